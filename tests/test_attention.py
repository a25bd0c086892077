import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from rftjax.models import attention


def inputs(T: int, heads: int = 6, dtype: str = "float32", rows: int = 2):
    """Queries, keys, values and the mask of packed rows: two groups of a prefix and three segments, then padding."""
    rng = np.random.default_rng(T)
    q, k, v = (jnp.asarray(rng.normal(size=(rows, T, count, 4)), dtype) for count in (heads, 2, 2))
    groups, segments = np.zeros((2, rows, T), np.int32)
    cuts = np.linspace(0, T - T // 8, 9).astype(int)
    for piece, (start, end) in enumerate(itertools.pairwise(cuts)):
        groups[:, start:end] = 1 + piece // 4
        segments[:, start:end] = piece % 4
    return q, k, v, attention.Layout(groups, segments, np.zeros_like(groups)).mask()


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


@pytest.mark.parametrize("T", [40, 300])
def test_the_kernel_for_tpus_gives_the_values_and_gradients_of_the_plain_form(T, splash_on_cpu):
    q, k, v, mask = inputs(T, rows=1)
    used = np.asarray(jnp.any(mask, axis=-1))
    found = np.asarray(attention.splash(q, k, v, mask))
    grads = gradients(attention.splash, q, k, v, mask)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[used], attention.plain(q, k, v, mask)[used], atol=2e-6)
    for got, expected in zip(grads, gradients(attention.plain, q, k, v, mask), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [64, 80, 128])
def test_the_kernel_for_tpus_compiles_for_them(channels, dtype):
    q, k = (jax.ShapeDtypeStruct((2, 500, heads, channels), dtype) for heads in (6, 2))
    mask = jax.ShapeDtypeStruct((2, 500, 500), bool)
    grad = jax.jit(lambda q, k, v, mask: gradients(attention.splash, q, k, v, mask))
    text = export.export(grad, platforms=["tpu"])(q, k, k, mask).mlir_module()
    assert text.count("tpu_custom_call") >= 3  # forward, queries, and keys with values
