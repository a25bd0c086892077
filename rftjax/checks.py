"""Checks of a job that need its model: what the devices can run, and prompts that fit, before anything costs time."""

from __future__ import annotations

import logging
from typing import Any

import jax
from ml_collections import ConfigDict

from rftjax import chat, policy
from rftjax.errors import UserError
from rftjax.types import Task

log = logging.getLogger(__name__)

LENGTH_CHECKS = 5000  # prompts of a set whose length is checked


def fit_context(config: ConfigDict, model: policy.Policy) -> ConfigDict:
    """Returns the config with `rollout.max_length` no longer than the model's context; says where it was."""
    context = model.config.max_positions
    if config.rollout.max_length <= context:
        return config
    log.warning(
        "rollout.max_length=%d: the model's context has %d tokens, which is the limit then",
        config.rollout.max_length,
        context,
    )
    fitted = config.copy_and_resolve_references()
    fitted.rollout.max_length = context
    return fitted


def check_attention(config: ConfigDict) -> None:
    """Raises ValueError where the devices have no such attention."""
    form = config.model.attention
    needed = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU")}.get(form)
    if needed and jax.default_backend() != needed[0]:
        raise UserError(
            f"model.attention={form!r}: needs {needed[1]}, there is {jax.devices()[0].platform}; set it to 'blocked'"
        )


def check_lengths(
    config: ConfigDict, model: policy.Policy, named: dict[str, list[Task]], tools: list[Any]
) -> int:
    """Returns the tokens of the shortest prompt in the first set, out of up to 5,000 a set.

    Raises ValueError listing the prompts that leave no room for an answer. Warns where the chat template rewrites
    history, which costs a new sequence a turn.
    """
    tokenizer = model.tokenizer
    templated = any(task.prompt is None for rows in named.values() for task in rows)
    reason = chat.instability(tokenizer) if templated and config.rollout.max_turns > 1 else ""
    if reason:
        log.warning("%s; such conversations go on in a new sequence a turn", reason)
    long, shortest = [], []
    for field, rows in named.items():
        checked = rows[:: max(1, len(rows) // LENGTH_CHECKS)]
        counts = [len(ids) for ids in chat.prompts(tokenizer, checked, tools=tools or None)]
        long += [
            f"{field}: task {task.id!r} has a prompt of {count} tokens"
            for task, count in zip(checked, counts, strict=True)
            if count >= config.rollout.max_length
        ]
        shortest.append(min(counts, default=1))
    if long:
        raise UserError(
            f"rollout.max_length={config.rollout.max_length}: {len(long)} prompts leave no room for an answer;"
            " raise it (up to the model's context) or drop the rows:\n  " + "\n  ".join(long[:20])
        )
    return shortest[0]
