"""The sampler's jitted part: a KV cache of rows, chunked prefill, and many decode steps a dispatch.

The cache is a list with a dict a layer, of the leaves that the family declares: keys and values, each (rows, K, S, C),
as a rule. What a row holds of a token lies at the token's position, on the axis before the last; where experts are
recorded (`Routing.recorded`), those that the token chose are among it, and go with the row wherever it is copied.
What a row computes depends on nothing but its own tokens: call shapes are constant, S only adds masked positions.
On a mesh, the devices share out the rows (`sharding.ROWS`) and compute nothing for those of others; those of a context
have the same rows, and each a part of their positions (see `models.cached`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rftjax.devices import sharding
from rftjax.models import CHOSEN, cache_leaves, decoder, logical_axes
from rftjax.models.block import Block
from rftjax.models.cached import form_on, over, own_places
from rftjax.models.config import CacheLeaf, Config
from rftjax.models.decoder import embed, logits
from rftjax.models.distribution import RowSettings, adjust, by_rows, draw, uniforms
from rftjax.models.experts import COLLECTION, GATES
from rftjax.models.layers import Norm
from rftjax.models.rotary import Turn, rotations
from rftjax.types import Params

Cache = list[dict[str, jax.Array]]
KEPT = -1  # the budget, in what the host gives, of a row that the device goes on with


class Rows(NamedTuple):
    """The decoding rows: next input token, its position, tokens that may still be sampled (0: idle), noise key parts
    (stream, draw, sample) and settings."""

    token_B: Any
    position_B: Any
    budget_B: Any
    noise_B3: Any
    settings: RowSettings


def sampler_params(
    config: Config, params: Params, adapters: Params | None = None, mesh: Mesh | None = None
) -> Params:
    """Returns what decode reads: compute dtype but for norm gains, one tree a layer, adapters (already scaled) merged,
    laid out for it.

    Nothing else hands weights to the sampler.
    """
    params = decoder.fetched(config, params)
    adapters = decoder.fetched(config, adapters) if adapters else None
    layers: list[Params] = []
    for stack in config.stacks:
        tree, own = params[stack.name], (adapters or {}).get(stack.name)
        for at in range(stack.count):
            if own and layers:
                # A layer at a time: the sums of all layers in float32 would lie beside the weights.
                (tree, own), layers[-1] = jax.lax.optimization_barrier(((tree, own), layers[-1]))
            layer = jax.tree.map(lambda leaf, at=at: leaf[at], tree)
            if own:
                layer = merge(layer, jax.tree.map(lambda leaf, at=at: leaf[at], own))
            layers.append(decoder.cast(layer, config.dtype))
    stacked = {stack.name for stack in config.stacks}
    rest = {name: tree for name, tree in params.items() if name not in stacked}
    weights = decoder.cast(rest, config.dtype) | {"layers": layers}
    if mesh is None:
        return weights
    return jax.lax.with_sharding_constraint(
        weights, sharding.decode_shardings(mesh, logical_axes(config), weights)
    )


def merge(tree: Params, adapters: Params) -> Params:
    """Returns the tree with a @ b added to each adapted kernel, in float32; all may have a leading L axis."""
    merged = {}
    for name, value in tree.items():
        adapter = adapters.get(name) if isinstance(adapters, dict) else None
        if adapter is None:
            merged[name] = value
        elif "a" in adapter:
            delta = jnp.einsum(
                "...ir,...ro->...io",
                adapter["a"],
                adapter["b"],
                precision=jax.lax.Precision.HIGHEST,
            )
            kernel = value["kernel"]
            wide = kernel.astype(jnp.float32) + delta.reshape(kernel.shape)
            merged[name] = value | {"kernel": wide}
        else:
            merged[name] = merge(value, adapter)
    return merged


def new_cache(config: Config, rows: int, length: int, mesh: Mesh | None = None) -> Cache:
    """Returns an empty cache of `length` positions a row in the compute dtype."""
    abstract = abstract_cache(config, rows, length, mesh)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), abstract)


def abstract_cache(config: Config, rows: int, length: int, mesh: Mesh | None = None) -> Any:
    """Returns the shapes, dtypes and shardings of a cache, its length rounded up to what the mesh divides."""
    length += -length % sharding.context_shards(mesh)

    def leaf(one: CacheLeaf) -> jax.ShapeDtypeStruct:
        place = sharding.cache_sharding(mesh, one.shape, one.axes) if mesh is not None else None
        whole = (rows, *one.shape[:-1], length, one.shape[-1])
        return jax.ShapeDtypeStruct(whole, jnp.dtype(one.dtype or config.dtype), sharding=place)

    return [{one.name: leaf(one) for one in leaves} for leaves in cache_leaves(config)]


def cache_length(cache: Cache) -> int:
    """Returns the positions of a row, of the device's own part where the caller is one that each device runs."""
    return jax.tree.leaves(cache)[0].shape[-2]


@functools.partial(jax.jit, static_argnames=("slots", "mesh"))
def idle_rows(slots: int, mesh: Mesh | None = None) -> Rows:
    """Returns rows that sample nothing."""
    nothing_B, ones_B = jnp.zeros(slots, jnp.int32), jnp.ones(slots, jnp.float32)
    settings = RowSettings(ones_B, ones_B, nothing_B)
    noise_B3 = jnp.zeros((slots, 3), jnp.int32)
    return _pin_rows(Rows(nothing_B, nothing_B, nothing_B, noise_B3, settings), mesh)


def pack_rows(rows: Rows) -> np.ndarray:
    """Returns the host's rows as int32 rows_B9, so that a dispatch takes one transfer; floats keep their bits.

    Rows with a budget of KEPT stay on the device as they are.
    """
    settings = rows.settings
    floats = [np.float32(one).view(np.int32) for one in (settings.temperature_B, settings.top_p_B)]
    whole = (rows.token_B, rows.position_B, rows.budget_B, *rows.noise_B3.T)
    return np.stack([*whole, *floats, settings.top_k_B], axis=1).astype(np.int32)


def unpack_rows(rows_B9: jax.Array) -> Rows:
    """Returns the rows that `pack_rows` packed."""
    floats_B2 = jax.lax.bitcast_convert_type(rows_B9[:, 6:8], jnp.float32)
    settings = RowSettings(floats_B2[:, 0], floats_B2[:, 1], rows_B9[:, 8])
    return Rows(rows_B9[:, 0], rows_B9[:, 1], rows_B9[:, 2], rows_B9[:, 3:6], settings)


def _pin_cache(config: Config, cache: Cache, mesh: Mesh | None) -> Cache:
    """Keeps the cache where `new_cache` put it, so that no call compiles a second time for another place."""
    if mesh is None:
        return cache
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_cache(config, 1, 1, mesh))
    return jax.lax.with_sharding_constraint(cache, places)


def _pin_rows(rows: Rows, mesh: Mesh | None) -> Rows:
    if mesh is None:
        return rows
    place = sharding.row_sharding(mesh)
    return jax.lax.with_sharding_constraint(rows, jax.tree.map(lambda _: place, rows))


@functools.partial(jax.jit, static_argnames=("config", "length", "mesh"))
def grow(config: Config, cache: Cache, *, length: int, mesh: Mesh | None = None) -> Cache:
    """Returns the cache with room for `length` positions."""
    own = -(-length // sharding.context_shards(mesh))

    def longer(leaf: jax.Array) -> jax.Array:
        before = [(0, 0)] * (leaf.ndim - 2)
        return jnp.pad(leaf, (*before, (0, own - leaf.shape[-2]), (0, 0)))

    specs = sharding.cache_specs(cache)
    run = sharding.over_rows(mesh, lambda cache: jax.tree.map(longer, cache), (specs,), specs)
    return _pin_cache(config, run(cache), mesh)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames=("config", "mesh"))
def copy_rows(
    config: Config,
    cache: Cache,
    source: Cache | None,
    to_B: jax.Array,
    from_B: jax.Array,
    *,
    mesh: Mesh | None = None,
) -> Cache:
    """Copies rows of `source` (None: the cache itself) into the cache; a target beyond its rows is dropped."""
    shards = sharding.row_multiple(mesh)

    def copy(cache: Cache, source: Cache | None, to_B: jax.Array, from_B: jax.Array) -> Cache:
        shard = jax.lax.axis_index(sharding.ROWS) if shards > 1 else 0

        def copy_leaf(target: jax.Array, leaf: jax.Array) -> jax.Array:
            length = min(target.shape[-2], leaf.shape[-2])
            mine_B = from_B // leaf.shape[0] == shard
            taken = leaf[jnp.where(mine_B, from_B % leaf.shape[0], 0), ..., :length, :]
            if shards > 1:
                # The device that has the row hands it to the others; XLA's CPU compiler cannot add bfloat16 here.
                mine = mine_B.reshape(-1, *[1] * (leaf.ndim - 1))
                wide = jnp.where(mine, taken.astype(jnp.float32), 0.0)
                taken = jax.lax.psum(wide, sharding.ROWS).astype(leaf.dtype)
            rows = target.shape[0]
            at_B = jnp.where(to_B // rows == shard, to_B % rows, rows)
            return target.at[at_B, ..., :length, :].set(taken, mode="drop")

        return jax.tree.map(copy_leaf, cache, cache if source is None else source)

    specs = sharding.cache_specs(cache)
    given: Any = True if source is None else sharding.cache_specs(source)
    run = sharding.over_rows(mesh, copy, (specs, given, False, False), specs)
    return _pin_cache(config, run(cache, source, to_B, from_B), mesh)


@functools.partial(jax.jit, static_argnames="mesh")
def chosen_experts(leaves: list[jax.Array], row: jax.Array, *, mesh: Mesh | None = None) -> Any:
    """Returns experts_SLU of what a row holds, in the order of positions, of the leaves CHOSEN of each layer that has
    one."""
    shards, parts = sharding.row_multiple(mesh), sharding.context_shards(mesh)

    def run(leaves: list[jax.Array], row: jax.Array) -> jax.Array:
        shard = jax.lax.axis_index(sharding.ROWS) if shards > 1 else 0
        rows = leaves[0].shape[0]
        taken = jnp.stack([leaf[row % rows] for leaf in leaves], axis=1)
        if shards > 1:
            taken = jnp.where(row // rows == shard, taken, 0).astype(jnp.int32)
            taken = jax.lax.psum(taken, sharding.ROWS).astype(leaves[0].dtype)
        if parts > 1:
            # Position p is the one at place p // parts of device p % parts.
            apart = jax.lax.all_gather(taken, sharding.CONTEXT, axis=1)
            taken = apart.reshape(-1, *taken.shape[1:])
        return taken

    specs = sharding.cache_specs(leaves)
    return sharding.over_rows(mesh, run, (specs, False), False)(leaves, row)


def _layers(
    config: Config,
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    rows_B: jax.Array | None,
    mesh: Mesh | None,
) -> tuple[jax.Array, Cache]:
    """Runs every layer on new tokens, written into the cache first; a position of S or more is not written.

    `rows_B` names the tokens' cache rows (None: row i for i, without a gather).
    """
    turns = rotations(config, positions_BT)
    x_BTD = embed(config, params, tokens_BT)
    at_B = jnp.arange(tokens_BT.shape[0]) if rows_B is None else rows_B
    form, shards = form_on(config.attention, mesh), sharding.context_shards(mesh)
    places_BT = own_places(positions_BT, cache_length(cache), shards)

    def write(leaf: jax.Array, new: jax.Array) -> jax.Array:
        if leaf.ndim == 3:  # no heads
            return leaf.at[at_B[:, None], places_BT].set(new, mode="drop")
        # Heads are named rather than sliced: for a slice of several heads XLA's TPU compiler chooses a layout of the
        # whole leaf that attention does not read, and copies it back and forth in each step.
        heads = jnp.arange(leaf.shape[1])[None, None, :]
        place = at_B[:, None, None], heads, places_BT[:, :, None]
        return leaf.at[place].set(new, mode="drop")

    written: Cache = []
    for stack in config.stacks:
        block: Any = Block(config, stack, cached=True, mesh=mesh)

        @jax.jit  # traced once for all layers
        def layer(
            tree: Params, x_BTD: jax.Array, cached: dict, window: Any, turn: Turn, block=block
        ) -> tuple:
            def attend_cached(q: jax.Array, new: dict, *sinks: jax.Array) -> tuple:
                written = {name: write(cached[name], one) for name, one in new.items()}
                seen = written if rows_B is None else jax.tree.map(lambda x: x[rows_B], written)
                sunk = sinks[0] if sinks else None
                return over(form, q, seen, positions_BT, window, sunk, shards), written

            if CHOSEN not in cached:
                return block.apply(tree, x_BTD, turn, attend_cached)
            (x_BTD, kept), told = block.apply(
                tree, x_BTD, turn, attend_cached, mutable=[COLLECTION]
            )
            chosen = told[COLLECTION]["mlp"]["chosen"][0].astype(cached[CHOSEN].dtype)
            return x_BTD, kept | {CHOSEN: write(cached[CHOSEN], chosen)}

        for index in range(stack.first, stack.first + stack.count):
            window, turn = config.layer_windows[index], turns[config.rope_indices[index]]
            tree = {"params": params["layers"][index]}
            x_BTD, leaves = layer(tree, x_BTD, cache[index], window, turn)
            written.append(leaves)
    return x_BTD, written


def _specs(config: Config, params: Params, mesh: Mesh | None) -> Any:
    """Returns how the weights are given to `over_rows`: whole, but for experts that are divided."""
    return sharding.expert_specs(mesh, params, GATES, config.routing.experts)


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="cache")
def prefill(
    config: Config,
    params: Params,
    cache: Cache,
    rows_B: jax.Array,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    *,
    mesh: Mesh | None = None,
) -> Cache:
    """Writes `count_B` tokens a row at positions from `start_B` on; rows with a count of 0 are padding.

    On a mesh, each device takes its share of B, whose `rows_B` count from its own first row.
    """

    def run(params, cache, rows_B, tokens_BT, start_B, count_B) -> Cache:
        steps_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
        far = cache_length(cache) * sharding.context_shards(mesh)
        positions_BT = jnp.where(steps_BT < count_B[:, None], start_B[:, None] + steps_BT, far)
        return _layers(config, params, cache, tokens_BT, positions_BT, rows_B, mesh)[1]

    specs, cached = _specs(config, params, mesh), sharding.cache_specs(cache)
    run = sharding.over_rows(mesh, run, (specs, cached, True, True, True, True), cached)
    return _pin_cache(config, run(params, cache, rows_B, tokens_BT, start_B, count_B), mesh)


@functools.partial(
    jax.jit,
    static_argnames=("config", "steps", "filtered", "limit", "mesh"),
    donate_argnames="cache",
)
def decode(
    config: Config,
    params: Params,
    cache: Cache,
    rows: Rows,
    given_B9: jax.Array,
    stops_E: jax.Array,
    seed: jax.Array,
    bounds_2: jax.Array,
    *,
    steps: int,
    filtered: bool,
    limit: int,
    mesh: Mesh | None = None,
) -> tuple[Cache, Rows, jax.Array, jax.Array, jax.Array]:
    """Samples tokens; returns cache, rows, tokens_BT (-1: none), logprobs_BT and the steps taken.

    `rows` are those that the previous call returned; `given_B9` (see `pack_rows`) replaces some. A row goes idle after
    a stop token or at the end of its budget. `bounds_2` holds `most`, the decode steps (up to `steps`), and `enough`:
    the call ends early once no more rows than that are active.
    """

    def run(params, cache, rows, given_B9, stops_E, seed, bounds_2) -> tuple:
        given = unpack_rows(given_B9)
        given_B = given.budget_B != KEPT
        rows = jax.tree.map(
            lambda new, old: jnp.where(given_B.reshape((-1,) + (1,) * (old.ndim - 1)), new, old),
            given,
            rows,
        )
        most, enough = bounds_2[0], bounds_2[1]
        return _decode(
            config, params, cache, rows, stops_E, seed, most, enough,
            steps=steps, filtered=filtered, limit=limit, mesh=mesh,
        )  # fmt: skip

    cached = sharding.cache_specs(cache)
    run = sharding.over_rows(
        mesh,
        run,
        (_specs(config, params, mesh), cached, True, True, False, False, False),
        (cached, True, True, True, False),
    )
    cache, rows, tokens_BT, logprobs_BT, taken = run(
        params, cache, rows, given_B9, stops_E, seed, bounds_2
    )
    cache = _pin_cache(config, cache, mesh)
    return cache, _pin_rows(rows, mesh), tokens_BT, logprobs_BT, taken


def _decode(
    config: Config,
    params: Params,
    cache: Cache,
    rows: Rows,
    stops_E: jax.Array,
    seed: jax.Array,
    most: jax.Array,
    enough: jax.Array,
    *,
    steps: int,
    filtered: bool,
    limit: int,
    mesh: Mesh | None,
) -> tuple[Cache, Rows, jax.Array, jax.Array, jax.Array]:
    """Runs the loop over steps, on a mesh for the rows of one device; all of them take the same number of steps."""
    B = rows.token_B.shape[0]
    far = cache_length(cache) * sharding.context_shards(mesh)
    final_norm: Any = Norm(config)

    def count(budget_B: jax.Array) -> jax.Array:
        active = jnp.sum(budget_B > 0)
        return jax.lax.psum(active, sharding.ROWS) if sharding.row_multiple(mesh) > 1 else active

    def going(carry) -> jax.Array:
        *_, step, active = carry
        return (step < most) & (active > enough)

    def choose(logits_BV: jax.Array, uniform_B: jax.Array, settings: RowSettings) -> tuple:
        adjusted_BV = adjust(logits_BV, settings, filtered=filtered, limit=limit)
        return draw(adjusted_BV, uniform_B, settings.temperature_B)

    def step_once(carry):
        cache, rows, tokens_BT, logprobs_BT, step, _ = carry
        active_B = rows.budget_B > 0
        positions_B1 = jnp.where(active_B, rows.position_B, far)[:, None]
        x_B1D, cache = _layers(
            config, params, cache, rows.token_B[:, None], positions_B1, None, mesh
        )
        x_BD = final_norm.apply({"params": params["final_norm"]}, x_B1D[:, 0])
        uniform_B = uniforms(seed, rows.noise_B3, rows.position_B + 1)
        logits_BV = logits(config, params, x_BD)
        ids_B, chosen_B = by_rows(choose, logits_BV, uniform_B, rows.settings)
        stopped_B = jnp.any(ids_B[:, None] == stops_E[None, :], axis=-1)
        budget_B = jnp.where(stopped_B | ~active_B, 0, rows.budget_B - 1)
        tokens_BT = tokens_BT.at[:, step].set(jnp.where(active_B, ids_B, -1))
        logprobs_BT = logprobs_BT.at[:, step].set(jnp.where(active_B, chosen_B, 0.0))
        rows = rows._replace(
            token_B=jnp.where(active_B, ids_B, rows.token_B),
            position_B=rows.position_B + active_B,
            budget_B=budget_B,
        )
        return cache, rows, tokens_BT, logprobs_BT, step + 1, count(budget_B)

    nothing_BT, zero = jnp.full((B, steps), -1, jnp.int32), jnp.zeros((), jnp.int32)
    start = (cache, rows, nothing_BT, jnp.zeros((B, steps)), zero, count(rows.budget_B))
    return jax.lax.while_loop(going, step_once, start)[:-1]
