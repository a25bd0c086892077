"""Estimates the memory of one device while a job samples and while it updates, from abstract arrays and the compiler's
count of an update's temporary buffers. It makes and reads no weights."""

from __future__ import annotations

import math
from typing import Any

import jax

from rftjax.devices import memories, sharding
from rftjax.models import logical_axes
from rftjax.run.build import Parts
from rftjax.run.training import batch_shape, make_learner
from rftjax.sampler import device
from rftjax.sampler.pool import cache_length
from rftjax.types import TrainState

SAMPLING = "at most while it samples"
UPDATE = "at most in an update"
HOST = "in the host's memory"


def estimate(parts: Parts) -> dict[str, float]:
    """Returns bytes on one device by purpose, and the sums of the two halves of a step under SAMPLING and UPDATE.

    Compiles the update, which the job then finds in its cache. Not counted: compiled programs, Python and libraries,
    which share the host's memory with the arrays where the device is the CPU.
    """
    state = parts.state_builder.abstract_state
    held = held_bytes(state)
    offloaded = {f"{name}, {HOST}": size for name, size in held_bytes(state, host=True).items()}
    if jax.default_backend() == "cpu":  # whose memory is the host's
        held |= offloaded
    sampling = {"sampler's weights": _weights(parts)} | _merging(parts) | _cache(parts)
    sampling[f"logits of {parts.rollout.engine.slots} rows"] = _decoding(parts)
    update = make_learner(parts).programs(state)[0].lower().compile().memory_analysis()
    length = max(batch_shape(parts)["pack_tokens"], parts.config.rollout.max_length)
    updating = {
        f"gradient, activations and logits of rows of up to {length} tokens": float(
            update.temp_size_in_bytes
            + max(0, update.output_size_in_bytes - update.alias_size_in_bytes)
        ),
        "batch": float(max(0, update.argument_size_in_bytes - sum(held.values()))),
    }
    found = {name: size for name, size in (held | offloaded | sampling | updating).items() if size}
    return found | {
        SAMPLING: sum(held.values()) + sum(sampling.values()),
        UPDATE: sum(held.values()) + sum(updating.values()),
    }


def held_bytes(state: TrainState, *, host: bool = False) -> dict[str, float]:
    """Returns the bytes by purpose of a state's abstract arrays that lie on one device, or in the `host`'s memory for
    one."""
    trees = {
        "trained parameters": state.trainable,
        "optimizer": state.opt_state,
        "frozen base": state.frozen,
        "reference of the KL": state.reference,
    }
    return {
        name: shard_bytes([one for one in jax.tree.leaves(tree) if memories.on_host(one) == host])
        for name, tree in trees.items()
    }


def shard_bytes(tree: Any) -> float:
    """Returns the bytes that one device has of a tree of abstract arrays, wherever it has them."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def _weights(parts: Parts) -> float:
    """Returns the bytes of the sampler's weights on one device."""
    shapes = jax.eval_shape(parts.sampler_weights.program(parts.state_builder.abstract_state).run)
    if parts.policy.mesh is None:
        return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)))
    mesh = sharding.decode_mesh(parts.policy.mesh)
    places = sharding.decode_shardings(mesh, logical_axes(parts.policy.config), shapes)
    sized = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places
    )
    return shard_bytes(sized)


def _merging(parts: Parts) -> dict[str, float]:
    """Returns the bytes of the float32 sums of base and adapters, which are made a layer at a time."""
    if not parts.config.lora.rank:
        return {}
    params = parts.policy.abstract_params
    layers = [leaf for s in parts.policy.config.stacks for leaf in jax.tree.leaves(params[s.name])]
    return {"merging a layer's adapters": 4.0 * sum(math.prod(leaf.shape[1:]) for leaf in layers)}


def _cache(parts: Parts) -> dict[str, float]:
    """Returns the bytes of the KV cache once its rows have their full length."""
    rows, length = parts.rollout.engine.rows, cache_length(parts.config.rollout.max_length)
    mesh = parts.rollout.engine.mesh
    cache = device.abstract_cache(parts.rollout.engine.config, rows, length, mesh)
    here = rows // sharding.row_multiple(mesh)
    return {f"cache of {here} rows of up to {length} tokens": shard_bytes(cache)}


def _decoding(parts: Parts) -> float:
    """Returns the bytes of a decode step's float32 logits and of one temporary array of their size."""
    engine = parts.rollout.engine
    slots = engine.slots // sharding.row_multiple(engine.mesh)
    return 2.0 * 4 * slots * parts.policy.config.vocab
