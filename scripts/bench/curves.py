"""Draws the rewards of several runs as one SVG: python scripts/bench/curves.py OUT.svg TITLE=DIR,DIR,... [TITLE=...]

A panel a title, a colour a run: thin lines are the training reward of each step, thick ones with dots the held-out one.
The last line printed is one JSON line with held-out rewards before and after.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, MARGIN = 420, 260, 44
COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#862e9c", "#087f5b")


def read(directory: str) -> list[dict[str, Any]]:
    """Returns the metrics of a run, one dict a step."""
    text = (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def polyline(
    points: Sequence[tuple[float, float]], colour: str, width: float, opacity: float
) -> str:
    """Returns a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"'
        f' stroke-opacity="{opacity}"/>'
    )


def panel(title: str, runs: Sequence[list[dict[str, Any]]], left: float) -> list[str]:
    """Returns the SVG elements of one panel whose left edge is at `left`."""
    last = max(line["step"] for run in runs for line in run)

    def place(step: float, reward: float) -> tuple[float, float]:
        x = left + MARGIN + step / last * (WIDTH - 1.5 * MARGIN)
        return x, HEIGHT - MARGIN - reward * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<text x="{left + WIDTH / 2}" y="24" text-anchor="middle" font-weight="bold">{title}</text>'
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        (x, y), (end, _) = place(0, tick), place(last, tick)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{end}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for step in range(0, last + 1, max(1, last // 4)):
        x, y = place(step, 0)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{step}</text>')
    x, y = place(last / 2, 0)
    parts.append(f'<text x="{x}" y="{y + 34}" text-anchor="middle">step</text>')
    for run, colour in zip(runs, COLOURS, strict=False):
        train = [place(line["step"], line["reward/mean"]) for line in run if "reward/mean" in line]
        heldout = [
            place(line["step"], line["eval/reward"]) for line in run if "eval/reward" in line
        ]
        parts.append(polyline(train, colour, 1.0, 0.4))
        parts.append(polyline(heldout, colour, 2.5, 1.0))
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in heldout
        ]
    return parts


def main(arguments: Sequence[str]) -> None:
    """Writes the picture and prints the numbers."""
    if len(arguments) < 2 or any("=" not in argument for argument in arguments[1:]):
        sys.exit(__doc__)
    panels = dict(argument.split("=", 1) for argument in arguments[1:])
    elements, numbers = [], {}
    for index, (title, directories) in enumerate(panels.items()):
        runs = [read(directory) for directory in directories.split(",")]
        elements += panel(title, runs, index * WIDTH)
        ends = [[line["eval/reward"] for line in run if "eval/reward" in line] for run in runs]
        gains = [values[-1] - values[0] for values in ends]
        numbers[title] = {
            "before": [round(values[0], 3) for values in ends],
            "after": [round(values[-1], 3) for values in ends],
            "mean_gain": round(statistics.mean(gains), 3),
        }
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    style = '<rect width="100%" height="100%" fill="white"/>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    )
    Path(arguments[0]).write_text(
        "\n".join([head, style, *elements, "</svg>", ""]), encoding="utf-8"
    )
    print(json.dumps(numbers))


if __name__ == "__main__":
    main(sys.argv[1:])
