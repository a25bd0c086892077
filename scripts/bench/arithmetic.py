"""What a model costs at least: parameters, operations and bytes, from its config alone; and what the machine reaches.

The formulas stand in README.md. A multiplication with an addition counts as two operations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rftjax.models import cache_leaves, decoder
from rftjax.models.config import Config


def parameters(config: Config) -> int:
    """Returns the number of parameters, without making any."""
    tree = jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def layer_products(config: Config) -> int:
    """Returns the entries of one layer's matrices: multiplications a token."""
    c = config
    attention = c.width * c.channels * (2 * c.heads + 2 * c.kv_heads)
    return attention + 3 * c.width * c.ffn


def forward_operations(config: Config, *, tokens: int, scored: int, pairs: int) -> int:
    """Returns the operations of a forward pass: `scored` tokens go through the language-model head, and attention
    looks at `pairs` pairs of a token and one that it sees."""
    linear = 2 * tokens * config.layers * layer_products(config)
    head = 2 * scored * config.width * config.vocab
    return linear + head + 4 * pairs * config.layers * config.heads * config.channels


def group_pairs(prompt: int, new: int, group: int, *, shared: bool) -> int:
    """Returns the attention pairs of a prompt's completions, the prompt computed once or once a completion."""
    whole = (prompt + new) * (prompt + new + 1) // 2
    own = whole - prompt * (prompt + 1) // 2
    return whole + (group - 1) * (own if shared else whole)


def step_operations(
    config: Config, *, prompts: int, group: int, prompt: int, new: int, shared: bool = True
) -> dict[str, int]:
    """Returns the operations of one GRPO step's sampling and update, prompts computed once a group in both."""
    completions = prompts * group * new
    tokens = completions + prompts * prompt * (1 if shared else group)
    pairs = prompts * group_pairs(prompt, new, group, shared=shared)
    once = prompts * group_pairs(prompt, new, group, shared=True)
    laid_out = completions + prompts * prompt
    return {
        "sample": forward_operations(config, tokens=laid_out, scored=completions, pairs=once),
        "update": 3 * forward_operations(config, tokens=tokens, scored=completions, pairs=pairs),
    }


def decode_bytes(config: Config, *, rows: int, cached: float) -> float:
    """Returns the bytes that one decode step reads at least: all weights once, and `cached` tokens of each row."""
    item = jnp.dtype(config.dtype).itemsize
    weights = parameters(config) - (0 if config.tied else config.vocab * config.width)
    a_token = sum(math.prod(leaf.shape) for leaves in cache_leaves(config) for leaf in leaves)
    cache = rows * cached * a_token
    return item * (weights + cache)


def best_of(repeats: int, run: Callable[[], Any]) -> float:
    """Returns the seconds of the fastest of `repeats` runs, after one that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matmul_peak(dtype: str, size: int) -> float:
    """Returns the operations a second of a product of two square matrices of `size`, here and now."""
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), jnp.float32).astype(dtype) for key in keys)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / best_of(5, lambda: product(left, right))


def read_bandwidth(mebibytes: int) -> float:
    """Returns the bytes a second at which the device copies an array (bytes read plus bytes written), here and now."""
    array = jnp.zeros((mebibytes << 18,), jnp.float32)
    copy = jax.jit(lambda values: values + 1)
    return 2 * array.nbytes / best_of(5, lambda: copy(array))
