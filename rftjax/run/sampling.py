"""Builds the sampler of a config, and the loop over conversations that it serves."""

from __future__ import annotations

import dataclasses

import jax
from ml_collections import ConfigDict

from rftjax import policy
from rftjax.environments import Environments
from rftjax.rollout import Rollout
from rftjax.sampler.engine import Engine
from rftjax.text import chat


def make_rollout(config: ConfigDict, model: policy.Policy, environments: Environments) -> Rollout:
    """Returns what samples groups of conversations; its sampler has no weights yet."""
    return Rollout(
        make_engine(config, model),
        model.tokenizer,
        environments,
        seed=config.seed,
        stop_strings=model.stop_strings(config.sampler.stop),
    )


def make_engine(config: ConfigDict, model: policy.Policy) -> Engine:
    """Returns the sampler of the config on the model's mesh, with rows for conversations that wait where there is an
    environment."""
    section = config.sampler
    pool = section.pool or section.slots * (2 if config.environment else 1)
    shape = model.config
    if shape.attention == "cudnn" and model.mesh is not None and model.mesh.shape["tensor"] > 1:
        # The sampler's heads are the compiler's to share out, which it cannot do to a kernel.
        shape = dataclasses.replace(shape, attention="plain")
    bridge = section.bridge_steps
    if bridge < 0:
        bridge = 0 if jax.default_backend() == "cpu" else section.dispatch_steps // 4
    strings = model.stop_strings(section.stop)
    return Engine(
        shape,
        slots=section.slots,
        parked=pool - section.slots,
        max_length=config.rollout.max_length,
        stops=model.stop_tokens(section.stop),
        find_stop=chat.StopStrings(model.tokenizer, strings) if strings else None,
        seed=config.seed,
        limit=model.vocabulary,
        dispatch_steps=section.dispatch_steps,
        bridge_steps=bridge,
        prefill_rows=section.prefill_rows,
        prefill_chunk=section.prefill_chunk,
        mesh=model.mesh,
    )
