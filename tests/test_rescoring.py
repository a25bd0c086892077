"""Recorded conversations are scored without a model, and what is suspicious in an evaluator is said."""

import codecs
import gzip
import json
import shutil
from pathlib import Path

import pytest

from rftjax import config as configs
from rftjax import modes
from rftjax.errors import UserError
from rftjax.monitor.rollouts import to_json, trajectory_record
from rftjax.run import judging, recorded, rescoring
from rftjax.run.build import load_tasks
from rftjax.scoring import Scorer
from rftjax.types import Score, Sequence, Task, Trajectory

EVALUATOR = """
import random

CALLS = random.SystemRandom()

def evaluate(task, trajectory):
    if "raise" in trajectory.completion:
        raise RuntimeError("a hard one")
    return 0.5 + 0.5 * (task.data["answer"] == trajectory.completion)

def noisy(task, trajectory):
    return CALLS.random()

def flat(task, trajectory):
    return 0.25

def length(task, trajectory):
    return 1.0 / (1 + len(trajectory.completion))

def rank(task, trajectories):
    order = sorted(one.completion for one in trajectories)
    return [float(order.index(one.completion)) for one in trajectories]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    (folder / "reward.py").write_text(EVALUATOR)
    rows = [{"id": f"t{i}", "prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(map(to_json, rows)))
    return folder


def sampled(task: Task, draw: int, *answers: str) -> list[Trajectory]:
    found = []
    for at, text in enumerate(answers):
        messages = [*task.messages, {"role": "assistant", "content": text}]
        sequence = Sequence([1, 2], [False, True], [0.0, -1.0], [-1, 0])
        one = Trajectory(task, draw, at, messages, [sequence], [0.0], finish_reason="stop")
        one.score = Score(float(at)) if text != "lost" else Score(0.0, valid=False, reason="r")
        found.append(one)
    return found


@pytest.fixture(scope="module")
def workdir(folder: Path) -> Path:
    """A run's rollouts of two steps, whose tasks the config names."""
    workdir = folder / "run"
    (workdir / "rollouts").mkdir(parents=True)
    tasks = load_tasks(config(folder))[0]
    for step in (1, 2):
        ones = [
            *sampled(tasks[step], 0, "1", "2", "3"),
            *sampled(tasks[0], 1, "raise", "1", "lost"),
        ]
        lines = (to_json(trajectory_record(step, one)) for one in ones)
        (workdir / "rollouts" / f"step_{step:06d}.jsonl").write_text("".join(lines))
    return workdir


def config(folder: Path, evaluator: str = "evaluate"):
    found = configs.base_config()
    found.evaluator = f"{folder}/reward.py:{evaluator}"
    found.tasks.train = str(folder / "rows.jsonl")
    found.scoring.workers = 1
    return found


def test_rollouts_are_scored_with_their_rows_and_kept_beside_what_was_recorded(
    folder, workdir, capsys
):
    modes.run("score", config(folder), {}, workdir)
    text = capsys.readouterr().out
    (report,) = (json.loads(one.read_text()) for one in (workdir / "scores").glob("run.json"))
    kept = [json.loads(line) for line in (workdir / "scores/run.jsonl").read_text().splitlines()]
    assert "12 samples in 4 groups" in text and "evaluator   evaluate" in text
    assert (report["samples"], report["groups"], report["failures"]) == (12, 4, 2)
    assert report["reasons"] == ["2 x RuntimeError: a hard one (reward.py:8)"]
    assert [one["reward"] for one in kept[:3]] == [0.5, 1.0, 0.5]  # 1 + 1 =
    assert [one["recorded_reward"] for one in kept[:6]] == [0.0, 1.0, 2.0, 0.0, 1.0, None]
    assert kept[0]["data"] == {"id": "t1", "answer": "2"}
    assert report["reward"]["max"] == 1.0 and sum(report["histogram"]["counts"]) == 10
    assert report["spread"]["zero_variance_share"] == 0.0
    assert report["seconds_a_call"]["max"] > 0.0
    assert "where it differs most" in text
    # A second score is compared with the first and replaces nothing.
    again = str(workdir / "scores/run.jsonl")
    modes.run("score", config(folder), {}, folder / "other", rollouts=again)
    report = json.loads((folder / "other/scores/run.json").read_text())
    assert report["agreement"]["equal_share"] == report["agreement"]["correlation"] == 1.0
    modes.run("score", config(folder), {}, folder / "other", rollouts=again)
    assert (folder / "other/scores/run-2.json").exists()


@pytest.mark.parametrize("place", ["", "rollouts", "rollouts/step_000001.jsonl"])
def test_rollouts_of_a_run_are_scored_elsewhere_with_that_runs_rows(
    folder, workdir, tmp_path, place, capsys
):
    shutil.copytree(workdir / "rollouts", tmp_path / "run/rollouts")
    (tmp_path / "run/checkpoints/2").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text(configs.to_json(config(folder)))
    given = config(folder)
    given.tasks.train = ""
    modes.run("score", given, {}, tmp_path / "other", rollouts=str(tmp_path / "run" / place))
    assert "KeyError: 'answer'" not in capsys.readouterr().out
    (report,) = (json.loads(one.read_text()) for one in (tmp_path / "other/scores").glob("*.json"))
    assert report["failures"] == report["samples"] // 6  # those that raise


def test_agreement_counts_the_pairs_of_a_group_in_the_same_order(folder, workdir, tmp_path):
    modes.run("score", config(folder, "rank"), {}, tmp_path, rollouts=str(workdir))
    report = json.loads((tmp_path / "scores/run.json").read_text())
    # "1" < "2" < "3" as recorded; "1" < "raise" against it, and "lost" has no recorded reward.
    assert report["agreement"]["order_share"] == pytest.approx(6 / 8)
    assert report["agreement"]["samples"] == 10


def test_conversations_of_anything_are_read(tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "completion": "b", "answer": "b", "reward": 0.5},
        {"prompt": [{"role": "user", "content": "a"}], "completion": "c", "id": "x", "draw": 7},
        {"prompt": [{"role": "user", "content": "a"}], "completion": "d", "id": "x", "draw": 7},
    ]
    (tmp_path / "said.jsonl").write_text("".join(map(to_json, lines)))
    found = recorded.read(recorded.files(tmp_path / "said.jsonl"), {})
    assert [one.completion for one in found] == ["b", "b", "c", "d"]
    assert [(one.draw, one.sample) for one in found] == [(0, 0), (1, 0), (2, 0), (2, 1)]
    assert [one.score.reward if one.score else None for one in found] == [None, 0.5, None, None]
    assert (found[1].task.prompt, found[1].task.data) == ("a", {"answer": "b"})
    assert (found[2].task.id, found[2].task.data) == ("x", {"id": "x"})


def test_lines_that_are_no_conversation_are_listed_with_their_place(tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"text": 1}\n[]\n{"messages": [{"role": "user"}]}\n')
    with pytest.raises(UserError) as caught:
        recorded.read(recorded.files(tmp_path / "odd.jsonl"), {})
    assert str(caught.value).count("odd.jsonl:") == 3 and "no message of the assi" in str(
        caught.value
    )
    with pytest.raises(UserError, match="--rollouts=.*there is nothing"):
        recorded.files(tmp_path / "none")


def found_in(folder: Path, name: str, trajectories: list[Trajectory], **kwargs) -> str:
    with Scorer(f"{folder}/reward.py:{name}", workers=1) as scorer:
        scorer.gather(trajectories)
        return "\n".join(judging.findings(scorer, trajectories, **kwargs))


def samples(folder: Path, *answers: str) -> list[Trajectory]:
    tasks = load_tasks(config(folder))[0]
    return [one for draw, task in enumerate(tasks) for one in sampled(task, draw, *answers)]


def test_a_file_of_anything_is_read_or_refused_by_line(tmp_path):
    line = json.dumps({"prompt": "q", "completion": "é"}, ensure_ascii=False)
    path = tmp_path / "said.jsonl"
    path.write_bytes(gzip.compress(codecs.BOM_UTF8 + f"\n{line}\r\n".encode()))  # as it is named
    assert [one.completion for one in recorded.read([path], {})] == ["é"]
    torn = {"messages": ["q"]}, {"prompt": "q", "completion": "a", "draw": "x"}
    path.write_text("\n".join(["{", *map(json.dumps, torn)]))
    config = configs.base_config()
    config.evaluator = "not:called"
    with pytest.raises(UserError) as told:
        rescoring.score(config, tmp_path, path)
    for number, rule in (
        (1, "is not valid JSON"),
        (2, "lists of messages"),
        (3, "draw: must be a"),
    ):
        assert f"{path}:{number}: " in str(told.value) and rule in str(told.value)
    for data, rule in ((b"\n", "holds no conversation"), (gzip.compress(b"{}" * 9)[:15], "torn")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rule):
            recorded.read([path], {})


def test_an_evaluator_without_a_fault_is_not_suspicious(folder):
    assert found_in(folder, "evaluate", samples(folder, "1", "2", "3", "4")) == ""


def test_scores_that_never_vary_are_told(folder):
    found = found_in(folder, "flat", samples(folder, "1", "2"))
    assert "the score is 0.25 for all of 8 samples" in found and found.count("\n") == 0


def test_calls_that_disagree_are_told(folder):
    found = found_in(folder, "noisy", samples(folder, "1", "2"))
    assert "two calls disagree on 8 of 8 samples" in found


def test_an_empty_answer_that_wins_is_told_except_in_conversations_with_an_environment(folder):
    found = found_in(folder, "length", samples(folder, "1 2 3", "a long answer"))
    assert "an empty answer to 4 tasks scores 1 on average, the samples 0.1" in found
    assert found_in(folder, "length", samples(folder, "1", "22"), conversations=True) == ""


def test_a_sample_s_answer_that_wins_everywhere_is_told(folder):
    answers = samples(folder, "1", "a")
    found = found_in(folder, "length", [*answers, *samples(folder, "12345678901234567890")])
    assert "an empty answer" in found and "the answer '1' to 4 tasks" in found


def test_a_place_without_rollouts_is_told_before_what_its_config_lacks(tmp_path):
    with pytest.raises(UserError, match="--rollouts=.*nowhere: must be a workdir with rollouts"):
        modes.run("score", configs.base_config(), {}, tmp_path / "nowhere")
