"""One whole GRPO step on the fixed workload: sample, reward, advantages, batch, update.

    python scripts/bench/step.py --model=PATH [--dtype=bfloat16] [--steps=4]

The first step compiles and is left out of the median. `--profile=DIR` records the last step for TensorBoard.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import arithmetic
import jax
import jax.numpy as jnp
import numpy as np
import workload

from rftjax import grpo
from rftjax.learning import optim, update
from rftjax.learning.batching import make_batch, most_scored
from rftjax.learning.row_length import Group, row_tokens
from rftjax.models.config import Config
from rftjax.models.remat import REMATS
from rftjax.sampler.engine import Engine
from rftjax.types import Params, TrainState, Trajectory

Update = Callable[..., tuple[TrainState, dict[str, Any]]]


def start(config: Config, params: Params, flags: argparse.Namespace) -> tuple[TrainState, Update]:
    """Returns step 0 and the jitted update: Adam behind a clip, loss of the grpo preset."""
    optimizer = optim.make_optimizer(lr=1e-6, steps=max(1, flags.steps))
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, {}, jax.jit(optimizer.init)(params))
    fields = grpo.preset_fields("grpo")
    step = update.make_update(
        config,
        optimizer,
        grpo.LossSettings.of(fields),
        remat=flags.remat,
        unroll=jax.default_backend() == "cpu",
    )
    return state, step


def sample(
    engine: Engine, prompts: dict[int, list[int]], flags: argparse.Namespace
) -> list[Trajectory]:
    """Returns `flags.group` completions of every prompt, in order."""
    for draw, prompt in prompts.items():
        for one in range(flags.group):
            engine.open((draw, one), prompt, flags.new_tokens, workload.noise(draw, one))
    turns = {}
    while engine.busy:
        for turn in engine.step():
            engine.close(turn.key)
            turns[turn.key] = turn
    return [
        workload.trajectory(prompts[draw], turn.tokens, turn.logprobs, draw, one)
        for (draw, one), turn in sorted(turns.items())
    ]


def set_advantages(trajectories: list[Trajectory]) -> None:
    """Sets each trajectory's advantage within its group."""
    rewards = [one.score.reward for one in trajectories if one.score is not None]
    values = grpo.advantages(rewards, [one.draw for one in trajectories])
    for one, value in zip(trajectories, values, strict=True):
        one.advantage = float(value)


def pack_tokens(flags: argparse.Namespace) -> int:
    """Returns the length of a packed row: as asked for, else what a job chooses without a bound on memory."""
    group = Group(flags.prompt_tokens, flags.new_tokens, flags.group)
    return flags.pack_tokens or row_tokens(group, flags.prompts)


def one_step(
    engine: Engine,
    state: TrainState,
    step: Update,
    prompts: dict[int, list[int]],
    flags: argparse.Namespace,
) -> tuple[TrainState, dict[str, Any], float, float]:
    """Returns the new state, the update's metrics, and the seconds of sampling and of the update."""
    lap = workload.Lap()
    engine.set_params(workload.sampler_params(engine.config, state.trainable))
    trajectories = sample(engine, prompts, flags)
    set_advantages(trajectories)
    sample_s = lap()
    engine.release()
    batch = make_batch(
        trajectories,
        rows=flags.prompts * flags.group,
        max_length=flags.prompt_tokens + flags.new_tokens,
        pack_tokens=pack_tokens(flags),
        pack_scored=most_scored(
            pack_tokens(flags), prompt=flags.prompt_tokens, sampled=flags.group * flags.new_tokens
        ),
        pack_rows=flags.pack_rows,
    )
    state, metrics = step(state, batch)
    metrics = jax.device_get(metrics)
    return state, metrics, sample_s, lap()


def parse() -> argparse.Namespace:
    """Returns the flags."""
    parser = workload.arguments(__doc__)
    workload.add_engine_flags(parser)
    parser.add_argument("--steps", type=int, default=4, help="the first, which compiles, included")
    parser.add_argument("--pack_tokens", type=int, default=0, help="0: as a job chooses")
    parser.add_argument("--pack_rows", type=int, default=1)
    parser.add_argument("--remat", default="", choices=REMATS)
    parser.add_argument("--profile", default="", help="folder for a trace of the last step")
    return parser.parse_args()


def main() -> None:
    flags = parse()
    clock, lap = workload.CompileClock(), workload.Lap()
    config, params = workload.load(flags)
    state, step = start(config, params, flags)
    del params  # the state, which holds them, is donated
    engine = workload.make_engine(config, flags, flags.prompt_tokens + flags.new_tokens)
    rng = np.random.default_rng(flags.seed)
    load_s, metrics = lap(), {}
    sample_s, update_s, programs = [], [], []
    for number in range(flags.steps):
        prompts = {
            number * flags.prompts + at: workload.random_tokens(config, rng, flags.prompt_tokens)
            for at in range(flags.prompts)
        }
        traced = flags.profile and number == flags.steps - 1
        with jax.profiler.trace(flags.profile) if traced else contextlib.nullcontext():
            state, metrics, *seconds = one_step(engine, state, step, prompts, flags)
        sample_s.append(seconds[0])
        update_s.append(seconds[1])
        programs.append(clock.programs)
        print(
            f"step {number + 1}: sample {seconds[0]:.3f} s, update {seconds[1]:.3f} s,"
            f" sampler and trainer {metrics['sampler/logprob_diff_max']:.1e} nats apart",
            flush=True,
        )
    steps_s = [a + b for a, b in zip(sample_s, update_s, strict=True)]
    s_per_step = statistics.median(steps_s[1:] or steps_s)
    tokens = flags.prompts * flags.group * flags.new_tokens
    results = {
        "s_per_step": s_per_step,
        "sample_s": statistics.median(sample_s[1:] or sample_s),
        "update_s": statistics.median(update_s[1:] or update_s),
        "peak_bytes": workload.peak_bytes(),
        "steps_s": steps_s,
        "load_s": load_s,
        "compile_s": clock.seconds,
        "programs": programs[0],
        "programs_after_first_step": programs[-1] - programs[0],
        "completion_tokens_per_s": tokens / s_per_step,
        "operations": arithmetic.step_operations(
            config,
            prompts=flags.prompts,
            group=flags.group,
            prompt=flags.prompt_tokens,
            new=flags.new_tokens,
        ),
        "logprob_diff_mean": float(metrics["sampler/logprob_diff_mean"]),
        "logprob_diff_max": float(metrics["sampler/logprob_diff_max"]),
    }
    workload.report(flags, results)


if __name__ == "__main__":
    main()
