"""Writes a Hugging Face directory from a checkpoint of a run.

    python scripts/export_hf.py --workdir=DIR [--step=N] [--adapter] --out=DIR

Without `--step` the newest checkpoint is taken; `--step=best` takes the one with the highest held-out
reward. LoRA adapters are merged into the weights, or written alone, as the peft package stores them, with --adapter.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rftjax import config as configs
from rftjax import hf, lora, tokenizer
from rftjax.checkpoint import Checkpoints
from rftjax.models import decoder
from rftjax.sampler import device
from rftjax.types import Params, TrainState
from rftjax.update import weights


def step_of(checkpoints: Checkpoints, wanted: str) -> int:
    """Returns the step to export; raises ValueError, naming those there are, where it has none."""
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"{checkpoints.directory} holds no whole checkpoint")
    if wanted == "best":
        best = checkpoints.best_step()
        if best is None:
            raise ValueError(f"--step=best: no checkpoint has a held-out reward; there are {steps}")
        return best
    if not wanted:
        return steps[-1]
    if not wanted.isdigit() or int(wanted) not in steps:
        raise ValueError(f"--step={wanted}: there is no such checkpoint; there are {steps}")
    return int(wanted)


def merged(trainable: Params, frozen: Params, scale: float) -> Params:
    """Returns whole weights: adapters, where there are any, are added to the matrices they adapt."""
    params, adapters = weights(TrainState(0, trainable, frozen, None), scale)
    if adapters is None:
        return params
    return params | {"layers": device.merge(params["layers"], adapters["layers"])}


def export(workdir: Path, wanted: str, out: Path, dtype: str, adapter: bool) -> int:
    """Writes `out` and returns the step that it holds."""
    stored = workdir / "config.json"
    config: Any = configs.from_json(stored.read_text(encoding="utf-8"), str(stored))
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        step = step_of(checkpoints, wanted)
        trainable, frozen = checkpoints.restore_params(step)
    finally:
        checkpoints.close()
    path, section = config.model.path, config.lora
    fields = hf.read_fields(path)
    if adapter:
        if not section.rank:
            raise ValueError(f"--adapter: the run in {workdir} trained all weights (lora.rank=0)")
        shape = hf.read_config(fields)
        lora.save_peft(out, shape, trainable, alpha=section.alpha, base=path)
        return step
    if section.rank and not frozen:
        shape, base, _ = hf.load(
            path, dtype=config.model.dtype, init=config.model.init, seed=config.seed
        )
        frozen = decoder.cast(base, config.model.dtype)
    params = merged(trainable, frozen, lora.scale(section.rank, section.alpha))
    words = tokenizer.load(path) if tokenizer.exists(path) else None
    shape, generation = hf.read_config(fields), hf.read_generation(path)
    hf.save(out, shape, params, fields, tokenizer=words, generation=generation, dtype=dtype)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--step", default="", help="a step, or best; left out: the newest")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapter", action="store_true", help="the adapters alone, unmerged")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags = parser.parse_args()
    try:
        step = export(flags.workdir, flags.step, flags.out, flags.dtype, flags.adapter)
    except (ValueError, OSError) as error:
        sys.exit(f"export_hf: {error}")
    print(f"step {step} of {flags.workdir} is in {flags.out}")


if __name__ == "__main__":
    main()
