"""Schedules by their points, the chain by one update computed by hand."""

import inspect
from argparse import Namespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rftjax import config
from rftjax.learning import optim
from rftjax.run.start import StateBuilder

PARAMS = {
    "layers": {
        "attention_norm": {"scale": jnp.full((2, 3), 2.0)},
        "mlp": {"gate": {"kernel": jnp.full((2, 3, 4), 2.0), "bias": jnp.full((2, 4), 2.0)}},
    },
    "final_norm": {"scale": jnp.full((3,), 2.0)},
    "head": {"kernel": jnp.full((3, 5), 2.0)},
}


def updated(params, gradients, optimizer, updates=1):
    state = optimizer.init(params)
    for _ in range(updates):
        changes, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(lambda p, c: p + c, params, changes)
    return params


def test_constant_keeps_the_rate():
    rate = optim.make_schedule(lr=0.3, steps=10)
    np.testing.assert_allclose([rate(n) for n in (0, 5, 10, 99)], 0.3, rtol=1e-6)


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_warm_up_rises_in_equal_parts_and_never_from_zero(schedule):
    rate = optim.make_schedule(lr=1.0, steps=20, schedule=schedule, warmup_steps=4)
    np.testing.assert_allclose([rate(n) for n in range(5)], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)


def test_linear_and_cosine_reach_their_share_at_the_last_step_and_stay():
    for schedule, middle in (("linear", 0.55), ("cosine", 0.55)):
        rate = optim.make_schedule(
            lr=2.0, steps=14, schedule=schedule, warmup_steps=4, final_lr_share=0.1
        )
        np.testing.assert_allclose(
            [rate(4), rate(9), rate(14), rate(30)], [2.0, 2 * middle, 0.2, 0.2], rtol=1e-6
        )
    linear, cosine = (
        optim.make_schedule(lr=1.0, steps=8, schedule=name) for name in ("linear", "cosine")
    )
    np.testing.assert_allclose(linear(2), 0.75, rtol=1e-6)
    np.testing.assert_allclose(cosine(2), 0.5 * (1 + np.cos(np.pi / 4)), rtol=1e-6)


def test_two_updates_are_those_of_adam_written_out():
    params, gradients = {"w": jnp.asarray([[1.0, -2.0]])}, {"w": jnp.asarray([[0.3, -0.1]])}
    optimizer = optim.make_optimizer(lr=0.1, steps=5, clip=0.0, beta1=0.8, beta2=0.9, eps=1e-3)
    w, g = np.asarray(params["w"], np.float64), np.asarray(gradients["w"], np.float64)
    m = v = np.zeros_like(w)
    for n in (1, 2):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        w = w - 0.1 * (m / (1 - 0.8**n)) / (np.sqrt(v / (1 - 0.9**n)) + 1e-3)
    np.testing.assert_allclose(updated(params, gradients, optimizer, 2)["w"], w, rtol=1e-6)


def test_the_clip_scales_by_the_global_norm_and_zero_switches_it_off():
    params = {"a": jnp.zeros((1, 2)), "b": jnp.zeros((2,))}
    gradients = {"a": jnp.asarray([[3.0, 0.0]]), "b": jnp.asarray([0.0, 4.0])}
    # With a large eps Adam's first update is about lr * gradient / eps: it shows the gradient's
    # size.
    shown = {}
    for clip in (0.0, 1.0, 10.0):
        optimizer = optim.make_optimizer(lr=1e6, steps=1, clip=clip, eps=1e6)
        shown[clip] = updated(params, gradients, optimizer)
    np.testing.assert_allclose(shown[0.0]["a"], [[-3.0, 0.0]], rtol=1e-4)
    np.testing.assert_allclose(shown[10.0]["b"], [0.0, -4.0], rtol=1e-4)
    np.testing.assert_allclose(shown[1.0]["a"], [[-0.6, 0.0]], rtol=1e-4)
    np.testing.assert_allclose(shown[1.0]["b"], [0.0, -0.8], rtol=1e-4)


def test_weight_decay_leaves_biases_and_norm_gains_alone_even_when_stacked():
    optimizer = optim.make_optimizer(lr=0.1, steps=5, weight_decay=0.5)
    after = updated(PARAMS, jax.tree.map(jnp.zeros_like, PARAMS), optimizer)
    np.testing.assert_allclose(after["layers"]["mlp"]["gate"]["kernel"], 1.9, rtol=1e-6)
    np.testing.assert_allclose(after["head"]["kernel"], 1.9, rtol=1e-6)
    for kept in (
        after["layers"]["attention_norm"]["scale"],
        after["layers"]["mlp"]["gate"]["bias"],
        after["final_norm"]["scale"],
    ):
        np.testing.assert_array_equal(kept, 2.0)


def test_the_state_has_one_structure_whatever_the_settings():
    plain = optim.make_optimizer(lr=0.1, steps=5, clip=0.0)
    full = optim.make_optimizer(
        lr=0.2, steps=9, schedule="cosine", warmup_steps=2, clip=1.0, weight_decay=0.1
    )
    assert jax.tree.structure(plain.init(PARAMS)) == jax.tree.structure(full.init(PARAMS))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.0}, "optim.lr=0.0"),
        ({"lr": float("nan")}, "optim.lr=nan"),
        ({"steps": 0}, "steps=0"),
        ({"schedule": "step"}, "optim.schedule='step': must be one of constant, linear, cosine"),
        ({"warmup_steps": 10}, "optim.warmup_steps=10: .* 10 steps"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1"),
        ({"final_lr_share": 1.5}, "optim.final_lr_share=1.5"),
        ({"clip": -1.0}, "optim.clip=-1.0"),
        ({"weight_decay": -0.1}, "optim.weight_decay=-0.1"),
        ({"beta1": 1.0}, "optim.beta1=1.0"),
        ({"beta2": -0.1}, "optim.beta2=-0.1"),
        ({"eps": 0.0}, "optim.eps=0.0"),
    ],
)
def test_bad_settings_name_field_and_value(settings, words):
    with pytest.raises(ValueError, match=words):
        optim.make_optimizer(**({"lr": 0.1, "steps": 10} | settings))


def test_every_setting_of_the_optimizer_is_a_field_of_its_section():
    arguments = inspect.signature(optim.make_optimizer).parameters
    section = config.base_config().optim
    others = {"max_nonfinite", "offload", "rounding"}  # the loop's, and of the state
    assert set(section) - others == set(arguments) - {"steps"}
    for name in set(section) - others - {"lr"}:
        assert section[name] == arguments[name].default


def test_the_fields_reach_the_update(tiny_dir):
    spec = config.base_config()
    spec.model.path, spec.steps = str(tiny_dir), 4
    spec.optim.lr, spec.optim.schedule, spec.optim.clip = 0.5, "linear", 0.0
    spec.optim.beta1, spec.optim.beta2, spec.optim.eps = 0.0, 0.0, 1.0
    spec.optim.final_lr_share = 0.5
    model = Namespace(config=None, abstract_params=None)
    optimizer = StateBuilder(spec, model, None).optimizer
    params = {"kernel": jnp.zeros((2, 2))}
    state = optimizer.init(params)
    for rate in (0.5, 0.4375):  # without memory a step is rate g / (|g| + 1)
        changes, state = optimizer.update({"kernel": jnp.full((2, 2), 3.0)}, state, params)
        np.testing.assert_allclose(changes["kernel"], -rate * 0.75, rtol=1e-6)


@pytest.mark.parametrize("updates", [1, 4])
def test_the_schedule_is_stretched_over_all_updates_of_a_step(tiny_dir, updates):
    spec = config.base_config()
    spec.model.path, spec.steps = str(tiny_dir), 4
    spec.optim.lr, spec.optim.schedule, spec.optim.clip = 1.0, "linear", 0.0
    spec.optim.beta1, spec.optim.beta2, spec.optim.eps = 0.0, 0.0, 1.0
    spec.optim.warmup_steps = 1
    spec.grpo.updates_per_batch = spec.grpo.minibatches = int(updates**0.5)
    optimizer = StateBuilder(spec, Namespace(config=None), None).optimizer
    params, rates = {"kernel": jnp.zeros((1, 1))}, []
    state = optimizer.init(params)
    for _ in range(4 * updates + 1):
        changes, state = optimizer.update({"kernel": jnp.full((1, 1), 3.0)}, state, params)
        rates.append(-float(changes["kernel"][0, 0]) / 0.75)
    # Without memory a step is rate g / (|g| + 1): up to lr in one step's updates, to 0 in those of three.
    rising = [(count + 1) / (updates + 1) for count in range(updates)]
    falling = [1 - count / (3 * updates) for count in range(3 * updates + 1)]
    np.testing.assert_allclose(rates, rising + falling, atol=1e-6)
