"""What of a layer's activations stays for the backward pass, which computes the rest again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

ALL, PRODUCTS, LAYER = "", "products", "layer"
REMATS = (ALL, PRODUCTS, LAYER)
KEPT = "kept"  # the name of what stays under PRODUCTS


def kept(x: jax.Array) -> jax.Array:
    """Marks a result that costs much to compute again: it stays under PRODUCTS."""
    return checkpoint_name(x, KEPT)


def rematerialized(layer: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Returns the layer as the backward pass is to see it: ALL stays, PRODUCTS and its input do, or its input alone."""
    if remat == ALL:
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(KEPT) if remat == PRODUCTS else None
    return jax.checkpoint(layer, policy=policy)
