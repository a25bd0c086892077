"""The host's part of a step: scheduling, messages, environments' answers and batching, without the device's work.

    python scripts/bench/host.py --model=PATH [--forms=step,tails] [--conversations=4096] [--s_per_decode_step=0.1]

step: conversations of several turns run through the rollout, the scheduler, the chat template and real worker
processes; what the device would compute is left out: stand-ins take its calls and give random tokens back. `host_s` is
the processor time of this process (its worker processes run beside it). With `--s_per_decode_step`, as `decode.py`
measures it for a model, `share` is the host's part of host and device time together. The same is measured for a
quarter of the conversations, and for a quarter of them with four times the turns: `growth` is the cost of a turn beside
that, 1.0 where cost is in proportion.

tails: decode steps of `answers` whose lengths are lognormal up to `longest`, beside the bound, the larger of tokens
over slots and the longest. `in_order` is the first time that tasks are drawn, `by_earlier_lengths` the second, when
those whose answers were long before start first; `shared_P` says what part P of the logarithm's variance lies between
tasks. `partial` are `partial_steps` steps with `rollout.partial` a quarter of a step's prompts; its bound is the
number of sampled tokens over the slots.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import workload
from standin import Replaced, StandIn

import rftjax
from rftjax.environments import Environments
from rftjax.learning.batching import make_batch
from rftjax.monitor.step_metrics import rollout_metrics
from rftjax.rollout import Rollout
from rftjax.run.partial import Partial
from rftjax.sampler.engine import Counters, Engine
from rftjax.tasks import TaskStream
from rftjax.types import SamplingParams, Score, Task, TrainState, Trajectory

WORDS = "the sum of two numbers is what you get when you count on from the first by the second . "
ENVIRONMENT = """
def reply(task, messages):
    said = sum(message["role"] == "assistant" for message in messages)
    return None if said == {turns} else [{{"role": "user", "content": {text!r}}}]
"""


def small_engine(flags: Any, policy: rftjax.Policy, length: int, *, parked: int) -> Engine:
    """Returns a sampler whose cache takes no memory to speak of."""
    config = dataclasses.replace(policy.config, layers=1, width=8, heads=1, kv_heads=1, channels=8)
    engine = Engine(
        config,
        slots=flags.slots,
        parked=parked,
        max_length=length,
        stops=[policy.stop_tokens(())[0]],
        dispatch_steps=flags.dispatch_steps,
        prefill_rows=flags.prefill_rows,
        prefill_chunk=flags.prefill_chunk,
    )
    engine.set_params({})
    return engine


def run(flags: Any, policy: rftjax.Policy, conversations: int, turns: int) -> dict[str, float]:
    """Measures one step of so many conversations and turns; each turn samples `turn_tokens`."""
    tokenizer = policy.tokenizer
    stop = policy.stop_tokens(())[0]
    standin = StandIn(tokenizer.encode(WORDS * 4, add_special_tokens=False), stop)
    length = flags.prompt_tokens + turns * (flags.turn_tokens + flags.environment_tokens + 32) + 64
    engine = small_engine(flags, policy, length, parked=flags.slots)
    words = (WORDS * (1 + flags.environment_tokens // 20)).split()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "environment.py"
        text = " ".join(words[: flags.environment_tokens])
        source.write_text(ENVIRONMENT.format(turns=turns, text=text))
        with Environments(f"{source}:reply") as environments, Replaced(standin):
            rollout = Rollout(engine, tokenizer, environments)
            prompt = " ".join((words * 9)[: flags.prompt_tokens])
            texts = [f"{draw} {prompt}" for draw in range(conversations // flags.group)]
            plain = not tokenizer.chat_template
            tasks = [
                Task(text, [{"role": "user", "content": text}], prompt=text if plain else None)
                for text in texts
            ]
            params = SamplingParams(flags.turn_tokens, turns)
            start, wall = time.process_time(), time.perf_counter()
            trajectories = rollout(enumerate(tasks), flags.group, params)
            rollout_s, wall_s = time.process_time() - start, time.perf_counter() - wall
    start = time.process_time()
    rollout_metrics(score(trajectories))
    metrics_s = time.process_time() - start
    start = time.process_time()
    rows = conversations
    longest = max(len(one.sequences[-1].tokens) for one in trajectories)
    make_batch(trajectories, rows=rows, max_length=longest, pack_tokens=flags.pack_tokens)
    batch_s = time.process_time() - start
    assert all(one.turns == turns for one in trajectories), "a conversation ended early"
    return {
        "host_s": rollout_s + metrics_s + batch_s,
        "rollout_s": rollout_s,
        "metrics_s": metrics_s,
        "batch_s": batch_s,
        "wall_s": wall_s,
        "decode_steps": engine.counters.decode_steps,
        "device_calls": standin.calls,
        "tokens": sum(len(s.tokens) for one in trajectories for s in one.sequences),
    }


def tails(flags: Any, policy: rftjax.Policy, shared: float) -> dict[str, Any]:
    """Counts decode steps of answers of lognormal lengths, drawn twice and in steps that carry what is unfinished."""
    rng = np.random.default_rng(flags.seed)
    tasks = [
        Task(str(index), [{"role": "user", "content": WORDS}], prompt=WORDS)
        for index in range(flags.answers // flags.group)
    ]
    between_P = rng.normal(size=len(tasks)) * shared**0.5
    own_NPG = rng.normal(size=(10, len(tasks), flags.group)) * (1 - shared) ** 0.5
    lengths_NPG = np.exp(np.log(flags.median_tokens) + flags.sigma * (between_P[:, None] + own_NPG))
    lengths_NPG = np.clip(np.rint(lengths_NPG), 16, flags.longest).astype(int)
    prompt = len(policy.tokenizer.encode(WORDS))
    lengths = lengths_NPG.reshape(-1, flags.group)
    standin = StandIn(
        policy.tokenizer.encode(WORDS, add_special_tokens=False),
        policy.stop_tokens(())[0],
        lambda draw, sample: prompt + int(lengths[draw, sample]),
    )
    engine = small_engine(flags, policy, prompt + flags.longest + 8, parked=flags.slots)
    params = SamplingParams(flags.longest)
    found: dict[str, Any] = {}
    with Environments("") as environments, Replaced(standin):
        rollout = Rollout(engine, policy.tokenizer, environments)
        for name, epoch in (("in_order", 0), ("by_earlier_lengths", 1)):
            engine.counters = Counters()
            engine.set_params({})
            draws = [(epoch * len(tasks) + place, task) for place, task in enumerate(tasks)]
            rollout(draws, flags.group, params)
            now = lengths_NPG[epoch]
            found[name] = over(flags, engine.counters, max(-(-now.sum() // flags.slots), now.max()))
        carrying = Rollout(engine, policy.tokenizer, environments)
        partial = Partial(
            TaskStream(tasks, seed=0, shuffle=False),
            carrying,
            lambda state: engine.set_params({}),
            lambda draws, wanted: carrying(draws, flags.group, params, wanted=wanted),
            engine.release,
            max(len(tasks) // 4, 1),
        )
        engine.counters = Counters()
        for step in range(flags.partial_steps):
            partial.take(TrainState(step, {}, {}, ()), len(tasks))
        found["partial"] = over(
            flags, engine.counters, engine.counters.sampled_tokens / flags.slots
        )
    return found


def over(flags: Any, counters: Counters, bound: float) -> dict[str, float]:
    """Returns the decode steps that were taken, and what they are of the bound."""
    return {"decode_steps": counters.decode_steps, "over_bound": counters.decode_steps / bound}


def score(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Gives every trajectory a score, so that all of them are laid out."""
    for trajectory in trajectories:
        trajectory.score, trajectory.advantage = Score(float(trajectory.sample % 2)), 1.0
    return trajectories


def main() -> None:
    parser = workload.arguments(__doc__)
    workload.add_engine_flags(parser)
    parser.add_argument("--conversations", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--turn_tokens", type=int, default=64, help="sampled in each turn")
    parser.add_argument("--environment_tokens", type=int, default=100, help="words of an answer")
    parser.add_argument("--pack_tokens", type=int, default=2048)
    parser.add_argument("--s_per_decode_step", type=float, default=0.0)
    parser.add_argument("--forms", default="step,tails")
    parser.add_argument("--answers", type=int, default=1024)
    parser.add_argument("--shared", default="0.0,0.5,0.8")
    parser.add_argument("--partial_steps", type=int, default=4)
    parser.add_argument("--median_tokens", type=float, default=512.0)
    parser.add_argument("--sigma", type=float, default=1.0, help="of the lengths' logarithm")
    parser.add_argument("--longest", type=int, default=4096)
    flags = parser.parse_args()
    if not flags.model or not set(flags.forms.split(",")) <= {"step", "tails"}:
        parser.error("--model: needed, for its tokenizer; --forms: step, tails")
    policy = rftjax.load(flags.model)
    results: dict[str, Any] = {}
    if "tails" in flags.forms:
        results["tails"] = {
            f"shared_{shared}": tails(flags, policy, float(shared))
            for shared in flags.shared.split(",")
        }
        print(f"tails: {workload.rounded(results['tails'])}", flush=True)
    if "step" in flags.forms:
        results |= step(flags, policy)
    workload.report(flags, results)


def step(flags: Any, policy: rftjax.Policy) -> dict[str, Any]:
    """Measures a step, one of a quarter of the conversations, and one of these with four times the turns."""
    run(flags, policy, 2 * flags.group, 2)
    whole = run(flags, policy, flags.conversations, flags.turns)
    fewer = run(flags, policy, flags.conversations // 4, flags.turns)
    longer = run(flags, policy, flags.conversations // 4, 4 * flags.turns)
    results: dict[str, Any] = {"step": whole, "fewer": fewer, "longer": longer}
    results["growth"] = {
        "conversations": whole["host_s"] / fewer["host_s"] / 4,
        "turns": longer["host_s"] / fewer["host_s"] / 4,
    }
    if flags.s_per_decode_step:
        device_s = whole["decode_steps"] * flags.s_per_decode_step
        results["device_s"] = device_s
        results["share"] = whole["host_s"] / (whole["host_s"] + device_s)
    return results


if __name__ == "__main__":
    main()
