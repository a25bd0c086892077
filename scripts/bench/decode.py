"""A decode step with so many cached tokens, beside its floor measured in the same process.

    python scripts/bench/decode.py --shape=smollm2-135m [--points=64x1024,8x4096] [--dtype=bfloat16]

A point is `ROWSxCACHED`: every row has about CACHED tokens in the cache. The floor of a step is the sum of

weights  all parameters read once, at the rate at which the machine sums an array
cache    the used part of the cache read once, at the same rate
products the operations of all products, at the rates of a layer's products and of the head with so many rows

Step and floor are measured in turn, `rounds` times; `ratio` is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from typing import Any

import arithmetic
import jax
import jax.numpy as jnp
import numpy as np
import workload

from rftjax.models.decoder import Config
from rftjax.sampler import device
from rftjax.sampler.pool import cache_length
from rftjax.types import Params

READ = 1 << 28  # bytes that are read to measure a rate: far more than the caches hold


class Step:
    """A dispatch over a cache in which every row has about `cached` tokens."""

    def __init__(self, config: Config, params: Params, rows: int, cached: int, steps: int) -> None:
        self.config, self.params, self.steps = config, params, steps
        self.cache = jax.jit(device.new_cache, static_argnums=(0, 1, 2))(
            config, rows, cache_length(cached + steps)
        )
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

    def __init__(self, config: Config, params: Params, rows: int, cached: int) -> None:
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        total = arithmetic.decode_bytes(config, rows=rows, cached=cached)
        self.read_bytes = {"weights": float(weights), "cache": total - weights}
        self.dtype = jnp.dtype(config.dtype)
        self.array = jnp.ones(READ // self.dtype.itemsize, self.dtype)
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

    def __call__(self) -> dict[str, float]:
        """Returns the seconds of the three parts."""
        rate = self.array.nbytes / arithmetic.best_of(3, lambda: self.total(self.array))
        layer_s = arithmetic.best_of(5, lambda: self.product(self.x_BD, self.layer))
        parts = {name: count / rate for name, count in self.read_bytes.items()}
        return parts | {"products": self.operations["all"] * layer_s / self.operations["layer"]}


def measure(
    config: Config, params: Params, point: tuple[int, int], flags: argparse.Namespace
) -> dict[str, Any]:
    """Measures one point."""
    rows, cached = point
    step, floor = Step(config, params, rows, cached, flags.steps), Floor(config, params, *point)
    step()
    rounds: list[tuple[float, dict[str, float]]] = []
    for _ in range(flags.rounds):
        rounds.append((arithmetic.best_of(1, step) / flags.steps, floor()))
    ratios = [seconds / sum(parts.values()) for seconds, parts in rounds]
    return {
        "s_per_decode_step": statistics.median(seconds for seconds, _ in rounds),
        "floor_s": {
            name: statistics.median(parts[name] for _, parts in rounds) for name in rounds[0][1]
        },
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def parse() -> argparse.Namespace:
    parser = workload.arguments(__doc__)
    parser.add_argument("--points", default="64x1024,8x1024,8x4096")
    parser.add_argument("--steps", type=int, default=16, help="decode steps of a dispatch")
    parser.add_argument("--rounds", type=int, default=5)
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
