"""Layers of experts: routing, grouped products and the balance of their load, each against the plain form."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from rftjax.devices import sharding
from rftjax.models import experts, triton
from rftjax.models.config import Config, Rope, Routing

SIZES = {
    "even": (8, 8, 8, 8),
    "an empty first and last expert": (0, 31, 1, 0),
    "one expert with all": (0, 0, 32, 0),
    "ends in the middle of a block": (9, 1, 15, 7),
}
CONFIG = Config(
    family="llama", vocab=8, width=6, layers=1, heads=1, kv_heads=1, channels=2, ffn=4, max_positions=64,
    norm_eps=1e-6, rope=Rope(), tied=True, init_std=0.5,
    routing=Routing(experts=8, chosen=3, ffn=5, scoring="sigmoid", corrected=True, normalised=True, scale=1.7),
)  # fmt: skip
RNG = np.random.default_rng(0)


def floats(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("block", [8, 128])
def test_grouped_products_and_gradients_equal_those_of_each_row_alone(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(experts, "LEAST", block)
    sizes = jnp.asarray(SIZES[name], jnp.int32)
    x, kernel, wanted = floats(32, 6), floats(4, 6, 5), floats(32, 5)
    expert = np.repeat(np.arange(4), SIZES[name])

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(jnp.einsum("jd,jdf->jf", x, kernel[expert]) * wanted)

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(experts.grouped(x, kernel, sizes) * wanted)

    found, expected = (jax.jit(jax.value_and_grad(one, (0, 1)))(x, kernel) for one in (ours, plain))
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_blocks_of_one_expert_and_the_ragged_products_of_accelerators_are_equal():
    sizes = jnp.asarray((9, 0, 15, 8), jnp.int32)
    x, kernel, dy = floats(32, 6), floats(4, 6, 5), floats(32, 5)
    blocks, ragged = (
        experts._product_by_blocks(x, kernel, sizes),
        jax.lax.ragged_dot(x, kernel, sizes),
    )
    np.testing.assert_allclose(blocks, ragged, atol=1e-5)
    blocks = experts._gradient_by_blocks(x, dy, sizes)
    np.testing.assert_allclose(blocks, experts._ragged_gradient(x, dy, sizes), atol=1e-5)


def described(platform: str, **sizes: int) -> AbstractMesh:
    """Returns a mesh of the platform, by default of one device on no axis of the model; kernels ask what it is."""
    kind = AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda") if platform == "cuda" else None
    axes = {axis: sizes.get(axis, 1) for axis in sharding.AXES} if sizes else {"one": 1}
    types = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=types, abstract_device=kind)


def lowered(loss, platform: str, *shapes: Any, mesh: AbstractMesh | None = None) -> str:
    """Returns the program for the devices of a mesh, or for one."""
    with jax.sharding.use_abstract_mesh(mesh or described(platform)):
        return jax.jit(loss).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


KERNEL = r"stablehlo.custom_call @\S*triton"


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("platform", "divided", "ragged", "kernels", "loops"),
    [("tpu", False, 3, 0, 0), ("cuda", False, 0, 3, 0), ("cuda", True, 3, 0, 0), ("cpu", False, 0, 0, 1)],
)  # fmt: skip
def test_tpus_are_given_ragged_products_gpus_kernels_and_cpus_loops_over_blocks(
    platform: str, divided: bool, ragged: int, kernels: int, loops: int
):
    shapes = ((64, 6), jnp.bfloat16), ((4, 6, 5), jnp.float32), ((4,), jnp.int32)

    def loss(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
        return jnp.sum(experts.grouped(x, kernel, sizes, divided).astype(jnp.float32) ** 2)

    given = (jax.ShapeDtypeStruct(*one) for one in shapes)
    text = lowered(jax.grad(loss, (0, 1)), platform, *given)
    assert text.count('"chlo.ragged_dot"') == ragged
    assert len(re.findall(KERNEL, text)) == kernels
    assert (text.count("stablehlo.while") >= loops) and (loops or kernels or "while" not in text)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("mesh", "ffn", "kernels", "ragged"),
    [
        ({}, 5, 9, 0),
        ({"data": 1}, 5, 9, 0),
        ({"tensor": 2}, 6, 9, 0),
        ({"data": 2, "expert": 2, "tensor": 2}, 6, 9, 0),
        ({"tensor": 2}, 5, 0, 9),  # which the compiler divides, as far as it does
    ],
)
def test_a_layer_of_experts_has_kernels_on_gpus_where_each_has_its_part_of_them(
    mesh: dict[str, int], ffn: int, kernels: int, ragged: int
):
    config = dataclasses.replace(CONFIG, routing=dataclasses.replace(CONFIG.routing, ffn=ffn))
    over = described("cuda", **mesh) if mesh else None
    module = experts.Experts(config, over)
    x = jax.ShapeDtypeStruct((4, 20, 6), jnp.float32)
    tree = jax.eval_shape(experts.Experts(config).init, jax.random.key(0), x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(module.apply({"params": params}, x)))

    text = lowered(jax.grad(loss, (0, 1)), "cuda", tree["params"], x, mesh=over)
    found = len(re.findall(KERNEL, text)), text.count('"chlo.ragged_dot"')
    assert found == (kernels, ragged)


@pytest.mark.parametrize(
    ("sizes", "inputs", "outputs"),
    [((5, 0, 130, 70, 0), 64, 96), ((3, 61, 0, 0, 64), 8, 33)],
)
def test_the_kernels_of_gpus_compute_what_blocks_of_one_expert_do(sizes, inputs, outputs):
    sizes, rows = jnp.asarray(sizes, jnp.int32), sum(sizes)
    x, kernel, dy = floats(rows, inputs), floats(5, inputs, outputs), floats(rows, outputs)
    found = triton.product(x, kernel, sizes, interpret=True)
    np.testing.assert_allclose(found, experts._product_by_blocks(x, kernel, sizes), atol=1e-4)
    found = triton.turned_product(dy, kernel, sizes, interpret=True)
    turned = experts._product_by_blocks(dy, kernel.swapaxes(1, 2), sizes)
    np.testing.assert_allclose(found, turned, atol=1e-4)
    found = triton.gradient(x, dy, sizes, interpret=True)
    np.testing.assert_allclose(found, experts._gradient_by_blocks(x, dy, sizes), atol=1e-4)


@pytest.mark.parametrize("sizes", [(3, 61, 0, 0, 30), (0, 0, 0, 0, 0)])
def test_rows_behind_the_last_expert_are_zero_on_gpus_too(sizes):
    x, kernel = floats(128, 8), floats(5, 8, 33)
    found = triton.product(x, kernel, jnp.asarray(sizes, jnp.int32), interpret=True)
    assert np.isfinite(found).all() and not np.any(found[sum(sizes) :])


def test_the_gradient_of_experts_in_bfloat16_is_float32():
    sizes = jnp.asarray((9, 0, 15, 8), jnp.int32)
    x, kernel = floats(32, 6).astype(jnp.bfloat16), floats(4, 6, 5)
    loss = jax.jit(
        jax.grad(lambda k: jnp.sum(experts.grouped(x, k, sizes).astype(jnp.float32) ** 2))
    )
    found = loss(kernel)
    assert found.dtype == jnp.float32
    assert np.any(found != found.astype(jnp.bfloat16).astype(jnp.float32))


def test_softmax_routing_takes_the_largest_probabilities_and_normalises_where_it_should():
    logits_TE = floats(5, 8)
    probabilities = np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
    for normalised in (False, True):
        routing = Routing(experts=8, chosen=3, normalised=normalised, scale=2.0)
        chosen, weights, entropies = experts.route(routing, logits_TE)
        best = np.argsort(-probabilities, axis=1)[:, :3]
        np.testing.assert_array_equal(chosen, best)
        expected = np.take_along_axis(probabilities, best, 1)
        expected = expected / expected.sum(1, keepdims=True) if normalised else expected
        np.testing.assert_allclose(weights, 2 * expected, rtol=1e-5)
        plain = -(probabilities * np.log(probabilities)).sum(1)
        np.testing.assert_allclose(entropies, plain, rtol=1e-5)


def test_a_correction_changes_the_choice_and_not_the_weights():
    routing = Routing(experts=4, chosen=2, scoring="sigmoid", corrected=True)
    logits_TE = jnp.asarray([[2.0, 1.0, 0.0, -1.0]])
    correction_E = jnp.asarray([-5.0, 0.0, 0.0, 5.0])
    chosen, weights, _ = experts.route(routing, logits_TE, correction_E)
    assert chosen.tolist() == [[3, 1]]
    np.testing.assert_allclose(weights, jax.nn.sigmoid(jnp.asarray([[-1.0, 1.0]])), rtol=1e-6)


def test_a_token_stays_within_the_groups_whose_two_best_experts_sum_to_most():
    # The single best expert lies in a group that is not taken: 0.9 + 0.1 < 0.6 + 0.6.
    scores = jnp.asarray([[0.9, 0.1, 0.05, 0.6, 0.6, 0.01, 0.2, 0.2, 0.2]])
    logits_TE = jnp.log(scores / (1 - scores))
    routing = Routing(
        experts=9, chosen=3, scoring="sigmoid", corrected=True, groups=3, open_groups=1
    )
    chosen, _, _ = experts.route(routing, logits_TE, jnp.zeros(9))
    assert sorted(chosen[0].tolist()) == [3, 4, 5]
    two = dataclasses.replace(routing, open_groups=2)
    chosen, _, _ = experts.route(two, logits_TE, jnp.zeros(9))
    assert sorted(chosen[0].tolist()) == [0, 3, 4]


def test_of_equal_scores_the_first_experts_win():
    logits_TE = jnp.zeros((2, 8))
    for scoring in ("softmax", "sigmoid"):
        routing = Routing(experts=8, chosen=3, scoring=scoring, groups=4, open_groups=2)
        assert experts.route(routing, logits_TE)[0].tolist() == [[0, 1, 2]] * 2


@pytest.fixture(scope="module")
def layer() -> tuple[experts.Experts, Any]:
    module = experts.Experts(CONFIG)
    tree = module.init(jax.random.key(0), jnp.zeros((1, 1, 6)))
    tree["params"]["router"]["correction"] = floats(8)
    return module, {"params": tree["params"]}


def dense(params: Any, x: jax.Array) -> jax.Array:
    """Every expert on every token, weighted."""
    r = CONFIG.routing
    logits = x @ params["router"]["weight"]
    chosen, weights, _ = experts.route(r, logits, params["router"]["correction"])
    gate, up, down = (params[name]["kernel"] for name in experts.GATES)
    inner = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up)
    each = jnp.einsum("tef,efd->ted", inner, down)
    picked = jnp.take_along_axis(each, chosen[:, :, None], axis=1)
    return jnp.sum(picked * weights[:, :, None], axis=1)


def test_a_layer_of_experts_computes_what_every_expert_on_every_token_would(layer):
    module, tree = layer
    x, wanted = floats(2, 20, 6), floats(40, 6)

    def ours(params: Any, x: jax.Array) -> jax.Array:
        y: Any = module.apply({"params": params}, x)
        return jnp.sum(y.reshape(-1, 6) * wanted)

    def plain(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(dense(params, x.reshape(-1, 6)) * wanted)

    found, expected = (
        jax.jit(jax.value_and_grad(one, (0, 1)))(tree["params"], x) for one in (ours, plain)
    )
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert not np.any(found[1][0]["router"]["correction"])
    assert np.any(found[1][0]["router"]["weight"])


def test_adapters_of_experts_add_their_product_to_each_expert(layer):
    module, tree = layer
    x = floats(1, 20, 6)
    pairs = {
        name: {"a": floats(8, kernel["kernel"].shape[1], 2), "b": floats(8, 2, kernel["kernel"].shape[2])}
        for name, kernel in tree["params"].items()
        if name in experts.GATES
    }  # fmt: skip
    found = module.apply({**tree, "lora": pairs}, x)
    merged = tree["params"] | {
        name: {"kernel": tree["params"][name]["kernel"] + pair["a"] @ pair["b"]}
        for name, pair in pairs.items()
    }
    np.testing.assert_allclose(found, module.apply({"params": merged}, x), rtol=1e-4, atol=1e-4)
    assert np.abs(found - module.apply(tree, x)).max() > 0.1


def test_what_a_token_gets_depends_on_no_other_token(layer):
    module, tree = layer
    x = floats(1, 40, 6)
    whole, alone = module.apply(tree, x), module.apply(tree, x[:, 7:8])
    np.testing.assert_allclose(whole[:, 7:8], alone, atol=1e-6)


def test_the_balance_counts_tokens_of_each_expert_without_padding(layer):
    module, tree = layer
    x = floats(2, 10, 6)
    _, told = module.apply(tree, x, mutable=[experts.COLLECTION])
    told = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), told[experts.COLLECTION])
    is_token_BT = np.ones((2, 10), bool)
    is_token_BT[1, 4:] = False
    found = experts.balance(CONFIG.routing, [told], jnp.asarray(is_token_BT))
    chosen = np.asarray(told["chosen"][0][0])[is_token_BT]
    counts = np.bincount(chosen.reshape(-1), minlength=8)
    assert counts.sum() == 14 * 3
    np.testing.assert_allclose(found["experts/load_max"], counts.max() / counts.mean(), rtol=1e-6)
    # A second layer in which one expert has every token.
    uneven = told | {"chosen": (told["chosen"][0].at[1].set(5),)}
    found = experts.balance(CONFIG.routing, [uneven], jnp.asarray(is_token_BT))
    np.testing.assert_allclose(found["experts/load_max"], 8.0, rtol=1e-6)
    entropies = np.asarray(told["entropies"][0][0])[is_token_BT]
    np.testing.assert_allclose(found["experts/entropy"], entropies.mean(), rtol=1e-5)
    assert experts.balance(CONFIG.routing, [], jnp.asarray(is_token_BT)) == {}
