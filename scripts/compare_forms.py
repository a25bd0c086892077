"""Compares the learning curves of the tiny job in float32, in bfloat16, also with weights that are bfloat16 alone, with
batches sampled one step ahead, and with answers that go on in the next step.

    python scripts/compare_forms.py [--workdir=DIR] [--seeds=4] [--forms=NAME,NAME]

Trains the job of `compare_trl.py` with the preset `grpo` in each form and prints one JSON line: the mean reward of the
ten steps from each of the steps 60, 90, 120 and 180 on, and the largest difference of sampler and trainer in any step.
Where all forms were asked for it draws the curves in `scripts/bench/compare_forms.svg`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import compare_trl

from rftjax import train
from rftjax.run import build as job

PICTURE = compare_trl.PICTURE.with_name("compare_forms.svg")
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"model.dtype": "bfloat16"},
    "bfloat16 rounded": {"model.dtype": "bfloat16", "optim.rounding": "stochastic"},
    "one step ahead": {"overlap.max_staleness": 1, "grpo.tis_cap": 2.0},
    "answers go on": {"rollout.partial": 4, "sampler.dispatch_steps": 2},
}


def run(form: str, seed: int, folder: Path) -> Path:
    """Trains one form with one seed unless it was already, and returns its workdir."""
    workdir = folder / f"{form.replace(' ', '-')}-{seed}"
    if not (workdir / "metrics.jsonl").exists() or (
        len(compare_trl.curve(workdir)) < compare_trl.STEPS
    ):
        config = compare_trl.spec("grpo", seed)
        config.update_from_flattened_dict(FORMS[form])
        train.train(job.open_config(workdir, config, {}), workdir)
    return workdir


def largest(workdir: Path, name: str) -> float:
    """Returns the largest value that a metric has in a run."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return max(json.loads(line)[name] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the learning curves of these forms.")
    parser.add_argument(
        "--workdir",
        type=lambda text: Path(text).expanduser(),
        help="where runs are kept and resumed",
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--forms", default=",".join(FORMS))
    flags = parser.parse_args()
    folder = flags.workdir or Path(tempfile.mkdtemp(prefix="compare_forms-"))
    curves: dict[str, list[list[float]]] = {}
    result: dict[str, Any] = {"steps": compare_trl.WINDOWS, "seeds": flags.seeds}
    for form in flags.forms.split(","):
        workdirs = [run(form, seed, folder) for seed in range(flags.seeds)]
        curves[form] = [compare_trl.curve(workdir) for workdir in workdirs]
        means = zip(*map(compare_trl.windows, curves[form]), strict=True)
        result[form] = {
            "reward": [round(statistics.mean(column), 4) for column in means],
            "logprob_diff_max": max(largest(one, "sampler/logprob_diff_max") for one in workdirs),
            "staleness_max": max(largest(one, "rollout/staleness") for one in workdirs),
        }
    if set(curves) == set(FORMS):
        PICTURE.write_text(compare_trl.picture({"grpo": curves}), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
