"""What `--mode` chooses: a run with its export and summary, an evaluation, or a check before anything costs time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rftjax import config as configs
from rftjax import hf, job, lora, policy, preflight, train, update
from rftjax.checkpoint import Checkpoints
from rftjax.errors import UserError
from rftjax.job import Job
from rftjax.sampler import device
from rftjax.types import TrainState


def run(
    mode: str, given: ConfigDict, overrides: dict[str, Any], workdir: Path, stop_after: int
) -> None:
    """Runs a mode; raises what `train.train` raises and ValueError for bad input."""
    if mode == "check":
        preflight.check(given, workdir)
        return
    config = job.open_config(workdir, given, overrides)
    if mode == "eval":
        evaluate_latest(config, workdir)
        return
    state, done = train.train(config, workdir, stop_after)
    if done and config.export:
        export_state(config, state, workdir)
    if jax.process_index() == 0:
        print(summary(workdir))


def export_state(config: ConfigDict, state: TrainState, workdir: Path) -> None:
    """Writes a Hugging Face directory of the state in `export`, adapters merged, and these alone in `adapter`."""
    path, section = config.model.path, config.lora
    fields = hf.read_fields(path)
    params, adapters = update.weights(state, lora.scale(section.rank, section.alpha))
    if adapters is not None:
        params = params | {"layers": device.merge(params["layers"], adapters["layers"])}
    model = policy.Policy(path, hf.read_config(fields), params, fields)
    model.export(workdir / "export")
    if adapters is not None:
        lora.save_peft(
            workdir / "adapter", model.config, state.trainable, alpha=section.alpha, base=path
        )


def summary(workdir: Path) -> str:
    """Returns the held-out reward before and after, and where the results lie."""
    path = workdir / "metrics.jsonl"  # not there where a run was interrupted before its first step
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    config = configs.from_json((workdir / "config.json").read_text())
    text = _gain(lines, "eval/")
    for name in (configs.heldout_set(entry)[0] for entry in config.eval.sets):
        found = _gain(lines, f"eval/{name}/")
        text += [f"held-out set {name}", *(f"  {line}" for line in found)] if found else []
    for name in ("export", "adapter"):
        if (workdir / name).exists():
            text.append(f"{name:24s}{workdir / name}")
    text.append(f"watch it                tensorboard --logdir {workdir / 'tensorboard'}")
    return "\n".join(text)


def _gain(lines: list[dict[str, Any]], prefix: str) -> list[str]:
    """Returns one held-out set's rewards at the first and the last evaluation in lines of text, [] without any."""
    evaluated = [line for line in lines if line.get(f"{prefix}reward") is not None]
    if not evaluated:
        return []
    first, last = evaluated[0], evaluated[-1]
    text = [
        f"held-out reward {name}  {line[f'{prefix}reward']:.3f} ± {line[f'{prefix}reward_stderr']:.3f}"
        f"  (step {line['step']}, {line[f'{prefix}tasks']:.0f} tasks)"
        for name, line in (("before", first), ("after ", last))
    ]
    gain = last[f"{prefix}reward"] - first[f"{prefix}reward"]
    return [*text, f"gain                    {gain:+.3f}"]


def evaluate_latest(config: ConfigDict, workdir: Path) -> None:
    """Evaluates the workdir's last checkpoint, or the base model where there is none, on the held-out tasks."""
    with Job.build(config, workdir) as parts:
        if not parts.heldout:
            raise UserError(
                "tasks.heldout: no held-out tasks to evaluate; name some, set tasks.heldout_count or eval.sets"
            )
        step = 0
        if (workdir / "checkpoints").is_dir():
            checkpoints: Checkpoints = parts.checkpoints(read_only=True)
            step = checkpoints.latest_step() or 0
            state = parts.origin.state(checkpoints, step)
            checkpoints.close()
        else:
            state = parts.origin.initial()
        parts.set_weights(state)
        metrics, _ = parts.evaluate()
    print(json.dumps({"step": step, **metrics}))
