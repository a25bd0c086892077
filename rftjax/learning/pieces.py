"""The optimizer's update, of the whole tree at once or a piece at a time: a layer of a stack, or what is beside stacks.

A piece comes to the device from wherever its parameters and moments lie and goes back there, so that no more than one
is there beside what lies there anyway. The pieces' updates are that of the whole tree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rftjax.devices import memories
from rftjax.learning import rounding
from rftjax.types import Params, TrainState


def needed(state: TrainState) -> bool:
    """Whether a state gains from pieces: some of it lies in the host's memory, or is rounded with random numbers."""
    leaves = jax.tree.leaves((state.trainable, state.opt_state))
    return any(map(memories.on_host, leaves)) or rounding.is_narrow(state.trainable)


def update(
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainState,
    grads: Params,
    norm: jax.Array,
    *,
    stacks: Collection[str] | None,
    seed: int = 0,
) -> TrainState:
    """Returns the state after an update with gradients of this global norm; where it is not finite, the state itself.

    By pieces where `stacks` names those of the layers, else at once. Parameters in bfloat16 are added to in float32 and
    rounded at random, keyed by (seed, step, leaf, layer).
    """
    finite = jnp.isfinite(norm)
    step = functools.partial(_step, optimizer, norm=norm)
    keys = rounding.keys(seed, state.step, state.trainable)
    if stacks is None:

        def applied(count: jax.Array, *old: Any) -> tuple:
            return count + 1, *step(*old, grads=grads, keys=keys)

        # A choice between the new state and the old one would hold both.
        before = state.step, state.trainable, state.opt_state
        count, trainable, opt_state = jax.lax.cond(finite, applied, lambda *same: same, *before)
        return state._replace(step=count, trainable=trainable, opt_state=opt_state)

    trees, rebuild = _mirrors(state.opt_state, state.trainable)

    def piece(name: str, old: tuple, grads: Any, keys: Any) -> tuple:
        """Returns the parameters and the moments of one piece."""
        params, opt_state = {name: old[0]}, rebuild([{name: moment} for moment in old[1:]])
        new, opt_state = step(params, opt_state, grads={name: grads}, keys={name: keys})
        return new[name], *(tree[name] for tree in _mirrors(opt_state, new)[0])

    found = {}
    for name in state.trainable:
        old = state.trainable[name], *(tree[name] for tree in trees)
        by = _by_layer if name in stacks else _alone
        found[name] = by(functools.partial(piece, name), finite, old, (grads[name], keys[name]))
    trainable, *moments = (
        {name: of[at] for name, of in found.items()} for at in range(1 + len(trees))
    )
    # The counts are those of an update of nothing.
    nothing = rebuild([{} for _ in trees])
    _, counted = step({}, nothing, grads={}, keys={})
    counts = jax.tree.map(lambda new, old: jnp.where(finite, new, old), counted, nothing)
    opt_state = _mirrors(counts, {})[1](moments)
    return state._replace(step=state.step + finite, trainable=trainable, opt_state=opt_state)


def _step(
    optimizer: optax.GradientTransformationExtraArgs,
    params: Params,
    opt_state: Any,
    *,
    grads: Params,
    keys: Params,
    norm: jax.Array,
) -> tuple[Params, Any]:
    """Returns new parameters and optimizer state, each leaf in the memory and the dtype that it had."""
    here = jax.tree.map(memories.to_device, params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), here)
    moments = jax.tree.map(memories.to_device, opt_state)
    changes, moments = optimizer.update(grads, moments, wide, norm=norm)
    new = jax.tree.map(rounding.rounded, optax.apply_updates(wide, changes), here, keys)
    return jax.tree.map(memories.like, new, params), jax.tree.map(memories.like, moments, opt_state)


def _by_layer(piece: Callable[..., tuple], finite: jax.Array, old: tuple, given: tuple) -> tuple:
    """Returns the arrays of a stack, each layer replaced in its place by what `piece` makes of it, or none of them.

    A loop of no rounds keeps what was there without a choice, which would hold both.
    """

    def layer(index: jax.Array, whole: tuple) -> tuple:
        own = jax.tree.map(lambda leaf: memories.entry(leaf, index), (whole, *given))
        return jax.tree.map(
            lambda leaf, part: jax.lax.dynamic_update_slice_in_dim(leaf, part, index, 0),
            whole,
            piece(*own),
        )

    layers = jax.tree.leaves(old)[0].shape[0]
    return jax.lax.fori_loop(0, jnp.where(finite, layers, 0), layer, old)


def _alone(piece: Callable[..., tuple], finite: jax.Array, old: tuple, given: tuple) -> tuple:
    """Returns what `piece` makes of arrays beside the stacks, in a loop too: XLA for TPUs would begin to fetch them
    from the host before the gradient is there."""

    def only(*stacked: Any) -> tuple:
        return _lead(piece(*jax.tree.map(lambda leaf: leaf[0], stacked)))

    return jax.tree.map(lambda leaf: leaf[0], _by_layer(only, finite, _lead(old), _lead(given)))


def _lead(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _mirrors(opt_state: Any, params: Params) -> tuple[list[Params], Callable[[list[Params]], Any]]:
    """Returns the trees in an optimizer's state that mirror the parameters, and what puts others in their place."""
    form = jax.tree.structure(params)

    def mirrors(node: Any) -> bool:
        return isinstance(node, dict) and jax.tree.structure(node) == form

    nodes, outer = jax.tree.flatten(opt_state, is_leaf=mirrors)
    places = [at for at, node in enumerate(nodes) if mirrors(node)]

    def rebuild(trees: list[Params]) -> Any:
        found = dict(zip(places, trees, strict=True))
        return outer.unflatten([found.get(at, node) for at, node in enumerate(nodes)])

    return [nodes[at] for at in places], rebuild
