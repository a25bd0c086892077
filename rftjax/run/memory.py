"""What one device holds while a job samples and while it updates, before anything is made: shapes, and the compiler's
own count of what an update needs beside them."""

from __future__ import annotations

import math
from typing import Any

import jax

from rftjax.devices import sharding
from rftjax.run.build import Job
from rftjax.sampler.pool import cache_length

SAMPLING = "at most while it samples"
UPDATE = "at most in an update"


def estimate(parts: Job) -> dict[str, float]:
    """Returns bytes on one device by what they are for, and the sums of the two halves of a step under SAMPLING and
    UPDATE. Compiles the update, which the job then finds in its cache."""
    state = parts.state_builder.abstract_state
    held: dict[str, float] = {
        "trained parameters": _bytes(state.trainable),
        "optimizer": _bytes(state.opt_state),
        "frozen base": _bytes(state.frozen),
        "reference of the KL": _bytes(state.reference),
    }
    sampling = {"sampler's weights": _weights(parts)} | _cache(parts)
    sampling[f"logits of {parts.rollout.engine.slots} rows"] = _decoding(parts)
    update = parts.learner().programs(state)[0].lower().compile().memory_analysis()
    length = max(parts.batch_shape["pack_tokens"], parts.config.rollout.max_length)
    updating = {
        f"gradient, activations and logits of rows of up to {length} tokens": float(
            update.temp_size_in_bytes
            + max(0, update.output_size_in_bytes - update.alias_size_in_bytes)
        ),
        "batch": float(max(0, update.argument_size_in_bytes - sum(held.values()))),
    }
    found = {name: size for name, size in (held | sampling | updating).items() if size}
    return found | {
        SAMPLING: sum(held.values()) + sum(sampling.values()),
        UPDATE: sum(held.values()) + sum(updating.values()),
    }


def _bytes(tree: Any) -> float:
    """Returns the bytes of a tree's arrays or shapes on one device."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def _weights(parts: Job) -> float:
    shapes = jax.eval_shape(parts.sampler_weights(parts.state_builder.abstract_state).run)
    if parts.policy.mesh is None:
        return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)))
    places = sharding.decode_shardings(parts.policy.mesh, shapes)
    sized = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places
    )
    return _bytes(sized)


def _cache(parts: Job) -> dict[str, float]:
    """Returns the size of the cache at its longest."""
    model, rows = parts.policy.config, parts.rollout.engine.rows
    length = cache_length(parts.config.rollout.max_length)
    shape = (rows, model.kv_heads, length, model.channels)
    here = sharding.cache_sharding(parts.mesh, model.kv_heads).shard_shape(shape)
    size = 2.0 * model.layers * math.prod(here) * jax.numpy.dtype(model.dtype).itemsize
    return {f"cache of {here[0]} rows of up to {length} tokens": size}


def _decoding(parts: Job) -> float:
    """Returns the logits of a decode step, in float32, and as many numbers again that are made of them."""
    slots = parts.rollout.engine.slots // sharding.row_multiple(parts.mesh)
    return 2.0 * 4 * slots * parts.policy.config.vocab
