"""The update alone, on random tokens: prompts shared by their group (packed) and one sequence a row (unpacked).

    python scripts/bench/update.py --model=PATH [--dtype=bfloat16] [--steps=4] [--peak=OPERATIONS_A_SECOND]

Tokens a second count every sequence's prompt and completion, whatever the layout computes, so that the two forms
compare. The share of the peak counts the operations that the layout needs, without padding and without remat.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from typing import Any

import arithmetic
import jax
import numpy as np
import step as whole_step
import workload

from rftjax.learning.batching import make_batch, most_scored
from rftjax.models.config import Config
from rftjax.models.remat import REMATS
from rftjax.types import Batch, TrainState


def random_batch(config: Config, flags: argparse.Namespace, *, packed: bool) -> Batch:
    """Returns the fixed workload with random completions and advantages, micro-batches of about equal size."""
    rng = np.random.default_rng(flags.seed)
    trajectories = []
    for draw in range(flags.prompts):
        prompt = workload.random_tokens(config, rng, flags.prompt_tokens)
        for one in range(flags.group):
            tokens = workload.random_tokens(config, rng, flags.new_tokens)
            logprobs = [-float(np.log(config.vocab))] * flags.new_tokens
            trajectories.append(workload.trajectory(prompt, tokens, logprobs, draw, one))
    whole_step.set_advantages(trajectories)
    length = flags.prompt_tokens + flags.new_tokens
    budget = whole_step.pack_tokens(flags)
    tokens, sampled = (
        (budget, flags.group * flags.new_tokens) if packed else (length, flags.new_tokens)
    )
    return make_batch(
        trajectories,
        rows=flags.prompts * flags.group,
        max_length=length,
        pack_tokens=tokens,
        pack_scored=most_scored(tokens, prompt=flags.prompt_tokens, sampled=sampled),
        pack_rows=flags.pack_rows if packed else max(1, flags.pack_rows * budget // length),
        share_prefix=packed,
    )


def measure(
    config: Config,
    state: TrainState,
    step: whole_step.Update,
    flags: argparse.Namespace,
    peak: float,
    *,
    packed: bool,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the last state and the results of one layout."""
    batch = random_batch(config, flags, packed=packed)
    lap, seconds = workload.Lap(), []
    metrics: dict[str, Any] = {}
    for number in range(flags.steps):
        traced = flags.profile and packed and number == flags.steps - 1
        with jax.profiler.trace(flags.profile) if traced else contextlib.nullcontext():
            lap()
            state, metrics = step(state, batch)
            metrics = jax.device_get(metrics)
            seconds.append(lap())
    s = statistics.median(seconds[1:] or seconds)
    operations = arithmetic.step_operations(
        config,
        prompts=flags.prompts,
        group=flags.group,
        prompt=flags.prompt_tokens,
        new=flags.new_tokens,
        shared=packed,
    )["update"]
    tokens = flags.prompts * flags.group * (flags.prompt_tokens + flags.new_tokens)
    laid_out = int(batch.micro_batches) * int(np.prod(batch.pack.tokens_RX.shape[1:]))
    return state, {
        "update_s": s,
        "first_s": seconds[0],
        "tokens_per_s": tokens / s,
        "micro_batches": int(batch.micro_batches),
        "tokens_laid_out": laid_out,
        "tokens_in_use": int((batch.pack.groups_RX > 0).sum()),
        "operations": operations,
        "operations_per_s": operations / s,
        "floor_s": operations / peak,
        "peak_share": operations / peak / s,
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
    }


def parse() -> argparse.Namespace:
    """Returns the flags; `forms` as a list."""
    parser = workload.arguments(__doc__)
    parser.add_argument("--forms", default="packed,unpacked")
    parser.add_argument("--steps", type=int, default=4, help="the first, which compiles, included")
    parser.add_argument("--pack_tokens", type=int, default=0, help="0: as a job chooses")
    parser.add_argument("--pack_rows", type=int, default=1)
    parser.add_argument("--remat", default="", choices=REMATS)
    parser.add_argument("--peak", type=float, default=0.0, help="operations a second; 0: measured")
    parser.add_argument(
        "--peak_size", type=int, default=2048, help="of the product that measures it"
    )
    parser.add_argument(
        "--profile", default="", help="folder for a trace of the last packed update"
    )
    flags = parser.parse_args()
    flags.forms = flags.forms.split(",")
    if set(flags.forms) - {"packed", "unpacked"}:
        parser.error("--forms: packed, unpacked")
    return flags


def main() -> None:
    flags = parse()
    clock = workload.CompileClock()
    measured = arithmetic.matmul_peak(flags.dtype, flags.peak_size)
    peak = flags.peak or measured
    config, params = workload.load(flags)
    state, step = whole_step.start(config, params, flags)
    del params
    results: dict[str, Any] = {"peak_operations_per_s": peak, "matmul_operations_per_s": measured}
    for form in flags.forms:
        state, results[form] = measure(config, state, step, flags, peak, packed=form == "packed")
        print(f"{form}: {workload.rounded(results[form])}", flush=True)
    results |= {"peak_bytes": workload.peak_bytes(), "compile_s": clock.seconds}
    workload.report(flags, results)


if __name__ == "__main__":
    main()
