import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from meshes import mesh_of

from rftjax.devices import sharding
from rftjax.models import exchange, experts
from rftjax.models.config import Config, Routing
from rftjax.models.experts import COLLECTION, Experts
from rftjax.models.rope import Rope

WIDTH = 16


def config_of(**routing) -> Config:
    settings = {"experts": 8, "chosen": 3, "ffn": 12, "normalised": True} | routing
    config = Config("qwen3_moe", 8, WIDTH, 1, 4, 2, 2, 8, 16, 1e-6, Rope(), False)
    return dataclasses.replace(config, routing=Routing(**settings))


@pytest.mark.parametrize(
    "sizes",
    [
        [[2, 0, 5, 1]] * 4,
        [[8, 0, 0, 0]] * 4,
        [[0, 3, 1, 4], [8, 0, 0, 0], [1, 1, 3, 3], [0, 0, 0, 8]],
    ],
)
def test_rows_go_to_the_device_of_their_expert_and_back(sizes):
    mesh = mesh_of(expert=4)
    rows = np.arange(32, dtype=np.float32).reshape(32, 1) + 1

    def run(rows, sizes_E):
        to, here = exchange.moves(sizes_E, 4)
        came = exchange.move(rows, to, 32)
        return came, exchange.move(came, to.back, 8), here[None]

    each = sharding.over_rows(mesh, run, (True, True), (True, True, True))
    came, back, tables = jax.jit(each)(rows, np.asarray(sizes, np.int32).reshape(-1))
    np.testing.assert_array_equal(back, rows)
    owner = np.concatenate([np.repeat(np.arange(4), one) for one in sizes])
    for device, found in enumerate(np.asarray(came).reshape(4, 32)):
        own = rows[owner == device, 0]
        np.testing.assert_array_equal(found[: len(own)], own)
        assert not np.any(found[len(own) :])
        np.testing.assert_array_equal(tables[device, :, 0], np.asarray(sizes)[:, device])


@pytest.mark.parametrize(
    ("mesh", "routing", "tokens", "parts"),
    [
        ({"expert": 8}, {}, 5, 1),
        ({"data": 2, "expert": 2, "tensor": 2}, {"bias": True}, 5, 1),
        ({"fsdp": 2, "expert": 4}, {"experts": 6}, 5, 1),  # which 4 devices do not divide
        ({"expert": 8}, {}, 176, 4),  # more than an expert needs at once
        ({"expert": 2, "context": 4}, {}, 8, 1),
    ],
)
def test_experts_on_several_devices_change_neither_outputs_nor_gradients(
    mesh, routing, tokens, parts, monkeypatch
):
    by_blocks = experts._product_by_blocks

    def unwritten(x_JD, kernel_EDF, sizes_E):
        """Leaves the rows that nothing came to as a kernel that does not write them may."""
        is_row_J = jnp.arange(x_JD.shape[0]) < jnp.sum(sizes_E)
        return jnp.where(is_row_J[:, None], by_blocks(x_JD, kernel_EDF, sizes_E), 9.0)

    monkeypatch.setattr(experts, "_product_by_blocks", unwritten)
    config, mesh = config_of(**routing), mesh_of(**mesh)
    shards = sharding.expert_shards(mesh, config.routing.experts)
    assert exchange.parts(config.routing, tokens, shards) == parts
    x = jax.random.normal(jax.random.key(0), (8, tokens, WIDTH))
    # All tokens of one device prefer one expert: nothing may be dropped.
    x = x.at[0].set(x[0, 0])
    alone, shared = Experts(config), Experts(config, mesh)
    params = alone.init(jax.random.key(1), x)["params"]

    def loss(module):
        def of(params, x):
            y, told = module.apply({"params": params}, x, mutable=[COLLECTION])
            return jnp.sum(jnp.sin(7.0 * y)), (y, told[COLLECTION]["chosen"][0])

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=True))

    (_, (y, chosen)), grads = loss(alone)(params, x)
    axes = {("router", "weight"): ("width", "routes")} | {
        (name, leaf): axes
        for name in ("experts_gate", "experts_up", "experts_down")
        for leaf, axes in (("kernel", ("experts", "gain", "gain")), ("bias", ("experts", "gain")))
    }
    placed = sharding.shard_tree(mesh, axes, params)
    gate = placed["experts_gate"]["kernel"].sharding.spec
    divided = config.routing.experts % mesh.shape["expert"] == 0
    over = tuple(axis for axis in ("expert", "fsdp", "context") if mesh.shape[axis] > 1)
    wanted = PartitionSpec(over if len(over) > 1 else over[0])
    assert gate == (wanted if divided else PartitionSpec())
    (_, (y2, chosen2)), grads2 = loss(shared)(placed, sharding.put_rows(mesh, x))
    np.testing.assert_array_equal(chosen2, chosen)
    np.testing.assert_allclose(y2, y, atol=1e-5)
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(grads2), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4 * max(1.0, tokens / 5))


def test_the_room_for_rows_is_not_of_all_tokens_where_a_device_has_few_experts():
    routing = Routing(experts=256, chosen=8)
    for shards, most in ((2, 2 * 2048 * 8), (32, 1 << 16), (64, 1 << 15), (256, 1 << 14)):
        parts = exchange.parts(routing, 2048, shards)
        assert exchange.room(routing, 2048 // parts, shards) <= most
        # Enough rows of each expert for its products.
        assert parts == 1 or 2048 // parts * shards * 8 >= exchange.ENOUGH * 256 / 2
    assert exchange.parts(routing, 2047, 32) == 1  # which does not divide
    assert exchange.parts(routing, 1, 64) == 1
