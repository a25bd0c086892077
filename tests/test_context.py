import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from meshes import mesh_of
from test_attention import packed, stepwise

from rftjax.devices import context, sharding
from rftjax.learning import batching, update
from rftjax.models import FAMILIES, across, attention, decoder, linear, splash
from rftjax.models.config import Config, Rope
from rftjax.models.latent import expanded
from rftjax.models.layout import Part
from rftjax.sampler import device
from rftjax.types import Pack

CONFIG = Config("qwen2", 64, 32, 2, 4, 2, 8, 32, 2048, 1e-6, Rope(), False)
LOGICAL = FAMILIES["qwen2"].LOGICAL_AXES


def arrays(seed: int, *shapes: tuple[int, ...], dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_gradients(call, q, new, weights, sinks, used):
    """The attended values, and gradients of a sum of them with random weights."""
    (factors,) = arrays(9, q.shape)

    def total(q, new, weights, sinks):
        own = () if sinks is None else (sinks,)
        expansion = weights and across.Expansion(weights, lambda *given: expanded(6, 8, *given))
        attended, _ = call(q, new, *own, expansion=expansion)
        return jnp.sum(jnp.where(used, attended.astype(jnp.float32), 0.0) * factors), attended

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))
    (_, attended), gradients = run(q, new, weights, sinks)
    return [jnp.where(used, attended.astype(jnp.float32), 0.0), *jax.tree.leaves(gradients)]


@pytest.mark.parametrize(
    ("form", "sizes", "latent", "window", "sunk"),
    [
        ("blocked", {"context": 8}, False, None, False),
        ("plain", {"fsdp": 2, "context": 2, "tensor": 2}, False, 5, True),
        ("blocked", {"context": 4, "tensor": 2}, True, None, False),
        ("cudnn", {"context": 2}, False, 5, False),
        ("triton", {"context": 2, "tensor": 2}, False, 5, True),
    ],
)
def test_attention_over_parts_of_a_row_is_that_over_the_whole(
    form, sizes, latent, window, sunk, monkeypatch
):
    monkeypatch.setattr(attention, "CUDNN", "xla")  # the same call as on a GPU
    monkeypatch.setattr(attention, "flash", stepwise)
    mesh, T = mesh_of(**sizes), 128 if form == "triton" else 64
    layout = packed(T)
    config = dataclasses.replace(CONFIG, attention=form, kv_heads=4 if latent else 2)
    q, keys, values, latents, rotated, kernel, a, b = arrays(
        T, (2, T, 4, 8), (2, T, 2, 8), (2, T, 2, 8), (2, T, 10), (2, T, 2), (10, 4, 14), (10, 3),
        (3, 4, 14),
    )  # fmt: skip
    new = {"latent": latents, "rotated": rotated} if latent else {"keys": keys, "values": values}
    weights = {"kernel": 0.2 * kernel, "a": a, "b": 0.1 * b} if latent else None
    sinks = arrays(3, (4,))[0] if sunk else None
    used = jnp.any(layout.mask(window), axis=-1)[:, :, None, None]
    given = q, new, weights, sinks, used
    alone = dataclasses.replace(config, attention="plain")
    wanted = value_and_gradients(across.among(alone, layout, window, None, ""), *given)
    found = value_and_gradients(across.among(config, layout, window, mesh, ""), *given)
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_the_kernel_for_tpus_takes_a_part_of_the_queries(window, splash_on_cpu):
    T = 2 * splash.TILE
    q, keys, values = arrays(T, (1, T, 4, 8), (1, T, 2, 8), (1, T, 2, 8))
    layout = packed(T, rows=1)
    used = np.asarray(jnp.any(layout.mask(window), axis=-1))
    wanted = np.asarray(attention.plain(q, keys, values, layout.mask(window)))
    for first in (0, splash.TILE):
        part = Part(first, splash.TILE)
        found = np.asarray(
            attention.of_part("splash", part.of(q), keys, values, layout, window, None, part)
        )
        here = slice(first, first + splash.TILE)
        np.testing.assert_allclose(found[used[:, here]], wanted[:, here][used[:, here]], atol=2e-6)


def test_vectors_are_taken_from_the_devices_that_have_them():
    mesh = mesh_of(fsdp=2, context=4)
    (x_RXD,) = arrays(0, (2, 16, 3), dtype="bfloat16")
    sources_RM = np.array([[15, 0, 3, 3, 4, 9, 9, 9], [0, 0, 1, 2, 8, 13, 14, 5]])

    def total(x_RXD):
        x_BD = context.taken(mesh, x_RXD, sources_RM)
        numbers_B = context.flat(mesh, 4, jnp.arange(16.0).reshape(2, 8))
        x_RMD = context.unflat(mesh, 4, x_BD, 8) if x_BD.ndim == 1 else x_BD
        return jnp.sum(x_RMD.astype(jnp.float32) * numbers_B[:, None]), (x_BD, numbers_B)

    (_, (x_BD, numbers_B)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(x_RXD)
    order = np.argsort(numbers_B)
    wanted = jnp.take_along_axis(x_RXD, sources_RM[..., None], axis=1).reshape(-1, 3)
    np.testing.assert_array_equal(np.asarray(x_BD)[order], wanted)
    numbers_RX = np.zeros((2, 16))
    np.add.at(numbers_RX, (np.arange(2)[:, None], sources_RM), np.arange(16).reshape(2, 8))
    np.testing.assert_array_equal(gradient[..., 0].astype(jnp.float32), numbers_RX)
    # Traced, as in an update: jax 0.10 maps no function over some axes of a mesh outside of a trace.
    back = jax.jit(lambda one_B: context.unflat(mesh, 4, one_B, 8))(numbers_B)
    np.testing.assert_array_equal(back, np.arange(16).reshape(2, 8))


def test_weights_lie_over_fsdp_and_context_and_what_they_do_not_divide_is_told():
    mesh = mesh_of(fsdp=2, context=4)

    def lies(width):
        path = ("layers", "mlp", "gate", "kernel")
        found = sharding.partition(mesh, LOGICAL, path, (2, width, 32))
        tree = {"layers": {"mlp": {"gate": {"kernel": np.zeros((2, width, 32))}}}}
        return found, sharding.replicated_axes(mesh, LOGICAL, tree)

    assert lies(16) == (PartitionSpec(None, ("fsdp", "context")), [])
    part, [told] = lies(6)
    assert part == PartitionSpec(None, "fsdp")
    assert "6 width do not divide over mesh.fsdp=2 x mesh.context=4; divided over mesh.fsdp" in told
    assert lies(3)[0] == PartitionSpec() and "replicated" in lies(3)[1][0]


def test_rows_are_filled_up_to_what_the_devices_divide():
    assert batching.widths(100, 300, 8) == [104, 200, 384]
    assert attention.row_unit("splash", mesh_of(context=4)) == 4 * splash.TILE
    assert attention.row_unit("blocked", mesh_of(context=4)) == 4
    assert attention.row_unit("splash", mesh_of(fsdp=4)) == 1
    batch = batching.make_batch([], rows=2, max_length=300, pack_tokens=100, pack_unit=8)
    assert batch.pack.tokens_RX.shape == (2, 1, 104)


def test_a_device_keeps_its_part_of_a_rows_activations(monkeypatch):
    """XLA's count of temporaries, of one row on one device and on eight."""
    # The form of accelerators: that of CPUs makes matrices of rows and tokens, which the compiler gathers for it.
    monkeypatch.setattr(
        linear, "by_rows", lambda x, dy, inputs, outputs: linear.plain(x, dy, inputs=inputs)
    )
    config = dataclasses.replace(CONFIG, ffn=1024)
    T = 256

    def temporaries(**sizes):
        mesh = mesh_of(**sizes)
        params = decoder.init(config, jax.random.key(0))
        ones_RX = np.ones((1, T), np.int32)
        pack = Pack(ones_RX, ones_RX, ones_RX, *[ones_RX] * 4)

        def loss(params):
            scores = update.scores(config, params, None, pack, mesh=mesh)
            return jnp.sum(scores[0])

        placed = sharding.shard_tree(mesh, LOGICAL, params)
        return jax.jit(jax.grad(loss)).lower(placed).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(context=8) < temporaries() / 4


def test_decoding_moves_no_part_of_the_cache():
    mesh, slots, length = mesh_of(context=8), 8, 512
    params = decoder.init(CONFIG, jax.random.key(0))
    weights = device.sampler_params(CONFIG, sharding.shard_tree(mesh, LOGICAL, params), mesh=mesh)
    cache = device.new_cache(CONFIG, slots, length, mesh)
    keys = cache[0]["keys"]
    assert keys.sharding.shard_shape(keys.shape) == (8, 2, 64, 8)
    text = (
        device.decode.lower(
            CONFIG, weights, cache, device.idle_rows(slots, mesh),
            np.zeros((slots, 9), np.int32), np.zeros(16, np.int32), np.uint32(0),
            np.array([16, 0], np.int32), steps=16, filtered=False, limit=0, mesh=mesh,
        )
        .compile()
        .as_text()
    )  # fmt: skip
    assert not re.search("all-gather|all-to-all|permute|reduce-scatter", text)
    # The largest score, the sum and the weighted values of each query head.
    summed = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    shapes = {shape for result in summed for shape in re.findall(r"f32\[([\d,]*)\]", result)}
    assert summed and shapes <= {"8,2,2,1,1", "8,2,2,1,8"}
