"""Compares the learning curves of a tiny job with those that TRL 1.16.0 took on it.

    python scripts/compare_trl.py [--workdir=DIR] [--seeds=4]

Trains `tests/data/tiny` with the presets `grpo` and `dapo` under the settings that the curves' note gives, draws both
frameworks' curves in `scripts/bench/compare_trl.svg` and prints one JSON line: the mean reward of the ten steps from
each of the steps 60, 90, 120 and 180 on, ours, TRL's and by how much they may differ. Exits with 1 where they differ
by more than the larger of 0.03 and 2.5 standard deviations of TRL's seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.curves import COLOURS, HEIGHT, MARGIN, WIDTH, polyline

from rftjax.types import Task, Trajectory

DATA = Path(__file__).parents[1] / "tests" / "data"
PICTURE = Path(__file__).parent / "bench" / "compare_trl.svg"
PRESETS = ("grpo", "dapo")
WINDOWS = (60, 90, 120, 180)
LENGTH = 10  # steps of a window
STEPS = WINDOWS[-1] + LENGTH - 1
WANTED = {"w1", "w2", "w3"}


def rows(split: str = "") -> list[dict[str, Any]]:
    """Returns the 256 prompts of three random words."""
    words = [f"w{index}" for index in range(61)]
    generators = [random.Random(index) for index in range(256)]
    return [
        {"prompt": " ".join(generator.choice(words) for _ in range(3))} for generator in generators
    ]


def evaluate(task: Task, trajectory: Trajectory) -> float:
    """Returns how many of six words are wanted ones."""
    return sum(word in WANTED for word in trajectory.completion.split()) / 6


def spec(preset: str, seed: int) -> Any:
    """Returns the config of one run, after the curves' note."""
    from rftjax.config import base_config

    config: Any = base_config()
    config.seed, config.steps, config.export = seed, STEPS, False
    config.model.path = str(DATA / "tiny")
    config.tasks.train = f"{Path(__file__).resolve()}:rows"
    config.tasks.allow_overlap = True
    config.evaluator = f"{Path(__file__).resolve()}:evaluate"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 4, 8, 256
    config.sampler.max_new_tokens, config.rollout.max_length = 6, 16
    config.sampler.slots, config.sampler.dispatch_steps, config.sampler.prefill_chunk = 32, 6, 4
    config.scoring.workers = 1
    config.grpo.preset = preset
    config.optim.lr, config.optim.clip, config.optim.weight_decay = 1e-3, 1.0, 0.0
    config.eval.every, config.checkpoint.every, config.logging.rollouts = 0, 0, 0
    config.logging.histograms = False
    return config


def curve(workdir: Path) -> list[float]:
    """Returns the mean reward of each step of a run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["reward/mean"] for line in lines if "reward/mean" in line]


def windows(values: list[float]) -> list[float]:
    """Returns the means of the ten steps from each of WINDOWS on; steps count from 1."""
    return [statistics.mean(values[first - 1 : first - 1 + LENGTH]) for first in WINDOWS]


def compare(ours: list[list[float]], theirs: list[list[float]]) -> dict[str, Any]:
    """Returns the windows' means over seeds, their difference and the bound on it."""
    mean_of, trl = (
        [list(column) for column in zip(*map(windows, curves), strict=True)]
        for curves in (ours, theirs)
    )
    differences = [
        statistics.mean(a) - statistics.mean(b) for a, b in zip(mean_of, trl, strict=True)
    ]
    bounds = [max(0.03, 2.5 * statistics.stdev(column)) for column in trl]
    return {
        "rftjax": [round(statistics.mean(column), 4) for column in mean_of],
        "trl": [round(statistics.mean(column), 4) for column in trl],
        "trl_std": [round(statistics.stdev(column), 4) for column in trl],
        "difference": [round(value, 4) for value in differences],
        "bound": [round(value, 4) for value in bounds],
        "within": [abs(a) <= b for a, b in zip(differences, bounds, strict=True)],
    }


def picture(curves: dict[str, dict[str, list[list[float]]]]) -> str:
    """Returns an SVG with a panel a preset: thin lines are seeds, thick ones their means."""
    parts = ['<rect width="100%" height="100%" fill="white"/>']
    for index, (preset, frameworks) in enumerate(curves.items()):
        left = index * WIDTH

        def place(step: float, reward: float, left: float = left) -> tuple[float, float]:
            x = left + MARGIN + step / STEPS * (WIDTH - 1.5 * MARGIN)
            return x, HEIGHT - MARGIN - reward * (HEIGHT - 2 * MARGIN)

        parts.append(
            f'<text x="{left + WIDTH / 2}" y="24" text-anchor="middle">{preset}: reward by step</text>'
        )
        for tick in (0.0, 0.5, 1.0):
            (x, y), (end, _) = place(0, tick), place(STEPS, tick)
            parts.append(f'<line x1="{x}" y1="{y}" x2="{end}" y2="{y}" stroke="#ddd"/>')
            parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
        for step in (0, *WINDOWS):
            x, y = place(step, 0)
            parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{step}</text>')
        for row, (name, seeds) in enumerate(frameworks.items()):
            colour = COLOURS[row]
            for seed in seeds:
                points = [place(step, value) for step, value in enumerate(seed[:STEPS], 1)]
                parts.append(polyline(points, colour, 0.7, 0.3))
            means = [statistics.mean(column) for column in zip(*seeds, strict=True)]
            points = [place(step, value) for step, value in enumerate(means[:STEPS], 1)]
            parts.append(polyline(points, colour, 2.0, 1.0))
            x, y = place(8, 0.95 - 0.1 * row)
            parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{name}</text>')
    size = f'width="{WIDTH * len(curves)}" height="{HEIGHT}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, *parts, "</svg>", ""])


def main() -> None:
    from rftjax import train
    from rftjax.run import build as job

    parser = argparse.ArgumentParser(description="Compares learning curves with TRL's.")
    parser.add_argument(
        "--workdir",
        type=lambda text: Path(text).expanduser(),
        help="where runs are kept and resumed",
    )
    parser.add_argument("--seeds", type=int, default=4)
    flags = parser.parse_args()
    stored = json.loads((DATA / "trl_1_16_tiny_curves.json").read_text())["curves"]
    folder = flags.workdir or Path(tempfile.mkdtemp(prefix="compare_trl-"))
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for preset in PRESETS:
        ours = []
        for seed in range(flags.seeds):
            workdir = folder / f"{preset}-{seed}"
            if not (workdir / "metrics.jsonl").exists() or len(curve(workdir)) < STEPS:
                train.train(job.open_config(workdir, spec(preset, seed), {}), workdir)
            ours.append(curve(workdir))
        theirs = [stored[f"{preset}/{seed}"] for seed in range(4)]
        curves[preset] = {"rftjax": ours, "TRL 1.16.0": theirs}
    PICTURE.write_text(picture(curves), encoding="utf-8")
    results = {preset: compare(*curves[preset].values()) for preset in PRESETS}
    print(json.dumps({"steps": WINDOWS, **results}))
    if not all(all(result["within"]) for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
