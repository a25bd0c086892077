"""Products with weights, whose weight gradients are float32 in any compute dtype.

Micro-batch gradients are summed in float32, so rounding each to bfloat16 would only lose bits. On CPU, XLA's bfloat16
product has twice the speed of float32, but falls back to float32 when the left operand is column-major, as it is in a
weight gradient.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

LINES = 1024  # bytes
COLUMNS = 16  # that are transposed at once


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(x: jax.Array, kernel: jax.Array, axes: int = 1, wide: bool = False) -> jax.Array:
    """Returns x, contracted over its last `axes` axes with the kernel's first ones.

    The product is of x's dtype, its result too, or float32 where `wide`.
    """
    contract = (tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes)))
    result = jnp.float32 if wide else x.dtype
    return jax.lax.dot_general(
        x, kernel.astype(x.dtype), (contract, ((), ())), preferred_element_type=result
    )


def _forward(
    x: jax.Array, kernel: jax.Array, axes: int, wide: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear(x, kernel, axes, wide), (x, kernel)


def _backward(
    axes: int, wide: bool, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    dx, wide_gradient = _gradients(axes, saved, dy)
    return dx, wide_gradient.astype(saved[1].dtype)


def _gradients(
    axes: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dy = dy.astype(x.dtype)
    outputs = kernel.ndim - axes
    contract = (tuple(range(dy.ndim - outputs, dy.ndim)), tuple(range(axes, kernel.ndim)))
    dx = jax.lax.dot_general(dy, kernel.astype(x.dtype), (contract, ((), ())))
    return dx, weight_gradient(x, dy, axes, outputs)


linear.defvjp(_forward, _backward)


@jax.custom_vjp
def tied(x_MD: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Returns what `linear` does with a table's transpose, one axis and `wide`."""
    table_VD = table_VD.astype(x_MD.dtype)
    return jnp.einsum("MD,VD->MV", x_MD, table_VD, preferred_element_type=jnp.float32)


def _tied(x_MD: jax.Array, table_VD: jax.Array) -> tuple[jax.Array, tuple]:
    return tied(x_MD, table_VD), (x_MD, table_VD)


def _tied_gradients(saved: tuple[jax.Array, jax.Array], dy_MV: jax.Array) -> tuple:
    x_MD, table_VD = saved
    dy_MV = dy_MV.astype(x_MD.dtype)
    gradient_VD = weight_gradient(dy_MV, x_MD, 1, 1)
    return dy_MV @ table_VD.astype(x_MD.dtype), gradient_VD.astype(table_VD.dtype)


tied.defvjp(_tied, _tied_gradients)


@jax.custom_vjp
def joined(x: jax.Array, kernel: jax.Array, zeros: jax.Array) -> jax.Array:
    """Returns what `linear` does with one axis and `wide`, its weight gradient as that of float32 zeros.

    Opened (see `wide.opened`), a kernel in the compute dtype would be there in float32 too, where a branch is kept for
    the backward pass.
    """
    return linear(x, kernel, 1, True)


def _joined(x: jax.Array, kernel: jax.Array, zeros: jax.Array) -> tuple[jax.Array, tuple]:
    return joined(x, kernel, zeros), (x, kernel)


def _joined_gradients(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple:
    dx, wide_gradient = _gradients(1, saved, dy)
    return dx, None, wide_gradient


joined.defvjp(_joined, _joined_gradients)


def weight_gradient(x: jax.Array, dy: jax.Array, inputs: int, outputs: int) -> jax.Array:
    """Returns the float32 product of x and dy over all but the last `inputs` axes of x and `outputs` of dy."""
    forms = {"cpu": functools.partial(by_rows, inputs=inputs, outputs=outputs)}
    return jax.lax.platform_dependent(
        x, dy, **forms, default=functools.partial(plain, inputs=inputs)
    )


def plain(x: jax.Array, dy: jax.Array, *, inputs: int) -> jax.Array:
    """Returns the weight gradient as one product over the leading axes."""
    shared = tuple(range(x.ndim - inputs))
    dims = ((shared, shared), ((), ()))
    return jax.lax.dot_general(x, dy, dims, preferred_element_type=jnp.float32)


def by_rows(x: jax.Array, dy: jax.Array, *, inputs: int, outputs: int) -> jax.Array:
    """Returns the weight gradient as a product with a row-major transpose of x."""
    x_MD = x.reshape(-1, math.prod(x.shape[x.ndim - inputs :]))
    dy_MF = dy.reshape(x_MD.shape[0], -1)
    dw_DF = jnp.dot(transposed(x_MD), dy_MF, preferred_element_type=jnp.float32)
    return dw_DF.reshape(*x.shape[x.ndim - inputs :], *dy.shape[dy.ndim - outputs :])


def narrow(a: jax.Array) -> jax.Array:
    """Returns a LoRA factor (..., inputs, rank) as it is, and its gradient.

    XLA for TPUs fills a last axis up to 128, so that a rank of 8 takes 16 times its room in what a loop over layers
    holds; as both are laid out here, the inputs are last.
    """

    def pinned(a: jax.Array) -> jax.Array:
        *lead, inputs, rank = range(a.ndim)
        return with_layout_constraint(a, Layout((*lead, rank, inputs)))

    return jax.lax.platform_dependent(a, tpu=pinned, default=lambda a: a)


def transposed(x_MD: jax.Array) -> jax.Array:
    """Returns the transpose as a copy in row-major order; without a barrier XLA would only relabel the axes.

    Rows whose bytes are a multiple of LINES lie over each other in the CPU's caches, where a column would be read from
    memory again for each of its numbers: their transpose is made of columns that fill a line of the cache.
    """
    M, D = x_MD.shape
    wide = COLUMNS * (D * x_MD.dtype.itemsize % LINES == 0 and D % COLUMNS == 0)
    if not wide:
        return _copied(x_MD.T)
    x_NMW = _copied(x_MD.reshape(M, D // wide, wide).swapaxes(0, 1))
    return _copied(x_NMW.swapaxes(1, 2)).reshape(D, M)


def _copied(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)
