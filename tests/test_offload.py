"""Optimizer state and weights in the host's memory, which change no bit, and weights that are rounded at random."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jobs import tiny_job
from meshes import mesh_of
from test_train import assert_equal, last_state, lines_of
from test_update import CONFIG, LOGICAL, LOSS, batch_of, trajectories

from rftjax import modes
from rftjax.devices import memories, sharding
from rftjax.errors import UserError
from rftjax.learning import optim, pieces, rounding, update
from rftjax.models import decoder, wide
from rftjax.models.linear import linear
from rftjax.models.remat import rematerialized
from rftjax.run import build as job
from rftjax.run import memory
from rftjax.run.results import export
from rftjax.types import TrainState
from rftjax.weights import hf

TWO = dataclasses.replace(CONFIG, layers=2, windows=(24, 24), dtype="bfloat16")
OPTIMIZER = optim.make_optimizer(lr=1e-2, steps=9, clip=0.1, weight_decay=0.1, warmup_steps=2)


def on_host(tree):
    abstract = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=one.sharding), tree
    )
    host = memories.abstract_on_host(abstract, optim.decay_mask(tree))
    return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, host))


def state_of(mesh, *, offload="", narrow=False, optimizer=OPTIMIZER):
    """Step 0 of the two-layer model, its parts where `offload` says."""
    params = decoder.init(TWO, jax.random.key(0))
    opt_state = optimizer.init(params)
    params = decoder.cast(params, "bfloat16") if narrow else params
    state = sharding.shard_tree(
        mesh, LOGICAL, TrainState(jnp.zeros((), jnp.int32), params, {}, opt_state)
    )
    if offload:
        state = state._replace(opt_state=on_host(state.opt_state))
    if offload == "all":
        state = state._replace(trainable=on_host(state.trainable))
    return state


def updated(state, mesh, *, optimizer, **settings):
    """The state after an update on random answers."""
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    apply = update.make_update(TWO, optimizer, LOSS, shardings=where, mesh=mesh, **settings)
    batch = batch_of(trajectories(4, 2, 30, 60), pack_rows=sharding.row_multiple(mesh))
    state, _ = apply(state, sharding.put_batch(mesh, batch))
    jax.tree.map(lambda leaf, place: leaf.sharding == place or pytest.fail(), state, where)
    return jax.device_get(state)


@pytest.mark.parametrize(("offload", "narrow"), [("", False), ("all", False), ("moments", True)])
def test_pieces_make_the_update_of_the_whole_tree(offload, narrow):
    def run(stacks, seed):
        state, norm = state_of(mesh_of(), offload=offload, narrow=narrow), jnp.float32(0.5)
        for _ in range(2):
            grads = jax.tree.map(
                lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), state.trainable
            )
            apply = functools.partial(pieces.update, OPTIMIZER, stacks=stacks, seed=seed)
            state = jax.jit(apply)(state, grads, norm)
        return state

    whole, parts = run(None, 7), run(["layers"], 7)
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        # A product and its sum may be rounded once or twice; what is rounded to bfloat16 is the same but for a few.
        far = np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64))
        wrong = far > 1e-6 * np.abs(np.asarray(other, np.float64)) + 1e-9
        assert wrong.mean() < (0.01 if one.dtype == jnp.bfloat16 else 1e-9)
        assert one.sharding.memory_kind == other.sharding.memory_kind
    assert int(parts.step) == 2
    if narrow:
        kernel = whole.trainable["layers"]["mlp"]["gate"]["kernel"]
        again = run(None, 8).trainable["layers"]["mlp"]["gate"]["kernel"]
        assert kernel.dtype == jnp.bfloat16
        assert 0.1 < np.mean(np.asarray(kernel) != np.asarray(again)) < 0.6


@pytest.mark.parametrize("stacks", [None, ["layers"]])
@pytest.mark.parametrize(("offload", "narrow"), [("all", False), ("moments", True)])
def test_a_gradient_that_is_not_finite_changes_nothing(offload, narrow, stacks):
    apply = jax.jit(functools.partial(pieces.update, OPTIMIZER, stacks=stacks))
    state = state_of(mesh_of(), offload=offload, narrow=narrow)
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), state.trainable)
    before = apply(state, ones, jnp.float32(1.0))
    for norm in (jnp.inf, jnp.nan):
        broken = jax.tree.map(lambda leaf, norm=norm: leaf * norm, ones)
        assert_equal(apply(before, broken, jnp.float32(norm)), before)
    assert int(before.step) == 1


@pytest.mark.parametrize("unroll", [False, True])
def test_gradients_of_bfloat16_weights_are_those_of_float32_weights(unroll):
    """Of weights that bfloat16 holds exactly: no gradient is rounded, and none summed in bfloat16."""
    mesh, descent = mesh_of(), optax.sgd(1.0)
    params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), state_of(mesh, narrow=True).trainable
    )
    before = jax.device_get(params)
    changes = []
    for offload in (False, True):
        held = on_host(params) if offload else jax.tree.map(jnp.array, params)
        state = TrainState(jnp.zeros((), jnp.int32), held, {}, descent.init(params))
        after = updated(state, mesh, optimizer=descent, unroll=unroll)
        changes.append(jax.tree.map(np.subtract, after.trainable, before))
    assert_equal(*changes)
    assert np.abs(changes[0]["embed"]["embedding"]).max() > 0


def test_no_float32_form_of_narrow_weights_stays_for_the_backward_pass():
    def layer(x_BD, tree):
        return jnp.tanh(linear(x_BD, wide.opened(tree)["kernel_DD"])), None

    def loss(zeros, tree, x_BD):
        body = rematerialized(layer, "", narrow=True)
        return jnp.sum(jax.lax.scan(body, x_BD, wide.joined(tree, zeros))[0].astype(jnp.float32))

    tree = {"kernel_DD": jnp.ones((4, 8, 8), jnp.bfloat16)}
    x_BD = jnp.ones((3, 8), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(wide.zeros_of(tree), tree, x_BD)
    forward, backward = (one for one in jaxpr.eqns if one.primitive.name == "scan")
    assert not [one for one in forward.outvars if one.aval.shape == (4, 8, 8)]
    assert [one.aval.dtype for one in backward.outvars if one.aval.shape == (4, 8, 8)] == [
        "float32"
    ]


def test_rounding_is_unbiased_and_gives_a_neighbour():
    low, high = 1.0, 1.0 + 2**-7
    values = low + (high - low) * np.asarray([0.0, 0.1, 0.25, 0.5, 0.9], np.float32)
    many = 20_000
    for sign in (1, -1):
        given = sign * jnp.broadcast_to(jnp.asarray(values), (many, 5))
        found = np.asarray(
            rounding.stochastic(given, jax.random.split(jax.random.key(3), many)), np.float32
        )
        assert set(np.unique(found)) == {sign * low, sign * high}
        # Five standard errors of the mean.
        np.testing.assert_allclose(
            found.mean(axis=0), sign * values, rtol=0, atol=5 * 0.5 * 2**-7 / many**0.5
        )


def test_rounding_leaves_what_is_not_finite_and_what_bfloat16_holds():
    values = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 0.0, -0.0, 3.0, 2.0**-130])
    found = rounding.stochastic(values, jax.random.split(jax.random.key(0), 7))
    np.testing.assert_array_equal(np.asarray(found, np.float32), values)


def test_rounding_does_not_depend_on_the_mesh():
    values = jax.random.normal(jax.random.key(1), (8, 16, 32))
    keys = rounding.keys(0, jnp.int32(5), {"w": values})["w"]
    found = [
        np.asarray(
            jax.jit(rounding.stochastic)(
                sharding.shard_tree(
                    mesh, {("w", "kernel"): ("width", "ffn")}, {"w": {"kernel": values}}
                )["w"]["kernel"],
                keys,
            )
        )
        for mesh in (mesh_of(), mesh_of(fsdp=4, tensor=2))
    ]
    np.testing.assert_array_equal(*found)


def test_updates_below_half_a_unit_of_the_last_place_are_not_lost():
    """A weight of 1 whose 400 updates of 2 ** -12 are a sixteenth of the unit between 1 and the bfloat16 below."""

    def moved(step):
        def one(at, weight_LI):
            keys = rounding.keys(0, at, {"w": weight_LI})["w"]
            return step(weight_LI.astype(jnp.float32) - 2.0**-12, keys)

        return jax.lax.fori_loop(0, 400, one, jnp.ones((4, 250), jnp.bfloat16))

    lost = moved(lambda sums, keys: sums.astype(jnp.bfloat16))
    kept = moved(rounding.stochastic)
    assert np.all(np.asarray(lost) == 1.0)
    assert np.asarray(kept, np.float32).mean() == pytest.approx(1.0 - 400 * 2**-12, abs=2e-3)


@pytest.fixture(scope="module")
def spec(tiny_dir, tmp_path_factory):
    config = tiny_job(tiny_dir, tmp_path_factory.mktemp("job"))
    config.steps, config.export = 4, False
    config.model.dtype = "bfloat16"
    config.mesh.data, config.mesh.fsdp = 4, 2
    return config


def variant(spec, **fields):
    config = spec.copy_and_resolve_references()
    config.update_from_flattened_dict({f"optim.{name}": value for name, value in fields.items()})
    return config


def learned(workdir):
    names = ("loss", "grad_norm", "reward/mean", "sampler/logprob_diff_max")
    return [[line[name] for name in names] for line in lines_of(workdir)]


def test_a_run_that_changes_where_its_state_lies_is_the_run_that_does_not(spec, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    modes.run("train", spec, {}, whole, 0)
    modes.run("train", variant(spec, offload="all"), {}, halves, 2)
    modes.run("train", spec, {"optim": {"offload": "moments"}}, halves, 0)
    assert learned(halves) == learned(whole)
    assert_equal(last_state(halves, 4), last_state(whole, 4))


def test_rounded_weights_learn_resume_and_export(spec, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    config = variant(spec, rounding="stochastic")
    modes.run("train", config, {}, whole, 0)
    modes.run("train", config, {}, halves, 2)
    modes.run("train", config, {"optim": {"offload": "all"}}, halves, 0)
    assert learned(halves) == learned(whole)
    assert_equal(last_state(halves, 4), last_state(whole, 4))
    trainable, optimizer = last_state(whole, 4)
    kernel = trainable["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and trainable["final_norm"]["scale"].dtype == np.float32
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(optimizer["opt_state"])} == {
        "float32",
        "int32",
    }
    with pytest.raises(UserError, match="optim.rounding=.*has .stochastic."):
        modes.run("train", spec, {"optim": {"rounding": ""}}, whole, 0)
    export(config, whole, tmp_path / "export")
    read = hf.load(str(tmp_path / "export"), dtype="float32")[1]
    np.testing.assert_array_equal(
        read["layers"]["mlp"]["gate"]["kernel"], kernel.astype(np.float32)
    )


def test_the_table_tells_what_lies_in_the_host_s_memory(spec, tmp_path):
    tables = {}
    for offload in ("", "moments", "all"):
        config = job.complete_config(variant(spec, offload=offload))
        with job.build(config, tmp_path / "run", read_ahead=False) as parts:
            tables[offload] = memory.estimate(parts)
    plain, moments, everything = tables.values()
    assert moments[f"optimizer, {memory.HOST}"] == plain["optimizer"] - moments["optimizer"]
    assert moments["optimizer"] < plain["optimizer"] / 10
    gains = everything["trained parameters"]
    assert everything[f"trained parameters, {memory.HOST}"] == plain["trained parameters"] - gains
    assert 0 < gains < plain["trained parameters"] / 10
    # The memory of CPU devices is the host's.
    assert moments[memory.SAMPLING] == plain[memory.SAMPLING]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"model.dtype": "float32", "optim.rounding": "stochastic"},
            "must be '' with model.dtype='float32'",
        ),
        ({"lora.rank": 4, "optim.rounding": "stochastic"}, "lora.rank above 0"),
        ({"optim.offload": "disk"}, "must be one of '', moments, all"),
    ],
)
def test_choices_that_do_not_fit_are_refused(spec, fields, words):
    config = spec.copy_and_resolve_references()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=words):
        job.complete_config(config)
