"""Attention of packed rows as a layer calls it, also of rows whose tokens lie on several devices (mesh axis `context`):
queries stay where they are, and what their keys and values are made of comes to each device of the row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rftjax.devices import context, sharding
from rftjax.models import attention
from rftjax.models.config import Config
from rftjax.models.layout import Layout, Part
from rftjax.models.remat import ALL, PRODUCTS, kept, rematerialized

New = dict[str, jax.Array]
Stays = Callable[[jax.Array], jax.Array]


class Expansion(NamedTuple):
    """How keys and values come from what the cache would hold: `of(weights, new, stays)` returns both, and calls
    `stays` on what costs much to compute again."""

    weights: Any
    of: Callable[[Any, New, Stays], tuple[jax.Array, jax.Array]]


def keys_and_values(
    new: New, expansion: Expansion | None, stays: Stays = kept
) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values (B, T, K, C) of new tokens."""
    if expansion is None:
        return new["keys"], new["values"]
    return expansion.of(expansion.weights, new, stays)


def among(
    config: Config, layout: Layout, window: Any, mesh: Mesh | None, remat: str
) -> Callable[..., tuple[jax.Array, None]]:
    """Returns what a layer calls to attend among the tokens of packed rows (see `layers.Attend`)."""
    form = config.attention

    def whole(
        q: jax.Array, new: New, *sinks: jax.Array, expansion: Expansion | None = None
    ) -> tuple[jax.Array, None]:
        keys, values = keys_and_values(new, expansion)
        return attention.attend(form, q, keys, values, layout, window, mesh, *sinks), None

    if mesh is None or sharding.context_shards(mesh, layout.groups_BT.shape[1]) == 1:
        return whole

    def parts(
        q: jax.Array, new: New, *sinks: jax.Array, expansion: Expansion | None = None
    ) -> tuple[jax.Array, None]:
        def here(q, new, weights, layout, window, sinks_H) -> jax.Array:
            gathered = {name: context.gathered(leaf) for name, leaf in new.items()}
            own = expansion and expansion._replace(weights=weights)
            keys, values = keys_and_values(gathered, own, lambda y: y)
            part = Part(jax.lax.axis_index(context.CONTEXT) * q.shape[1], q.shape[1])
            return attention.of_part(form, q, keys, values, layout, window, sinks_H, part)

        run = context.over_heads(mesh, here, config.kv_heads)
        # The gathered keys of all layers would take what the axis saves.
        run = rematerialized(run, PRODUCTS) if remat == ALL else run
        weights = expansion.weights if expansion else None
        return run(q, new, weights, layout, window, sinks[0] if sinks else None), None

    return parts
