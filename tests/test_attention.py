import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

from rftjax.models import attention, flash, splash
from rftjax.models.layout import Layout
from rftjax.models.tiled import TILE, tiled

# The kernel for NVIDIA GPUs step by step on the CPU, where it cannot be compiled.
stepwise = functools.partial(flash.flash, interpret=True)


def packed(T: int, rows: int = 2, cuts: int = 8):
    """The layout of packed rows: groups of a prefix and three segments, then padding."""
    groups, segments, positions = np.zeros((3, rows, T), np.int32)
    places = np.linspace(0, T - T // 8, cuts + 1).astype(int)
    for piece, (start, end) in enumerate(itertools.pairwise(places)):
        groups[:, start:end] = 1 + piece // 4
        segments[:, start:end] = piece % 4
        before = places[piece - piece % 4 + 1] - places[piece - piece % 4] if piece % 4 else 0
        positions[:, start:end] = before + np.arange(end - start)
    return Layout(groups, segments, positions)


def inputs(T: int, heads: int = 6, dtype: str = "float32", rows: int = 2):
    """Queries, keys, values and the mask of packed rows."""
    rng = np.random.default_rng(T)
    q, k, v = (jnp.asarray(rng.normal(size=(rows, T, count, 4)), dtype) for count in (heads, 2, 2))
    return q, k, v, packed(T, rows).mask()


def gradients(form, q, k, v, mask):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    used = jnp.any(mask, axis=-1)[:, :, None, None]  # rows of padding attend to nothing

    def total(q, k, v):
        return jnp.sum(jnp.where(used, form(q, k, v, mask), 0.0).astype(jnp.float32) * weights)

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("T", [40, 256, 300, 1100])
def test_blocks_give_the_values_and_gradients_of_the_plain_form(T):
    q, k, v, mask = inputs(T)
    used = np.asarray(jnp.any(mask, axis=-1))
    found = np.asarray(attention.blocked(q, k, v, mask))[used]
    wanted = np.asarray(attention.plain(q, k, v, mask))[used]
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    pairs = zip(
        gradients(attention.blocked, q, k, v, mask),
        gradients(attention.plain, q, k, v, mask),
        strict=True,
    )
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_blocks_in_bfloat16_stay_near_float32():
    q, k, v, mask = inputs(300, dtype="bfloat16")
    wide = (q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32))
    pairs = zip(
        gradients(attention.blocked, q, k, v, mask),
        gradients(attention.plain, *wide, mask),
        strict=True,
    )
    for got, expected in pairs:
        assert got.dtype == jnp.bfloat16
        scale = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.02 * scale)


def test_rows_that_attend_to_nothing_give_no_nan():
    q, k, v, mask = inputs(128)
    for array in gradients(attention.blocked, q, k, v, jnp.zeros_like(mask)):
        assert np.isfinite(array).all()


def test_a_block_computes_no_score_beyond_its_end():
    q, k, v, mask = inputs(1024, rows=1)
    text = str(jax.make_jaxpr(attention.blocked)(q, k, v, mask))
    assert "1024,1024" not in text.replace("bool[1,1024,1024]", "")


@pytest.mark.parametrize(("T", "window"), [(40, None), (300, 40), (700, None), (700, 150)])
def test_visible_tiles_give_the_values_and_gradients_of_the_plain_form(T, window):
    q, k, v, _ = inputs(T)
    layout = packed(T)
    mask = layout.mask(window)
    used = np.asarray(jnp.any(mask, axis=-1))

    def form(q, k, v, _):
        return tiled(q, k, v, layout, window)

    found, wanted = jax.jit(form)(q, k, v, mask), attention.plain(q, k, v, mask)
    np.testing.assert_allclose(found[used], wanted[used], atol=2e-6)
    pairs = zip(
        gradients(form, q, k, v, mask), gradients(attention.plain, q, k, v, mask), strict=True
    )
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_visible_tiles_in_bfloat16_stay_near_float32():
    q, k, v, mask = inputs(300, dtype="bfloat16")
    layout = packed(300)
    wide = (q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32))
    pairs = zip(
        gradients(lambda q, k, v, _: tiled(q, k, v, layout), q, k, v, mask),
        gradients(attention.plain, *wide, mask),
        strict=True,
    )
    for got, expected in pairs:
        assert got.dtype == jnp.bfloat16
        scale = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.02 * scale)


def test_rows_of_padding_give_no_nan_over_tiles():
    q, k, v, mask = inputs(256)
    empty = Layout(*np.zeros((3, 2, 256), np.int32))
    for array in gradients(lambda q, k, v, _: tiled(q, k, v, empty), q, k, v, mask | True):
        assert np.isfinite(array).all()


@pytest.mark.parametrize("window", [None, 40])
def test_the_visible_tiles_are_those_that_the_mask_has_a_pair_in(window):
    layout = packed(16 * 100, cuts=16)
    pairs = np.asarray(layout.mask(window)).reshape(2, 100, 16, 100, 16).any(axis=(2, 4))
    visible = np.asarray(layout.tiles(16, window))
    if window is None:
        np.testing.assert_array_equal(visible, pairs)
    assert not (pairs & ~visible).any() and visible.sum() <= 1.3 * pairs.sum()


def test_a_completion_does_not_pay_for_its_neighbours():
    def visible(completions: int) -> int:
        lengths = [TILE] + completions * [4 * TILE]
        segments = np.repeat(np.arange(completions + 1), lengths)[None]
        return int(Layout(np.ones_like(segments), segments, segments).tiles(TILE).sum())

    assert visible(3) - visible(2) == visible(2) - visible(1) == 4 + 4 * 5 // 2


def test_long_rows_on_a_cpu_keep_nothing_of_rows_by_rows():
    def program(T: int) -> str:
        q, k, v, _ = inputs(T, rows=1)
        layout = packed(T, rows=1)
        run = jax.grad(lambda q: attention.attend("blocked", q, k, v, layout).sum())
        return str(jax.make_jaxpr(run)(q))

    for T in (attention.LONG, 2 * attention.LONG):
        assert f"{T},{T}" not in program(T)
    short = attention.LONG - TILE
    assert f"bool[1,{short},{short}]" in program(short)


@pytest.mark.parametrize("form", ["blocked", "tiled", "splash", "triton", "cudnn"])
def test_sinks_take_weight_from_the_keys_in_every_form(form, splash_on_cpu, monkeypatch):
    monkeypatch.setattr(attention, "CUDNN", "xla")  # the same call as on a GPU
    monkeypatch.setattr(attention, "flash", stepwise)
    q, k, v, mask = inputs(300, rows=1)
    layout = packed(300, rows=1)
    used = jnp.any(mask, axis=-1)[:, :, None, None]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    sinks = jnp.asarray([-2.0, 0.5, 3.0, 1.0, -1.0, 9.0])

    def total(form, *given):
        attended = attention.attend(form, *given[:3], layout, None, None, given[3])
        return jnp.sum(jnp.where(used, attended, 0.0) * weights), attended

    def run(form):
        both = jax.value_and_grad(total, argnums=(1, 2, 3, 4), has_aux=True)
        return jax.jit(both, static_argnums=0)(form, q, k, v, sinks)

    (_, found), grads = run(form)
    (_, wanted), expected = run("plain")
    # One more key without a value, written out.
    H, C = q.shape[2:]
    scores = jnp.einsum("BTHC,BSHC->BHTS", q, jnp.repeat(k, H // 2, 2)) / C**0.5
    scores = jnp.where(mask[:, None], jnp.exp(scores), 0.0)
    shares = scores / (scores.sum(-1, keepdims=True) + jnp.exp(sinks)[None, :, None, None])
    by_hand = jnp.einsum("BHTS,BSHC->BTHC", shares, jnp.repeat(v, H // 2, 2))
    for one, two in ((wanted, by_hand), (found, wanted)):
        np.testing.assert_allclose(jnp.where(used, one, 0), jnp.where(used, two, 0), atol=4e-6)
    assert np.abs(expected[3]).min() > 1e-3
    for one, two in zip(grads, expected, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


@pytest.mark.parametrize("kernel", ["for TPUs", "for GPUs"])
@pytest.mark.parametrize(("T", "window"), [(300, None), (300, 40)])
def test_the_kernels_give_the_values_and_gradients_of_the_plain_form(
    kernel, T, window, splash_on_cpu
):
    q, k, v, _ = inputs(T, rows=1)
    layout = packed(T, rows=1)
    mask = layout.mask(window)

    def form(q, k, v, _):
        run = attention.splash if kernel == "for TPUs" else stepwise
        return run(q, k, v, layout, window)

    used = np.asarray(jnp.any(mask, axis=-1))
    found, grads = np.asarray(jax.jit(form)(q, k, v, mask)), gradients(form, q, k, v, mask)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[used], attention.plain(q, k, v, mask)[used], atol=2e-6)
    for got, expected in zip(grads, gradients(attention.plain, q, k, v, mask), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_kernel_for_gpus_takes_short_rows_of_their_own_layouts_and_wide_heads():
    T = 40  # not whole tiles, which are half as long for heads so wide
    layout = Layout(*map(np.concatenate, zip(packed(T, 1), packed(T, 1, cuts=4), strict=True)))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, heads, 80)), "float32") for heads in (3, 1, 1))
    mask = layout.mask()
    used = np.asarray(jnp.any(mask, axis=-1))

    def form(q, k, v, _):
        return stepwise(q, k, v, layout)

    found = np.asarray(jax.jit(form)(q, k, v, mask))
    np.testing.assert_allclose(found[used], attention.plain(q, k, v, mask)[used], atol=5e-6)
    pairs = zip(
        gradients(form, q, k, v, mask), gradients(attention.plain, q, k, v, mask), strict=True
    )
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_the_kernel_for_tpus_keeps_nothing_of_rows_by_rows():
    T = 2 * splash.LONG  # rows by rows of a smaller T may be another shape
    layout = Layout(*[jax.ShapeDtypeStruct((1, T), "int32")] * 3)
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 64), "bfloat16") for heads in (2, 1))

    def total(q, k, v, layout):
        return attention.splash(q, k, v, layout).astype(jnp.float32).sum()

    text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(q, k, k, layout))
    assert f"{2 * T},64]" in text  # the keys, twice behind one another
    assert f"{T},{T}" not in text and f"{T},{2 * T}" not in text
    assert f",{splash.LARGE},{splash.LARGE}]" not in text  # tiles of a mask, one behind another


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [64, 80, 128])
def test_the_kernel_for_tpus_compiles_for_them(channels, dtype):
    q, k = (jax.ShapeDtypeStruct((2, 500, heads, channels), dtype) for heads in (6, 2))
    layout = Layout(*[jax.ShapeDtypeStruct((2, 500), "int32")] * 3)

    def total(q, k, v, layout):
        return jnp.sum(attention.splash(q, k, v, layout).astype(jnp.float32))

    grad = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    text = export.export(grad, platforms=["tpu"])(q, k, k, layout).mlir_module()
    assert text.count("tpu_custom_call") >= 3  # forward, queries, and keys with values


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
@pytest.mark.parametrize(("T", "channels"), [(500, 80), (2048, 256)])
def test_the_kernel_for_gpus_is_three_programs_and_holds_nothing_of_rows_by_rows(T, channels):
    device = AbstractDevice("NVIDIA H100", None, "gpu")
    mesh = AbstractMesh((1,), ("one",), abstract_device=device)
    q, k = (jax.ShapeDtypeStruct((2, T, heads, channels), "bfloat16") for heads in (6, 2))
    layout = Layout(*[jax.ShapeDtypeStruct((2, T), "int32")] * 3)

    def total(q, k, v, layout):
        return jnp.sum(flash.flash(q, k, v, layout).astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, k, layout)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3
    assert f"{T}x{T}x" not in text and "stablehlo.dot_general" not in text
