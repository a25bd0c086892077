import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rftjax.models.config import Config, Rope
from rftjax.models.head import logits
from rftjax.models.linear import by_rows, linear, plain, weight_gradient

RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), dtype)


CASES = {
    "one axis to two": ((2, 5, 6), (6, 3, 4), 1, "btd,dhc->bthc"),
    "two axes to one": ((2, 5, 3, 4), (3, 4, 6), 2, "bthc,hcd->btd"),
    "rows": ((7, 6), (6, 9), 1, "md,dv->mv"),
    "rows of a kilobyte, transposed in parts": ((7, 256), (256, 9), 1, "md,dv->mv"),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_product(name):
    x_shape, kernel_shape, axes, letters = CASES[name]
    x, kernel = normal(*x_shape), normal(*kernel_shape)
    weights = normal(*jnp.einsum(letters, x, kernel).shape)

    def ours(x, kernel):
        return jnp.sum(linear(x, kernel, axes) * weights)

    def plain(x, kernel):
        return jnp.sum(jnp.einsum(letters, x, kernel) * weights)

    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), rtol=1e-5)
    for got, wanted in zip(
        jax.jit(jax.grad(ours, (0, 1)))(x, kernel), jax.grad(plain, (0, 1))(x, kernel), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_weight_gradient_is_float32_and_not_rounded_to_the_compute_dtype():
    x, dy = normal(64, 6, dtype="bfloat16"), normal(64, 9, dtype="bfloat16")
    exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    found = weight_gradient(x, dy, 1, 1)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    kernel = normal(6, 9)
    gradient = jax.grad(lambda kernel: jnp.sum(linear(x, kernel, 1, True) * dy))(kernel)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-5)
    # What comes back to a wide product is rounded to the compute dtype once, before the sum.
    wide = dy.astype(jnp.float32) * 1.001
    gradient = jax.grad(lambda kernel: jnp.sum(linear(x, kernel, 1, True) * wide))(kernel)
    rounded = np.asarray(wide.astype(jnp.bfloat16), np.float64)
    exact = np.asarray(x, np.float64).T @ rounded
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-5)


def test_a_wide_product_is_not_rounded_to_the_compute_dtype():
    x, kernel = normal(64, 6, dtype="bfloat16"), normal(6, 9)
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    found = linear(x, kernel, 1, True)
    assert found.dtype == jnp.float32 and linear(x, kernel).dtype == jnp.bfloat16
    np.testing.assert_allclose(found, x.astype(jnp.float32) @ rounded, atol=1e-5)


def test_the_other_backends_form_is_the_same_product():
    x, dy = normal(2, 5, 3, 4), normal(2, 5, 6)
    wanted = jnp.einsum("bthc,btd->hcd", x, dy)
    np.testing.assert_allclose(plain(x, dy, inputs=2), wanted, atol=1e-5)
    np.testing.assert_allclose(by_rows(x, dy, inputs=2, outputs=1), wanted, atol=1e-5)
    lowered = jax.jit(weight_gradient, static_argnums=(2, 3)).trace(x, dy, 2, 1)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "optimization_barrier" not in text


def test_a_tied_heads_gradient_is_not_rounded_to_the_compute_dtype():
    config = Config("qwen2", 24, 8, 1, 2, 2, 4, 8, 64, 1e-6, Rope(), True, dtype="bfloat16")
    x_MD, table_VD, factors_MV = normal(6, 8, dtype="bfloat16"), normal(24, 8), normal(6, 24)

    def total(params):
        return jnp.sum(logits(config, params, x_MD) * factors_MV)

    found_VD = jax.grad(total)({"embed": {"embedding": table_VD}})["embed"]["embedding"]
    wide = [one.astype(jnp.bfloat16).astype(jnp.float32) for one in (factors_MV, x_MD)]
    np.testing.assert_allclose(found_VD, wide[0].T @ wide[1], rtol=1e-5, atol=1e-5)
    assert np.any(found_VD != found_VD.astype(jnp.bfloat16))
