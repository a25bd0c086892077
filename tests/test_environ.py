"""No secret of the shell reaches user code unless the spec names it."""

from pathlib import Path

import pytest

from rftjax.workers.environ import worker_environment
from rftjax.workers.pool import WorkerError, Workers

SECRETS = {
    "OPENAI_API_KEY": "sk-abc",
    "HF_TOKEN": "hf_x",
    "DATABASE_URL": "postgres://me:word@host/db",
    "DB_PASSWORD": "hunter",
    "GOOGLE_APPLICATION_CREDENTIALS": "/",
    "SSH_AUTH_SOCK": "/tmp",
    "CANARY": "f3a9c2e1b7",
    "HTTPS_PROXY": "http://me:word@proxy:80",
    "CARD_PIN": "1234",
}
HARMLESS = {
    "PATH": "/bin:/usr/bin",
    "LC_ALL": "C.UTF-8",
    "PYTHONPATH": "/somewhere/else",
    "http_proxy": "http://proxy:80",
    "RETRIES": "3",
    "RATIO": "0.25",
    "KIND": "two_users",
    "EMPTY": "",
    "DATA_FOLDER": "/tmp",
}


def test_secrets_are_withheld_and_harmless_variables_pass():
    passed, withheld = worker_environment((), "scoring.env", SECRETS | HARMLESS)
    assert passed.items() >= HARMLESS.items()
    assert not SECRETS.keys() & passed.keys()
    assert withheld == sorted(SECRETS)


def test_a_variable_that_the_spec_names_passes_and_must_be_set():
    passed, _ = worker_environment(("HF_TOKEN",), "scoring.env", SECRETS)
    assert passed["HF_TOKEN"] == "hf_x"
    with pytest.raises(ValueError, match="scoring.env: NOT_SET must be set where the run is"):
        worker_environment(("NOT_SET",), "scoring.env", SECRETS)


def test_accelerators_are_hidden_unless_they_are_named():
    gpus = {"CUDA_VISIBLE_DEVICES": "1", "JAX_PLATFORMS": "cuda"}
    assert worker_environment((), "env", gpus)[0]["CUDA_VISIBLE_DEVICES"] == ""
    assert worker_environment((), "env", gpus)[0]["JAX_PLATFORMS"] == "cpu"
    assert worker_environment(tuple(gpus), "env", gpus)[0].items() >= gpus.items()


@pytest.mark.parametrize("at_import", [False, True])
@pytest.mark.parametrize(
    "lookup",
    [
        "key = os.environ['JUDGE_API_KEY']",
        "key = os.getenv('JUDGE_API_KEY')\n    if not key: raise OSError('set JUDGE_API_KEY')",
    ],
)
def test_user_code_that_misses_a_variable_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lookup: str, at_import: bool
):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-1")
    path = tmp_path / "judge.py"
    early = "\nlook()" if at_import else ""
    path.write_text(f"import os\ndef look():\n    {lookup}\n    return key{early}\nact = look\n")
    told = r"JUDGE_API_KEY is withheld from user code: add it by scoring.env=\('JUDGE_API_KEY',\)"
    if at_import:
        with pytest.raises(ValueError, match=told):
            Workers(f"{path}:act", 1, 5.0, env_field="scoring.env")
    else:
        with (
            Workers(f"{path}:act", 1, 5.0, env_field="scoring.env") as pool,
            pytest.raises(WorkerError, match=told),
        ):
            pool.submit().result(10)
    with Workers(f"{path}:act", 1, 5.0, env=("JUDGE_API_KEY",)) as pool:
        assert pool.submit().result(10) == "sk-1"
