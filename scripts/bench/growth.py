"""How the cost of a step grows with completions, prompts and turns, beside the arithmetic floor; one process a point.

    python scripts/bench/growth.py --model=PATH [--dtype=bfloat16] [--points=64x64,64x256,64x1024] [--update_only]

A point is PROMPTxNEW: 8 prompts, 8 completions each, of so many tokens. `turns` is four sampled turns of 64 tokens with
100 tokens of an environment between them, which are not trained on. Without --points all are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import arithmetic
import jax
import numpy as np
import step as whole_step
import workload

from rftjax import types
from rftjax.learning.batching import make_batch, most_scored
from rftjax.learning.row_length import Group, row_tokens
from rftjax.models.decoder import Config
from rftjax.models.remat import REMATS
from rftjax.types import Batch, Trajectory

NEW, PROMPTS = (64, 256, 1024), (64, 512, 2048)
TURNS, TURN_TOKENS, ANSWER_TOKENS = 4, 64, 100


def points() -> list[str]:
    """Returns the names of all points."""
    return [f"{prompt}x{new}" for prompt in PROMPTS for new in NEW] + ["turns"]


def pattern(flags: argparse.Namespace) -> list[tuple[int, bool]]:
    """Returns the pieces of what follows the prompt: tokens, and whether they are sampled."""
    if flags.point != "turns":
        return [(flags.new_tokens, True)]
    return [(ANSWER_TOKENS, False), (TURN_TOKENS, True)] * TURNS


def own_tokens(flags: argparse.Namespace) -> int:
    return sum(count for count, _ in pattern(flags))


def random_trajectories(config: Config, flags: argparse.Namespace) -> list[Trajectory]:
    """Returns the point's trajectories with random tokens, rewards of the step's kind."""
    rng = np.random.default_rng(flags.seed)
    made = []
    for draw in range(flags.prompts):
        prompt = workload.random_tokens(config, rng, flags.prompt_tokens)
        for one in range(flags.group):
            trajectory = workload.trajectory(prompt, [], [], draw, one)
            sequence = trajectory.sequences[0]
            for count, sampled in pattern(flags):
                tokens = workload.random_tokens(config, rng, count)
                logprobs = [-float(np.log(config.vocab))] * count
                sequence.extend(tokens, logprobs if sampled else None, 0 if sampled else -1)
            trajectory.score = types.Score(float(len(set(sequence.tokens))))
            made.append(trajectory)
    return made


def lay_out(trajectories: list[Trajectory], flags: argparse.Namespace) -> Batch:
    """Returns the batch in rows of the length that a job chooses."""
    own, prompt = own_tokens(flags), flags.prompt_tokens
    tokens = flags.pack_tokens or row_tokens(Group(prompt, own, flags.group), flags.prompts)
    sampled = sum(count for count, sampled in pattern(flags) if sampled)
    return make_batch(
        trajectories,
        rows=flags.prompts * flags.group,
        max_length=prompt + own,
        pack_tokens=tokens,
        pack_scored=most_scored(
            tokens, prompt=prompt + flags.group * (own - sampled), sampled=flags.group * sampled
        ),
        pack_rows=1,
    )


def operations(config: Config, flags: argparse.Namespace) -> dict[str, int]:
    """Returns the least operations of the update and, where it is measured, of sampling."""
    own = own_tokens(flags)
    sampled = sum(count for count, sampled in pattern(flags) if sampled)
    pairs = arithmetic.group_pairs(flags.prompt_tokens, own, flags.group, shared=True)
    forward = arithmetic.forward_operations(
        config,
        tokens=flags.prompts * (flags.prompt_tokens + flags.group * own),
        scored=flags.prompts * flags.group * sampled,
        pairs=flags.prompts * pairs,
    )
    return {"update": 3 * forward} | ({"sample": forward} if samples(flags) else {})


def samples(flags: argparse.Namespace) -> bool:
    """Whether the point's tokens are sampled; else they are random."""
    return not flags.update_only and flags.point != "turns"


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the results of one point."""
    config, params = workload.load(flags)
    state, step = whole_step.start(config, params, flags)
    del params
    engine, rng = None, np.random.default_rng(flags.seed)
    if samples(flags):
        engine = workload.make_engine(config, flags, flags.prompt_tokens + own_tokens(flags))
    seconds: dict[str, list[float]] = {"sample": [], "update": [], "update_cpu": []}
    gap, used = 0.0, np.zeros((0, 0, 0), bool)
    for number in range(flags.steps):
        lap = workload.Lap()
        if engine is None:
            trajectories = random_trajectories(config, flags)
        else:
            draws = range(number * flags.prompts, (number + 1) * flags.prompts)
            count = flags.prompt_tokens
            prompts = {draw: workload.random_tokens(config, rng, count) for draw in draws}
            engine.set_params(workload.sampler_params(config, state.trainable))
            trajectories = whole_step.sample(engine, prompts, flags)
            engine.release()
        whole_step.set_advantages(trajectories)
        seconds["sample"].append(lap())
        before = time.process_time()
        batch = lay_out(trajectories, flags)
        state, metrics = step(state, batch)
        metrics = jax.device_get(metrics)
        seconds["update"].append(lap())
        seconds["update_cpu"].append(time.process_time() - before)
        print(f"{flags.point}: update {seconds['update'][-1]:.2f} s", flush=True)
        gap = float(metrics["sampler/logprob_diff_mean"])
        used = np.asarray(batch.pack.groups_RX[: int(batch.micro_batches)]) > 0
    found = {f"{half}_s": statistics.median(taken[1:] or taken) for half, taken in seconds.items()}
    needed = operations(config, flags)
    if engine is None:
        del found["sample_s"]
    else:
        found["logprob_diff_mean"] = gap
    return found | {
        "operations": needed,
        "update_operations_per_s": needed["update"] / found["update_s"],
        "update_operations_per_cpu_s": needed["update"] / found["update_cpu_s"],
        "row_tokens": used.shape[-1],
        "rows": used.shape[0],
        "full_share": float(used.mean()),
        "peak_bytes": workload.peak_bytes(),
    }


def parse() -> argparse.Namespace:
    """Returns the flags; `points` as a list."""
    parser = workload.arguments(__doc__)
    workload.add_engine_flags(parser)
    parser.add_argument("--points", default=",".join(points()))
    parser.add_argument("--point", default="", help="this one, in this process")
    parser.add_argument("--update_only", action="store_true", help="random tokens, no sampling")
    parser.add_argument("--steps", type=int, default=2, help="the first, which compiles, included")
    parser.add_argument("--pack_tokens", type=int, default=0, help="0: as a job chooses")
    parser.add_argument("--remat", default="", choices=REMATS)
    parser.add_argument("--peak_size", type=int, default=2048, help="of the product that measures")
    flags = parser.parse_args()
    flags.points = flags.points.split(",")
    unknown = {*flags.points, *filter(None, [flags.point])} - set(points())
    if unknown:
        parser.error(f"--points: {', '.join(sorted(unknown))}: not among {', '.join(points())}")
    return flags


def main() -> None:
    flags = parse()
    if flags.point:
        if flags.point != "turns":
            flags.prompt_tokens, flags.new_tokens = map(int, flags.point.split("x"))
        print(json.dumps(measure(flags)), flush=True)
        return
    peak = arithmetic.matmul_peak(flags.dtype, flags.peak_size)
    results: dict[str, Any] = {"matmul_operations_per_s": peak, "points": {}}
    for point in flags.points:
        # A process of its own: the peak of its memory is that of this point.
        command = [sys.executable, *sys.argv, f"--point={point}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        found["floor_s"] = {name: one / peak for name, one in found["operations"].items()}
        results["points"][point] = found
        print(workload.rounded(found), flush=True)
    workload.report(flags, results)


if __name__ == "__main__":
    main()
