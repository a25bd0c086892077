"""Builds the learner of a run: its update, its scorer of reference log-probabilities, and the shape of its batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from rftjax import grpo
from rftjax.devices import sharding
from rftjax.learning import batching, custom, update
from rftjax.learning.learner import Learner
from rftjax.run.build import Parts, lora_scale
from rftjax.run.sampling import sampling_params
from rftjax.text import chat


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
        remat=parts.config.model.remat,
        unroll=jax.default_backend() == "cpu",
        lora_scale=lora_scale(parts.config),
        mesh=parts.mesh,
        **_distribution(parts),
        shardings=jax.tree.map(lambda leaf: leaf.sharding, parts.state_builder.abstract_state),
    )


def batch_shape(parts: Parts) -> dict[str, Any]:
    """Returns what `batching.make_batch` takes beside the trajectories."""
    config, params = parts.config, sampling_params(parts.config)
    section = config.batch
    samples = -(-section.prompts * section.group_size // config.grpo.minibatches)
    own_temperatures = any(task.temperature for task in parts.train_tasks)
    sampled = section.group_size * params.max_new_tokens * params.max_turns
    return {
        "rows": samples * params.max_turns if _rewrites_history(parts) else samples,
        "max_length": config.rollout.max_length,
        "pack_tokens": section.pack_tokens,
        "pack_scored": batching.most_scored(
            section.pack_tokens, prompt=parts.shortest_prompt, sampled=sampled
        ),
        "pack_rows": section.pack_rows * sharding.row_multiple(parts.mesh),
        "mask_truncated": config.grpo.mask_truncated or config.rollout.truncated_turns == "mask",
        "temperature": config.sampler.temperature * own_temperatures,
    }


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
