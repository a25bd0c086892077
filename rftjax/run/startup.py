"""Compiles what a step calls before the first one, and counts what is compiled after it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import jax

from rftjax.devices import processes
from rftjax.devices.compilation import Program, compiling
from rftjax.learning.learner import Learner
from rftjax.monitor.recorder import Recorder
from rftjax.run.build import Parts
from rftjax.run.sampling import sampling_params
from rftjax.tasks import TaskStream
from rftjax.text import chat


@contextlib.contextmanager
def compile_ahead(
    parts: Parts, learner: Learner, stream: TaskStream, recorder: Recorder, *, needed: bool = True
) -> Iterator[None]:
    """Compiles what the next step calls while the caller reads weights; says how many programs and how long.

    From then on the calls of a longer cache are compiled beside the steps, before one needs them.
    Does nothing where no step is `needed`.
    """
    if not needed:
        yield
        return
    began_s = time.monotonic()
    with (
        recorder.time("startup", in_step=False),
        compiling(_programs(parts, learner, stream)),
    ):
        yield
    if jax.process_count() == 1:  # processes would not compile at the same moments
        parts.rollout.engine.compile_behind = parts.compilations.behind
    found = parts.compilations.take()
    recorder.say(
        f"compiled {found['compile/programs']:.0f} programs in {time.monotonic() - began_s:.1f} s,"
        f" {found['compile/cached']:.0f} of them from the cache"
    )


def _programs(parts: Parts, learner: Learner, stream: TaskStream) -> Iterator[Program]:
    state = parts.state_builder.abstract_state
    yield from learner.programs(state)
    weights = parts.sampler_weights.abstract(state)
    ahead = stream.upcoming(parts.config.batch.prompts + parts.config.rollout.partial)
    prompts = chat.prompts(parts.policy.tokenizer, ahead, tools=parts.environments.tools or None)
    params = sampling_params(parts.config)
    yield from parts.rollout.engine.programs(
        weights, max(map(len, prompts)), params.max_new_tokens, filtered=params.filtered
    )


def step_counts(parts: Parts) -> dict[str, float]:
    """Returns metrics of what happened since the last call: programs compiled, cache rows evicted from waiting
    conversations, and bystanders of faults in user code; the latter two of all processes."""
    metrics: dict[str, float] = {}
    if parts.config.environment or parts.config.agent:
        counters = parts.rollout.engine.counters
        metrics["throughput/evicted_rows"] = float(counters.evicted_rows)
        counters.evicted_rows = 0
        metrics["environment/bystanders"] = float(parts.rollout.bystanders)
    metrics["evaluator/bystanders"] = float(parts.scorer.bystanders)
    everywhere = processes.gather(metrics)
    summed = {name: math.fsum(one[name] for one in everywhere) for name in metrics}
    return parts.compilations.take() | summed
