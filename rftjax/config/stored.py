"""The stored form of a config: config.json, and what a resumed run may change of it.

A resume may change what cannot alter results, and what is compared by its contents or recorded instead.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from rftjax.config.fields import as_now, assign, base_config, flatten
from rftjax.errors import UserError
from rftjax.workers import named

# Fields and, where they end in "." or "_", beginnings of fields.
FREE = (
    "steps",
    "export",
    "export_step",
    "hooks",
    "eval.",
    "checkpoint.",
    "logging.",
    "alarms.",
    "optim.max_nonfinite",
    "optim.offload",
    "scoring.",
    "environments.workers",
    "environments.timeout_s",
    "environments.tool_timeout_s",
    "environments.env",
    "agents.",
    "serving.",
    "mesh.",
    "model.remat",
    "model.attention",
    "batch.pack_",
    "batch.memory",
    "sampler.slots",
    "sampler.pool",
    "sampler.dispatch_steps",
    "sampler.bridge_steps",
    "sampler.prefill_",
)
# These name inputs, which may move: `binding` compares their contents with those that the run began with.
INPUTS = (
    "model.path",
    "tasks.train",
    "tasks.heldout",
    "tasks.heldout_count",
    "tasks.heldout_split",
    "tasks.map",
    "tasks.split",
    "tasks.limit",
    "tasks.allow_overlap",
    "tasks.max_prompt_tokens",
    "evaluator",
    "environment",
    "agent",
    "lora.path",
)
# Functions of the user's, whose sources are compared.
CODE = ("grpo.baseline", "grpo.loss", "tasks.sampling")
# These alter results: the change stands in the metrics.
RECORDED = ("optim.lr", "rollout.max_length")


def to_json(config: ConfigDict) -> str:
    """Returns the text of config.json; a value that JSON cannot hold raises ValueError."""
    try:
        return json.dumps(config.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the config cannot be stored as JSON ({error}); use plain values"
        ) from error


def from_json(text: str, name: str = "config.json") -> ConfigDict:
    """Returns the config that `to_json` wrote, locked; fields that it lacks have their defaults."""
    try:
        stored = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name}: is not valid JSON ({error}); start in a new workdir") from error
    if not isinstance(stored, dict):
        raise UserError(f"{name}: must hold an object; start in a new workdir")
    config = base_config()
    with config.unlocked():
        for field, value in flatten(stored).items():
            try:
                assign(config, field, as_now(field, value))
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{name}: {field}={value!r}: {error}; start in a new workdir"
                ) from error
    return config


def merge_resume(stored: ConfigDict, given: ConfigDict, flags: Mapping[str, Any]) -> ConfigDict:
    """Returns the config of a resumed run: the stored one with the flags that may change.

    `flags` are the fields set on the command line by path. One that contradicts the stored config and may not change
    is an error; a spec whose defaults changed is only told of, but for an input that is no longer where it was.
    """
    before, wanted, overridden = flatten(stored), flatten(given), flatten(flags)
    merged = copy.deepcopy(stored)
    with merged.unlocked():
        for field, value in wanted.items():
            moved = _matches(field, INPUTS) and _is_gone(before.get(field))
            if field not in before or field in overridden or moved:
                assign(merged, field, value)
    contradictions = list(_contradictions(before, overridden))
    if contradictions:
        raise UserError(
            "flags contradict the config.json of the run to resume:\n  "
            + "\n  ".join(contradictions)
            + f"\nWhat may change: {', '.join(_shown(FREE))}; {', '.join(_shown(INPUTS))} where the contents stay;"
            " optim.lr; rollout.max_length, upwards"
        )
    now = flatten(merged)
    changed = [
        f"{field} ({now[field]!r} stays, not {value!r})"
        for field, value in wanted.items()
        if field in before and field not in overridden and value not in (None, now[field])
    ]
    if changed:
        logging.warning(
            "resuming with the stored config.json; the spec differs in %s (a flag changes what may change)",
            ", ".join(changed),
        )
    return merged


def may_change(field: str) -> bool:
    """Whether a resumed run takes another value of the field."""
    return field in RECORDED or _matches(field, (*FREE, *INPUTS))


def _contradictions(before: Mapping[str, Any], flags: Mapping[str, Any]) -> Iterator[str]:
    for field, value in flags.items():
        if field not in before or before[field] == value:
            continue
        found = f"--config.{field}={value!r}: the run in this workdir has {before[field]!r}"
        if field == "rollout.max_length" and value < before[field]:
            yield f"{found} and may only raise it; leave the flag out, or start in a new workdir"
        elif not may_change(field) and not _names_code(field, before[field], value):
            yield f"{found}; leave the flag out to go on with it, or start in a new workdir"


def _names_code(field: str, *values: Any) -> bool:
    return field in CODE and all(":" in str(value) for value in values)


def _matches(field: str, names: Sequence[str]) -> bool:
    return any(field.startswith(name) if name[-1] in "._" else field == name for name in names)


def _shown(names: Sequence[str]) -> list[str]:
    return [name + "*" * (name[-1] in "._") for name in names]


def _is_gone(value: Any) -> bool:
    """Whether a value is a path, "PATH" or "FILE.py:name", to something that is no longer there."""
    if not isinstance(value, str):
        return False
    if "," in value:  # a sum of evaluators
        return any(_is_gone(one.source) for one in named.parse(value))
    path = value.partition(".py:")[0] + ".py" if ".py:" in value else value
    local = path.startswith(("/", "./", "../")) or path.endswith(
        (".py", ".gguf", ".jsonl", ".json")
    )
    return local and not os.path.exists(path)
