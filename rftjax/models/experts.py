"""Layers of experts: routing, products grouped by expert without a dropped token, and how evenly tokens are shared.

Pairs of a token and one of its experts are sorted by expert, so that each expert's rows lie together. On TPUs their
product is JAX's ragged one, on NVIDIA GPUs that of `triton`; on CPU, where XLA would compute it as a dense product over
all experts, it is a loop over blocks of rows of one expert. Every shape is static.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from rftjax.devices import context, sharding
from rftjax.models import exchange, triton
from rftjax.models.config import Config, Routing
from rftjax.models.layers import gated
from rftjax.models.linear import narrow, transposed
from rftjax.models.remat import kept
from rftjax.types import Params

BLOCK = 128  # rows of a block at most
LEAST = 8  # and at least
COLLECTION = "routing"  # of what `Experts` tells a caller that asks for it
GATES = ("experts_gate", "experts_up", "experts_down")  # the linear maps of experts
# The axis of an expert's inner width, the last or the one before, of those parameters that have it.
INNER = {
    **{(name, leaf): -1 for name in GATES[:2] for leaf in ("kernel", "bias", "b")},
    **{(GATES[2], leaf): -2 for leaf in ("kernel", "a")},
}
ROWS, TENSOR, PART = "rows", "tensor", "part"


def route(
    routing: Routing,
    logits_TE: jax.Array,
    correction_E: jax.Array | None = None,
    replayed_TU: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns chosen_TU, weights_TU and entropies_T (nats) of float32 logits; of equal scores the first expert wins.

    Softmax: the largest probabilities (Shazeer et al. 2017). Sigmoid: the largest scores plus correction, within the
    groups of experts whose two best sum to most, weighted without the correction (DeepSeek-AI 2024).
    `replayed_TU` takes the place of the choice where it is not -1; the weights stay those of these logits, so that the
    router has a gradient (Ma et al. 2025).
    """
    r = routing
    if r.scoring == "softmax":
        scores_TE = choice_TE = jax.nn.softmax(logits_TE, axis=-1)
        shares_TE = scores_TE
    else:
        scores_TE = choice_TE = jax.nn.sigmoid(logits_TE)
        if correction_E is not None:
            choice_TE = scores_TE + correction_E[None]
        if r.groups > 1:
            choice_TE = _within_groups(r, choice_TE)
        shares_TE = scores_TE / jnp.sum(scores_TE, axis=-1, keepdims=True)
    chosen_TU = jax.lax.top_k(jax.lax.stop_gradient(choice_TE), r.chosen)[1]
    if replayed_TU is not None:
        chosen_TU = jnp.where(replayed_TU < 0, chosen_TU, replayed_TU)
    weights_TU = jnp.take_along_axis(scores_TE, chosen_TU, axis=-1)
    if r.normalised:
        floor = 0.0 if r.scoring == "softmax" else 1e-20  # as transformers
        weights_TU = weights_TU / (jnp.sum(weights_TU, axis=-1, keepdims=True) + floor)
    entropies_T = -jnp.sum(shares_TE * jnp.log(jnp.maximum(shares_TE, 1e-30)), axis=-1)
    return chosen_TU, weights_TU * r.scale, entropies_T


def _within_groups(routing: Routing, choice_TE: jax.Array) -> jax.Array:
    """Returns the scores with minus infinity outside the best groups."""
    T, E = choice_TE.shape
    grouped = choice_TE.reshape(T, routing.groups, E // routing.groups)
    best = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    groups = jax.lax.top_k(best, routing.open_groups)[1]
    is_open = jnp.any(groups[:, :, None] == jnp.arange(routing.groups)[None, None], axis=1)
    return jnp.where(is_open[:, :, None], grouped, -jnp.inf).reshape(T, E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped(
    x_JD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, divided: bool = False
) -> jax.Array:
    """Returns each row's product with its expert's matrix: the first `sizes_E[0]` rows are of expert 0, and so on.

    The product is of x's dtype; the kernel's gradient is float32, as that of `linear`. `divided` says that the compiler
    divides the matrices over the axis `tensor`, which it cannot do for a kernel of `triton`.
    """
    return _product(x_JD, kernel_EDF.astype(x_JD.dtype), sizes_E, divided)


def _grouped_forward(
    x_JD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, divided: bool
) -> tuple:
    return grouped(x_JD, kernel_EDF, sizes_E, divided), (x_JD, kernel_EDF, sizes_E)


def _grouped_backward(divided: bool, saved: tuple, dy_JF: jax.Array) -> tuple:
    x_JD, kernel_EDF, sizes_E = saved
    dy_JF = dy_JF.astype(x_JD.dtype)
    dx_JD = _turned_product(dy_JF, kernel_EDF.astype(x_JD.dtype), sizes_E, divided)
    dkernel_EDF = jax.lax.platform_dependent(
        x_JD,
        dy_JF,
        sizes_E,
        cpu=_gradient_by_blocks,
        default=_ragged_gradient,
        **({} if divided else {"cuda": triton.gradient}),
    )
    return dx_JD, dkernel_EDF.astype(kernel_EDF.dtype), None


grouped.defvjp(_grouped_forward, _grouped_backward)


def _product(
    x_JD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, divided: bool
) -> jax.Array:
    return jax.lax.platform_dependent(
        x_JD,
        kernel_EDF,
        sizes_E,
        cpu=_product_by_blocks,
        default=jax.lax.ragged_dot,
        **({} if divided else {"cuda": triton.product}),
    )


def _turned_product(
    dy_JF: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, divided: bool
) -> jax.Array:
    """Returns `_product` with each expert's matrix transposed.

    XLA for TPUs would lay out the weights of all layers, in a copy, as this product of one layer reads them; XLA for
    GPUs would transpose those of all layers before the loop over them.
    """

    def swapped(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda dy, kernel, sizes: product(dy, kernel.swapaxes(1, 2), sizes)

    def pinned(dy: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
        kernel = with_layout_constraint(kernel, Layout((0, 1, 2)))
        return jax.lax.ragged_dot(dy, kernel.swapaxes(1, 2), sizes)

    return jax.lax.platform_dependent(
        dy_JF,
        kernel_EDF,
        sizes_E,
        cpu=swapped(_product_by_blocks),
        tpu=pinned,
        default=swapped(jax.lax.ragged_dot),
        **({} if divided else {"cuda": triton.turned_product}),
    )


def _ragged_gradient(x_JD: jax.Array, dy_JF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return jax.lax.ragged_dot_general(
        x_JD, dy_JF, sizes_E, numbers, preferred_element_type=jnp.float32
    )


def _blocks(rows: int, sizes_E: jax.Array) -> tuple[int, jax.Array, jax.Array, jax.Array]:
    """Returns the rows of a block, each block's expert and first row, and how many blocks there are.

    An expert's last block may reach into the rows of the next ones.
    """
    E = sizes_E.shape[0]
    block = min(BLOCK, max(LEAST, 1 << (rows // E).bit_length()))
    counts_E = -(-sizes_E // block)
    ends_E = jnp.cumsum(counts_E)
    at_Z = jnp.arange(min(rows, rows // block + E))
    expert_Z = jnp.minimum(jnp.searchsorted(ends_E, at_Z, side="right"), E - 1)
    first_E = jnp.cumsum(sizes_E) - sizes_E
    row_Z = first_E[expert_Z] + (at_Z - (ends_E - counts_E)[expert_Z]) * block
    return block, expert_Z, row_Z, ends_E[-1]


def _product_by_blocks(x_JD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns `grouped`; blocks in order, so that what one writes into the next expert's rows is overwritten."""
    J, F = x_JD.shape[0], kernel_EDF.shape[2]
    block, expert_Z, row_Z, count = _blocks(J, sizes_E)
    padded = jnp.pad(x_JD, ((0, block), (0, 0)))

    def one(at: jax.Array, y: jax.Array) -> jax.Array:
        kernel_DF = jax.lax.dynamic_index_in_dim(kernel_EDF, expert_Z[at], keepdims=False)
        rows = jax.lax.dynamic_slice_in_dim(padded, row_Z[at], block)
        return jax.lax.dynamic_update_slice_in_dim(y, rows @ kernel_DF, row_Z[at], 0)

    return jax.lax.fori_loop(0, count, one, jnp.zeros((J + block, F), x_JD.dtype))[:J]


def _gradient_by_blocks(x_JD: jax.Array, dy_JF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    J, D = x_JD.shape
    E, F = sizes_E.shape[0], dy_JF.shape[1]
    block, expert_Z, row_Z, count = _blocks(J, sizes_E)
    ends_E = jnp.cumsum(sizes_E)
    x, dy = (jnp.pad(rows, ((0, block), (0, 0))) for rows in (x_JD, dy_JF))

    def one(at: jax.Array, dkernel_EDF: jax.Array) -> jax.Array:
        expert, row = expert_Z[at], row_Z[at]
        own = (row + jnp.arange(block) < ends_E[expert])[:, None]
        rows = jnp.where(own, jax.lax.dynamic_slice_in_dim(x, row, block), 0)
        # Row-major on the left: XLA's CPU backend is slow, and float32, where it is not (see `linear`).
        added = jnp.dot(
            transposed(rows),
            jax.lax.dynamic_slice_in_dim(dy, row, block),
            preferred_element_type=jnp.float32,
        )
        before = jax.lax.dynamic_index_in_dim(dkernel_EDF, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dkernel_EDF, before + added, expert, 0)

    return jax.lax.fori_loop(0, count, one, jnp.zeros((E, D, F), jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def spread(x_TD: jax.Array, order_J: jax.Array, place_J: jax.Array, chosen: int) -> jax.Array:
    """Returns x_JD: the row of each pair's token, pairs in `order_J`, where pair p of token p // chosen lies at
    `place_J[p]`. The gradient is a gather and a sum, where JAX's own is a scatter."""
    return jnp.take(x_TD, order_J // chosen, axis=0)


def _spread_forward(
    x_TD: jax.Array, order_J: jax.Array, place_J: jax.Array, chosen: int
) -> tuple[jax.Array, jax.Array]:
    return spread(x_TD, order_J, place_J, chosen), place_J


def _spread_backward(chosen: int, place_J: jax.Array, dx_JD: jax.Array) -> tuple:
    by_token = jnp.take(dx_JD, place_J, axis=0).reshape(-1, chosen, dx_JD.shape[1])
    return jnp.sum(by_token, axis=1, dtype=jnp.float32).astype(dx_JD.dtype), None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def unsorted(y_JD: jax.Array, order_J: jax.Array, place_J: jax.Array) -> jax.Array:
    """Returns the rows in the order of the pairs; the gradient is a gather too."""
    return jnp.take(y_JD, place_J, axis=0)


unsorted.defvjp(
    lambda y_JD, order_J, place_J: (unsorted(y_JD, order_J, place_J), order_J),
    lambda order_J, dy_JD: (jnp.take(dy_JD, order_J, axis=0), None, None),
)


class Grouped(nn.Module):
    """One linear map an expert, plus a LoRA path where the tree holds one; `divided` is that of `grouped`.

    `summed`: the caller sums the outputs over the axis `tensor`, of whose devices the first adds the bias.
    """

    features: int
    config: Config
    divided: bool = False
    summed: bool = False

    @nn.compact
    def __call__(self, x_JD: jax.Array, expert_J: jax.Array, sizes_E: jax.Array) -> jax.Array:
        shape = (sizes_E.shape[0], x_JD.shape[1], self.features)
        init = nn.initializers.normal(self.config.init_std)
        product = functools.partial(grouped, sizes_E=sizes_E, divided=self.divided)
        y: Any = product(x_JD, self.param("kernel", init, shape, jnp.float32))
        if self.has_variable("lora", "a"):
            a, b = narrow(self.get_variable("lora", "a")), self.get_variable("lora", "b")
            y = y + product(product(x_JD, a), b)
        if self.config.routing.bias:
            zeros, outputs = nn.initializers.zeros, (shape[0], self.features)
            bias_EF = self.param("bias", zeros, outputs, jnp.float32)
            # Rows of no expert have no bias, and their gradient, which nothing promises to be 0, adds to none.
            bias_JF = jnp.take(bias_EF, expert_J, axis=0, mode="fill", fill_value=0)
            if self.summed:
                bias_JF = jnp.where(jax.lax.axis_index("tensor") == 0, bias_JF, 0)
            y = y + bias_JF.astype(y.dtype)
        return y


class Router(nn.Module):
    """Scores of experts, in float32 whatever the compute dtype, so that the sampler and the trainer choose alike."""

    config: Config

    @nn.compact
    def __call__(self, x_TD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        init = nn.initializers.normal(c.init_std)
        weight = self.param("weight", init, (x_TD.shape[1], c.routing.experts), jnp.float32)
        highest = jax.lax.Precision.HIGHEST
        logits_TE = kept(jnp.dot(x_TD.astype(jnp.float32), weight, precision=highest))
        if c.routing.router_bias:
            zeros = nn.initializers.zeros
            bias_E = self.param("router_bias", zeros, (c.routing.experts,), jnp.float32)
            logits_TE = logits_TE + bias_E[None]
        if not c.routing.corrected:
            return logits_TE, None
        zeros = nn.initializers.zeros
        return logits_TE, self.param("correction", zeros, (c.routing.experts,), jnp.float32)


class Experts(nn.Module):
    """A gated feed-forward layer in which each token passes the experts that the router chooses.

    On a `mesh` each device routes its own tokens. Where experts are divided over devices, their rows go to the device
    of their expert and back. `inside` names what each call is one of already: ROWS, of the devices with rows of their
    own; TENSOR, of those that share the experts' inner width; PART, of the parts of a device's tokens. `replayed`, of
    x's shape but for the last axis, which is U, is that of `route`.
    """

    config: Config
    mesh: Mesh | None = None
    inside: tuple[str, ...] = ()

    def setup(self) -> None:
        c, inner = self.config, self.config.routing.ffn
        self.router = Router(c)
        own = TENSOR in self.inside
        divided = not own and sharding.shares(self.mesh, "tensor") > 1
        inner = inner // sharding.shares(self.mesh, "tensor") if own else inner
        self.experts_gate = Grouped(inner, c, divided)
        self.experts_up = Grouped(inner, c, divided)
        self.experts_down = Grouped(c.width, c, divided, own)

    def __call__(self, x: jax.Array, replayed: jax.Array | None = None) -> jax.Array:
        given = (x,) if replayed is None else (x, replayed)
        routing = self.config.routing
        shards = sharding.expert_shards(self.mesh, routing.experts)
        tensor = sharding.shares(self.mesh, "tensor")
        several = sharding.row_multiple(self.mesh) * sharding.context_shards(self.mesh) > 1
        if ROWS not in self.inside and several:
            return self._on_each_device(given)
        if TENSOR not in self.inside and tensor > 1 and routing.ffn % tensor == 0:
            return self._over_tensor(given)
        if PART not in self.inside:
            parts = exchange.parts(routing, x.size // x.shape[-1], shards)
            if parts > 1:
                return self._in_parts(given, parts)
        x_TD = x.reshape(-1, x.shape[-1])
        scores, replayed_TU = self.router(x_TD), None
        if replayed is not None:
            replayed_TU = replayed.reshape(-1, routing.chosen).astype(jnp.int32)
        chosen_TU, weights_TU, entropies_T = route(routing, *scores, replayed_TU)
        told = {"chosen": chosen_TU, "entropies": entropies_T}
        if replayed_TU is not None:
            own_TU = route(routing, *scores)[0]
            changed = jnp.all(chosen_TU[:, :, None] != own_TU[:, None, :], axis=2)
            told["changed"] = jnp.sum(changed, axis=1)
        expert_J = chosen_TU.reshape(-1)
        order_J = jnp.argsort(expert_J, stable=True)
        sorted_J = expert_J[order_J]
        place_J = jnp.zeros_like(order_J).at[order_J].set(jnp.arange(order_J.shape[0]))
        ends = jnp.searchsorted(sorted_J, jnp.arange(routing.experts + 1))
        sizes_E = jnp.diff(ends).astype(jnp.int32)
        rows = spread(x_TD, order_J, place_J, routing.chosen)
        if shards == 1:
            y = self._products(rows, sorted_J, sizes_E, kept)
        else:
            y = self._elsewhere(rows, sizes_E, x_TD.shape[0], shards)
        y = unsorted(y, order_J, place_J)
        y_TUD = y.reshape(*chosen_TU.shape, -1)
        mixed = jnp.einsum("TUD,TU->TD", y_TUD, weights_TU, preferred_element_type=jnp.float32)
        if TENSOR in self.inside:
            # Not before: on their way rows lie in room for many more.
            mixed = jax.lax.psum(mixed, "tensor")
        return self._told(*_shaped(x.shape[:-1], 1, (mixed.astype(x.dtype), told)))

    def _products(
        self,
        rows: jax.Array,
        expert_J: jax.Array,
        sizes_E: jax.Array,
        stays: Callable[[jax.Array], jax.Array] = lambda y: y,
    ) -> jax.Array:
        each = expert_J, sizes_E
        gate, up = (stays(of(rows, *each)) for of in (self.experts_gate, self.experts_up))
        return stays(self.experts_down(gated(self.config, gate, up), *each))

    def _elsewhere(
        self, rows: jax.Array, sizes_E: jax.Array, tokens: int, shards: int
    ) -> jax.Array:
        """Returns the products of rows sorted by expert, computed on the devices of the experts."""
        room = exchange.room(self.config.routing, tokens, shards)
        to, sizes = exchange.moves(sizes_E, shards)
        order, place, expert = exchange.by_expert(sizes, room)
        came = unsorted(exchange.move(rows, to, room), place, order)
        y = self._products(came, expert, jnp.sum(sizes, axis=0))
        # What came back stays for the backward pass, not the gates and ups: their room is mostly empty.
        return kept(exchange.move(unsorted(y, order, place), to.back, rows.shape[0]))

    def _on_each_device(self, given: tuple[jax.Array, ...]) -> jax.Array:
        """Returns the layer's output for x with first axes of rows and tokens, which lie on the mesh."""
        tree, run = self._apart(ROWS)
        specs = sharding.expert_specs(self.mesh, tree, GATES, self.config.routing.experts)
        parted = sharding.context_shards(self.mesh, given[0].shape[1]) > 1
        place: Any = context.PARTS if parted else True
        each = sharding.over_rows(self.mesh, run, (specs, place), (place, place))
        return self._told(*each(tree, given))

    def _over_tensor(self, given: tuple[jax.Array, ...]) -> jax.Array:
        """Returns the layer's output, of whose experts each device of `tensor` has a part of the inner width."""
        tree, run = self._apart(TENSOR)
        specs = sharding.inner_specs(tree, INNER)
        return self._told(*sharding.over_tensor(self.mesh, run, specs)(tree, given))

    def _in_parts(self, given: tuple[jax.Array, ...], parts: int) -> jax.Array:
        """Returns the layer's output, of one part of the tokens after another.

        The backward pass computes each part again: what it would keep is the room of them all.
        """
        tree, run = self._apart(PART)

        @jax.checkpoint
        def one(_: None, given: tuple[jax.Array, ...]) -> tuple[None, tuple]:
            return None, run(tree, given)

        shape = given[0].shape[:-1]
        parted = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, leaf.shape[-1]), given)
        return self._told(*_shaped(shape, 2, jax.lax.scan(one, None, parted)[1]))

    def _apart(self, inside: str) -> tuple[Params, Callable[..., tuple]]:
        """Returns this layer's tree, and a function of such a tree and what is given: its output, and what it tells."""
        experts = Experts(self.config, self.mesh, (*self.inside, inside), parent=None)
        tree = {name: self.variables[name] for name in ("params", "lora") if name in self.variables}

        def run(tree: Params, given: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
            y, told = experts.apply(tree, *given, mutable=[COLLECTION])
            return y, {name: one for name, (one,) in told[COLLECTION].items()}

        return tree, run

    def _told(self, y: jax.Array, told: dict[str, jax.Array]) -> jax.Array:
        """Tells a caller that asks for it what was chosen; returns y."""
        for name, one in told.items():
            self.sow(COLLECTION, name, one)
        return y


def _shaped(shape: tuple[int, ...], axes: int, tree: Any) -> Any:
    """Returns arrays whose first axes, so many, are those of tokens, in the tokens' shape."""
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[axes:]), tree)


def balance(
    routing: Routing, told: list[dict[str, Any]], is_token_BT: jax.Array
) -> dict[str, jax.Array]:
    """Returns metrics of what `Experts` told in each stack of layers, over tokens that are not padding.

    `experts/load_max` is the tokens of the busiest expert over the mean of all, of the most uneven layer (1: even);
    `experts/entropy` the mean entropy of a token's scores in nats. Where experts are replayed,
    `experts/replay_changed_share` is the share of them that the routers would not have chosen.
    """
    if not told:
        return {}
    chosen = jnp.concatenate([one["chosen"][0] for one in told])  # (L, B, T, U)
    entropies_LBT = jnp.concatenate([one["entropies"][0] for one in told])
    tokens = jnp.maximum(jnp.sum(is_token_BT), 1)

    def count(chosen_BTU: jax.Array) -> jax.Array:
        kept = jnp.where(is_token_BT[:, :, None], chosen_BTU, routing.experts)
        return jnp.bincount(kept.reshape(-1), length=routing.experts)

    counts_LE = jnp.stack([count(layer) for layer in chosen])
    load_L = jnp.max(counts_LE, axis=1) * (routing.experts / (tokens * routing.chosen))
    layers = entropies_LBT.shape[0]
    entropy = jnp.sum(jnp.where(is_token_BT[None], entropies_LBT, 0.0)) / tokens
    found = {"experts/load_max": jnp.max(load_L), "experts/entropy": entropy / layers}
    if "changed" in told[0]:
        changed_LBT = jnp.concatenate([one["changed"][0] for one in told])
        changed = jnp.sum(jnp.where(is_token_BT[None], changed_LBT, 0))
        found["experts/replay_changed_share"] = changed / (tokens * layers * routing.chosen)
    return found
