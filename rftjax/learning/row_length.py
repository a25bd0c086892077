"""Chooses the length of a packed row from what the groups of a job need and what a micro-batch may hold."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from rftjax.models.decoder import Config

UNIT = 64  # tokens that a chosen length is a multiple of
ENOUGH = 512  # tokens of a row from which on products gain nothing by more of them
RECOMPUTED = (
    4 / 3
)  # operations of an update that runs each layer's forward pass twice, over those of one
SPARE = 16  # one part in so many more tokens may be computed to have shorter rows


class Group(NamedTuple):
    """Tokens of a group's prompt and of each of its `samples` completions."""

    prompt: int
    own: int
    samples: int


class Rows(NamedTuple):
    """Tokens of a packed row, and whether the backward pass computes each layer's activations again."""

    tokens: int
    remat: bool


def choose(config: Config, group: Group, groups: int, *, memory: float, remat: bool) -> Rows:
    """Returns rows whose activations take at most `memory` bytes where a row may be so short.

    `remat` asks for recomputation whatever the memory is; without it, activations are recomputed where this costs less
    than the prompts that shorter rows compute again.
    """
    found = {}
    for again in (False, True):
        most = memory / token_bytes(config, remat=again)
        found[again] = Rows(row_tokens(group, groups, most=most), again)
    kept, spared = (computed(group, groups, found[again].tokens) for again in (False, True))
    return found[remat or spared * RECOMPUTED < kept]


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


def token_bytes(config: Config, *, remat: bool) -> float:
    """Returns the bytes that an update keeps for the backward pass of one token, by estimate.

    A count of a layer's arrays without logits: a quarter from the compiler's in float32 and a third in
    bfloat16. With `remat` a layer keeps its input, and XLA a few arrays of its size.
    """
    c = config
    heads = (3 * c.heads + 4 * c.kv_heads) * c.channels
    kept = 4 * c.width if remat else 6 * c.width + heads + 5 * c.ffn
    return float(c.layers * kept * jnp.dtype(c.dtype).itemsize)
