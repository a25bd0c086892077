"""Eval Protocol's evaluators run unchanged without the package, with the scores that they have under it."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from rftjax import tasks
from rftjax.evaluators.forms.form import ALL, GROUP, SAMPLE
from rftjax.evaluators.forms.load import load
from rftjax.scoring import Scorer
from rftjax.types import Task, Trajectory

REFERENCE = Path(__file__).parents[1] / "scripts" / "reference"
sys.path.insert(0, str(REFERENCE))
# It lies beside what it writes with the real package.
made = importlib.import_module("make_eval_protocol")

FILES = made.FOLDER
SCORES = json.loads((FILES / "scores.json").read_text())


@pytest.mark.parametrize("test", made.TESTS)
def test_scores_without_the_package_are_those_with_it(test):
    assert SCORES["package"].startswith("eval-protocol ")
    for text, found, wanted in zip(
        made.ANSWERS, made.measured(test), SCORES["scores"][test], strict=True
    ):
        assert found["valid"] == wanted["valid"], text
        assert found["reward"] == pytest.approx(wanted["reward"], abs=1e-12), text
        assert found["parts"] == pytest.approx(wanted["parts"], abs=1e-12), text
        assert found["metrics"] == wanted["metrics"], text


def test_the_reward_for_mathematics_reads_numbers_as_the_package_does():
    found = made.sum_scores()
    assert sum(score > 0 for score in SCORES["sums"]) > made.SUMS / 10
    for case, score, wanted in zip(made.sums(), found, SCORES["sums"], strict=True):
        assert score == pytest.approx(wanted, abs=1e-12), case


@pytest.mark.parametrize(
    ("test", "scope", "concurrent"),
    [
        ("pointwise.py:test_sums", SAMPLE, True),
        ("pointwise.py:test_words", SAMPLE, False),
        ("groups.py:test_shortest", GROUP, False),
        ("groups.py:test_against_the_mean", ALL, True),
    ],
)
def test_the_mode_says_what_a_call_gets(test, scope, concurrent):
    form = load(f"{FILES}/{test}")
    assert (form.scope, form.concurrent) == (scope, concurrent)


def test_a_score_that_is_not_valid_drops_the_sample_and_worker_processes_offer_the_stand_in():
    trajectories = made.trajectories()
    with Scorer(f"{FILES}/pointwise.py:test_sums", workers=1) as scorer:
        found = scorer.gather(trajectories)
    assert [one.valid for one in found] == [text != "I refuse to say." for text in made.ANSWERS]
    assert found[7].reason == "the answer is a refusal"
    assert found[1].reason == "a-model: 12" and found[1].metrics == {"step_rewards": 0.5}


def test_all_samples_that_are_scored_together_reach_one_call():
    trajectories = made.trajectories()[:3]
    for draw, one in enumerate(trajectories):
        one.draw = draw
    with Scorer(f"{FILES}/groups.py:test_against_the_mean", workers=1) as scorer:
        scorer.of_groups(1)(trajectories[1])
        found = scorer.gather([*trajectories, trajectories[2]])  # one of them twice
    assert [one.reward for one in found] == [1.0, 1.0, 0.0, 0.0]


def test_a_row_that_does_not_come_back_has_no_score(tmp_path):
    (tmp_path / "some.py").write_text(
        (FILES / "groups.py").read_text().replace("sorted(rows, key=length)", "rows[1:]")
    )
    with Scorer(f"{tmp_path}/some.py:test_shortest", workers=1) as scorer:
        found = scorer.gather(made.trajectories()[:2])
    assert [one.valid for one in found] == [False, True]
    assert "set no evaluation_result for this row" in found[0].reason


def test_the_dataset_adapter_is_the_mapping_of_the_rows(tmp_path):
    (tmp_path / "sums.jsonl").write_text('{"question": "2 + 2 =", "truth": "4"}\n')
    (task,) = tasks.read(str(tmp_path / "sums.jsonl"), map=f"{FILES}/pointwise.py:test_sums")
    assert task.messages == [{"role": "user", "content": "2 + 2 = Answer in <answer> tags."}]
    assert task.data == {"question": "2 + 2 =", "truth": "4"}
    answer = {"role": "assistant", "content": "<answer>4</answer>"}
    with Scorer(f"{FILES}/pointwise.py:test_sums", workers=1) as scorer:
        (score,) = scorer.gather([Trajectory(task, 0, 0, [*task.messages, answer])])
    assert score.reward == 1.0


def test_what_the_stand_in_has_not_is_named_with_the_package(tmp_path):
    (tmp_path / "math_eval.py").write_text(
        "from eval_protocol.rewards.lean_prover import lean_prover_reward\n"
    )
    with pytest.raises(ValueError, match="no module eval_protocol.rewards.lean_prover; install"):
        load(f"{tmp_path}/math_eval.py:f")


def test_an_installed_package_wins(tmp_path):
    (tmp_path / "eval_protocol.py").write_text("value = 0.25\n")
    (tmp_path / "own.py").write_text(
        "from eval_protocol import value\ndef evaluate(task, trajectory):\n    return value\n"
    )
    task = Task("t", [], {})
    with Scorer(f"{tmp_path}/own.py:evaluate", workers=1) as scorer:
        assert scorer.gather([Trajectory(task, 0, 0)])[0].reward == 0.25
