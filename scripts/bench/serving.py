"""A server with many clients beside the same requests in the process itself, in turn.

    python scripts/bench/serving.py --model=MODEL [--clients=64] [--rounds=3] [--dtype=bfloat16]
    python scripts/bench/serving.py --model=tests/data/tiny --prompt_tokens=16 --new_tokens=44 --long_prompt=30 \
        --s_per_decode_step=0.1 --s_per_prefill=0.1

Every client asks once, for an answer of its own length, with token ids and a seed; the clients are another process.
`ratio` is the median of the server's throughput over the engine's, `cpu_ratio` the same by this process's own time,
which other processes on the machine disturb less; `wrong` counts answers that differ from the engine's. The times to
a first token are those of one long prompt that the server has not seen, and of the same once more. With
`--s_per_decode_step` a stand-in sleeps in the place of the device, so that what is measured is how the server fills
dispatches, on any machine; its answers are random and not compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import workload
from standin import Replaced, Timed

from rftjax.sampler import device
from rftjax.sampler.engine import Engine, noise_key
from rftjax.serving.app import App
from rftjax.serving.server import Background, listen
from rftjax.serving.service import Service
from rftjax.serving.tracing import Tracing
from rftjax.serving.turns import SERVED, Model
from rftjax.text import tokenizer
from rftjax.types import SamplingParams

KEY, NAME = "bench", "bench"
Asked = tuple[list[int], int, int]  # prompt, tokens of the answer, seed


def requests(flags: argparse.Namespace, vocab: int, first: int) -> list[Asked]:
    """Returns a request a client, prompts and answers of mixed lengths up to those of the flags."""
    rng = np.random.default_rng(first)
    found = []
    for index in range(flags.clients):
        count = int(rng.integers(flags.prompt_tokens // 2, flags.prompt_tokens + 1))
        prompt = rng.integers(3, vocab - 1, count).tolist()
        most = int(rng.integers(max(1, flags.new_tokens // 8), flags.new_tokens + 1))
        found.append((prompt, most, first + index))
    return found


def in_process(engine: Engine, asked: list[Asked]) -> list[list[int]]:
    """Returns the engine's own answers."""
    answers: dict[int, list[int]] = {}
    for index, (prompt, most, seed) in enumerate(asked):
        engine.open((index, 0), prompt, most, noise_key(SERVED, seed, 0), SamplingParams())
    while engine.busy:
        for turn in engine.step():
            answers[turn.key[0]] = turn.tokens
            engine.close(turn.key)
    return [answers[index] for index in range(len(asked))]


async def ask_all(url: str, asked: list[Asked]) -> tuple[list[list[int]], float]:
    """Returns the server's answers and the seconds until all were there."""
    limits: dict[str, Any] = {"max_retries": 0, "timeout": 3600}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, **limits) as client:

        async def ask(prompt: list[int], most: int, seed: int) -> list[int]:
            answer = await client.completions.create(
                model=NAME,
                prompt=prompt,
                max_tokens=most,
                seed=seed,
                extra_body={"return_token_ids": True},
            )
            choice: Any = answer.choices[0].to_dict()
            return choice["token_ids"]

        await client.models.list()  # connects
        start_s = time.perf_counter()
        answers = await asyncio.gather(*(ask(*one) for one in asked))
        return answers, time.perf_counter() - start_s


def clients(url: str, asked: list[Asked]) -> tuple[list[list[int]], float]:
    """Returns what `ask_all` does, from a process of its own."""
    given = json.dumps([url, asked])
    command = [sys.executable, str(Path(__file__)), "--as_client"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def first_token_s(url: str, prompt: list[int]) -> float:
    """Returns the seconds from a request to its first token."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        client.models.list()
        start_s = time.perf_counter()
        answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=1, stream=True)
        for _ in answer:
            return time.perf_counter() - start_s
    raise AssertionError("no token came")


def main(flags: argparse.Namespace) -> dict[str, Any]:
    if not flags.s_per_decode_step:
        return measure(flags)
    words = list(range(3, 8))
    with Replaced(Timed(words, words[0], flags.s_per_decode_step, flags.s_per_prefill)):
        return measure(flags) | {"wrong": 0}


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Runs the rounds and the two requests with a long prompt."""
    config, params = workload.load(flags)
    words = tokenizer.load(flags.model)
    vocab = min(tokenizer.vocabulary(words), config.vocab)
    length = max(flags.prompt_tokens + flags.new_tokens, flags.long_prompt + 8)
    engine = Engine(
        config,
        slots=flags.slots,
        max_length=min(length, config.max_positions),
        limit=vocab,
        dispatch_steps=flags.dispatch_steps,
        bridge_steps=flags.bridge_steps,
        prefill_rows=flags.prefill_rows,
        prefill_chunk=flags.prefill_chunk,
    )
    engine.set_params(device.sampler_params(config, params))
    in_process(engine, requests(flags, vocab, 10**6))  # compiles
    service = Service(engine)
    model = Model(NAME, words, (), (), engine.max_length)
    app = App(
        service,
        model,
        SamplingParams(),
        Tracing(),
        key=KEY,
        max_bytes=2**24,
        max_waiting=10**6,
    )
    server = Background(app.routes(), listen("127.0.0.1", 0))
    ratios, cpu_ratios, rates, wrong = [], [], [], 0
    try:
        for number in range(flags.rounds):
            asked = requests(flags, vocab, 1000 * number)
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            wanted = service.run(lambda asked=asked: in_process(engine, asked))
            own_s, own_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
            # Nothing of these prompts is in the cache, as nothing was for the engine alone.
            service.run(engine.release)
            start_cpu_s = time.process_time()
            answers, served_s = clients(server.url, asked)
            served_cpu_s = time.process_time() - start_cpu_s
            wrong += sum(one != other for one, other in zip(wanted, answers, strict=True))
            ratios.append(own_s / served_s)
            cpu_ratios.append(own_cpu_s / served_cpu_s)
            rates.append(sum(map(len, wanted)) / served_s)
            service.run(engine.release)
            print(f"round {number}: {rates[-1]:.0f} tokens/s, {ratios[-1]:.3f} of the engine's")
        rng = np.random.default_rng(flags.seed)
        long = [rng.integers(3, vocab - 1, flags.long_prompt).tolist() for _ in range(2)]
        first_token_s(server.url, long[0])  # compiles the longer cache
        times = [first_token_s(server.url, long[1]) for _ in range(2)]
    finally:
        server.close()
        service.stop()
    return {
        "clients": flags.clients,
        "ratio": statistics.median(ratios),
        "cpu_ratio": statistics.median(cpu_ratios),
        "tokens_per_s": statistics.median(rates),
        "wrong": wrong,
        "first_token_s": times[0],
        "first_token_again_s": times[1],
    }


if __name__ == "__main__":
    if "--as_client" in sys.argv:
        print(json.dumps(asyncio.run(ask_all(*json.loads(sys.stdin.read())))))
    else:
        parser = workload.arguments(__doc__)
        workload.add_engine_flags(parser)
        parser.add_argument("--clients", type=int, default=64)
        parser.add_argument("--rounds", type=int, default=3)
        parser.add_argument("--s_per_decode_step", type=float, default=0.0)
        parser.add_argument("--s_per_prefill", type=float, default=0.0)
        parser.add_argument("--long_prompt", type=int, default=512, help="tokens")
        given = parser.parse_args()
        workload.report(given, main(given))
