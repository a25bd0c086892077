import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rftjax.config.fields import base_config, expand_home
from rftjax.config.stored import from_json, to_json
from rftjax.models import decoder, layers
from rftjax.models.config import Routing, Stack
from rftjax.models.decoder import Config, Rope
from rftjax.models.remat import ALL, LAYER, PRODUCTS

CONFIG = Config(
    family="qwen2", vocab=64, width=32, layers=2, heads=4, kv_heads=2, channels=8, ffn=64,
    max_positions=4096, norm_eps=1e-6, rope=Rope(), tied=True,
)  # fmt: skip
EXPERTS = dataclasses.replace(
    CONFIG,
    family="qwen3_moe",
    split=(Stack("layers", 0, 2, True),),
    routing=Routing(experts=4, chosen=2, ffn=16, normalised=True),
)
T = 150  # two tiles


@functools.cache
def params():
    return decoder.init(CONFIG, jax.random.key(0))


def total(params, attention: str, remat: str, scanned: bool, config: Config = CONFIG):
    config = dataclasses.replace(config, attention=attention)
    row_1T = jnp.arange(T, dtype=jnp.int32)[None]
    arrays = row_1T % 64, row_1T, jnp.ones_like(row_1T), jnp.minimum(row_1T // 40, 1)
    tree = params if scanned else decoder.unroll(config, params)
    x = decoder.hidden(config, tree, *arrays, remat=remat)
    return jnp.sum(x * jnp.sin(jnp.arange(x.size).reshape(x.shape)))


def primitives(jaxpr: Any) -> Iterator[str]:
    """Yields what is computed, as often as it is: text shows a part that is used twice once."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        inner = jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns"))
        for part in inner:
            if hasattr(part, "eqns"):
                yield from primitives(part)


@pytest.mark.parametrize(("remat", "scanned"), [(PRODUCTS, True), (LAYER, False)])
def test_what_is_computed_again_does_not_change_the_gradient(remat, scanned):
    def gradient(remat: str):
        form = functools.partial(total, attention="blocked", remat=remat, scanned=scanned)
        return jax.jit(jax.grad(form))(params())

    same = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)
    jax.tree.map(same, gradient(remat), gradient(ALL))


@pytest.mark.parametrize("attention", ["tiled", "blocked"])
def test_no_product_and_no_attention_is_computed_again_where_products_stay(attention):
    def counted(remat: str) -> tuple[int, int]:
        form = functools.partial(total, attention=attention, remat=remat, scanned=True)
        text = str(jax.make_jaxpr(jax.grad(form))(params()))
        return text.count("dot_general["), text.count("exp ")

    products, exponentials = counted(ALL)
    assert counted(PRODUCTS)[0] == products
    again = counted(LAYER)
    assert again[0] > products + 7 and again[1] > exponentials


def test_no_product_of_experts_or_their_router_is_computed_again_where_products_stay():
    tree = jax.eval_shape(lambda key: decoder.init(EXPERTS, key), jax.random.key(0))

    def counted(remat: str) -> tuple[int, int]:
        form = functools.partial(
            total, attention="blocked", remat=remat, scanned=True, config=EXPERTS
        )
        found = list(primitives(jax.make_jaxpr(jax.grad(form))(tree).jaxpr))
        return found.count("ragged_dot_general"), found.count("dot_general")

    products = counted(ALL)
    # Three values, and their gradients: of weights, and of inputs in a form for TPUs and one for other devices.
    assert products[0] == 3 + 3 + 2 * 3
    assert counted(PRODUCTS) == products
    again = counted(LAYER)
    assert again[0] >= products[0] + 2 and again[1] > products[1]


def test_plain_attention_computes_its_scores_again_and_not_what_they_are_multiplied_with():
    def counted(remat: str) -> int:
        form = functools.partial(total, attention="plain", remat=remat, scanned=True)
        found = primitives(jax.make_jaxpr(jax.grad(form))(params()).jaxpr)
        return list(found).count("dot_general")

    assert counted(PRODUCTS) == counted(ALL) + 1


def test_recomputation_was_true_or_false_in_runs_and_flags_of_before():
    config = base_config()
    for old, now in (("True", LAYER), ("false", ALL), (PRODUCTS, PRODUCTS)):
        config.model.remat = old
        assert expand_home(config).model.remat == now
    for old, now in ((True, LAYER), (False, ALL)):
        text = to_json(config).replace('"remat": "products"', f'"remat": {str(old).lower()}')
        assert text != to_json(config) and from_json(text).model.remat == now


def test_a_gate_in_bfloat16_is_rounded_once_and_keeps_its_two_inputs_alone():
    gate, up = jax.random.normal(jax.random.key(0), (2, 64, 32), jnp.bfloat16)
    found, backward = jax.vjp(functools.partial(layers.gated, CONFIG), gate, up)
    wide = gate.astype(jnp.float32)
    wanted = (wide * jax.nn.sigmoid(wide) * up.astype(jnp.float32)).astype(jnp.bfloat16)
    assert found.dtype == jnp.bfloat16 and (found == wanted).all()
    held = [leaf for leaf in jax.tree.leaves(backward) if leaf.size > 1]
    assert [(leaf.shape, leaf.dtype) for leaf in held] == [((64, 32), jnp.bfloat16)] * 2
