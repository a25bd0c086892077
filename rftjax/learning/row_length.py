"""Chooses the length of a packed row from what the groups of a job need and what a micro-batch may hold."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from rftjax.models import remat
from rftjax.models.config import Config, Stack

UNIT = 64  # tokens that a chosen length is a multiple of
ENOUGH = 512  # tokens of a row from which on products gain nothing by more of them
# Time of an update over that of one which computes nothing again: what lies between products, or a second forward pass.
COSTS = {remat.ALL: 1.0, remat.PRODUCTS: 1.05, remat.LAYER: 4 / 3}
SPARE = 16  # one part in so many more tokens may be computed to have shorter rows


class Group(NamedTuple):
    """Tokens of a group's prompt and of each of its `samples` completions."""

    prompt: int
    own: int
    samples: int


class Rows(NamedTuple):
    """Tokens of a packed row, and what of a layer's activations stays for the backward pass (see `models.remat`)."""

    tokens: int
    remat: str


def choose(config: Config, group: Group, groups: int, *, memory: float, least: str) -> Rows:
    """Returns rows whose activations take at most `memory` bytes where a row may be so short.

    `least` asks for that much recomputation whatever the memory is. More is recomputed where a completion does not fit
    else, or where this costs less than the prompts that shorter rows compute again.
    """
    found = []
    for again in remat.REMATS[remat.REMATS.index(least) :]:
        most = memory / token_bytes(config, again)
        tokens = row_tokens(group, groups, most=most)
        cost = computed(group, groups, tokens) * COSTS[again]
        found.append((tokens > most, cost, Rows(tokens, again)))
    fitting = [one for one in found if not one[0]] or found[-1:]
    return min(fitting, key=lambda one: one[1])[2]


def row_tokens(group: Group, groups: int, *, most: float = float("inf")) -> int:
    """Returns the shortest length with which `groups` groups cost little more than with the best one up to `most`.

    A prompt is computed once in each row that holds completions of it. Where no length up to `most` holds a completion,
    returns the shortest that does.
    """
    whole = group.prompt + group.samples * group.own
    one = _up(group.prompt + group.own)
    least = max(one, UNIT * int(min(ENOUGH, _up(groups * whole), most) // UNIT))
    last = int(max(least, min(max(2 * ENOUGH, _up(whole)), most)))
    fitting = range(least, last + 1, UNIT)
    costs = {length: computed(group, groups, length) for length in fitting}
    enough = min(costs.values()) * (1 + 1 / SPARE)
    return next(length for length, cost in costs.items() if cost <= enough)


def _up(tokens: int) -> int:
    return -(-tokens // UNIT) * UNIT


def computed(group: Group, groups: int, length: int) -> int:
    """Returns the tokens of all rows, padding included."""
    whole = group.prompt + group.samples * group.own
    if length >= whole:
        return -(-groups // (length // whole)) * length
    together = (length - group.prompt) // group.own
    return groups * -(-group.samples // together) * length


def token_bytes(config: Config, again: str) -> float:
    """Returns the bytes that an update keeps for the backward pass of one token, by estimate.

    A count of a layer's arrays without logits: a quarter from the compiler's in float32 and a third in
    bfloat16. Of a layer that is computed again its input stays, and XLA has a few arrays of its size.
    """
    layers = sum(_layer_numbers(config, stack, again) * stack.count for stack in config.stacks)
    return float(layers * jnp.dtype(config.dtype).itemsize)


def _layer_numbers(config: Config, stack: Stack, again: str) -> int:
    """Returns the numbers that one layer keeps of a token; one of experts has a row for each that the token chooses."""
    c, r = config, config.routing
    ffn = r.chosen * r.ffn + r.shared if stack.sparse else c.ffn
    rows = r.chosen * c.width if stack.sparse else 0
    kept = {
        remat.ALL: 6 * c.width + (3 * c.heads + 4 * c.kv_heads) * c.channels + 5 * ffn + 3 * rows,
        remat.PRODUCTS: 4 * c.width + (2 * c.heads + 2 * c.kv_heads) * c.channels + 2 * ffn + rows,
        remat.LAYER: 4 * c.width,
    }
    return kept[again]
