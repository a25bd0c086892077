import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from meshes import mesh_of

import rftjax
from rftjax.devices import sharding
from rftjax.learning.batching import make_batch
from rftjax.models import FAMILIES, decoder, logical_axes
from rftjax.models.decoder import Config, Rope

LOGICAL = FAMILIES["qwen2"].LOGICAL_AXES


def test_one_axis_takes_the_devices_that_the_others_leave():
    assert dict(sharding.make_mesh(tensor=2).shape) == {
        "data": 4,
        "fsdp": 1,
        "expert": 1,
        "context": 1,
        "tensor": 2,
    }
    assert dict(sharding.make_mesh(data=2, fsdp=-1).shape) == {
        "data": 2,
        "fsdp": 4,
        "expert": 1,
        "context": 1,
        "tensor": 1,
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "their product must be the number of devices, 8"),
        ({"tensor": 3}, "their product must be the number of devices, 8"),
        ({"data": -1, "fsdp": -1}, "mesh.data=-1: .* one of them may be -1"),
        ({"tensor": 0}, "mesh.tensor=0: sizes are positive"),
    ],
)
def test_a_mesh_that_the_devices_do_not_make_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


def test_processes_with_different_numbers_of_devices_are_refused():
    devices = [SimpleNamespace(process_index=one) for one in (0, 1, 0, 0)]
    with pytest.raises(
        ValueError, match=r"\(3 in process 0, 1 in process 1\); give each of them as"
    ):
        sharding.make_mesh(devices, fsdp=4)


def test_parameters_lie_on_the_mesh_by_the_rules(tiny_dir):
    mesh = mesh_of(2, 2, 2)
    params = rftjax.load(str(tiny_dir), mesh=mesh).params
    query = params["layers"]["attention"]["query"]
    assert query["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert query["bias"].sharding.spec == PartitionSpec(None, "tensor")
    assert params["embed"]["embedding"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert params["layers"]["mlp"]["down"]["kernel"].sharding.spec == PartitionSpec(
        None, "tensor", "fsdp"
    )
    assert sharding.replicated_axes(mesh, LOGICAL, params) == []


def test_optimizer_state_lies_where_its_parameters_lie(tiny_dir):
    mesh = mesh_of(1, 2, 2)
    params = rftjax.load(str(tiny_dir), mesh=mesh).params
    state = sharding.shard_tree(mesh, LOGICAL, optax.adam(1e-3).init(params))
    for moments in (state[0].mu, state[0].nu):
        jax.tree.map(
            lambda one, two: one.sharding == two.sharding or pytest.fail(), moments, params
        )


def test_adapters_of_experts_are_divided_as_their_kernels_and_others_replicated():
    mesh, logical = mesh_of(2, 2, 2), FAMILIES["deepseek_v3"].LOGICAL_AXES

    def lies(*path):
        return sharding.partition(mesh, logical, ("layers", "mlp", *path), (2, 4, 16, 16))

    assert lies("experts_gate", "a") == lies("experts_up", "a") == PartitionSpec(None, "fsdp")
    assert lies("experts_gate", "b") == PartitionSpec(None, "fsdp", None, "tensor")
    assert lies("experts_down", "a") == PartitionSpec(None, "fsdp", "tensor")
    assert lies("experts_down", "b") == PartitionSpec(None, "fsdp")
    dense = sharding.partition(mesh, logical, ("layers", "attention", "output", "a"), (2, 16, 4))
    assert dense == PartitionSpec()


def test_devices_of_experts_hold_parts_of_all_else_but_in_decoding():
    mesh, logical = mesh_of(fsdp=2, expert=2, tensor=2), FAMILIES["deepseek_v3"].LOGICAL_AXES
    shapes = {
        ("mlp", "experts_gate", "kernel"): (2, 4, 16, 16),
        ("attention", "latent", "kernel"): (2, 16, 16),
        ("embed", "embedding"): (16, 16),
    }

    def lies(rules=sharding.RULES):
        return [sharding.partition(mesh, logical, *one, rules) for one in shapes.items()]

    over = ("fsdp", "expert")
    assert lies() == [
        PartitionSpec(None, ("expert", "fsdp"), None, "tensor"),
        PartitionSpec(None, over),
        PartitionSpec("tensor", over),
    ]
    assert lies(sharding.DECODE_RULES) == [
        PartitionSpec(None, "expert", None, "tensor"),
        PartitionSpec(),
        PartitionSpec("tensor"),
    ]


@pytest.mark.parametrize(
    ("experts", "spec", "told"),
    [
        (8, PartitionSpec(None, ("expert", "fsdp")), []),
        (6, PartitionSpec(None, "expert", "fsdp"), []),  # the width is divided instead
        (5, PartitionSpec(None, None, ("fsdp", "expert")), ["; divided by another axis instead"]),
    ],
)  # fmt: skip
def test_experts_that_all_axes_do_not_divide_are_divided_by_width(experts, spec, told):
    mesh, logical = mesh_of(fsdp=4, expert=2), FAMILIES["deepseek_v3"].LOGICAL_AXES
    leaf = jax.ShapeDtypeStruct((2, experts, 16, 4), jnp.float32)
    tree = {"layers": {"mlp": {"experts_gate": {"kernel": leaf}}}}
    found = sharding.shardings(mesh, logical, tree)
    assert found["layers"]["mlp"]["experts_gate"]["kernel"].spec == spec
    said = sharding.replicated_axes(mesh, logical, tree)
    assert len(said) == len(told) and all(one in two for one, two in zip(told, said, strict=True))


def test_heads_that_the_mesh_does_not_divide_are_replicated_and_named(tiny_dir):
    mesh = mesh_of(1, 1, 4)  # 4 query heads, 2 key and value heads
    params = rftjax.load(str(tiny_dir), mesh=mesh).params
    attention = params["layers"]["attention"]
    assert attention["query"]["kernel"].sharding.spec == PartitionSpec(None, None, "tensor")
    assert attention["key"]["kernel"].sharding.is_fully_replicated
    found = sharding.replicated_axes(mesh, LOGICAL, params)
    assert len(found) == 4  # kernel and bias of key and value
    assert (
        "layers/attention/key/kernel: 2 kv_heads do not divide over mesh.tensor=4; replicated"
        in (found)
    )


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        (("router", "kernel"), (4, 8), "layers/router/kernel of shape .* declares the axes None"),
        (("down", "kernel"), (2, 3, 4, 8), r"declares the axes \('ffn', 'width'\)"),
        (("planet", "kernel"), (4, 8), r"no rule says where the axes \['planets'\] lie"),
    ],
)
def test_a_family_with_an_undeclared_axis_is_refused(path, shape, message):
    declared = {**LOGICAL, ("planet", "kernel"): ("planets", "width")}
    tree = {"layers": {path[0]: {path[1]: np.zeros(shape, np.float32)}}}
    with pytest.raises(ValueError, match=message):
        sharding.shard_tree(mesh_of(1, 2, 2), declared, tree)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family_declares_the_axes_of_all_that_its_name_table_has(family):
    biased = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
    config = Config(family, 8, 8, 2, 4, 2, 2, 8, 64, 1e-6, Rope(), False, **biased)
    for name in FAMILIES[family].names(config):
        axes = logical_axes(config)[name.path[-2], name.path[-1]]
        assert len(axes) == len(name.shape), name.path


def test_decoding_finds_its_weights_whole_but_for_the_tensor_axis(tiny_dir):
    mesh = mesh_of(2, 2, 2)
    params = rftjax.load(str(tiny_dir), mesh=mesh).params
    places = sharding.decode_shardings(mesh, LOGICAL, params)
    assert places["layers"]["attention"]["query"]["kernel"].spec == PartitionSpec(
        None, None, "tensor"
    )
    assert places["final_norm"]["scale"].is_fully_replicated
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))

    def on_one_device(places):
        sizes = jax.tree.map(lambda at, leaf: np.prod(at.shard_shape(leaf.shape)), places, params)
        return sum(jax.tree.leaves(sizes))

    masters = on_one_device(jax.tree.map(lambda leaf: leaf.sharding, params))
    assert whole / 4 <= masters < whole / 3.5
    assert whole / 2 <= on_one_device(places) < whole / 1.9


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 4), (2, 2, 2)])
def test_the_mesh_changes_neither_logits_nor_samples(tiny_dir, shape):
    tokens = np.arange(24).reshape(2, 12)
    plain = rftjax.load(str(tiny_dir))
    placed = rftjax.load(str(tiny_dir), mesh=mesh_of(*shape))
    np.testing.assert_allclose(placed.logits(tokens), plain.logits(tokens), atol=1e-5)
    settings = {"max_new_tokens": 6, "samples": 2, "stop": [1]}
    one, two = (policy.sample(tokens.tolist(), **settings) for policy in (plain, placed))
    assert [t.sequences[0].tokens for t in one] == [t.sequences[0].tokens for t in two]


def test_packed_rows_are_divided_and_the_loss_arrays_are_not():
    mesh = mesh_of(2, 2, 2)
    batch = make_batch([], rows=4, max_length=8, pack_rows=sharding.row_multiple(mesh))
    placed = sharding.put_batch(mesh, batch)
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(placed.pack)} == {
        PartitionSpec(None, sharding.ROWS)
    }
    assert placed.sampled_BT.sharding.is_fully_replicated


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "expert": 4},
        {"context": 8},
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"data": 2, "expert": 2, "context": 2},
    ],
)
def test_the_embedding_has_the_same_gradient_where_it_lies_over_devices(sizes):
    mesh = mesh_of(**sizes)
    config = Config("qwen2", 4096, 16, 1, 1, 1, 16, 8, 64, 1e-6, Rope(), True, embed_scale=2.0)
    table_VD = jax.random.normal(jax.random.key(0), (4096, 16))
    tokens_BT = 370 * (jnp.arange(64).reshape(8, 8) % 11)
    weights_BTD = jax.random.normal(jax.random.key(1), (8, 8, 16))

    def loss(mesh, table_VD, tokens_BT, weights_BTD):
        params = {"embed": {"embedding": table_VD}}
        x_BTD = sharding.keep_tokens(mesh, decoder.embed(config, params, tokens_BT, mesh))
        return jnp.sum(jnp.sin(x_BTD) * weights_BTD)

    gradient = jax.grad(functools.partial(loss, mesh))
    place = sharding.table_sharding(mesh, table_VD.shape)
    given = jax.device_put(table_VD, place), *sharding.put_rows(mesh, (tokens_BT, weights_BTD))
    compiled = jax.jit(gradient).lower(*given).compile()
    found = compiled(*given)
    assert found.sharding.is_equivalent_to(place, 2)
    plain = jax.grad(functools.partial(loss, None))(table_VD, tokens_BT, weights_BTD)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    # No device holds, or adds up, all of the gradient.
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < table_VD.size * 4 / 4
