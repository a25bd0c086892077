"""Products grouped by expert on NVIDIA GPUs, in Pallas for Triton: XLA computes them there over all experts.

Rows are sorted by expert. One program computes a tile of the result for a block of rows of one expert, so that no row
meets another expert's matrix and nothing of the size rows x experts exists.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 64  # rows of a block
STEP = 32  # entries of a contraction that are loaded at once; all sides are filled up to a multiple of it
PARAMS = {"num_warps": 4, "num_stages": 3}


def _filled(x: jax.Array, *axes: int) -> jax.Array:
    """Returns x with zeros behind the axes, up to a multiple of STEP."""
    spare = [(0, -size % STEP if at in axes else 0) for at, size in enumerate(x.shape)]
    return jnp.pad(x, spare) if any(more for _, more in spare) else x


def _width(size: int) -> int:
    """Returns the width of a tile: the largest power of two up to 128 that divides the size."""
    return min(128, size & -size)


def _whole(array: Any) -> Any:
    """Returns how a kernel sees an array of which it takes parts itself."""
    from jax.experimental import pallas

    return pallas.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))


def product(
    x_JD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Returns each row's product with its expert's matrix in x's dtype, 0 for rows behind the last expert's.

    `interpret` runs step by step on any device.
    """
    return _products(x_JD, kernel_EDF, sizes_E, turned=False, interpret=interpret)


def turned_product(
    dy_JF: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Returns `product` with each expert's matrix transposed, which is read as it lies."""
    return _products(dy_JF, kernel_EDF, sizes_E, turned=True, interpret=interpret)


def _products(
    x: jax.Array, kernel: jax.Array, sizes_E: jax.Array, *, turned: bool, interpret: bool
) -> jax.Array:
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    rows, width = x.shape[0], kernel.shape[1 if turned else 2]
    x, kernel = _filled(x, 1), _filled(kernel, 1, 2)
    experts, wide = kernel.shape[0], kernel.shape[1 if turned else 2]
    counts_E = -(-sizes_E // BLOCK)
    ends_E, last_E = jnp.cumsum(counts_E), jnp.cumsum(sizes_E)
    at_Z = jnp.arange(min(rows, rows // BLOCK + experts))
    expert_Z = jnp.minimum(jnp.searchsorted(ends_E, at_Z, side="right"), experts - 1)
    first_Z = (last_E - sizes_E)[expert_Z] + (at_Z - (ends_E - counts_E)[expert_Z]) * BLOCK
    blocks = (expert_Z, jnp.minimum(first_Z, rows), last_E[expert_Z])
    # Masked rows are not touched on a GPU; step by step a slice beyond the end would begin earlier.
    spare = BLOCK if interpret else 0
    x = jnp.pad(x, ((0, spare), (0, 0)))
    result, tile = jax.ShapeDtypeStruct((rows + spare, wide), x.dtype), _width(wide)
    one = pallas.BlockSpec((1,), lambda block, column: (block,))
    y = pallas.pallas_call(
        functools.partial(_product, steps=x.shape[1] // STEP, width=tile, turned=turned),
        grid=(at_Z.shape[0], wide // tile),
        in_specs=[one, one, one, _whole(x), _whole(kernel)],
        out_specs=_whole(result),
        out_shape=result,
        compiler_params=triton.CompilerParams(**PARAMS),
        interpret=interpret,
        name="grouped_product",
    )(*(part.astype(jnp.int32) for part in blocks), x, kernel)
    # No program writes the rows behind the last expert's.
    return jnp.where((jnp.arange(rows) < last_E[-1])[:, None], y[:rows, :width], 0)


def _product(
    expert: Any,
    first: Any,
    last: Any,
    x: Any,
    kernel: Any,
    y: Any,
    *,
    steps: int,
    width: int,
    turned: bool,
) -> None:
    """Computes one block's tile; the arguments are references to memory."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    rows = pallas.ds(first[0], BLOCK)
    columns = pallas.ds(pallas.program_id(1) * width, width)
    own = (first[0] + jnp.arange(BLOCK) < last[0])[:, None]

    def add(at: jax.Array, total: jax.Array) -> jax.Array:
        part = pallas.ds(at * STEP, STEP)
        left = triton.load(x.at[rows, part], mask=own, other=0.0)
        right = kernel[expert[0], columns, part].T if turned else kernel[expert[0], part, columns]
        return total + dot(left, right)

    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((BLOCK, width), jnp.float32))
    triton.store(y.at[rows, columns], total.astype(y.dtype), mask=own)


def gradient(
    x_JD: jax.Array, dy_JF: jax.Array, sizes_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Returns the float32 gradient (E, D, F) of the experts' matrices."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    D, F, E = x_JD.shape[1], dy_JF.shape[1], sizes_E.shape[0]
    spare = BLOCK if interpret else 0
    x, dy = (jnp.pad(_filled(rows, 1), ((0, spare), (0, 0))) for rows in (x_JD, dy_JF))
    deep, wide = _width(x.shape[1]), _width(dy.shape[1])
    last_E = jnp.cumsum(sizes_E)
    one = pallas.BlockSpec((1,), lambda expert, depth, column: (expert,))
    tile = pallas.BlockSpec((None, deep, wide), lambda expert, depth, column: (expert, depth, column))  # fmt: skip
    found = pallas.pallas_call(
        functools.partial(_gradient, deep=deep, wide=wide),
        grid=(E, x.shape[1] // deep, dy.shape[1] // wide),
        in_specs=[one, one, _whole(x), _whole(dy)],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct((E, x.shape[1], dy.shape[1]), jnp.float32),
        compiler_params=triton.CompilerParams(**PARAMS),
        interpret=interpret,
        name="grouped_gradient",
    )(*((last_E - sizes_E).astype(jnp.int32), last_E.astype(jnp.int32)), x, dy)
    return found[:, :D, :F]


def _gradient(first: Any, last: Any, x: Any, dy: Any, found: Any, *, deep: int, wide: int) -> None:
    """Computes one tile of one expert's gradient."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    depths = pallas.ds(pallas.program_id(1) * deep, deep)
    columns = pallas.ds(pallas.program_id(2) * wide, wide)

    def add(at: jax.Array, total: jax.Array) -> jax.Array:
        row = first[0] + at * STEP
        rows, own = pallas.ds(row, STEP), (row + jnp.arange(STEP) < last[0])[:, None]
        left = triton.load(x.at[rows, depths], mask=own, other=0.0)
        return total + dot(left.T, triton.load(dy.at[rows, columns], mask=own, other=0.0))

    steps = (last[0] - first[0] + STEP - 1) // STEP
    found[...] = jax.lax.fori_loop(0, steps, add, jnp.zeros((deep, wide), jnp.float32))


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns a float32 product inside a kernel, exact where both are float32."""
    from jax.experimental.pallas import triton

    exact = left.dtype == jnp.float32
    product = triton.dot(left, right, precision=jax.lax.Precision.HIGHEST if exact else None)
    return product.astype(jnp.float32)
