"""How a metric is merged over micro-batches and over updates: one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rule(NamedTuple):
    """How a metric is merged: mean, sum, min, max, or tokens (a mean weighted by trained tokens).

    `blank` is its value where nothing has a trained token.
    """

    micro_batches: str = "tokens"
    updates: str = "mean"
    blank: float = 0.0


DEFAULT = Rule()
RULES = {
    "tokens": Rule("sum"),
    "loss": Rule("sum"),
    "ratio/min": Rule("min", "min", 1.0),
    "ratio/max": Rule("max", "max", 1.0),
    "ratio/mean": Rule("tokens", "mean", 1.0),
    # A property of the policy that sampled: the same in every pass over the minibatches.
    "sampler/logprob_diff_mean": Rule("tokens", "tokens"),
    "sampler/logprob_diff_max": Rule("max", "max"),
}


def merge_micro_batches(metrics_N: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns an update's metrics from the stacked ones of its micro-batches, `tokens` among them.

    Micro-batches without trained tokens are left out.
    """
    tokens_N = metrics_N["tokens"]
    return {
        name: _merge(jnp, rule_of(name).micro_batches, value_N, tokens_N, rule_of(name).blank)
        for name, value_N in metrics_N.items()
    }


def merge_updates(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns a step's metrics from those of its updates, each with `tokens`."""
    tokens_N = np.asarray([metrics["tokens"] for metrics in updates], np.float64)
    merged = {}
    for name in updates[0]:
        value_N = np.asarray([metrics[name] for metrics in updates], np.float64)
        rule = rule_of(name)
        merged[name] = float(_merge(np, rule.updates, value_N, tokens_N, rule.blank))
    return merged


def blank(names: Sequence[str]) -> dict[str, float]:
    """Returns the metrics of a step without any token to train on."""
    return {name: rule_of(name).blank for name in names}


def rule_of(name: str) -> Rule:
    """Returns the metric's rule."""
    return RULES.get(name, DEFAULT)


def _merge(xp: Any, how: str, value_N: Any, tokens_N: Any, blank: float) -> Any:
    some_N = tokens_N > 0
    if how == "sum":
        return xp.sum(xp.where(some_N, value_N, 0))
    if how == "mean":
        merged = xp.sum(xp.where(some_N, value_N, 0)) / xp.maximum(xp.sum(some_N), 1)
    elif how == "min":
        merged = xp.min(xp.where(some_N, value_N, xp.inf))
    elif how == "max":
        merged = xp.max(xp.where(some_N, value_N, -xp.inf))
    else:
        assert how == "tokens", how
        total = xp.sum(xp.where(some_N, value_N * tokens_N, 0))
        merged = total / xp.maximum(xp.sum(tokens_N), 1)
    return xp.where(xp.any(some_N), merged, blank)
