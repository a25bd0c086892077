"""Trains the quickstart's task with every preset, with LoRA and with random rewards, and prints their held-out gains.

    .venv/bin/python scripts/compare_variants.py --out=DIR [--variants=grpo,lora,control] [--seeds=0,1,2]

Runs one after the other and keeps each one's result in DIR, so that the same command goes on where it was stopped; runs
that are complete cost nothing. The table of all results in DIR is printed at the end, and alone with `--seeds=`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rftjax import grpo

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = "--config=experiments/quickstart.py"
VARIANTS = {name: [QUICKSTART, f"--config.grpo.preset={name}"] for name in grpo.PRESETS} | {
    "lora": [QUICKSTART, "--config.lora.rank=8", "--config.optim.lr=5e-4"],
    "control": ["--config=experiments/control.py"],
}


def run(name: str, seed: int, folder: Path, extra: list[str]) -> None:
    """Runs one variant to its end and writes `result.json`; the checkpoints and the export are not kept."""
    flags = [*VARIANTS[name], f"--config.seed={seed}", *extra]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "rftjax.main", *flags, f"--workdir={folder / 'run'}"]
    start = time.time()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{name}, seed {seed}: failed; see {folder / 'log.txt'}")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps_wanted = json.loads((folder / "run/config.json").read_text())["steps"]
    if lines[-1]["step"] != steps_wanted:
        raise SystemExit(f"{name}, seed {seed}: ended early; the same command goes on with it")
    held_out = [line for line in lines if line.get("eval/reward") is not None]
    steps = [line for line in lines[2:] if line.get("time/update_s") is not None]
    result: dict[str, Any] = {
        "variant": name,
        "seed": seed,
        "flags": flags,
        "before": held_out[0]["eval/reward"],
        "after": held_out[-1]["eval/reward"],
        "stderr": held_out[-1]["eval/reward_stderr"],
        "peak_bytes": usage.ru_maxrss * 1024,
        "run_s": time.time() - start,
    }
    for field in ("time/step_s", "time/sample_s", "time/update_s"):
        result[field] = statistics.median(line[field] for line in steps)
    (folder / "result.json").write_text(json.dumps(result))
    for part in ("checkpoints", "export", "adapter"):
        shutil.rmtree(folder / "run" / part, ignore_errors=True)
    print(json.dumps(result), flush=True)


def table(out: Path) -> str:
    """Returns a Markdown table of the results in a folder, one variant a row."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))]
    text = [
        "| variant | before | after, by seed | mean gain | update | step | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        runs = sorted((r for r in results if r["variant"] == name), key=lambda r: r["seed"])
        if not runs:
            continue
        mean = {key: statistics.mean(run[key] for run in runs) for key in ("before", "after")}
        after = ", ".join(f"{run['after']:.3f}" for run in runs)
        update_s, step_s, peak = (
            statistics.median(run[key] for run in runs)
            for key in ("time/update_s", "time/step_s", "peak_bytes")
        )
        text.append(
            f"| {name} | {mean['before']:.3f} | {after} | {mean['after'] - mean['before']:+.3f}"
            f" | {update_s:.1f} s | {step_s:.1f} s | {peak / 2**30:.1f} GiB |"
        )
    return "\n".join(text)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=lambda text: Path(text).expanduser(), required=True)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2")
    known, extra = parser.parse_known_args()
    names = known.variants.split(",")
    unknown = sorted(set(names) - set(VARIANTS))
    if unknown:
        parser.error(f"--variants={known.variants}: {unknown} is none of {', '.join(VARIANTS)}")
    for seed in known.seeds.split(",") if known.seeds else []:
        for name in names:
            folder = known.out.resolve() / f"{name}-{seed}"
            if not (folder / "result.json").exists():
                run(name, int(seed), folder, extra)
    print(table(known.out.resolve()))


if __name__ == "__main__":
    main()
