import json
import logging
import threading

import pytest

from rftjax.errors import UserError
from rftjax.monitor import loggers
from rftjax.monitor.loggers import Loggers, open_loggers

FIELDS = {"seed": 0, "optim.lr": 1e-3, "eval.pass_k": (1, 4), "evaluator": "a:b", "export": True}


class Kept:
    """A service that keeps what it gets."""

    def __init__(self):
        self.lines, self.closed = [], False

    def log(self, step, metrics):
        self.lines.append((step, metrics))

    def close(self):
        self.closed = True


def two_halves(name, workdir):
    """Logs a run in two parts, as a resume does; returns its identities in both."""
    identities = []
    for steps in ((1, 2), (3, 4)):
        found = open_loggers((name,), workdir, FIELDS, project="tests", name="half")
        for step in steps:
            found.log(step, {"reward/mean": step / 10, "loss": None})
        found.close()
        identities.append(json.loads((workdir / "loggers.json").read_text())[name])
    return identities


def test_services_get_every_line_and_a_faulty_one_stops_no_other(caplog):
    good = Kept()

    class Bad(Kept):
        def log(self, step, metrics):
            raise ConnectionError("no network")

    with caplog.at_level(logging.WARNING):
        both = Loggers({"bad": Bad, "good": lambda: good})
        for step in range(3):
            both.log(step, {"loss": 1.0, "reward/mean": None})
        both.close()
        both.close()
    assert good.lines == [(step, {"loss": 1.0}) for step in range(3)] and good.closed
    assert caplog.text.count("bad failed and gets no more metrics") == 1
    assert "ConnectionError: no network" in caplog.text


def test_a_service_that_cannot_connect_or_hangs_holds_nothing_up(caplog, monkeypatch):
    monkeypatch.setattr(loggers, "CLOSE_S", 0.1)
    monkeypatch.setattr(loggers, "WAITING", 2)
    forever = threading.Event()

    def refused():
        raise SystemExit("log in first")

    with caplog.at_level(logging.WARNING):
        both = Loggers({"refused": refused, "hangs": forever.wait})
        for step in range(9):
            both.log(step, {"loss": 1.0})
        both.close()
    forever.set()
    assert "refused failed" in caplog.text and "log in first" in caplog.text
    assert "hangs takes no metrics" in caplog.text and "hangs does not end" in caplog.text


def test_a_missing_package_is_told_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rftjax\[wandb\]'"):
        open_loggers(("wandb",), tmp_path, {}, project="p", name="")


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, second = two_halves("wandb", tmp_path)
    assert first == second
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*{first}/*.wandb"))) == 2


def test_mlflow_goes_on_with_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first, second = two_halves("mlflow", tmp_path)
    assert first == second
    client = mlflow.MlflowClient(f"file://{tmp_path / 'mlflow'}")
    history = client.get_metric_history(first, "reward/mean")
    assert [(one.step, one.value) for one in history] == [(n, n / 10) for n in (1, 2, 3, 4)]
    run = client.get_run(first)
    assert run.data.params["optim.lr"] == "0.001" and run.info.status == "FINISHED"


def test_trackio_goes_on_with_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    first, second = two_halves("trackio", tmp_path)
    assert first == second == "half"
    found = SQLiteStorage.get_logs("tests", "half")
    assert [(one["step"], one["reward/mean"]) for one in found] == [(n, n / 10) for n in (1, 2, 3, 4)]  # fmt: skip
