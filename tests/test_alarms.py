import pytest

from rftjax import alarms


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
FALLS = [None, None, 0.5, None, None, 0.6, None, None, None, 0.4]


def test_a_healthy_run_has_no_alarm():
    lines = lines_of(
        reward__mean=RISING,
        eval__reward=[None if step % 3 else step / 10 for step in range(10)],
        rollout__completion_tokens_mean=20.0,
        rollout__duplicate_share=0.1,
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
        ("duplicates", {"rollout__duplicate_share": 0.7}, "duplicate_share"),
        (
            "part_without_the_rest",
            {"reward__part__format": 1.0, "reward__part__right": RISING[::-1]},
            "part_fall",
        ),
        ("sampler_differs", {"sampler__logprob_diff_mean": 0.2}, "logprob_diff"),
    ],
)
def test_each_fault_raises_its_alarm_which_0_switches_off(name, series, off):
    lines = lines_of(**series)
    assert set(alarms.find(lines)) == {name}
    assert alarms.find(lines, **{off: 0.0}) == {}


def test_a_heldout_reward_that_falls_with_the_training_reward_is_no_alarm():
    assert alarms.find(lines_of(reward__mean=RISING[::-1], eval__reward=FALLS)) == {}


def test_a_plateau_ends_a_run_and_a_new_best_does_not():
    def reason(values, patience=2):
        lines = lines_of(len(values), eval__reward=values)
        return alarms.stop_reason(lines, metric="eval/reward", patience=patience)

    assert "eval.patience" in reason([0.1, 0.5, 0.4, 0.5])
    assert not reason([0.1, 0.5, 0.4, 0.6])
    assert not reason([0.5, 0.4])
    assert not reason([0.1, 0.5, 0.4, 0.5], patience=0)


def test_steps_without_variance_end_a_run():
    lines = lines_of(4, groups__zero_variance_share=[0.5, 1.0, 1.0, 1.0])
    assert "eval.dead_steps" in alarms.stop_reason(lines, metric="x", dead_steps=3)
    assert not alarms.stop_reason(lines, metric="x", dead_steps=4)
    assert not alarms.stop_reason(lines, metric="x")
