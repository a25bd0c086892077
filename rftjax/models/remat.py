"""What of a layer's activations stays for the backward pass, which computes the rest again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ALL, PRODUCTS, LAYER = "", "products", "layer"
REMATS = (ALL, PRODUCTS, LAYER)
KEPT = "kept"  # the name of what stays under PRODUCTS


def kept(x: jax.Array) -> jax.Array:
    """Marks a result that costs much to compute again: it stays under PRODUCTS."""
    return checkpoint_name(x, KEPT)


def rematerialized(
    layer: Callable[..., Any], remat: str, *, narrow: bool = False
) -> Callable[..., Any]:
    """Returns the layer as the backward pass is to see it: ALL stays, PRODUCTS and its input do, or its input alone.

    Of a layer with `narrow` parameters no float32 form stays, of all layers as large as their gradients.
    """
    if remat == ALL:
        return jax.checkpoint(layer, policy=_not_widened) if narrow else layer
    policy = jax.checkpoint_policies.save_only_these_names(KEPT) if remat == PRODUCTS else None
    return jax.checkpoint(layer, policy=policy)


def _not_widened(primitive: Any, *inputs: Any, **settings: Any) -> bool:
    """Whether a result stays: all but the float32 form of a parameter, as `wide` opens it."""
    dtypes = [x.dtype for x in inputs]
    opens = primitive.name == "custom_vjp_call" and dtypes == [jnp.bfloat16, jnp.float32]
    return not (opens and inputs[0].shape == inputs[1].shape)
