import re

import pytest

from rftjax import config as configs
from rftjax.config.fields import assign, flatten
from rftjax.monitor import alarms


def lines_of(count=10, **series):
    """Metrics of `count` steps: each series is a constant or one value a step; double underscores are slashes."""
    lines = [{"step": step} for step in range(1, count + 1)]
    for name, values in series.items():
        if not isinstance(values, list):
            values = [values] * count
        for line, value in zip(lines, values, strict=True):
            if value is not None:
                line[name.replace("__", "/")] = value
    return lines


RISING = [step / 10 for step in range(10)]
SAME = {"eval__commonest_share": 0.62, "eval__commonest_reward": 0.1}
FALLS = [None, None, 0.5, None, None, 0.6, None, None, None, 0.4]


def test_a_healthy_run_has_no_alarm():
    lines = lines_of(
        reward__mean=RISING,
        eval__reward=[None if step % 3 else step / 10 for step in range(10)],
        rollout__completion_tokens_mean=20.0,
        rollout__duplicate_wrong_share=0.1,
        rollout__truncated_share=0.3,
        entropy=[1.0] * 5 + [0.2] * 5,
        eval__commonest_share=0.4,
        eval__commonest_reward=0.0,
        reward__part__format=1.0,
        reward__part__right=RISING,
        sampler__logprob_diff_mean=1e-5,
    )
    for count in range(len(lines) + 1):
        assert alarms.find(lines[:count]) == {}


@pytest.mark.parametrize(
    "name, series, off",
    [
        ("heldout_falls", {"reward__mean": RISING, "eval__reward": FALLS}, "heldout_fall"),
        (
            "length_runs_away",
            {"rollout__completion_tokens_mean": [10.0] * 5 + [30.0] * 5},
            "length_factor",
        ),
        ("duplicates", {"rollout__duplicate_wrong_share": 0.7}, "duplicate_share"),
        (
            "part_without_the_rest",
            {"reward__part__format": 1.0, "reward__part__right": RISING[::-1]},
            "part_fall",
        ),
        ("sampler_differs", {"sampler__logprob_diff_mean": 0.2}, "logprob_diff"),
        ("entropy_collapses", {"entropy": [1.0] * 5 + [0.05] * 5}, "entropy_share"),
        ("truncation", {"rollout__truncated_share": 0.6}, "truncated_share"),
        ("truncation", {"rollout__truncated_share": [0.0] * 5 + [0.3] * 5}, "truncated_rise"),
        ("same_answer", SAME | {"reward__mean": 0.1, "reward__max": 1.0}, "same_answer_share"),
        (
            "same_answer",
            {name.replace("eval", "rollout"): x for name, x in SAME.items()},
            "same_answer_share",
        ),
    ],
)
def test_each_fault_raises_its_alarm_which_0_switches_off(name, series, off):
    lines = lines_of(**series)
    assert set(alarms.find(lines)) == {name}
    assert alarms.find(lines, **{off: 0.0}) == {}


def test_a_heldout_reward_that_falls_with_the_training_reward_is_no_alarm():
    assert alarms.find(lines_of(reward__mean=RISING[::-1], eval__reward=FALLS)) == {}
    assert alarms.find(lines_of(reward__mean=0.5, eval__reward=FALLS)) == {}


def test_a_heldout_reward_may_fall_from_that_of_the_start_and_by_the_threshold():
    lines = lines_of(4, reward__mean=[None, 0.1, 0.2, 0.3], eval__reward=[0.5, None, None, 0.25])
    assert set(alarms.find(lines, window=2, heldout_fall=0.24)) == {"heldout_falls"}
    assert not alarms.find(lines, window=2, heldout_fall=0.25)


def test_a_plateau_ends_a_run_and_a_new_best_does_not():
    def reason(values, patience=2):
        lines = lines_of(len(values), eval__reward=values)
        return alarms.stop_reason(lines, metric="eval/reward", patience=patience)

    assert "eval.patience" in reason([0.1, 0.5, 0.4, 0.5])
    assert not reason([0.1, 0.5, 0.4, 0.6])
    assert not reason([0.1, 0.5, 0.6, 0.5])
    assert not reason([0.5, 0.4])
    assert not reason([0.1, 0.5, 0.4, 0.5], patience=0)


def test_steps_without_variance_end_a_run():
    lines = lines_of(4, groups__zero_variance_share=[0.5, 1.0, 1.0, 1.0])
    assert "eval.dead_steps" in alarms.stop_reason(lines, metric="x", dead_steps=3)
    assert not alarms.stop_reason(lines, metric="x", dead_steps=4)
    assert not alarms.stop_reason(lines, metric="x")


def test_a_plateau_is_of_the_named_metric_and_counts_evaluations_that_gave_one():
    lines = lines_of(
        6, eval__reward=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], other=[1, None, 1, None, None, 1]
    )
    assert alarms.stop_reason(lines, metric="other", patience=2).startswith("other has not risen")
    assert not alarms.stop_reason(lines[:5], metric="other", patience=2)
    assert not alarms.stop_reason(lines, metric="eval/reward", patience=2)


def test_a_run_is_not_dead_before_it_had_the_steps():
    lines = lines_of(3, groups__zero_variance_share=[None, 1.0, 1.0])  # step 0 only evaluates
    assert not alarms.stop_reason(lines, metric="x", dead_steps=3)
    assert alarms.stop_reason(lines, metric="x", dead_steps=2)


TOKENS, COPIES = "rollout__completion_tokens_mean", "rollout__duplicate_wrong_share"
FORMAT, RIGHT, DIFF = "reward__part__format", "reward__part__right", "sampler__logprob_diff_mean"


@pytest.mark.parametrize(
    "name, quiet, loud",
    [
        # The mean of the first window against that of the last; 2.0 is not above 2.0.
        (
            "length_runs_away",
            {TOKENS: [8.0, 12.0, 90.0, 90.0, 90.0, 10.0, 30.0]},
            {TOKENS: [8.0, 12.0, 0.0, 0.0, 0.0, 10.0, 31.0]},
        ),
        (
            "duplicates",
            {COPIES: [0.9, 0.9, 0.9, 0.9, 0.9, 0.4, 0.6]},
            {COPIES: [0.0, 0.0, 0.0, 0.0, 0.0, 0.4, 0.7]},
        ),
        # A peak of one step is no fall of a mean, and before the last window the format may fail.
        (
            "part_without_the_rest",
            {FORMAT: [1.0] * 7, RIGHT: [0.5, 0.5, 0.6, 0.5, 0.5, 0.46, 0.46]},
            {FORMAT: [0.2] * 5 + [0.99, 0.99], RIGHT: [0.5, 0.5, 0.6, 0.5, 0.5, 0.4, 0.4]},
        ),
        (
            "part_without_the_rest",
            {FORMAT: [1.0] * 5 + [0.97, 1.0], RIGHT: [0.9] * 4 + [0.1] * 3},
            {FORMAT: [1.0] * 7, "reward__mean": [0.9] * 4 + [0.1] * 3},
        ),
        ("sampler_differs", {DIFF: [0.9] * 6 + [0.1]}, {DIFF: [0.0] * 6 + [0.11]}),
        # Below the best by 0.05, which is not above 0.05; then the best is not the first one.
        (
            "heldout_falls",
            {"reward__mean": RISING[:7], "eval__reward": [None, 0.5, None, 0.25, None, None, 0.45]},
            {"reward__mean": RISING[:7], "eval__reward": [None, 0.25, None, 0.5, None, None, 0.44]},
        ),
        # The training reward now against that when the held-out one was best: risen, not higher at some time.
        (
            "heldout_falls",
            {"reward__mean": [0.1, 0.8, 0.8, 0.9, 0.9, 0.7, 0.6], "eval__reward": [None, None, 0.5] + [0.1] * 4},
            {"reward__mean": [0.1, 0.1, 0.2, 0.9, 0.9, 0.7, 0.6], "eval__reward": [None, None, 0.5] + [0.1] * 4},
        ),
    ],
)  # fmt: skip
def test_an_alarm_is_of_its_window_and_above_its_threshold(name, quiet, loud):
    assert name not in alarms.find(lines_of(7, **quiet), window=2)
    assert name in alarms.find(lines_of(7, **loud), window=2)


def test_no_alarm_is_raised_before_its_windows_are_full():
    series = {TOKENS: [1.0, 1.0, 9.0], COPIES: 1.0, FORMAT: 1.0, RIGHT: [1.0, 0.5, 0.0]}
    assert not alarms.find(lines_of(3, **series), window=4)
    assert "length_runs_away" not in alarms.find(lines_of(3, **series), window=2)  # they overlap
    assert set(alarms.find(lines_of(3, **series), window=1)) == {
        *("length_runs_away", "duplicates", "part_without_the_rest")
    }


def test_a_policy_that_is_certain_of_the_best_answers_raises_no_alarm():
    best = {"reward__mean": 0.95, "reward__max": 1.0}
    certain = {"entropy": [1.0] * 5 + [0.01] * 5, "eval__commonest_share": 0.9}
    assert alarms.find(lines_of(**best, **certain, eval__commonest_reward=0.95)) == {}
    assert set(alarms.find(lines_of(**best, **certain, eval__commonest_reward=0.5))) == {
        "same_answer"
    }
    # Rewards below 0: -0.1 is near a best of 0.0 only where the mean was once far below.
    losses = {"entropy": [1.0] * 5 + [0.01] * 5, "reward__max": 0.0}
    assert alarms.find(lines_of(**losses, reward__mean=[-2.0] * 5 + [-0.1] * 5)) == {}
    assert alarms.find(lines_of(**losses, reward__mean=[-0.5] * 5 + [-0.4] * 5))


def test_truncation_is_told_after_two_steps_and_not_for_a_single_one():
    for values in ([0.79, 0.9], [0.79, 0.9, 1.0]):
        lines = lines_of(len(values), rollout__truncated_share=values)
        assert set(alarms.find(lines)) == {"truncation"}
    assert not alarms.find(lines_of(1, rollout__truncated_share=0.9))
    assert not alarms.find(lines_of(3, rollout__truncated_share=[0.9, 0.9, 0.1]))


def test_every_setting_that_an_alarm_advises_is_one_that_the_config_takes():
    fired = {}
    for series in (
        {"rollout__completion_tokens_mean": [10.0] * 5 + [30.0] * 5, "entropy": [1.0] + [0.0] * 9},
        {"rollout__duplicate_wrong_share": 0.7, "rollout__truncated_share": 0.9, **SAME},
        {"reward__mean": RISING, "eval__reward": FALLS, "sampler__logprob_diff_mean": 0.2},
        {"reward__part__format": 1.0, "reward__part__right": RISING[::-1]},
    ):
        fired |= alarms.find(lines_of(**series))
    assert len(fired) == 8
    known = flatten(configs.base_config())
    for text in fired.values():
        for field, value in re.findall(r"\b([a-z]+\.[a-z_]+)(?:=([\w.]+))?", text):
            assert field in known or field == "rftjax.compare", field
            if value:
                config = configs.base_config()
                kind = type(known[field]) if known[field] is not None else float
                with config.unlocked():
                    assign(config, field, kind(value))
                config.model.path = config.tasks.train = "a/b"
                config.evaluator = "module:name"
                configs.check(config)
