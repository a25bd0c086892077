"""Attention of packed rows: plain, in causal blocks of queries, over visible tiles (also for GPUs or TPUs), cuDNN's."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rftjax.devices import sharding
from rftjax.errors import UserError
from rftjax.models.flash import TILE as GPU_TILE
from rftjax.models.flash import flash
from rftjax.models.layout import Layout, Part
from rftjax.models.remat import kept
from rftjax.models.splash import TILE, splash
from rftjax.models.tiled import FLOOR, tiled

BLOCK = 128  # queries of a block, and at most BLOCKS of them
BLOCKS = 8
LONG = 512  # tokens of a row from which on `tiled` is faster than `blocked` on a CPU
CUDNN = "cudnn"  # as JAX names it
PAIR, EIGHT = 2, 8  # its keys come in pairs, its channels in eights
FORMS = ("blocked", "tiled", "plain", "cudnn", "triton", "splash")
NEEDED = {  # the platform of a form that runs nowhere else, as JAX and as people call it
    "cudnn": ("gpu", "an NVIDIA GPU"),
    "triton": ("gpu", "an NVIDIA GPU"),
    "splash": ("tpu", "a TPU"),
}


def check_devices(form: str) -> None:
    """Raises UserError where the devices have no such attention."""
    platform, called = NEEDED.get(form, ("", ""))
    if platform and jax.default_backend() != platform:
        raise UserError(
            f"model.attention={form!r}: needs {called}, there is {jax.devices()[0].platform}; set it to 'blocked'"
        )


def attend(
    form: str,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    layout: Layout,
    window: Any = None,
    mesh: Mesh | None = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Returns what `plain` does by one of FORMS; `cudnn` runs on NVIDIA GPUs only, in bfloat16, `triton` on such GPUs
    and `splash` on TPUs only.

    `blocked` is `tiled` for long rows on one CPU device. `window` limits how many positions back a token sees, itself
    included. On a mesh, B lies over data, fsdp and expert and is a multiple of their devices.
    """
    form = "tiled" if form == "blocked" and _suits_tiles(q_BTHC.shape[1], mesh) else form
    if form in ("tiled", "triton", "splash"):
        kernel = {"tiled": tiled, "triton": flash, "splash": splash}[form]
        run = sharding.over_heads(mesh, kernel, k_BTKC.shape[2])
        return run(q_BTHC, k_BTKC, v_BTKC, layout, window, sinks_H)
    return FORM_OF[form](q_BTHC, k_BTKC, v_BTKC, layout.mask(window), sinks_H)


def row_unit(form: str, mesh: Mesh | None) -> int:
    """Returns what the tokens of a packed row are a multiple of, so that each device of a context has as many, in the
    pieces that a form takes."""
    shards = sharding.context_shards(mesh)
    return (
        shards * {"splash": TILE, "triton": GPU_TILE, "cudnn": PAIR}.get(form, 1)
        if shards > 1
        else 1
    )


def of_part(
    form: str,
    q_BQHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    layout: Layout,
    window: Any,
    sinks_H: jax.Array | None,
    part: Part,
) -> jax.Array:
    """Returns what `attend` does for the queries of a part of the layout, on the device that has them; `tiled` is
    `blocked` here."""
    if form in ("triton", "splash"):
        kernel = flash if form == "triton" else splash
        return kernel(q_BQHC, k_BSKC, v_BSKC, layout, window, sinks_H, part)
    run = FORM_OF["blocked" if form == "tiled" else form]
    return run(q_BQHC, k_BSKC, v_BSKC, layout.mask(window, part), sinks_H)


def _suits_tiles(T: int, mesh: Mesh | None) -> bool:
    """Whether rows of T tokens are long, on one device that is a CPU; a mesh may be of devices that are not here."""
    if mesh is None:
        return T >= LONG and jax.default_backend() == "cpu"
    return T >= LONG and mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def cudnn(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask_BTS: jax.Array,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Returns what `plain` does, for tokens that attend to any, by cuDNN's kernel."""
    scale, channels = q_BTHC.shape[-1] ** -0.5, q_BTHC.shape[-1]
    if sinks_H is not None:
        # The kernel has no sinks: they are the scores of one more key, by one more channel, and its values are 0.
        more = [(0, 0), (0, PAIR), (0, 0), (0, EIGHT)]
        k_BSKC, v_BSKC = (jnp.pad(x, more) for x in (k_BSKC, v_BSKC))
        k_BSKC = k_BSKC.at[:, -PAIR, :, channels].set(1)
        q_BTHC = jnp.pad(q_BTHC, [(0, 0), (0, 0), (0, 0), (0, EIGHT)])
        q_BTHC = q_BTHC.at[..., channels].set((sinks_H / scale).astype(q_BTHC.dtype)[None, None])
        mask_BTS = jnp.pad(mask_BTS, ((0, 0), (0, 0), (0, PAIR))).at[:, :, -PAIR].set(True)
    return jax.nn.dot_product_attention(
        q_BTHC, k_BSKC, v_BSKC, mask=mask_BTS[:, None], implementation=CUDNN, scale=scale
    )[..., :channels]


def plain(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask_BTS: jax.Array,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Returns attended values (B, T, H, C), the form that the others are compared with; a sink is a score of its head
    that takes part in the softmax and has no value (Agarwal et al. 2025)."""
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C) * (C**-0.5)
    scores = jnp.einsum("BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32)
    weights = softmax(jnp.where(mask_BTS[:, None, None], scores, FLOOR), sinks_H)
    weights = weights.astype(v_BSKC.dtype)
    return kept(jnp.einsum("BKGTS,BSKC->BTKGC", weights, v_BSKC).reshape(B, T, H, C))


def softmax(scores_BKGTS: jax.Array, sinks_H: jax.Array | None) -> jax.Array:
    """Returns the weights of float32 scores over the last axis, a sink among them without a weight of its own."""
    if sinks_H is None:
        return jax.nn.softmax(scores_BKGTS, axis=-1)
    B, K, G, T = scores_BKGTS.shape[:4]
    sinks = jnp.broadcast_to(sinks_H.reshape(1, K, G, 1, 1), (B, K, G, T, 1))
    both = jnp.concatenate([scores_BKGTS, sinks.astype(scores_BKGTS.dtype)], axis=-1)
    return jax.nn.softmax(both, axis=-1)[..., :-1]


@jax.custom_vjp
def blocked(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask_BTS: jax.Array,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Returns what `plain` does where the mask lets no token see a later one, or for a part of the queries.

    A block of queries computes no score beyond its end where all queries are there, and the backward pass computes the
    weights again from the logarithm of their sum (Dao et al. 2022).
    """
    return _forward(q_BTHC, k_BSKC, v_BSKC, mask_BTS, sinks_H)[0]


def _blocks(T: int, S: int) -> list[tuple[int, int, int]]:
    """Returns the first query of each block, the one behind its last, and the keys that it looks at."""
    count = max(1, min(BLOCKS, T // BLOCK))
    bounds = [(T * index // count, T * (index + 1) // count) for index in range(count)]
    return [(start, end, end if T == S else S) for start, end in bounds]


def _by_head(x_BTHC: jax.Array, K: int) -> jax.Array:
    """Returns x (B, K, G, T, C): the G query heads of each key head together."""
    B, T, H, C = x_BTHC.shape
    return x_BTHC.reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)


def _by_token(x_BKGTC: jax.Array) -> jax.Array:
    """Returns x (B, T, H, C), the inverse of `_by_head`."""
    B, K, G, T, C = x_BKGTC.shape
    return x_BKGTC.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, C)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _forward(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask_BTS: jax.Array,
    sinks_H: jax.Array | None = None,
) -> tuple[jax.Array, tuple]:
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    G = H // K
    q_BKGTC, k_BKCS, v_BKSC = (
        _by_head(q_BTHC, K),
        k_BSKC.transpose(0, 2, 3, 1),
        v_BSKC.swapaxes(1, 2),
    )
    outputs, totals = [], []
    for start, end, seen in _blocks(T, S):
        q = q_BKGTC[:, :, :, start:end].reshape(B, K, -1, C)
        scores = _product("BKNC,BKCS->BKNS", q, k_BKCS[..., :seen])
        scores = scores.reshape(B, K, G, -1, seen) * (C**-0.5)
        scores = jnp.where(mask_BTS[:, None, None, start:end, :seen], scores, FLOOR)
        top = jnp.max(scores, axis=-1, keepdims=True)
        if sinks_H is not None:
            top = jnp.maximum(top, sinks_H.reshape(1, K, G, 1, 1))
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sinks_H is not None:
            total = total + jnp.exp(sinks_H.reshape(1, K, G, 1, 1) - top)
        weights = weights.astype(v_BSKC.dtype).reshape(B, K, -1, seen)
        values = _product("BKNS,BKSC->BKNC", weights, v_BKSC[:, :, :seen])
        outputs.append((values.reshape(B, K, G, -1, C) / total).astype(q_BTHC.dtype))
        totals.append(top + jnp.log(total))
    output, total = kept(jnp.concatenate(outputs, axis=3)), kept(jnp.concatenate(totals, axis=3))
    return _by_token(output), (q_BTHC, k_BSKC, v_BSKC, mask_BTS, sinks_H, output, total)


def _backward(saved: tuple, d_BTHC: jax.Array) -> tuple:
    q_BTHC, k_BSKC, v_BSKC, mask_BTS, sinks_H, output_BKGTC, total_BKGT1 = saved
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    G, dtype = H // K, q_BTHC.dtype
    q_BKGTC, d_BKGTC = _by_head(q_BTHC, K), _by_head(d_BTHC, K)
    k_BKCS, v_BKCS = k_BSKC.transpose(0, 2, 3, 1), v_BSKC.transpose(0, 2, 3, 1)
    k_BKSC = k_BSKC.swapaxes(1, 2)
    products = d_BKGTC.astype(jnp.float32) * output_BKGTC.astype(jnp.float32)
    inner_BKGT1 = jnp.sum(products, axis=-1, keepdims=True)
    dk_BKSC = dv_BKSC = jnp.zeros((B, K, S, C), jnp.float32)
    dq = []
    for start, end, seen in _blocks(T, S):
        q = q_BKGTC[:, :, :, start:end].reshape(B, K, -1, C)
        d = d_BKGTC[:, :, :, start:end].reshape(B, K, -1, C)
        shape = (B, K, G, end - start, seen)
        scores = _product("BKNC,BKCS->BKNS", q, k_BKCS[..., :seen]).reshape(shape) * (C**-0.5)
        scores = scores - total_BKGT1[:, :, :, start:end]
        weights = jnp.exp(jnp.where(mask_BTS[:, None, None, start:end, :seen], scores, FLOOR))
        dweights = _product("BKNC,BKCS->BKNS", d, v_BKCS[..., :seen]).reshape(shape)
        dscores = weights * (dweights - inner_BKGT1[:, :, :, start:end]) * (C**-0.5)
        weights = weights.astype(dtype).reshape(B, K, -1, seen)
        dscores = dscores.astype(dtype).reshape(B, K, -1, seen)
        dv_BKSC = dv_BKSC.at[:, :, :seen].add(_product("BKNS,BKNC->BKSC", weights, d))
        dk_BKSC = dk_BKSC.at[:, :, :seen].add(_product("BKNS,BKNC->BKSC", dscores, q))
        dq.append(_product("BKNS,BKSC->BKNC", dscores, k_BKSC[:, :, :seen]).reshape(B, K, G, -1, C))
    dq_BTHC = _by_token(jnp.concatenate(dq, axis=3)).astype(dtype)
    dk_BSKC, dv_BSKC = (grad.swapaxes(1, 2).astype(dtype) for grad in (dk_BKSC, dv_BKSC))
    if sinks_H is None:
        return dq_BTHC, dk_BSKC, dv_BSKC, None, None
    weight_BKGT1 = jnp.exp(sinks_H.reshape(1, K, G, 1, 1) - total_BKGT1)
    dsinks_H = -jnp.sum(weight_BKGT1 * inner_BKGT1, axis=(0, 3, 4)).reshape(H)
    return dq_BTHC, dk_BSKC, dv_BSKC, None, dsinks_H.astype(sinks_H.dtype)


blocked.defvjp(_forward, _backward)


FORM_OF: dict[str, Any] = {"blocked": blocked, "plain": plain, "cudnn": cudnn}  # of a mask
