"""Sampling alone: fixed lengths, mixed lengths, several turns.

    python scripts/bench/sample.py --model=PATH [--forms=fixed,mixed,turns] [--dtype=bfloat16]

fixed   `slots` conversations of `prompt_tokens` + `new_tokens`: seconds a decode step against what memory allows
mixed   256 requests of lognormal length, 16 to 512 tokens: decode steps against the lower bound
turns   `prompts` x `group` conversations of four turns, 100 tokens of an environment before each but the first:
        tokens prefilled against tokens that are new

Each form runs `1 + repeats` times and the first run, which compiles, is left out of the times.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
from typing import Any

import arithmetic
import numpy as np
import workload

from rftjax.models.config import Config
from rftjax.sampler.engine import Counters, Engine
from rftjax.types import Params

Key = tuple[int, int]


def decode(engine: Engine) -> list[tuple[float, int]]:
    """Samples all that is open to its end; returns seconds and decode steps of every dispatch."""
    laps, lap = [], workload.Lap()
    while engine.busy:
        before = engine.counters.decode_steps
        for turn in engine.step():
            engine.close(turn.key)
        laps.append((lap(), engine.counters.decode_steps - before))
    return laps


def fixed(config: Config, params: Params, flags: argparse.Namespace) -> dict[str, Any]:
    """Measures decoding with every slot busy from beginning to end."""
    engine = workload.make_engine(config, flags, flags.prompt_tokens + flags.new_tokens)
    runs, compiled_s = [], 0.0
    for run in range(1 + flags.repeats):
        engine.set_params(params)
        rng = np.random.default_rng(flags.seed)
        for draw in range(-(-flags.slots // flags.group)):
            prompt = workload.random_tokens(config, rng, flags.prompt_tokens)
            for one in range(min(flags.group, flags.slots - draw * flags.group)):
                engine.open((draw, one), prompt, flags.new_tokens, workload.noise(draw, one))
        laps = decode(engine)
        if run == 0:
            compiled_s = sum(seconds for seconds, _ in laps)
        else:
            runs.append(laps)
    # The first dispatch computes the prompts as well.
    rates = [seconds / steps for laps in runs for seconds, steps in laps[1:] or laps]
    s_per_decode_step = statistics.median(rates)
    total_s = statistics.median(sum(seconds for seconds, _ in laps) for laps in runs)
    cached = flags.prompt_tokens + flags.new_tokens / 2
    needed = arithmetic.decode_bytes(config, rows=flags.slots, cached=cached)
    bandwidth = flags.bandwidth or arithmetic.read_bandwidth(flags.copy_mebibytes)
    return {
        "s": total_s,
        "first_s": compiled_s,
        "s_per_decode_step": s_per_decode_step,
        "tokens_per_s": flags.slots * flags.new_tokens / total_s,
        "bytes_per_decode_step": needed,
        "bytes_per_s": needed / s_per_decode_step,
        "bandwidth_bytes_per_s": bandwidth,
        "floor_s_per_decode_step": needed / bandwidth,
        "bandwidth_share": needed / bandwidth / s_per_decode_step,
    }


def request_lengths(flags: argparse.Namespace, count: int) -> list[int]:
    """Returns tokens to sample a request: lognormal, cut off at both ends."""
    rng = np.random.default_rng(flags.seed)
    drawn = rng.lognormal(np.log(flags.median_tokens), flags.sigma, count)
    return np.clip(np.rint(drawn), flags.shortest, flags.longest).astype(int).tolist()


def refilled_at_once(lengths: list[int], slots: int) -> int:
    """Returns the steps of slots that take the next request, in order, the moment they are free."""
    ends = [0] * slots
    for length in lengths:
        heapq.heappush(ends, heapq.heappop(ends) + length)
    return max(ends)


def mixed(config: Config, params: Params, flags: argparse.Namespace) -> dict[str, Any]:
    """Measures how much of the decode steps is spent on idle slots."""
    lengths = request_lengths(flags, flags.requests)
    engine = workload.make_engine(config, flags, flags.prompt_tokens + max(lengths))
    times, counters = [], Counters()
    for _ in range(1 + flags.repeats):
        engine.set_params(params)
        engine.counters = counters = Counters()
        rng = np.random.default_rng(flags.seed)
        prompt: list[int] = []
        for number, length in enumerate(lengths):
            draw, one = divmod(number, flags.group)
            if one == 0:
                prompt = workload.random_tokens(config, rng, flags.prompt_tokens)
            engine.open((draw, one), prompt, length, workload.noise(draw, one))
        times.append(sum(seconds for seconds, _ in decode(engine)))
    bound = max(-(-sum(lengths) // flags.slots), max(lengths))
    batches = [lengths[at : at + flags.slots] for at in range(0, len(lengths), flags.slots)]
    seconds = statistics.median(times[1:] or times)
    return {
        "s": seconds,
        "first_s": times[0],
        "tokens": sum(lengths),
        "tokens_per_s": sum(lengths) / seconds,
        "longest": max(lengths),
        "decode_steps": counters.decode_steps,
        "dispatches": counters.dispatches,
        "lower_bound_steps": bound,
        "steps_over_bound": counters.decode_steps / bound,
        "steps_refilled_at_once": refilled_at_once(lengths, flags.slots),
        "steps_longest_first": refilled_at_once(sorted(lengths, reverse=True), flags.slots),
        "steps_without_refilling": sum(max(batch) for batch in batches),
    }


def converse(engine: Engine, flags: argparse.Namespace, rng: np.random.Generator) -> None:
    """Runs the conversations to their end; an environment answers 0 to `wait_dispatches` dispatches after its turn."""
    prompts = {
        draw: workload.random_tokens(engine.config, rng, flags.prompt_tokens)
        for draw in range(flags.prompts)
    }
    left: dict[Key, int] = {}
    for draw, prompt in prompts.items():
        for one in range(flags.group):
            engine.open((draw, one), prompt, flags.turn_tokens, workload.noise(draw, one))
            left[draw, one] = flags.turns - 1
    waiting: list[tuple[int, Key]] = []
    now = 0
    while engine.busy or waiting:
        now += 1
        due = [key for at, key in waiting if at <= now or not engine.busy]
        waiting = [(at, key) for at, key in waiting if key not in due]
        for key in due:
            said = workload.random_tokens(engine.config, rng, flags.environment_tokens)
            engine.extend(key, said, flags.turn_tokens)
        for turn in engine.step():
            if left[turn.key]:
                left[turn.key] -= 1
                waiting.append((now + int(rng.integers(0, flags.wait_dispatches + 1)), turn.key))
            else:
                engine.close(turn.key)


def turns(config: Config, params: Params, flags: argparse.Namespace) -> dict[str, Any]:
    """Measures whether any token of a conversation is computed twice."""
    length = flags.prompt_tokens + flags.turns * flags.turn_tokens
    length += (flags.turns - 1) * flags.environment_tokens
    engine = workload.make_engine(config, flags, length, parked=flags.slots)
    times, counters = [], Counters()
    for _ in range(1 + flags.repeats):
        engine.set_params(params)
        engine.counters = counters = Counters()
        lap = workload.Lap()
        converse(engine, flags, np.random.default_rng(flags.seed))
        times.append(lap())
    # A prompt's last token is the first decode step's input: nothing has to prefill it.
    new = flags.prompts * (flags.prompt_tokens - 1)
    new += flags.prompts * flags.group * (flags.turns - 1) * flags.environment_tokens
    seconds = statistics.median(times[1:] or times)
    return {
        "s": seconds,
        "first_s": times[0],
        "sampled_tokens": counters.sampled_tokens,
        "tokens_per_s": counters.sampled_tokens / seconds,
        "decode_steps": counters.decode_steps,
        "prefilled_tokens": counters.prefilled_tokens,
        "new_tokens": new,
        "prefilled_over_new": counters.prefilled_tokens / new,
        "copied_rows": counters.copied_rows,
        "evicted_rows": counters.evicted_rows,
    }


FORMS = {"fixed": fixed, "mixed": mixed, "turns": turns}


def parse() -> argparse.Namespace:
    """Returns the flags; `forms` as a list."""
    parser = workload.arguments(__doc__)
    workload.add_engine_flags(parser)
    parser.add_argument("--forms", default="fixed,mixed,turns")
    parser.add_argument("--repeats", type=int, default=1, help="runs after the one that compiles")
    parser.add_argument("--bandwidth", type=float, default=0.0, help="bytes a second; 0: measured")
    parser.add_argument("--copy_mebibytes", type=int, default=256, help="to measure bandwidth with")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--median_tokens", type=float, default=128.0)
    parser.add_argument("--sigma", type=float, default=0.7, help="of the lengths' logarithm")
    parser.add_argument("--shortest", type=int, default=16)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--turn_tokens", type=int, default=32, help="sampled in each turn")
    parser.add_argument("--environment_tokens", type=int, default=100)
    parser.add_argument("--wait_dispatches", type=int, default=2)
    flags = parser.parse_args()
    flags.forms = flags.forms.split(",")
    unknown = set(flags.forms) - set(FORMS)
    if unknown or flags.repeats < 1:
        parser.error(f"--forms: {', '.join(FORMS)}; --repeats: at least 1")
    return flags


def main() -> None:
    flags = parse()
    clock = workload.CompileClock()
    config, masters = workload.load(flags)
    params = workload.sampler_params(config, masters)
    del masters
    results: dict[str, Any] = {}
    for form in flags.forms:
        results[form] = FORMS[form](config, params, flags)
        print(f"{form}: {workload.rounded(results[form])}", flush=True)
    results |= {"peak_bytes": workload.peak_bytes(), "compile_s": clock.seconds}
    workload.report(flags, results)


if __name__ == "__main__":
    main()
