"""A model of several stacks, and a cache of other leaves than keys and values."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of

from rftjax import models
from rftjax.devices import sharding
from rftjax.models import decoder
from rftjax.models.config import FULL, CacheLeaf, Config, Rope, Stack
from rftjax.models.families import llama
from rftjax.policy import Policy
from rftjax.sampler import device
from rftjax.sampler.engine import Engine
from rftjax.weights import hf, lora

WHOLE = Config(
    family="llama",
    vocab=64,
    width=16,
    layers=3,
    heads=4,
    kv_heads=2,
    channels=4,
    ffn=32,
    max_positions=512,
    norm_eps=1e-6,
    rope=Rope(),
    tied=True,
    windows=(FULL, 6, 9),
    init_std=0.3,
)
STACKS = (Stack("first", 0, 1), Stack("layers", 1, 2))
SPLIT = dataclasses.replace(WHOLE, split=STACKS)
FIELDS = {"model_type": "llama", "vocab_size": 64}
INIT = jax.jit(decoder.init, static_argnums=0)
TOKENS_BT = np.random.default_rng(0).integers(0, 64, (2, 20))


@pytest.fixture(scope="module")
def params() -> Any:
    return INIT(WHOLE, jax.random.key(0))


def parted(tree: Any) -> Any:
    """The tree of the whole model as that of its two stacks."""
    rest = {name: leaf for name, leaf in tree.items() if name != "layers"}
    return rest | {
        stack.name: jax.tree.map(
            lambda leaf, at=stack: leaf[at.first : at.first + at.count], tree["layers"]
        )
        for stack in STACKS
    }


def assert_close(found: Any, expected: Any, atol: float = 1e-6) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, atol=atol)


@functools.partial(jax.jit, static_argnums=0)
def loss(config: Config, tree: Any, adapters: Any = None) -> jax.Array:
    ones_BT = jnp.ones(TOKENS_BT.shape, jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(TOKENS_BT.shape[1]), TOKENS_BT.shape)
    x = decoder.hidden(
        config, tree, jnp.asarray(TOKENS_BT), positions_BT, ones_BT, 0 * ones_BT, lora=adapters
    )
    return jnp.mean(decoder.logits(config, tree, x.reshape(-1, config.width)) ** 2)


def test_a_model_in_two_stacks_computes_what_it_computes_in_one(params):
    expected, wanted = jax.jit(jax.value_and_grad(lambda tree: loss(WHOLE, tree)))(params)

    def unrolled(tree: Any) -> jax.Array:
        return loss(SPLIT, tree)

    found, gradient = jax.jit(jax.value_and_grad(unrolled))(parted(params))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert_close(gradient, parted(wanted))
    lists = decoder.unroll(SPLIT, parted(params))
    assert [len(lists[stack.name]) for stack in STACKS] == [1, 2]
    found, gradient = jax.jit(jax.value_and_grad(unrolled))(lists)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert_close(decoder.roll(SPLIT, gradient), parted(wanted))


def test_fresh_parameters_of_two_stacks_are_those_of_one(params):
    assert_close(INIT(SPLIT, jax.random.key(0)), parted(params), 0.0)


def test_two_stacks_have_the_tensors_of_one_in_an_export(params, tmp_path):
    fields = FIELDS | {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": True,
    }  # fmt: skip
    hf.save(tmp_path / "one", WHOLE, params, fields)
    hf.save(tmp_path / "two", SPLIT, parted(params), fields)
    file = "model.safetensors"
    one, two = (hf.read_safetensors(tmp_path / name / file) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert_close(hf.load(tmp_path / "two")[1], params, 0.0)


def test_adapters_of_two_stacks_are_merged_and_written_with_the_layers_numbers(params, tmp_path):
    def noisy(tree: Any) -> Any:
        rng = np.random.default_rng(1)
        return jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree
        )

    one = noisy(lora.init(WHOLE, rank=2, targets="query,down"))
    two = parted(one)
    expected = loss(WHOLE, params, one)
    np.testing.assert_allclose(loss(SPLIT, parted(params), two), expected, rtol=1e-5)
    merged = device.merge(parted(params), two)
    np.testing.assert_allclose(loss(SPLIT, merged), expected, rtol=1e-5)
    for name, config, tree in (("one", WHOLE, one), ("two", SPLIT, two)):
        lora.save_peft(tmp_path / name, config, tree, alpha=2.0)
    assert_close(lora.load_peft(tmp_path / "two", WHOLE, alpha=2.0), one)
    assert_close(lora.load_peft(tmp_path / "one", SPLIT, alpha=2.0), two)
    shapes = jax.tree.map(np.shape, lora.init(SPLIT, rank=2, targets="query,down"))
    assert shapes == jax.tree.map(np.shape, two)


def test_two_stacks_sample_what_one_samples(params):
    prompts = [[5, 6, 7, 8, 9], [9, 8]]
    found, expected = (
        Policy("", config, tree, FIELDS).sample(prompts, max_new_tokens=12, stop=[])
        for config, tree in ((SPLIT, parted(params)), (WHOLE, params))
    )
    for one, two in zip(found, expected, strict=True):
        assert one.sequences[0].tokens == two.sequences[0].tokens
        np.testing.assert_allclose(one.sequences[0].logprobs, two.sequences[0].logprobs, atol=1e-5)


@pytest.fixture
def with_latent(monkeypatch):
    """A family whose cache has a third leaf, which no head has an axis of."""

    def cache(config: Config, stack: Stack) -> tuple[CacheLeaf, ...]:
        return *llama.cache(config, stack), CacheLeaf("latent", (5,), ("channels",))

    family = SimpleNamespace(LOGICAL_AXES=llama.LOGICAL_AXES, cache=cache)
    monkeypatch.setitem(models.FAMILIES, "latent", family)
    return dataclasses.replace(WHOLE, family="latent", windows=())


def test_rows_of_any_leaves_are_placed_copied_and_grown(with_latent):
    mesh = mesh_of(2, 2, 2)
    cache = device.new_cache(with_latent, 8, 4, mesh)
    keys_and_values = {"keys": (8, 2, 4, 4), "values": (8, 2, 4, 4)}
    assert jax.tree.map(jnp.shape, cache[0]) == keys_and_values | {"latent": (8, 4, 5)}
    assert cache[2]["latent"].sharding.shard_shape((8, 4, 5)) == (2, 4, 5)
    assert cache[2]["keys"].sharding.shard_shape((8, 2, 4, 4)) == (2, 1, 4, 4)
    rng = np.random.default_rng(0)
    cache = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(np.float32), leaf.sharding),
        cache,
    )
    before = jax.device_get(cache)
    to_B, from_B = sharding.replicate(mesh, (np.array([6, 99]), np.array([1, 0])))
    grown = device.grow(with_latent, cache, length=6, mesh=mesh)
    copied = device.copy_rows(with_latent, grown, None, to_B, from_B, mesh=mesh)
    for found, old in zip(jax.tree.leaves(copied), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(found[..., :4, :][6], old[1])
        np.testing.assert_array_equal(np.delete(found[..., :4, :], 6, 0), np.delete(old, 6, 0))
        assert not np.any(found[..., 4:, :])


def test_a_row_of_any_leaves_goes_to_the_host_and_back_bit_for_bit(with_latent):
    engine = Engine(with_latent, slots=2, max_length=100)
    pool = engine._pool
    pool.reserve(20)
    rng = np.random.default_rng(0)
    filled = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), pool.cache)
    pool.cache = jax.tree.map(jnp.asarray, filled)
    saved = pool.evict(1)
    assert saved[0].keys() == {"keys", "values", "latent"}
    pool.cache = jax.tree.map(jnp.zeros_like, pool.cache)
    pool.restore(0, saved)
    for found, wanted in zip(jax.tree.leaves(pool.cache), jax.tree.leaves(filled), strict=True):
        np.testing.assert_array_equal(found[0], wanted[1])
        assert not np.any(found[1])
