"""The share of the time that the device is busy while 1,000 environments take 0 to 2 seconds for each answer.

    python scripts/bench/waiting.py --model=PATH [--conversations=1000] [--slots=256] [--s_per_decode_step=0.02]

The rollout, the scheduler and the worker processes are the real ones. The device is a stand-in that sleeps as long as a
decode step or a prefill of a model would take, so that the result depends little on the machine; the host's work is
not overlapped with it, as it would be in part with a real device. `busy_share` is the device's time over that of the
whole step, its last conversations included; `rows_share` is the part of the decoded rows that sampled a token;
`answers_at_once` is how many answers were awaited at once on average.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import host
import workload
from standin import Replaced, Timed

import rftjax
from rftjax.environments import Environments
from rftjax.rollout import Rollout
from rftjax.types import SamplingParams, Task

ENVIRONMENT = """
import asyncio, random

async def reply(task, messages):
    await asyncio.sleep(random.uniform(0.0, {longest_s}))
    said = sum(message["role"] == "assistant" for message in messages)
    return None if said == {turns} else [{{"role": "user", "content": "go on with the next one"}}]
"""


def measure(flags: Any, policy: rftjax.Policy) -> dict[str, float]:
    """Runs one step of all conversations."""
    words = policy.tokenizer.encode(host.WORDS * 4, add_special_tokens=False)
    standin = Timed(words, policy.stop_tokens(())[0], flags.s_per_decode_step, flags.s_per_prefill)
    length = flags.prompt_tokens + flags.turns * (flags.turn_tokens + 40) + 64
    parked = max(flags.conversations - flags.slots, 0)
    engine = host.small_engine(flags, policy, length, parked=parked)
    plain = None if policy.tokenizer.chat_template else host.WORDS
    tasks = [
        Task(str(draw), [{"role": "user", "content": f"{draw} {host.WORDS}"}], prompt=plain)
        for draw in range(flags.conversations // flags.group)
    ]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "environment.py"
        source.write_text(ENVIRONMENT.format(longest_s=flags.longest_s, turns=flags.turns))
        with (
            Environments(f"{source}:reply", workers=flags.workers) as environments,
            Replaced(standin),
        ):
            rollout = Rollout(engine, policy.tokenizer, environments)
            wall, cpu = time.perf_counter(), time.process_time()
            params = SamplingParams(flags.turn_tokens, flags.turns)
            trajectories = rollout(enumerate(tasks), flags.group, params)
            wall_s = time.perf_counter() - wall
            host_s = time.process_time() - cpu
    assert all(one.turns == flags.turns for one in trajectories), "a conversation ended early"
    counters = engine.counters
    waited_s = sum(one.turns for one in trajectories) * flags.longest_s / 2
    return {
        "busy_share": standin.busy_s / wall_s,
        "rows_share": counters.sampled_tokens / (counters.decode_steps * flags.slots),
        "wall_s": wall_s,
        "busy_s": standin.busy_s,
        "host_s": host_s,
        "answers_at_once": waited_s / wall_s,
        "decode_steps": counters.decode_steps,
        "device_calls": standin.calls,
    }


def main() -> None:
    parser = workload.arguments(__doc__)
    workload.add_engine_flags(parser)
    parser.set_defaults(slots=256)
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--turn_tokens", type=int, default=64, help="sampled in each turn")
    parser.add_argument("--longest_s", type=float, default=2.0, help="of an answer")
    parser.add_argument("--workers", type=int, default=16, help="each takes 64 calls at once")
    parser.add_argument("--s_per_decode_step", type=float, default=0.02)
    parser.add_argument("--s_per_prefill", type=float, default=0.02)
    flags = parser.parse_args()
    if not flags.model:
        parser.error("--model: needed, for its tokenizer")
    workload.report(flags, {"waiting": measure(flags, rftjax.load(flags.model))})


if __name__ == "__main__":
    main()
