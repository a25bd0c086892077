"""A decode step with so many cached tokens, beside its floor measured in the same process.

    python scripts/bench/decode.py --shape=smollm2-135m [--points=64x1024,8x4096] [--dtype=bfloat16]

A point is `ROWSxCACHED`: every row has about CACHED tokens in the cache. The floor of a step is the sum of

weights  all parameters read once, at the rate at which the machine sums an array
cache    the used part of the cache read once, at the same rate
products the operations of all products, at the rates of a layer's products and of the head with so many rows

Step and floor are measured in turn, `rounds` times; `ratio` is the median of the rounds' ratios. `cpu` holds the same
in seconds of processor time, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import arithmetic
import jax
import jax.numpy as jnp
import numpy as np
import workload

from rftjax.models.config import Config
from rftjax.sampler import device
from rftjax.sampler.pool import cache_length
from rftjax.types import Params

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


class Step:
    """A dispatch over a cache in which every row has about `cached` tokens."""

    def __init__(self, config: Config, params: Params, rows: int, cached: int, steps: int) -> None:
        self.config, self.params, self.steps = config, params, steps
        self.cache = device.new_cache(config, rows, cache_length(cached + steps // 2))
        given = device.Rows(
            token_B=np.arange(rows, dtype=np.int32) + 1,
            position_B=np.full(rows, cached - steps // 2, np.int32),
            budget_B=np.full(rows, steps, np.int32),
            noise_B3=np.zeros((rows, 3), np.int32),
            settings=device.RowSettings(np.ones(rows), np.ones(rows), np.zeros(rows, np.int32)),
        )
        self.given_B9 = jnp.asarray(device.pack_rows(given))
        self.rows = device.idle_rows(rows)
        self.stops_E = jnp.full(16, -2, jnp.int32)
        self.bounds_2 = jnp.asarray([steps, 0], jnp.int32)

    def __call__(self) -> None:
        """Samples `steps` tokens a row from the same state."""
        self.cache, _, tokens_BT, *_ = device.decode(
            self.config,
            self.params,
            self.cache,
            self.rows,
            self.given_B9,
            self.stops_E,
            jnp.uint32(0),
            self.bounds_2,
            steps=self.steps,
            filtered=False,
            limit=0,
        )
        jax.block_until_ready(tokens_BT)


class Floor:
    """Measures what a step costs at least; each call measures anew."""

    def __init__(
        self, config: Config, params: Params, rows: int, cached: int, mebibytes: int
    ) -> None:
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        total = arithmetic.decode_bytes(config, rows=rows, cached=cached)
        self.read_bytes = {"weights": float(weights), "cache": total - weights}
        self.dtype = jnp.dtype(config.dtype)
        self.array = jnp.ones((mebibytes << 20) // self.dtype.itemsize, self.dtype)
        self.total = jax.jit(lambda array: jnp.sum(array, dtype=jnp.float32))
        key = jax.random.key(1)
        self.x_BD = jax.random.normal(key, (rows, config.width), self.dtype)
        c = config
        inputs = jax.random.normal(key, (c.width, arithmetic.layer_products(c) // c.width))
        # One matrix with the entries of a layer's, again and again: its reading is no part of the products' rate.
        self.layer = inputs.astype(self.dtype)
        self.operations = {
            "layer": 2 * rows * self.layer.size,
            "all": arithmetic.forward_operations(
                config, tokens=rows, scored=rows, pairs=rows * cached
            ),
        }
        self.product = jax.jit(jnp.matmul)

    def __call__(self, clock: Clock) -> dict[str, float]:
        """Returns the seconds of the three parts."""
        rate = self.array.nbytes / fastest(3, lambda: self.total(self.array), clock)
        layer_s = fastest(5, lambda: self.product(self.x_BD, self.layer), clock)
        parts = {name: count / rate for name, count in self.read_bytes.items()}
        return parts | {"products": self.operations["all"] * layer_s / self.operations["layer"]}


def fastest(repeats: int, run: Callable[[], Any], clock: Clock) -> float:
    """Returns the seconds of the fastest of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        start = clock()
        jax.block_until_ready(run())
        seconds.append(clock() - start)
    return min(seconds)


def measure(
    config: Config, params: Params, point: tuple[int, int], flags: argparse.Namespace
) -> dict[str, Any]:
    """Measures one point by the wall's clock and the processor's."""
    rows, cached = point
    step = Step(config, params, rows, cached, flags.steps)
    floor = Floor(config, params, rows, cached, flags.read_mebibytes)
    started = time.perf_counter()
    step()
    first_s = time.perf_counter() - started
    floor(time.perf_counter)
    found: dict[str, Any] = {
        "cache_length": device.cache_length(step.cache),
        "bytes": floor.read_bytes,
        "first_s": first_s,
    }
    for name, clock in CLOCKS.items():
        rounds = [
            (fastest(1, step, clock) / flags.steps, floor(clock)) for _ in range(flags.rounds)
        ]
        ratios = [seconds / sum(parts.values()) for seconds, parts in rounds]
        found[name] = {
            "s_per_decode_step": statistics.median(seconds for seconds, _ in rounds),
            "floor_s": {
                part: statistics.median(parts[part] for _, parts in rounds) for part in rounds[0][1]
            },
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
    return found


def parse() -> argparse.Namespace:
    parser = workload.arguments(__doc__)
    parser.add_argument("--points", default="64x1024,8x1024,8x4096")
    parser.add_argument("--steps", type=int, default=16, help="decode steps of a dispatch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--read_mebibytes", type=int, default=256, help="to measure reading with: beyond all caches"
    )
    parser.add_argument("--layers", type=int, default=0, help="of random weights; 0: all")
    return parser.parse_args()


def main() -> None:
    flags = parse()
    config, masters = workload.load(flags)
    if flags.layers:
        layers = jax.tree.map(lambda leaf: leaf[: flags.layers], masters["layers"])
        config = dataclasses.replace(config, layers=flags.layers)
        masters = masters | {"layers": layers}
    params = workload.sampler_params(config, masters)
    del masters
    results: dict[str, Any] = {}
    for name in flags.points.split(","):
        rows, cached = (int(number) for number in name.split("x"))
        results[name] = measure(config, params, (rows, cached), flags)
        print(f"{name}: {workload.rounded(results[name])}", flush=True)
    workload.report(flags, results | {"peak_bytes": workload.peak_bytes()})


if __name__ == "__main__":
    main()
