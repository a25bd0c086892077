"""What an evaluator cannot score leaves its group with a reason, and too much of it stops the run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rftjax.scoring import EvaluatorError, Scorer, answered, error_share
from rftjax.types import Score, Sequence, Task, Trajectory

EVALUATOR = """
import asyncio, decimal, fractions, functools, os, random, subprocess, sys, time
import numpy
from rftjax.types import Score

class Number:
    ndim = 0
    def item(self):
        return 0.25

VALUES = {
    "half": 0.5, "one": 1, "true": True, "scalar": Number(), "none": None, "nan": float("nan"),
    "inf": float("inf"), "text": "1.0", "list": [1.0], "huge": 10**400, "class": Score,
    "large": 1e39, "large_part": Score(1.0, {"a": -1e39}), "largest": 3.4e38,
    "score": Score(0.75, {"format": 1, "answer": Number()}),
    "nan_score": Score(float("nan")), "text_score": Score("1"), "none_part": Score(1.0, {"a": None}),
    "nan_part": Score(1.0, {"a": float("nan")}), "list_parts": Score(1.0, [1.0]),
    "number_part_name": Score(1.0, {1: 1.0}), "none_valid": Score(1.0, valid=None),
    "metrics": Score(1.0, {"form": 1}, metrics={"words": 12, "share": Number()}),
    "nan_metric": Score(1.0, metrics={"a": float("nan")}), "list_metrics": Score(1.0, metrics=[1.0]),
    "tuple": (1.0, {}), "dict": {"reward": 1.0}, "numpy": numpy.float32(0.25), "numpy_bool": numpy.True_,
    "array": numpy.ones(1), "fraction": fractions.Fraction(1, 4), "decimal": decimal.Decimal("0.25"),
    "complex": 1j, "numpy_valid": Score(0.25, valid=numpy.True_, reason=None),
    "invalid": Score(float("nan"), valid=False, reason="the judge was down"),
}

def evaluate(task, trajectory):
    what = trajectory.completion
    if what == "raise":
        raise RuntimeError("no such answer")
    if what == "loop":
        while True:
            pass
    if what == "exit":
        os._exit(0)
    if what == "child":
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)
    if what == "output":
        for _ in range(1024):
            os.write(1, bytes(2**20))
        return 0.5
    if what == "count":
        with open(task.data["path"], "a") as file:
            file.write("x")
        return 1.0
    if what == "random":
        return random.random()
    if what == "numpy_random":
        return numpy.random.random()
    if what == "data":
        assert task == trajectory.task
        return task.data["value"] + len(trajectory.sequences) + trajectory.turns
    return VALUES[what]

async def evaluate_async(task, trajectory):
    if trajectory.completion == "loop":
        await asyncio.sleep(1000)
    await asyncio.sleep(0.01)
    return evaluate(task, trajectory)

class Judge:
    async def __call__(self, task, trajectory):
        return await evaluate_async(task, trajectory)

judge = Judge()

def returns_coroutine(task, trajectory):
    return evaluate_async(task, trajectory)

def one_argument(trajectory):
    return 1.0

def star(*args, **options):
    return evaluate(*args)

def more(task, trajectory, scale=1.0):
    return evaluate(task, trajectory)

def swapped(trajectory, task):
    return 1.0

def three(task, trajectory, scale):
    return 1.0

class Fine:
    def __init__(self, value=0.5):
        self.value = value
    def __call__(self, task, trajectory):
        return self.value

class Needy(Fine):
    def __init__(self, value):
        self.value = value

class Record:
    pass

part = functools.partial(three, scale=2.0)
async_part = functools.partial(evaluate_async)
method = Judge().__call__
"""


@pytest.fixture(scope="module")
def user_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "reward.py"
    path.write_text(EVALUATOR)
    return path


@pytest.fixture(scope="module")
def scorer(user_file: Path):
    with Scorer(f"{user_file}:evaluate", workers=1, timeout_s=0.5) as scorer:
        yield scorer


def trajectory(completion: str, sample: int = 0, **fields: Any) -> Trajectory:
    task = Task("row-1", [{"role": "user", "content": "?"}], {"value": 2.0})
    messages = [*task.messages, {"role": "assistant", "content": completion}]
    return Trajectory(task, 3, sample, messages, finish_reason="stop", **fields)


def score_of(scorer: Scorer, completion: str) -> Score:
    (score,) = scorer.gather([trajectory(completion)])
    return score


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("half", 0.5),
        ("one", 1.0),
        ("true", 1.0),
        ("scalar", 0.25),
        ("numpy", 0.25),
        ("numpy_bool", 1.0),
        ("fraction", 0.25),
        ("decimal", 0.25),
        ("numpy_valid", 0.25),
    ],
)
def test_a_number_is_a_reward(scorer: Scorer, completion: str, reward: float):
    score = score_of(scorer, completion)
    assert score == Score(reward)
    assert type(score.reward) is float


def test_a_score_keeps_its_parts_as_plain_numbers(scorer: Scorer):
    score = score_of(scorer, "score")
    assert score == Score(0.75, {"format": 1.0, "answer": 0.25})
    assert {type(part) for part in score.parts.values()} == {float}


def test_a_score_keeps_numbers_that_are_only_recorded(scorer: Scorer):
    score = score_of(scorer, "metrics")
    assert (score.parts, score.metrics) == ({"form": 1.0}, {"words": 12.0, "share": 0.25})


@pytest.mark.parametrize("name", ["star", "more", "part", "Fine", "async_part", "method"])
def test_whatever_takes_task_and_trajectory_is_an_evaluator(user_file: Path, name: str):
    with Scorer(f"{user_file}:{name}", workers=1) as scorer:
        assert scorer.gather([trajectory("half")])[0].valid


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("swapped", "the other way round"),
        ("three", "missing a required argument: 'scale'"),
        ("Needy", "the class Needy is made without arguments, but missing a required argument"),
        ("Record", "Record is a class whose objects cannot be called"),
    ],
)
def test_what_does_not_is_refused_at_the_start(user_file: Path, name: str, fault: str):
    with pytest.raises(ValueError, match=fault):
        Scorer(f"{user_file}:{name}", workers=1)


def test_the_largest_rewards_that_float32_holds_are_valid(scorer: Scorer):
    assert score_of(scorer, "largest") == Score(3.4e38)


def test_an_evaluator_sees_task_and_trajectory(scorer: Scorer):
    (score,) = scorer.gather([trajectory("data", turn_rewards=[0.0, 0.0, 0.0])])
    assert score == Score(2.0 + 0 + 3)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("none", "must be a number, not NoneType; return one on every path"),
        ("tuple", "must be a number, not tuple; return Score(reward, parts={...})"),
        ("dict", "must be a number, not dict; return Score(reward"),
        ("array", "must be a number, not ndarray of shape (1,)"),
        ("complex", "must be a number, not complex"),
        ("nan_metric", "Score.metrics['a'] must be finite"),
        ("list_metrics", "Score.metrics must be a dict"),
        ("text", "must be a number, not str"),
        ("list", "must be a number, not list"),
        ("class", "must be a number, not type"),
        ("nan", "must be finite, not nan"),
        ("inf", "must be finite, not inf"),
        ("huge", "must be finite"),
        ("large", "must be finite in float32, not 1e+39"),
        ("large_part", "Score.parts['a'] must be finite in float32, not -1e+39"),
        ("nan_score", "Score.reward must be finite"),
        ("text_score", "Score.reward must be a number"),
        ("none_part", "Score.parts['a'] must be a number"),
        ("nan_part", "Score.parts['a'] must be finite"),
        ("list_parts", "Score.parts must be a dict"),
        ("number_part_name", "Score.parts must be a dict of names"),
        ("none_valid", "Score.valid must be a bool"),
        ("invalid", "the judge was down"),
        ("raise", "RuntimeError: no such answer (reward.py:"),
        ("unknown", "KeyError: 'unknown'"),
        ("loop", "overran the time limit of 0.5 s (scoring.timeout_s)"),
        ("exit", "the worker process died (exit status 0)"),
        ("child", "overran the time limit"),
    ],
)
def test_a_fault_makes_the_sample_invalid_and_the_next_is_scored(
    scorer: Scorer, completion: str, reason: str
):
    bad, good = trajectory(completion), trajectory("half")
    scores = scorer.gather([bad, good])
    assert (scores[0].valid, scores[0].reward, scores[0].parts) == (False, 0.0, {})
    assert reason in scores[0].reason
    assert scores[1] == Score(0.5)
    assert [bad.score, good.score] == scores


def test_a_gigabyte_of_output_is_no_fault(user_file: Path):
    with Scorer(f"{user_file}:evaluate", workers=1, timeout_s=30.0) as scorer:
        assert score_of(scorer, "output") == Score(0.5)


def test_scores_come_in_the_order_asked_for_whatever_was_submitted_first(scorer: Scorer):
    names = ["half", "one", "score", "scalar"]
    trajectories = [trajectory(name) for name in names]
    for one in reversed(trajectories[1:]):
        scorer.submit(one)
        scorer.submit(one)
    assert [score.reward for score in scorer.gather(trajectories)] == [0.5, 1.0, 0.75, 0.25]


def test_a_trajectory_submitted_twice_is_evaluated_once(scorer: Scorer, tmp_path: Path):
    one = trajectory("count")
    one.task.data["path"] = str(tmp_path / "runs")
    scorer.submit(one)
    scorer.submit(one)
    assert scorer.gather([one, one]) == [Score(1.0)] * 2
    assert score_of(scorer, "half") == Score(0.5)
    assert (tmp_path / "runs").read_text() == "x"


def test_equal_draws_of_two_streams_are_scored_apart(scorer: Scorer):
    train, heldout = trajectory("half"), trajectory("one")
    assert (train.draw, train.sample) == (heldout.draw, heldout.sample)
    scorer.submit(train)
    scorer.submit(heldout)
    assert [score.reward for score in scorer.gather([heldout, train])] == [1.0, 0.5]


def test_a_failed_environment_is_invalid_without_a_call(scorer: Scorer):
    failed = trajectory("one")
    failed.finish_reason, failed.error = "error", "the game crashed"
    assert scorer.gather([failed]) == [
        Score(0.0, valid=False, reason="environment: the game crashed")
    ]


def test_samples_without_an_answer_are_invalid_by_their_own_reason_and_no_fault(scorer: Scorer):
    silent, failed, good = (trajectory("one") for _ in range(3))
    for one in (silent, failed):
        one.sequences.append(Sequence([1, 2], [False] * 2, [0.0] * 2, [-1] * 2))
    failed.finish_reason, failed.error = "error", "the game crashed"
    reasons = [score.reason for score in scorer.gather([silent, failed, good])]
    assert reasons[0].startswith("nothing was sampled")
    assert reasons[1:] == ["environment: the game crashed", ""]
    unscored = trajectory("one")
    assert answered([silent, failed, good, unscored]) == [failed.score, good.score]


@pytest.mark.parametrize("name", ["random", "numpy_random"])
def test_random_rewards_repeat_for_a_sample_and_differ_between_samples(
    scorer: Scorer, user_file: Path, name: str
):
    trajectories = [trajectory(name, sample) for sample in range(4)]
    first = [score.reward for score in scorer.gather(trajectories)]
    assert len(set(first)) == 4
    assert [score.reward for score in scorer.gather(trajectories[::-1])] == first[::-1]
    others = [trajectory(name, sample) for sample in range(4)]
    for one in others:  # of another draw of the same task
        one.draw += 1
    assert not set(first) & {score.reward for score in scorer.gather(others)}
    with Scorer(f"{user_file}:evaluate", workers=1, seed=1) as other:
        assert first[0] not in [score.reward for score in other.gather(trajectories)]


@pytest.mark.parametrize("name", ["evaluate_async", "judge", "returns_coroutine"])
def test_asynchronous_evaluators_give_scores_and_faults(user_file: Path, name: str):
    with Scorer(f"{user_file}:{name}", workers=1, timeout_s=0.5) as scorer:
        scores = scorer.gather([trajectory(what) for what in ("half", "nan", "loop", "score")])
    assert [score.valid for score in scores] == [True, False, False, True]
    assert [scores[0].reward, scores[3].reward] == [0.5, 0.75]
    assert "must be finite" in scores[1].reason
    assert "overran" in scores[2].reason


def test_without_an_evaluator_the_turn_rewards_are_summed():
    with Scorer("") as scorer:
        scores = scorer.gather(
            [
                trajectory("x", turn_rewards=[0.5, 0.25]),
                trajectory("x", turn_rewards=[float("nan")]),
            ]
        )
    assert scores[0] == Score(0.75)
    assert not scores[1].valid


def test_too_many_faults_stop_with_share_limit_and_reasons(scorer: Scorer):
    good, bad = Score(1.0), ["raise", "raise", "raise", "none", "none", "nan", "text"]
    scores = scorer.gather([trajectory(name) for name in bad]) + [good] * 13
    assert error_share(scores) == 0.35
    with pytest.raises(EvaluatorError) as caught:
        scorer.check(scores)
    message = str(caught.value)
    for part in (
        "7 of 20 samples (35.0%)",
        "scoring.max_error_share=0.25",
        "3 x RuntimeError: no such answer",
        "2 x ValueError: the evaluator's result must be a number, not NoneType",
        "Traceback (most recent call last)",
    ):
        assert part in message
    assert "1 x 1 other reasons" in message and message.count(" x ") == 4


def test_the_full_text_of_a_fault_is_that_of_the_step_which_is_checked(scorer: Scorer):
    (score,) = scorer.gather([trajectory("raise")])
    scorer.check([score, *[Score(1.0)] * 3])
    with pytest.raises(EvaluatorError) as caught:
        scorer.check([score])
    assert score.reason in str(caught.value) and "Traceback" not in str(caught.value)


def test_faults_up_to_the_limit_are_let_pass(scorer: Scorer):
    scorer.check([Score(0.0, valid=False, reason="r")] + [Score(1.0)] * 3)
    scorer.check([])


def test_a_sample_lost_by_another_s_fault_is_left_out_and_is_no_fault_of_the_evaluator(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
):
    lost, fine = trajectory("half"), trajectory("half", 1)
    lost.bystander, lost.finish_reason, lost.error = True, "error", "the worker died"
    scores = scorer.gather([lost, fine])
    assert [score.valid for score in scores] == [False, True]
    assert answered([lost, fine]) == scores[1:]
    scorer.check(answered([lost, fine]))


def test_a_bystander_s_error_marks_the_trajectory(tmp_path: Path):
    (tmp_path / "reward.py").write_text(
        "import os\ndef evaluate(task, trajectory):\n    os._exit(3)\n"
    )
    one = trajectory("x")
    with Scorer(f"{tmp_path}/reward.py:evaluate", workers=1) as scorer:
        scorer.gather([one])
        assert not one.bystander  # its own fault
        two = trajectory("x")
        scorer.submit(two)
    assert scorer.gather([two])[0].valid is False
    assert two.bystander  # the workers were closed


def test_a_fault_in_the_result_names_no_file_of_this_package(scorer: Scorer):
    (score,) = scorer.gather([trajectory("nan")])
    assert ".py" not in score.reason


def test_an_evaluator_that_cannot_be_called_is_refused_at_the_start(user_file: Path):
    with pytest.raises(ValueError, match=r"evaluate\(task, trajectory\).*too many positional"):
        Scorer(f"{user_file}:one_argument", workers=1)
    with pytest.raises(ValueError, match="evaluator='missing.py:evaluate'"):
        Scorer("missing.py:evaluate", workers=1)


def test_what_worker_processes_import_pulls_in_no_heavy_library():
    names = "scoring, types, tasks, environments, workers, evaluators, evaluators.number, monitor.reasons"
    code = f"import sys, {', '.join(f'rftjax.{name}' for name in names.split(', '))}\n"
    code += "heavy = {'jax', 'flax', 'datasets', 'pydantic', 'transformers', 'tensorboard'}\n"
    code += "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
