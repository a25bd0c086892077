import jax.numpy as jnp
import numpy as np
import pytest

from rftjax.learning import merging


def test_each_metric_of_micro_batches_is_merged_by_its_rule_and_empty_ones_say_nothing():
    tokens = [3.0, 0.0, 1.0]
    values = {
        "tokens": (tokens, 4.0),
        "loss": ([1.0, 0.0, 3.0], 4.0),
        "entropy": ([1.0, np.nan, 3.0], 1.5),
        "ratio/min": ([0.9, 0.1, 0.8], 0.8),
        "ratio/max": ([1.1, 9.0, 1.2], 1.2),
        "sampler/logprob_diff_mean": ([0.1, 9.0, 0.5], 0.2),
        "sampler/logprob_diff_max": ([0.3, 9.0, 0.7], 0.7),
    }
    found = merging.merge_micro_batches({k: jnp.asarray(v) for k, (v, _) in values.items()})
    for name, (_, wanted) in values.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6, err_msg=name)


def test_metrics_of_several_updates_are_means_extremes_and_of_all_samples():
    names = ("tokens", "loss", "ratio/max", "ratio/min", "sampler/logprob_diff_mean")
    names += ("sampler/logprob_diff_max",)
    made = [
        dict(zip(names, (30.0, 1.0, 1.0, 1.0, 0.1, 0.4), strict=True)),
        dict(zip(names, (10.0, 3.0, 1.5, 0.5, 0.3, 0.2), strict=True)),
    ]
    wanted = dict(zip(names, (20.0, 2.0, 1.5, 0.5, 0.15, 0.4), strict=True))
    assert merging.merge_updates(made) == pytest.approx(wanted)


def test_where_nothing_is_trained_on_ratios_are_1_and_all_else_0():
    names = ["tokens", "loss", "ratio/min", "ratio/max", "ratio/mean", "entropy"]
    blank = merging.blank(names)
    assert list(blank.values()) == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert merging.merge_updates([blank, blank]) == blank
