"""The rules of a config: types, ranges, and what must fit together, checked before anything is loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from rftjax.config import ranges
from rftjax.config.fields import (
    TYPES,
    base_config,
    embedded_model,
    field_type,
    flatten,
    has_type,
    suggest,
)
from rftjax.errors import UserError
from rftjax.workers import named

REQUIRED = {
    "model.path": "a directory in Hugging Face format, a .gguf file or a hub name",
    "tasks.train": "a JSONL file, a dataset or 'module:name' of a function of rows",
    "evaluator": "'module:name' or 'file.py:name' of a function evaluate(task, trajectory) or another form of "
    "docs/evaluators.md, or an environment whose turn rewards are added up, or an agent that returns its reward",
}
_EVALUATORS = ("evaluator", "eval.evaluator")
_CALLABLES = (
    "environment",
    "tasks.map",
    "tasks.sampling",
    "grpo.loss",
    "hooks",
)
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", *_COMPRESSED)
MESH = ("data", "fsdp", "expert", "context", "tensor")
LOGGERS = ("wandb", "mlflow", "trackio")  # modules of rftjax.monitor.loggers
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAKEN_NAMES = ("train", "heldout", "part", "metric")  # streams of rollouts/, and eval/part/NAME


def check(
    config: ConfigDict,
    *,
    devices: int = 0,
    processes: int = 1,
    resumed: bool = False,
    needs: Collection[str] = tuple(REQUIRED),
) -> None:
    """Raises one UserError that lists everything wrong with the fields' values; loads and imports nothing.

    `needs` are the fields without a default that must be given.
    Call it after the preset is resolved. `devices` is the number of devices over all processes (0: the mesh and what
    must divide over it are not checked). A `resumed` run may end within its warm-up.
    """
    values = flatten(config)
    problems = dict(_structure_problems(config, values))
    for field, problem in _value_problems(values, needs):
        problems.setdefault(field, problem)
    sound = {field: value for field, value in values.items() if field not in problems}
    if resumed:
        sound.pop("optim.warmup_steps", None)
    related = [*_relation_problems(sound), *_mesh_problems(sound, devices, processes)]
    lines = [_say(field, values.get(field, ""), text) for field, text in problems.items()]
    lines += [_say(field, values[field], text) for field, text in related]
    if lines:
        count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError(f"the config has {count}:\n  " + "\n  ".join(lines))


def _say(field: str, value: Any, text: str) -> str:
    return f"{field}={value!r}: {text}"


def _structure_problems(config: ConfigDict, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields missing, unknown and wrongly typed fields of the sections that every spec has."""
    base = base_config()
    known = flatten(base)
    for field, default in known.items():
        wanted = field_type(base, field)
        if field not in values:
            yield (
                field,
                f"is missing; a spec starts from rftjax.config.base_config() (default {default!r})",
            )
        elif not (values[field] is default is None or has_type(values[field], wanted)):
            found = type(values[field]).__name__
            yield field, f"must be {TYPES.get(wanted, 'a tuple')}, is of type {found}"
    for field in values:
        section = field.partition(".")[0]
        if field not in known and isinstance(base.get(section), ConfigDict):
            yield (
                field,
                f"is no field of section {section!r}{suggest(field, known)}; "
                "a spec's own fields go into a section of its own",
            )


def _value_problems(values: Mapping[str, Any], needs: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with single fields; of wrongly typed ones nothing is known."""
    for field in needs:
        what = REQUIRED[field]
        other = field == "evaluator" and (values.get("environment") or values.get("agent"))
        if values.get(field) == "" and not other:
            yield field, f"must be given: {what} (--config.{field}=... or in the spec)"
    yield from ranges.problems(values)
    for field in _CALLABLES:
        if isinstance(values.get(field), str) and values[field]:
            yield from _callable_problems(field, values[field])
    for field in _EVALUATORS:
        if isinstance(values.get(field), str) and values[field]:
            yield from _evaluator_problems(field, values[field])
    agent = values.get("agent")
    if isinstance(agent, str) and agent and not agent.startswith(("http://", "https://")):
        yield from _callable_problems("agent", agent)
    host, colon, port = str(values.get("agents.address", "a:0")).rpartition(":")
    if not (host and colon and port.isdigit() and int(port) < 65536):
        yield "agents.address", "must be 'host:port' (port 0: any free one)"
    if ":" in str(values.get("grpo.baseline")):
        yield from _callable_problems("grpo.baseline", values["grpo.baseline"])
    for field in ("model.path", "tasks.train", "tasks.heldout"):
        if isinstance(values.get(field), str) and values[field]:
            yield from _path_problems(field, values[field])
    sets = values.get("eval.sets")
    if faults := "; ".join(_set_problems(sets) if isinstance(sets, tuple) else ()):
        yield "eval.sets", faults
    for field in ("scoring.env", "environments.env", "agents.env"):
        names = values.get(field)
        if isinstance(names, tuple) and not all(isinstance(name, str) and name for name in names):
            yield field, 'must hold names of environment variables, as ("OPENAI_API_KEY",)'
    for service in values["logging.to"] if isinstance(values.get("logging.to"), tuple) else ():
        if service not in LOGGERS:
            yield "logging.to", f"must hold names of {', '.join(LOGGERS)}, as ('wandb',)"
            break
    for stop in values["sampler.stop"] if isinstance(values.get("sampler.stop"), tuple) else ():
        if isinstance(stop, bool) or not isinstance(stop, (str, int)) or stop == "":
            yield "sampler.stop", "must hold texts and token ids only"


def _evaluator_problems(field: str, value: str) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the sources of one evaluator or of a weighted sum of them."""
    try:
        found = named.parse(value, field)
    except UserError as error:
        yield field, str(error).partition(": ")[2]
        return
    for one in found:
        if one.source.endswith(named.GRADER):
            path = os.path.abspath(os.path.expanduser(one.source))
            if not os.path.isfile(path):
                yield field, f"there is no file {path}; correct the path"
        else:
            yield from _callable_problems(field, one.source)


def _callable_problems(field: str, value: str) -> Iterator[tuple[str, str]]:
    module, colon, name = value.rpartition(":")
    if not (colon and module and name):
        yield (
            field,
            "must be 'module:name' or 'file.py:name': the file or module, a colon, the name in it",
        )
    elif module.endswith(".py") and not os.path.isfile(os.path.expanduser(module)):
        yield (
            field,
            f"there is no file {os.path.abspath(os.path.expanduser(module))}; correct the path",
        )


def _path_problems(field: str, value: str) -> Iterator[tuple[str, str]]:
    path, _, name = value.partition(".py:")
    path = os.path.expanduser(path + ".py" if name else value)
    suffixes = (".gguf",) if field == "model.path" else (*_DATA_SUFFIXES, ".py")
    local = path.startswith(("/", "./", "../")) or value.startswith("~") or path.endswith(suffixes)
    if local and not os.path.exists(path):
        way_out = "correct the path"
        if value == embedded_model():
            way_out = "python -m rftjax.weights.fetch_model fetches it"
        yield field, f"there is no {os.path.abspath(path)}; {way_out}"


def heldout_set(text: str) -> tuple[str, str, str]:
    """Returns name, source and split ("" where none is given) of an entry of `eval.sets`, "name=source#split"."""
    name, _, rest = text.partition("=")
    source, _, split = rest.partition("#")
    return name, source, split


def _set_problems(texts: tuple[Any, ...]) -> Iterator[str]:
    names: list[str] = []
    for text in texts:
        name, source, split = heldout_set(text) if isinstance(text, str) else ("", "", "")
        if not (name and source) or (text.endswith("#") and not split):
            yield f"{text!r} must be a text 'name=source' or 'name=source#split'"
        elif not _SET_NAME.fullmatch(name):
            yield f"{name!r} must be a name of letters, digits, '.', '_' and '-', the first a letter or digit"
        elif name in _TAKEN_NAMES:
            yield f"{name!r} has another meaning in metrics and rollouts; choose another name"
        elif name in names:
            yield f"{name!r} must name one set only; rename the other"
        else:
            yield from (f"{name}: {problem}" for _, problem in _path_problems("eval.sets", source))
        names.append(name)


def _relation_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields what is wrong between fields that are each sound; rules with a field that is not are left out."""

    def given(*fields: str) -> list[Any] | None:
        found = [values.get(field) for field in fields]
        return None if None in found else found

    if values.get("model.attention") == "cudnn" and values.get("model.dtype") == "float32":
        yield "model.attention", "must be 'blocked', 'plain' or 'triton' with model.dtype='float32'"
    if values.get("model.attention") == "cudnn" and (values.get("batch.pack_tokens") or 0) % 2:
        yield "batch.pack_tokens", "must be even with model.attention='cudnn'"
    if (found := given("sampler.max_new_tokens", "rollout.max_length")) and found[0] >= found[1]:
        yield (
            "sampler.max_new_tokens",
            f"must be below rollout.max_length={found[1]}, which the prompt shares; raise rollout.max_length",
        )
    found = given("batch.group_size", "grpo.baseline")
    if found and found[0] == 1 and found[1] in ("mean", "leave_one_out"):
        yield (
            "batch.group_size",
            f"must be at least 2 with grpo.baseline={found[1]!r}, which would make every advantage 0; "
            "raise it, or set grpo.baseline to batch_mean or none",
        )
    yield from _grpo_problems(values)
    if values.get("agent") and values.get("environment"):
        yield (
            "agent",
            "takes the place of an environment; leave one of the two out",
        )
    found = given("environments.tool_timeout_s", "environments.timeout_s")
    if found and found[0] >= found[1]:
        yield (
            "environments.tool_timeout_s",
            f"must be below environments.timeout_s={found[1]}, which all calls of a turn share; raise that",
        )
    samples = values.get("eval.samples", 1)
    for k in values.get("eval.pass_k", ()):
        if not isinstance(k, int) or not 1 <= k <= samples:
            yield "eval.pass_k", f"must hold whole numbers from 1 to eval.samples={samples}"
            break
    yield from _metric_problems(values)
    if (found := given("sampler.pool", "sampler.slots")) and 0 < found[0] < found[1]:
        yield "sampler.pool", f"must be at least sampler.slots={found[1]}, or 0 to have it chosen"
    narrow = values.get("optim.rounding")
    if narrow and (values.get("model.dtype") == "float32" or values.get("lora.rank")):
        rule = "must be '' with model.dtype='float32' or with lora.rank above 0, which train float32 weights"
        yield "optim.rounding", rule
    if (found := given("optim.warmup_steps", "steps")) and found[0] >= found[1]:
        yield "optim.warmup_steps", f"must be below steps={found[1]}"
    if values.get("optim.final_lr_share") and values.get("optim.schedule") == "constant":
        yield (
            "optim.final_lr_share",
            "must be 0.0 with optim.schedule='constant', which stays at optim.lr; choose 'linear' or 'cosine'",
        )
    if found := given("tasks.heldout", "tasks.heldout_split", "tasks.heldout_count"):
        heldout, heldout_split, count = found
        if count and (heldout or heldout_split):
            yield (
                "tasks.heldout_count",
                "must be 0 where held-out tasks are given by themselves; "
                "it takes them out of tasks.train (eval.max_tasks limits how many are evaluated)",
            )


def _metric_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with `checkpoint.best_metric`; whether an evaluator gives a part is not known here."""
    metric, sets, pass_k = (
        values.get(field) for field in ("checkpoint.best_metric", "eval.sets", "eval.pass_k")
    )
    if metric is None or sets is None or pass_k is None:
        return
    sources = ("tasks.heldout", "tasks.heldout_split", "tasks.heldout_count")
    main = not sets or any(values.get(field, True) for field in sources)
    prefixes = ["eval/"] * main + [f"eval/{heldout_set(text)[0]}/" for text in sets]
    names = ["reward", *(f"pass_at_{k}" for k in pass_k), "strict", "lenient"]
    known = [prefix + name for prefix in prefixes for name in names]
    parts = tuple(f"{prefix}{kind}/" for prefix in prefixes for kind in ("part", "metric"))
    if metric not in known and not (metric.startswith(parts) and metric not in parts):
        yield (
            "checkpoint.best_metric",
            f"must be a metric of a held-out set: {', '.join(known)}, {prefixes[0]}part/NAME or "
            f"{prefixes[0]}metric/NAME",
        )


def _grpo_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields what does not fit together among the settings of a step's updates."""
    size, prompts = values.get("batch.group_size", 2), values.get("batch.prompts", 0)
    for field in ("grpo.drop_zero_variance", "grpo.dynamic_prompts"):
        if size == 1 and values.get(field):
            yield field, "must be off with batch.group_size=1, where no group has variance"
    count = values.get("grpo.minibatches", 1)
    whole = values.get("grpo.minibatch_groups", True)
    if prompts and (prompts if whole else prompts * size) % count:
        yield (
            "grpo.minibatches",
            f"must divide batch.prompts={prompts}"
            if whole
            else f"must divide the {prompts * size} samples of a step",
        )
    if values.get("grpo.credit") == "turn" and values.get("agent"):
        yield (
            "grpo.credit",
            "must be 'trajectory' with an agent, whose calls have no order of turns",
        )
    if values.get("grpo.kl_weight") == 0:
        for field in ("grpo.kl_in_reward", "grpo.kl_refresh_steps"):
            if values.get(field):
                yield field, "must be off where grpo.kl_weight is 0.0; give that a value"
    if values.get("overlap.max_staleness"):
        if values.get("grpo.tis_cap") == 0:
            yield (
                "overlap.max_staleness",
                "must be 0 where grpo.tis_cap is 0.0: nothing would weigh samples of older weights; try 2.0",
            )
        if any(values.get(f"mesh.{axis}") != 1 for axis in MESH[1:]):
            yield (
                "overlap.max_staleness",
                "must be 0 where mesh.fsdp, mesh.expert, mesh.context or mesh.tensor is not 1: two threads give their"
                " collectives no common order",
            )
        if values.get("grpo.dynamic_prompts"):
            yield (
                "overlap.max_staleness",
                "must be 0 with grpo.dynamic_prompts, which are known only once a batch is scored",
            )
    yield from _partial_problems(values)
    limit = values.get("sampler.max_new_tokens", 0) * values.get("rollout.max_turns", 1)
    if limit and values.get("grpo.overlong_buffer", 0) >= limit:
        yield "grpo.overlong_buffer", f"must be below the {limit} tokens that may be sampled"
    if values.get("lora.path") and values.get("lora.rank") == 0:
        yield "lora.path", "must be empty where lora.rank is 0; give the rank of those adapters"


def _partial_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields what does not fit together with answers that go on in the next step."""
    if not values.get("rollout.partial"):
        return
    if values.get("grpo.tis_cap") == 0:
        yield (
            "rollout.partial",
            "must be 0 where grpo.tis_cap is 0.0: nothing would weigh tokens of older weights; leave that field out,"
            " which makes it 2.0",
        )
    for field in ("environment", "agent"):
        if values.get(field):
            yield (
                "rollout.partial",
                f"must be 0 with {field}, whose state no checkpoint holds; overlap.max_staleness=1 hides its time",
            )
    if values.get("overlap.max_staleness"):
        yield "rollout.partial", "must be 0 with overlap.max_staleness=1; choose one of them"


def _mesh_problems(
    values: Mapping[str, Any], devices: int, processes: int
) -> Iterator[tuple[str, str]]:
    axes = {axis: values.get(f"mesh.{axis}", 0) for axis in MESH}
    rest = [axis for axis, size in axes.items() if size == -1]
    if len(rest) > 1:
        yield f"mesh.{rest[1]}", f"only one axis may be -1, and mesh.{rest[0]} is already"
        return
    if not devices or 0 in axes.values():
        return
    fixed = math.prod(size for size in axes.values() if size != -1)
    if devices % fixed or (not rest and devices != fixed):
        field = "mesh.tensor" if axes["tensor"] > 1 or rest == ["data"] else "mesh.data"
        yield (
            field,
            f"the axes {axes} must multiply to the {devices} devices there are; "
            "change the sizes, or set one to -1 for the rest",
        )
        return
    prompts = values.get("batch.prompts", processes)
    if prompts % processes:
        yield (
            "batch.prompts",
            f"must divide by the {processes} processes, each of which samples its share; "
            "start another number of processes, or give a new run other prompts",
        )
