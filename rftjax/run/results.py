"""What a run leaves for others: the weights of a checkpoint as a Hugging Face directory, and its summary."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rftjax.compare import Run, mean_and_error
from rftjax.errors import UserError
from rftjax.learning.update import weights
from rftjax.models import decoder
from rftjax.run.checkpoint import Checkpoints
from rftjax.sampler import device
from rftjax.text import tokenizer
from rftjax.types import Params, TrainState
from rftjax.weights import exporting, hf, lora

ADAPTER, EXPORT = "adapter", "export"


def choose_step(checkpoints: Checkpoints, wanted: str) -> int:
    """Returns the step to take: a number, "last", "best", or "" for the best, else the last.

    Raises UserError, naming those there are, where it has no whole checkpoint.
    """
    steps = checkpoints.steps()
    if not steps:
        raise UserError(
            f"{checkpoints.directory} holds no whole checkpoint; give the workdir of a run with one"
        )
    if wanted in ("", "best"):
        best = checkpoints.best_step()
        if best is None and wanted:
            raise UserError(f"--step=best: no checkpoint has a held-out reward; there are {steps}")
        return steps[-1] if best is None else best
    if wanted == "last":
        return steps[-1]
    if not wanted.isdigit() or int(wanted) not in steps:
        raise UserError(f"--step={wanted}: there is no such checkpoint; there are {steps}")
    return int(wanted)


def export(
    config: ConfigDict,
    workdir: Path,
    out: Path,
    *,
    wanted: str = "",
    dtype: str = "float32",
    adapter: bool = False,
) -> int:
    """Writes a checkpoint's weights to `out`, LoRA merged in, or the adapter alone; returns the step.

    `wanted` is as `choose_step` takes it. Raises UserError where `out` holds what no export wrote.
    """
    path, section = config.model.path, config.lora
    if adapter and not section.rank:
        raise UserError(f"--adapter: the run in {workdir} trained all weights (lora.rank=0)")
    exporting.check_replaceable(out)
    metric = config.checkpoint.best_metric
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True, best_metric=metric)
    try:
        step = choose_step(checkpoints, wanted)
        trainable, frozen = checkpoints.restore_params(step)
        value = checkpoints.metric(step)
        newest = checkpoints.steps()[-1]
    finally:
        checkpoints.close()
    facts = {"run": str(workdir), "step": step, "last_step": newest, "base_model": path}
    facts |= {} if math.isnan(value) else {metric: value}
    fields = hf.read_fields(path)
    shape = hf.read_config(fields)
    if adapter:
        base = loadable_by_peft(path)
        lora.save_peft(out, shape, trainable, alpha=section.alpha, base=base, facts=facts)
        return step
    if section.rank and not frozen:
        init = {"init": config.model.init, "seed": config.seed}
        frozen = decoder.cast(
            hf.load(path, dtype=config.model.dtype, **init)[1], config.model.dtype
        )
    params = merged(trainable, frozen, lora.scale(section.rank, section.alpha))
    words = tokenizer.load(path) if tokenizer.exists(path) else None
    generation = tokenizer.generation(path, words)
    hf.save(
        out, shape, params, fields, tokenizer=words, generation=generation, dtype=dtype, facts=facts
    )
    return step


def export_run(config: ConfigDict, workdir: Path) -> None:
    """Writes `export`, and the adapters alone in `adapter`, of the checkpoint that `export_step` names."""
    wanted = "last" if config.export_step == "last" else ""
    step = export(config, workdir, workdir / EXPORT, wanted=wanted)
    if not config.lora.rank:
        return
    export(config, workdir, workdir / ADAPTER, wanted=str(step), adapter=True)


def check_exports(workdir: Path) -> None:
    """Raises UserError where the export of a run that begins could not be written in the end."""
    for name in (EXPORT, ADAPTER):
        exporting.check_replaceable(workdir / name)


def merged(trainable: Params, frozen: Params, scale: float) -> Params:
    """Returns whole weights: adapters, where there are any, are added to the matrices they adapt."""
    params, adapters = weights(TrainState(0, trainable, frozen, None), scale)
    if adapters is None:
        return params
    return device.merge(params, adapters)


def loadable_by_peft(path: str) -> str:
    """Returns the base model's hub name or absolute directory, "" for a GGUF file, which peft cannot load."""
    found = Path(path).expanduser()
    if not found.exists():
        return "" if path.endswith(".gguf") else path
    return str(found.absolute()) if found.is_dir() else ""


def summary(workdir: Path) -> str:
    """Returns the held-out reward before and after, and where the results lie."""
    run = Run(workdir)
    # There is no file where a run was interrupted before its first step.
    streams = run.streams() if (workdir / "metrics.jsonl").exists() else []
    text: list[str] = []
    for stream in streams:
        if stream == "heldout":
            text += held_out(run, stream)
        else:
            text += [f"held-out set {stream}", *(f"  {line}" for line in held_out(run, stream))]
    for name in (EXPORT, ADAPTER):
        if facts := exporting.facts_of(workdir / name):
            text.append(f"{name:24s}{workdir / name}  ({_which(facts)})")
    events = shlex.quote(str(workdir / "tensorboard"))
    text.append(f"watch it                tensorboard --logdir {events}")
    return "\n".join(text)


def _which(facts: dict[str, Any]) -> str:
    """Returns which step an export holds, and why."""
    step, last = facts.get("step"), facts.get("last_step")
    ranked = [f"{name} {value:.3f}" for name, value in facts.items() if name.startswith("eval/")]
    which = f"step {step}, {'the last' if step == last else f'the best; the last is {last}'}"
    return ", ".join([which, *ranked])


def held_out(run: Run, stream: str) -> list[str]:
    """Returns one held-out set's rewards at the first and the last evaluation, and the gain, in lines of text.

    The gain's standard error is, where both evaluations scored the same tasks, that of the mean of the tasks' own
    gains, s / sqrt(n) with s the standard deviation of n differences; else the root of the sum of both squared errors.
    """
    prefix = "eval/" if stream == "heldout" else f"eval/{stream}/"
    evaluated = [line for line in run.lines if line.get(f"{prefix}reward") is not None]
    if not evaluated:
        return []
    first, last = evaluated[0], evaluated[-1]
    # An evaluation of an earlier step says nothing about the weights that the run ended with.
    label = "after " if last["step"] == run.lines[-1]["step"] else "latest"
    text = [
        f"held-out reward {name}  {line[f'{prefix}reward']:.3f} ± {line.get(f'{prefix}reward_stderr') or 0.0:.3f}"
        f"  (step {line['step']}, {line[f'{prefix}tasks']:.0f} tasks)"
        for name, line in (("before", first), (label, last))
    ]
    if first is last:
        return text[:1]
    gain = last[f"{prefix}reward"] - first[f"{prefix}reward"]
    before, after = (run.rewards(stream, line["step"]) for line in (first, last))
    if before and set(before) == set(after):
        _, error = mean_and_error([after[task] - before[task] for task in before])
        how = f"paired over {len(before)} tasks"
    else:
        error = math.hypot(*(line.get(f"{prefix}reward_stderr") or 0.0 for line in (first, last)))
        how = "not paired"
    text.append(f"gain                    {gain:+.3f} ± {error:.3f}  ({how})")
    return [*text, f"note                    {note}"] if (note := run.remeasured()) else text
