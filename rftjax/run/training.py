"""Builds the learner of a run: its update, its scorer of reference log-probabilities, and the shape of its batches."""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
from typing import Any

import jax
from ml_collections import ConfigDict

from rftjax import grpo
from rftjax.devices import processes, sharding
from rftjax.learning import batching, credit, custom, row_length, update
from rftjax.learning.learner import Learner
from rftjax.models import attention
from rftjax.run.build import Parts, lora_scale
from rftjax.run.sampling import sampling_params
from rftjax.text import chat

SHARE = 4  # one part in so many of a device's memory is for activations, where `batch.memory` names none


def make_learner(parts: Parts) -> Learner:
    """Returns what turns scored trajectories into updates."""
    config = parts.config
    scorer = update.make_scorer(
        parts.policy.config,
        unroll=jax.default_backend() == "cpu",
        mesh=parts.mesh,
        **_distribution(parts),
    )
    return Learner(
        config.grpo.to_dict(),
        batch_shape(parts),
        parts.mesh,
        make_update(parts),
        scorer,
        config.batch.prompts,
        config.sampler.max_new_tokens * config.rollout.max_turns,
        config.seed,
        lora_scale(config),
        config.model.dtype,
    )


def make_update(parts: Parts) -> Any:
    """Returns the jitted update of the config; the new state has the shardings of the old one."""
    section = parts.config.grpo
    loss = grpo.LossSettings.of(section)
    if section.kl_in_reward:
        loss = dataclasses.replace(loss, kl_weight=0.0)
    return update.make_update(
        parts.policy.config,
        parts.state_builder.optimizer,
        loss,
        term=custom.loss_term(section.loss),
        remat=chosen_rows(parts).remat,
        unroll=jax.default_backend() == "cpu",
        lora_scale=lora_scale(parts.config),
        seed=parts.config.seed,
        mesh=parts.mesh,
        **_distribution(parts),
        shardings=jax.tree.map(lambda leaf: leaf.sharding, parts.state_builder.abstract_state),
    )


def batch_shape(parts: Parts) -> dict[str, Any]:
    """Returns what `batching.make_batch` takes beside the trajectories."""
    config, params = parts.config, sampling_params(parts.config)
    section = config.batch
    samples = -(-section.prompts * section.group_size // config.grpo.minibatches)
    pack_tokens = chosen_rows(parts).tokens
    own_temperatures = any(task.temperature for task in parts.train_tasks)
    sampled = section.group_size * params.max_new_tokens * params.max_turns
    return {
        "rows": samples * params.max_turns if _rewrites_history(parts) else samples,
        "max_length": config.rollout.max_length,
        "pack_tokens": pack_tokens,
        "pack_scored": batching.most_scored(
            pack_tokens, prompt=min(parts.prompt_tokens, default=1), sampled=sampled
        ),
        "pack_rows": section.pack_rows * sharding.row_multiple(parts.mesh),
        "pack_unit": attention.row_unit(parts.policy.config.attention, parts.mesh),
        "mask_truncated": config.grpo.mask_truncated or config.rollout.truncated_turns == "mask",
        "temperature": config.sampler.temperature * own_temperatures,
        "by_turn": config.grpo.credit == credit.TURN,
        "experts": parts.policy.config.choices if config.grpo.routing_replay else None,
    }


def chosen_rows(parts: Parts) -> row_length.Rows:
    """Returns packed rows as the config says or, by default, for prompts of mean and completions of full length."""
    config, params = parts.config, sampling_params(parts.config)
    if config.batch.pack_tokens:
        return row_length.Rows(config.batch.pack_tokens, config.model.remat)
    prompt = round(statistics.fmean(parts.prompt_tokens or [1]))
    room = max(1, config.rollout.max_length - prompt)
    own = room if params.max_turns > 1 else min(params.max_new_tokens, room)
    shared_out = config.grpo.minibatches * sharding.row_multiple(parts.mesh)
    return row_length.choose(
        parts.policy.config,
        row_length.Group(prompt, own, config.batch.group_size),
        -(-config.batch.prompts // shared_out),
        memory=activation_bytes(config) / config.batch.pack_rows,
        least=config.model.remat,
    )


def activation_bytes(config: ConfigDict) -> float:
    """Returns what a micro-batch's activations may take on a device."""
    return config.batch.memory * 1e9 or device_bytes() / SHARE


@functools.cache
def device_bytes() -> float:
    """Returns the memory of a device in whole GiB, the least of all processes: their programs are to be the same.

    The first call is one that all processes make.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = float(stats.get("bytes_limit", host) // 2**30 * 2**30)
    return min(processes.gather(own))


def _distribution(parts: Parts) -> dict[str, Any]:
    section = parts.config.sampler
    return {
        "temperature": section.temperature,
        "top_p": section.top_p,
        "top_k": section.top_k,
        "limit": parts.policy.vocabulary,
    }


def _rewrites_history(parts: Parts) -> bool:
    """Whether the chat template may make a new sequence of each turn."""
    chats = any(task.prompt is None for task in parts.train_tasks)
    several = chats and parts.config.rollout.max_turns > 1
    return several and bool(chat.instability(parts.policy.tokenizer))
