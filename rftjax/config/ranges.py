"""The range or the choices of each config field that has any."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rftjax.config.fields import TYPES, has_type
from rftjax.errors import UserError

RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "must be at least 1",
        lambda value: value >= 1,
        "steps batch.prompts batch.group_size batch.pack_rows sampler.max_new_tokens sampler.slots "
        "sampler.dispatch_steps sampler.prefill_rows sampler.prefill_chunk rollout.max_turns "
        "scoring.workers environments.workers agents.workers serving.max_request_bytes "
        "grpo.updates_per_batch grpo.minibatches "
        "alarms.window eval.samples checkpoint.keep logging.every",
    ),
    (
        "must be at least 2 (a prompt token and a sampled one)",
        lambda value: value >= 2,
        "rollout.max_length",
    ),
    (
        "must be at least 0 (0 switches it off)",
        lambda value: value >= 0,
        "batch.pack_tokens batch.memory "
        "tasks.heldout_count tasks.limit tasks.max_prompt_tokens sampler.top_k sampler.pool eval.every eval.max_tasks "
        "eval.top_k "
        "checkpoint.every logging.rollouts serving.max_waiting lora.rank eval.patience eval.dead_steps "
        "alarms.heldout_fall alarms.length_factor alarms.duplicate_share alarms.part_fall alarms.logprob_diff "
        "alarms.entropy_share alarms.truncated_share alarms.truncated_rise alarms.same_answer_share "
        "grpo.kl_refresh_steps grpo.dynamic_prompts rollout.partial "
        "environments.tool_timeout_s environments.max_calls environments.max_message_tokens "
        "grpo.overlong_buffer grpo.overlong_penalty optim.warmup_steps optim.clip optim.weight_decay "
        "optim.max_nonfinite",
    ),
    (
        "must be at least 0 (0: none), or -1 to keep all",
        lambda value: value >= -1,
        "logging.keep_rollouts",
    ),
    (
        "must be at least 0, or -1 to choose by the device",
        lambda value: value >= -1,
        "sampler.bridge_steps",
    ),
    (
        "must be between 0 (any free port) and 65535",
        lambda value: 0 <= value <= 65535,
        "serving.port",
    ),
    ("must be between 0 and 2**32 - 1", lambda value: 0 <= value < 2**32, "seed"),
    ("must be at least 0.0", lambda value: value >= 0, "eval.pass_reward"),
    (
        "must be 0, or 1 to sample the next batch while this one trains",
        lambda value: value in (0, 1),
        "overlap.max_staleness",
    ),
    (
        "must be above 0.0",
        lambda value: value > 0,
        "sampler.temperature scoring.timeout_s environments.timeout_s agents.timeout_s optim.lr optim.eps lora.alpha",
    ),
    ("must be at least 0.0 (0.0: greedy)", lambda value: value >= 0, "eval.temperature"),
    (
        "must be above 0.0 and at most 1.0 (1.0 switches it off)",
        lambda value: 0 < value <= 1,
        "sampler.top_p eval.top_p",
    ),
    (
        "must be between 0.0 and 1.0",
        lambda value: 0 <= value <= 1,
        "scoring.max_error_share optim.final_lr_share",
    ),
    (
        "must be at least 0.0 and below 1.0",
        lambda value: 0 <= value < 1,
        "optim.beta1 optim.beta2",
    ),
    (
        "must be at least 1, or -1 for the devices that the other axes leave",
        lambda value: value >= 1 or value == -1,
        "mesh.data mesh.fsdp mesh.expert mesh.context mesh.tensor",
    ),
)
_CHOICES = {
    "export_step": ("best", "last"),
    "model.attention": ("blocked", "tiled", "plain", "cudnn", "triton", "splash"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("", "products", "layer"),
    "grpo.credit": ("trajectory", "turn"),
    "model.init": ("pretrained", "random"),
    "chat.history": ("template", "kept"),
    "chat.thinking": ("template", "on", "off", "low", "medium", "high"),
    "rollout.truncated_turns": ("environment", "end", "mask"),
    "optim.offload": ("", "moments", "all"),
    "optim.rounding": ("", "stochastic"),
    "optim.schedule": ("constant", "linear", "cosine"),
}


def problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (field, rule) for each value, by the path of its field, that is not finite or not in its range or choices;
    of wrongly typed ones nothing is known."""
    for field, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield field, "must be finite"
    for rule, holds, fields in RANGES:
        for field in fields.split():
            value: Any = values.get(field)
            if has_type(value, float) and not holds(value):
                yield field, rule
    for field, choices in _CHOICES.items():
        if isinstance(values.get(field), str) and values[field] not in choices:
            yield field, f"must be one of {', '.join(one or repr(one) for one in choices)}"


def checked(given: Mapping[str, Any], fields: Mapping[str, tuple[str, type]]) -> dict[str, Any]:
    """Returns a function's arguments, scalars of NumPy and JAX as Python's; raises UserError where one breaks the rules
    of the config field that `fields` names for it, with its type."""
    values = {
        name: value.item() if getattr(value, "ndim", None) == 0 else value
        for name, value in given.items()
    }
    for name, value in values.items():
        field, wanted = fields[name]
        wrong_type = [] if has_type(value, wanted) else [(field, f"must be {TYPES[wanted]}")]
        for _, rule in wrong_type or problems({field: value}):
            raise UserError(f"{name}={value!r}: {rule}")
    return values
