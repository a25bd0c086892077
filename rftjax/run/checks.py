"""Checks that need the model, before training: its context, its experts, and whether prompts fit."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from ml_collections import ConfigDict

from rftjax import policy
from rftjax.errors import UserError
from rftjax.text import chat
from rftjax.types import Task

log = logging.getLogger(__name__)

CHUNK = 1000  # prompts that are encoded at once
SAID_EVERY = 20  # chunks
LISTED = 20  # rows that a message names


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


def check_replay(config: ConfigDict, model: policy.Policy) -> None:
    """Raises UserError where experts are to be replayed and the model has none."""
    if config.grpo.routing_replay and not model.config.routing.experts:
        raise UserError(
            f"grpo.routing_replay=True: model.path={config.model.path!r} is a dense model (model_type"
            f" {model.config.family!r}), which routes nothing; leave the field out"
        )


def check_environment(config: ConfigDict, active: bool) -> None:
    """Warns of an environment whose answers the model never sees."""
    if active and config.rollout.max_turns == 1:
        log.warning(
            "rollout.max_turns=1: the environment is asked once, after the first answer, and the model sees nothing of"
            " what it says; raise rollout.max_turns"
        )


def check_agent(config: ConfigDict) -> None:
    """Warns of an agent that gets a single answer."""
    if config.agent and config.rollout.max_turns == 1:
        log.warning(
            "rollout.max_turns=1: a second call of the agent is refused, which ends its rollout; raise"
            " rollout.max_turns where it needs more answers"
        )


def fit_prompts(
    config: ConfigDict, tokenizer: Any, named: dict[str, list[Task]], tools: list[Any]
) -> tuple[dict[str, list[Task]], list[int]]:
    """Renders and measures every row; returns the sets without the rows that `tasks.max_prompt_tokens` leaves out, and
    the tokens of the prompts in the first set.

    Raises UserError listing the rows that cannot be rendered, and where a set is left without a row that has room for
    an answer. Warns of single rows without it, and where the chat template rewrites history or drops the tools.
    """
    _check_templates(config, tokenizer, named, tools)
    fitting, lengths, refused = {}, [], []
    for field, rows in named.items():
        counts, faults = _measured(config, tokenizer, field, rows, tools)
        refused += faults
        if not faults:
            fitting[field], kept = _fitting(config, field, rows, counts)
            lengths.append(kept)
    if refused:
        raise UserError(
            f"{len(refused)} rows cannot be shown to the model; correct them, or leave them out in tasks.map:\n  "
            f"{_listed(refused)}"
        )
    return fitting, lengths[0]


def _check_templates(
    config: ConfigDict, tokenizer: Any, named: dict[str, list[Task]], tools: list[Any]
) -> None:
    """Raises UserError for tools beside plain prompts; warns of what a template does to history and tools."""
    plain = [task for rows in named.values() for task in rows if task.prompt is not None]
    if tools and plain:
        raise UserError(
            f"environment={config.environment!r}: its tools cannot be shown in rows with `prompt` (task"
            f" {plain[0].id!r}), which go to the model without a chat template; give rows with `messages`, or"
            " describe the tools in the prompts and use an environment without schemas"
        )
    chats = [task for rows in named.values() for task in rows if task.prompt is None]
    if chats and not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, which rows with `messages` need (task"
            f" {chats[0].id!r}); give rows with `prompt` (plain text) or a model that has one"
        )
    if not chats:
        return
    reason = chat.instability(tokenizer) if config.rollout.max_turns > 1 else ""
    if reason:
        log.warning("%s; such conversations go on in a new sequence a turn", reason)
    if tools:
        with contextlib.suppress(chat.ChatTemplateError):  # the row is named with the others
            if chat.drops_tools(tokenizer, chats[0].messages, tools):
                log.warning(
                    "the chat template drops the tools: a prompt is the same with and without them, so the model never"
                    " sees them; use a model whose template shows tools, or describe them in a system message"
                )


def _measured(
    config: ConfigDict, tokenizer: Any, field: str, rows: list[Task], tools: list[Any]
) -> tuple[list[int], list[str]]:
    """Returns the tokens of each row's prompt, and what is wrong with the rows that have none."""
    counts: list[int] = []
    faults: list[str] = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        most = max(config.rollout.max_length, config.tasks.max_prompt_tokens)
        found = chat.measure(tokenizer, part, tools=tools, most=most)
        for number, (task, count) in enumerate(zip(part, found, strict=True), start + 1):
            if isinstance(count, int) and count:
                counts.append(count)
            else:
                faults.append(
                    f"{_named(field, number, task)}: {count or 'its prompt has no tokens'}"
                )
        if start and start % (SAID_EVERY * CHUNK) == 0:
            log.info("%s: measured %d of %d prompts", field, start + len(part), len(rows))
    return counts, faults


def _fitting(
    config: ConfigDict, field: str, rows: list[Task], counts: list[int]
) -> tuple[list[Task], list[int]]:
    """Returns the rows that stay and their tokens; says which ones do not, and which leave little room or none."""
    most, limit = config.rollout.max_length, config.tasks.max_prompt_tokens
    new = config.sampler.max_new_tokens

    def named(chosen: list[int]) -> str:
        named = (_named(field, at + 1, rows[at]) for at in chosen[:LISTED])
        return _listed(
            [f"{one}: {counts[at]} tokens" for one, at in zip(named, chosen, strict=False)],
            len(chosen),
        )

    over = [at for at, count in enumerate(counts) if limit and count > limit]
    kept = [at for at, count in enumerate(counts) if not limit or count <= limit]
    full = [at for at in kept if counts[at] >= most]
    tight = [at for at in kept if most - new < counts[at] < most]
    if rows and len(full) == len(kept):
        rule = f"rollout.max_length={most}" if kept else f"tasks.max_prompt_tokens={limit}"
        raise UserError(
            f"{rule}: no prompt of {field} leaves room for an answer; raise it (rollout.max_length up to the model's"
            f" context) or give shorter prompts:\n  {named(full or over)}"
        )
    if over:
        log.warning(
            f"tasks.max_prompt_tokens={limit}: {len(over)} of {len(rows)} rows of {field} have longer prompts and are"
            f" left out:\n  {named(over)}"
        )
    if full:
        log.warning(
            f"rollout.max_length={most}: {len(full)} of {len(rows)} prompts of {field} leave no room for an answer;"
            " their samples end without one, are counted and teach nothing; raise it, or leave such rows out with"
            f" tasks.max_prompt_tokens={most - 1}:\n  {named(full)}"
        )
    if tight:
        log.warning(
            f"sampler.max_new_tokens={new}: {len(tight)} of {len(rows)} prompts of {field} leave room for fewer tokens"
            f" within rollout.max_length={most}; raise that by {max(counts[at] for at in tight) + new - most}, or leave"
            f" such rows out with tasks.max_prompt_tokens={most - new}:\n  {named(tight)}"
        )
    return [rows[at] for at in kept], [counts[at] for at in kept]


def _named(field: str, number: int, task: Task) -> str:
    text = " ".join(
        str(task.messages[-1].get("content", "") if task.messages else "")[:200].split()
    )
    return f"{field}: task {task.id!r} ({number} in their order, {text[:40]!r})"


def _listed(lines: list[str], count: int = 0) -> str:
    count = count or len(lines)
    more = [f"and {count - LISTED} more"] if count > LISTED else []
    return "\n  ".join([*lines[:LISTED], *more])
