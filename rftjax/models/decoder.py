"""The decoder-only transformer that the families share.

Parameters are a plain nested dict; a stack of equal layers has one tree, in which everything carries a leading L axis.
The only stack of most families is called `layers`:

    embed/embedding (V, D)
    layers/attention_norm/scale (L, D)          layers/mlp_norm/scale (L, D)
    [layers/attention_output_norm/scale (L, D)  layers/mlp_output_norm/scale (L, D)]
    layers/attention/query/kernel (L, D, H, C)  [bias (L, H, C)]; key and value with K for H
    [layers/attention/query_norm/scale (L, C) or (L, H, C); key_norm with K for H]
    layers/attention/output/kernel (L, H, C, D) [bias (L, D)]  [layers/attention/sinks (L, H)]
    layers/mlp/gate/kernel, up/kernel (L, D, F) [bias (L, F)]; down/kernel (L, F, D) [bias (L, D)]
    in a stack with experts, for mlp above: router/weight (L, D, E) [correction, router_bias (L, E)];
        experts_gate/kernel, experts_up/kernel (L, E, D, F) [bias (L, E, F)];
        experts_down/kernel (L, E, F, D) [bias (L, E, D)];
        and beside it [shared/gate, up, down], which every token passes; latent attention: see `latent`
    final_norm/scale (D)
    head/kernel (D, V)                          only where the embedding is not tied

LoRA adapters are a tree of the same form in which each adapted linear layer holds a
(L, inputs, rank) and b (L, rank, outputs).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rftjax.devices import context, memories, sharding
from rftjax.models import across, wide
from rftjax.models.block import Block, causal
from rftjax.models.config import FULL, Config, Rope, Stack
from rftjax.models.experts import COLLECTION
from rftjax.models.head import logits
from rftjax.models.layers import Norm
from rftjax.models.layout import Layout
from rftjax.models.remat import rematerialized
from rftjax.models.rotary import rotations
from rftjax.models.wide import is_joined, opened
from rftjax.types import Params

__all__ = [
    "FULL",
    "Config",
    "Rope",
    "cast",
    "embed",
    "hidden",
    "init",
    "logits",
    "reading_dtype",
    "roll",
    "unroll",
]


WIDE = ("scale", "sinks", "weight", "router_bias", "correction")


def reading_dtype(name: str, dtype: str) -> str:
    """Returns the dtype in which the forward pass reads a parameter whose path ends in `name`: norm gains, sinks and
    routers in float32, all else in the compute dtype."""
    return "float32" if name in WIDE else dtype


def cast(params: Params, dtype: str) -> Params:
    """Returns the parameters as the forward pass reads them; leaves of that dtype are the same arrays."""

    def one(path: tuple, leaf: Any) -> Any:
        return leaf.astype(reading_dtype(path[-1].key, dtype))

    return jax.tree_util.tree_map_with_path(one, params)


def fetched(config: Config, tree: Params) -> Params:
    """Returns parameters, or adapters, that a program was given, on its devices: those that lie in the host's memory in
    the dtypes that the forward pass reads, adapters in float32."""

    def dtype(path: tuple, leaf: jax.Array) -> Any:
        name = path[-1].key
        return leaf.dtype if name in sharding.ADAPTERS else reading_dtype(name, config.dtype)

    return memories.fetched(tree, [stack.name for stack in config.stacks], dtype)


def joined(config: Config, params: Params, zeros: Params) -> Params:
    """Returns parameters whose gradients are taken in float32 zeros: those of layers opened layer by layer."""
    stacks = [stack.name for stack in config.stacks]
    return {
        name: part if name in stacks else opened(part)
        for name, part in wide.joined(params, zeros).items()
    }


def embed(
    config: Config, params: Params, tokens_BT: jax.Array, mesh: Mesh | None = None
) -> jax.Array:
    """Returns x_BTD in the compute dtype; where the table's columns lie over the mesh, so do its gradient's."""
    table_VD = params["embed"]["embedding"]
    if mesh is not None and _lies_over(mesh, table_VD, tokens_BT):
        x_BTD = looked_up(table_VD, tokens_BT, config.dtype, mesh)
    else:
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(config.dtype)
    return (
        x_BTD if config.embed_scale == 1.0 else x_BTD * jnp.asarray(config.embed_scale, x_BTD.dtype)
    )


def _lies_over(mesh: Mesh, table_VD: jax.Array, tokens_BT: jax.Array) -> bool:
    """Whether devices have parts of the table's columns, and each its own tokens."""
    tokens = tokens_BT.shape[1]
    apart = sharding.context_shards(mesh, tokens) == sharding.context_shards(mesh)
    return apart and bool(sharding.column_axes(sharding.table_sharding(mesh, table_VD.shape)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def looked_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: str, mesh: Mesh) -> jax.Array:
    """Returns the rows of the table, of whose float32 gradient each device adds up its own columns.

    Otherwise XLA hands each device all columns, in float32, of the rows of all devices.
    """
    place = sharding.table_sharding(mesh, table_VD.shape)
    table_VD = jax.lax.with_sharding_constraint(table_VD, place)  # not where the head lies
    return context.spread(mesh, jnp.take(table_VD, tokens_BT, axis=0).astype(dtype))


def _looked_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: str, mesh: Mesh) -> tuple:
    return looked_up(table_VD, tokens_BT, dtype, mesh), (table_VD, tokens_BT)


def _looked_up_gradient(dtype: str, mesh: Mesh, saved: tuple, dx_BTD: jax.Array) -> tuple:
    table_VD, tokens_BT = saved
    place = sharding.table_sharding(mesh, table_VD.shape)
    rows, own = place.shard_shape(table_VD.shape)
    divided = sharding.column_axes(place)

    def added(tokens_BT: jax.Array, dx_BTD: jax.Array) -> jax.Array:
        tokens, dx = (context.columns(mesh, one, divided) for one in (tokens_BT, dx_BTD))
        first = jax.lax.axis_index("tensor") * rows if rows < table_VD.shape[0] else 0
        places = jnp.where(tokens < first, rows, tokens - first)  # none for other devices' rows
        zeros = jnp.zeros((rows, own), jnp.float32)
        return zeros.at[places].add(dx.astype(jnp.float32), mode="drop")

    run = jax.shard_map(
        added,
        mesh=mesh,
        in_specs=(context.PARTS, context.PARTS),
        out_specs=place.spec,
        check_vma=False,
    )
    return run(tokens_BT, dx_BTD).astype(table_VD.dtype), None


looked_up.defvjp(_looked_up, _looked_up_gradient)


def hidden(
    config: Config,
    params: Params,
    tokens_RX: jax.Array,
    positions_RX: jax.Array,
    groups_RX: jax.Array,
    segments_RX: jax.Array,
    *,
    lora: Params | None = None,
    remat: str = "",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Returns the last layer's normed output x_RXD for packed rows (see `types.Pack`), which lie on the mesh."""
    settings: dict[str, Any] = {"lora": lora, "remat": remat, "mesh": mesh}
    return walk(config, params, tokens_RX, positions_RX, groups_RX, segments_RX, **settings)[0]


def walk(
    config: Config,
    params: Params,
    tokens_RX: jax.Array,
    positions_RX: jax.Array,
    groups_RX: jax.Array,
    segments_RX: jax.Array,
    experts_RXLU: jax.Array | None = None,
    *,
    lora: Params | None = None,
    remat: str = "",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, list[dict[str, Any]]]:
    """Returns what `hidden` does, and what the experts of each sparse stack told (see `experts.balance`).

    `experts_RXLU` are the experts to replay, of all layers that have some (see `experts.route`).
    """
    final_norm: Any = Norm(config)
    turns = rotations(config, positions_RX)
    # A scan takes the rotation of its layer out of all of them.
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *turns) if len(turns) > 1 else turns[0]
    layout = Layout(groups_RX, segments_RX, positions_RX)

    def run(stack: Stack, x_RXD: jax.Array, experts_LRXU: Any) -> tuple[jax.Array, Any]:
        block: Any = Block(config, stack, mesh=mesh)

        def layer(x_RXD: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            tree, window, turn, experts_RXU = inputs
            tree = tree | {"params": opened(tree["params"])}
            x_RXD = sharding.keep_tokens(mesh, x_RXD)
            limit = window if config.windowed else None

            among = across.among(config, layout, limit, mesh, remat)
            (x_RXD, _), told = block.apply(
                tree, x_RXD, turn, among, experts_RXU, mutable=[COLLECTION]
            )
            return x_RXD, told.get(COLLECTION, {}).get("mlp", {})

        trees = {"params": params[stack.name]}
        if lora and stack.name in lora:
            trees["lora"] = lora[stack.name]
        here = slice(stack.first, stack.first + stack.count)
        windows, indices = config.layer_windows[here], config.rope_indices[here]
        body = rematerialized(layer, remat, narrow=is_joined(params[stack.name]))
        if isinstance(params[stack.name], dict):

            def scanned(x_RXD: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
                tree, window, index, experts_RXU = inputs
                turn = (
                    jax.tree.map(lambda part: part[index], stacked) if len(turns) > 1 else stacked
                )
                return body(x_RXD, (tree, window, turn, experts_RXU))

            numbers = (jnp.asarray(one, jnp.int32) for one in (windows, indices))
            return jax.lax.scan(scanned, x_RXD, (trees, *numbers, experts_LRXU))
        body, told = jax.jit(body), []  # traced once for all layers
        for at, (window, index) in enumerate(zip(windows, indices, strict=True)):
            tree = {name: layers[at] for name, layers in trees.items()}
            own = None if experts_LRXU is None else experts_LRXU[at]
            x_RXD, one = body(x_RXD, (tree, window, turns[index], own))
            told.append(one)
        return x_RXD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *told)

    x_RXD = embed(config, params, tokens_RX, mesh)
    routed, seen = [], 0
    for stack in config.stacks:
        own = None
        if stack.sparse and experts_RXLU is not None:
            own = jnp.moveaxis(experts_RXLU[:, :, seen : seen + stack.count], 2, 0)
            seen += stack.count
        x_RXD, told = run(stack, x_RXD, own)
        routed += [told] if stack.sparse else []
    x_RXD = sharding.keep_tokens(mesh, x_RXD)
    return final_norm.apply({"params": params["final_norm"]}, x_RXD), routed


def layer_trees(stack: Stack, tree: Params) -> list[Params]:
    """Returns the tree of each layer of a stack, in the order of the model."""
    return [jax.tree.map(lambda leaf, at=at: leaf[at], tree) for at in range(stack.count)]


def unroll(config: Config, tree: Params) -> Params:
    """Returns the tree in the form that runs fastest on CPU: a list of layers a stack, and a separate head (D, V).

    In a scan, XLA's CPU backend copies the whole stacked gradient in every layer; a product with a (D, V) head is
    faster than with the embedding (V, D).
    """
    stacks = [stack for stack in config.stacks if stack.name in tree]
    unrolled = tree | {stack.name: layer_trees(stack, tree[stack.name]) for stack in stacks}
    if config.tied and "embed" in tree:
        unrolled["head"] = {"kernel": tree["embed"]["embedding"].T}
    return unrolled


def roll(config: Config, tree: Params) -> Params:
    """Returns a gradient of an unrolled tree as that of the tree itself."""
    rolled = dict(tree)
    for stack in config.stacks:
        if stack.name in tree:
            rolled[stack.name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree[stack.name])
    if config.tied and "head" in tree:
        head = rolled.pop("head")["kernel"]
        rolled["embed"] = {"embedding": rolled["embed"]["embedding"] + head.T}
    return rolled


def init(config: Config, key: jax.Array) -> Params:
    """Returns fresh float32 parameters, normal with the config's standard deviation."""
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    x_BTD = jnp.zeros((1, 1, config.width), config.dtype)
    turn = rotations(config, jnp.zeros((1, 1), jnp.int32))[0]

    def layers(stack: Stack, keys_L: jax.Array) -> Params:
        block = Block(config, stack)
        return jax.vmap(lambda key: block.init(key, x_BTD, turn, causal)["params"])(keys_L)

    params: dict[str, Any] = {
        "embed": {
            "embedding": jax.random.normal(embed_key, (config.vocab, config.width))
            * config.init_std
        },
        "final_norm": {"scale": jnp.full((config.width,), 1.0 - config.norm_offset)},
    }
    keys_L = jax.random.split(layers_key, config.layers)
    for stack in config.stacks:
        params[stack.name] = layers(stack, keys_L[stack.first : stack.first + stack.count])
    if not config.tied:
        kernel_DV = jax.random.normal(head_key, (config.width, config.vocab)) * config.init_std
        params["head"] = {"kernel": kernel_DV}
    return params
