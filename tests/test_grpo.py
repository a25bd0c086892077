"""The losses against TRL's numbers, exact KL gradients and plain NumPy formulas."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rftjax import grpo
from rftjax.learning import merging

# Computed by TRL 1.16.0; the file names its own sources and conventions.
TRL = json.loads((pathlib.Path(__file__).parent / "data/trl_1_16_loss_cases.json").read_text())
TRL_SETTINGS = {
    "grpo": {"aggregate": "sequence_mean"},
    "grpo_kl_k3": {"aggregate": "sequence_mean", "kl_weight": 0.04, "kl": "k3"},
    "grpo_clip_higher": {"aggregate": "sequence_mean", "clip_high": 0.28},
    "gspo_wide": {"aggregate": "sequence_mean", "ratio": "sequence", "clip_high": 0.28},
    "bnpo": {"aggregate": "token_mean"},
    "dr_grpo": {"aggregate": "constant", "max_tokens": 6},
    "dapo": {"aggregate": "token_mean", "clip_high": 0.28},
    "grpo_onpolicy": {"aggregate": "sequence_mean"},
    "dapo_toolmask": {"aggregate": "token_mean", "clip_high": 0.28},
}


def batch(rows=8, tokens=7, seed=0, spread=0.4):
    """Random inputs with uneven lengths, a gap inside of a row and, in row 1, nothing to train on."""
    rng = np.random.default_rng(seed)
    logprobs_BT = -rng.exponential(1.5, (rows, tokens)).astype(np.float32)

    def near():
        return logprobs_BT + rng.normal(0, spread, (rows, tokens)).astype(np.float32)

    mask_BT = np.arange(tokens)[None, :] < rng.integers(2, tokens + 1, (rows, 1))
    mask_BT[0, 1] = False
    mask_BT[1] = False
    return {
        "logprobs": logprobs_BT,
        "loss_mask": mask_BT,
        "advantages": rng.normal(0, 1, rows).astype(np.float32),
        "old_logprobs": near(),
        "reference_logprobs": near(),
        "sampler_logprobs": near(),
        "entropy": rng.exponential(1.0, (rows, tokens)).astype(np.float32),
        "weights": rng.uniform(0.5, 2, rows).astype(np.float32),
    }


def loss_and_gradient(inputs, **settings):
    rest = {name: value for name, value in inputs.items() if name != "logprobs"}

    def loss_of(logprobs_BT):
        return grpo.policy_loss(logprobs_BT, **rest, **settings)[0]

    loss, gradient_BT = jax.value_and_grad(loss_of)(jnp.asarray(inputs["logprobs"]))
    return float(loss), np.asarray(gradient_BT)


# --- advantages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, list])
def test_advantages_match_a_loop_over_groups_in_any_order_and_of_any_size(kind):
    rng = np.random.default_rng(1)
    ids_B = rng.permutation([7] * 4 + [-3] * 2 + [10**6] * 5 + [0] * 3)
    rewards_B = rng.normal(0, 2, len(ids_B))
    for scale in ("group", "batch", "none"):
        for baseline in ("mean", "leave_one_out", "batch_mean", "none"):
            expected_B = []
            for i, (group, reward) in enumerate(zip(ids_B, rewards_B, strict=True)):
                mine = rewards_B[ids_B == group]
                others = rewards_B[(ids_B == group) & (np.arange(len(ids_B)) != i)]
                center = {
                    "mean": mine.mean(),
                    "leave_one_out": others.mean(),
                    "batch_mean": rewards_B.mean(),
                    "none": 0.0,
                }[baseline]
                std = {"group": mine.std(ddof=1), "batch": rewards_B.std(ddof=1), "none": 1 - 1e-4}
                expected_B.append((reward - center) / (std[scale] + 1e-4))
            result_B = grpo.advantages(kind(rewards_B), kind(ids_B), baseline=baseline, scale=scale)
            assert result_B.dtype == np.float32
            np.testing.assert_allclose(result_B, expected_B, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_and_groups_of_one_get_exactly_zero(kind, baseline, scale):
    rewards = kind([0.1] * 7 + [0.7, 1 / 3, 1 / 3, 1 / 3, 0.2, 0.9])
    ids = kind([5] * 7 + [2, 9, 9, 9, 4, 4])
    result = np.asarray(grpo.advantages(rewards, ids, baseline=baseline, scale=scale))
    assert np.all(result[:11] == 0.0)
    assert np.all(result[11:] != 0.0)


def test_equal_rewards_everywhere_get_exactly_zero_under_the_batch_baseline():
    result = grpo.advantages([0.1] * 9, range(9), baseline="batch_mean", scale="batch")
    assert np.all(result == 0.0)


def test_a_reward_without_baseline_is_not_blown_up_by_a_group_without_spread():
    result = grpo.advantages([2.0, 2.0, 5.0], [1, 1, 2], baseline="none", scale="group")
    np.testing.assert_array_equal(result, [2.0, 2.0, 5.0])


def test_advantages_follow_their_rows_through_a_permutation_and_ignore_renamed_groups():
    rng = np.random.default_rng(2)
    rewards_B, ids_B = rng.normal(size=12), np.repeat([3, 1, 2], 4)
    order_B = rng.permutation(12)
    direct_B = grpo.advantages(rewards_B, ids_B)
    np.testing.assert_allclose(
        grpo.advantages(rewards_B[order_B], ids_B[order_B] * 2**40), direct_B[order_B], rtol=1e-6
    )
    names_B = np.asarray([f"draw {i}" for i in ids_B])
    np.testing.assert_array_equal(grpo.advantages(rewards_B, names_B), direct_B)


def test_ids_that_differ_beyond_32_bits_stay_apart_next_to_device_rewards():
    ids = np.asarray([1, 1, 1 + 2**32, 1 + 2**32])
    result = grpo.advantages(jnp.asarray([0.0, 1.0, 10.0, 11.0]), ids, scale="none")
    np.testing.assert_allclose(result, [-0.5, 0.5, -0.5, 0.5])


def test_two_draws_of_one_prompt_are_two_groups_and_dropped_members_leave_the_rest_consistent():
    rewards = np.asarray([1.0, 0.0, 1.0, 1.0])
    np.testing.assert_allclose(
        grpo.advantages(rewards, [0, 0, 1, 1], scale="none"), [0.5, -0.5, 0.0, 0.0]
    )
    np.testing.assert_allclose(grpo.advantages(rewards[1:], [0, 1, 1], scale="none"), [0, 0, 0])


def test_advantages_run_under_jit():
    rewards, ids = jnp.asarray([1.0, 2.0, 4.0, 4.0]), jnp.asarray([8, 3, 8, 3])
    np.testing.assert_allclose(
        jax.jit(grpo.advantages)(rewards, ids), grpo.advantages(rewards, ids), rtol=1e-6
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_rewards_that_are_not_finite_are_refused(bad, kind):
    with pytest.raises(ValueError, match="NaN"):
        grpo.advantages(kind([1.0, bad]), kind([0, 0]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"baseline": "median"}, "grpo.baseline='median': must be one of mean, leave_one_out"),
        ({"scale": "std"}, "grpo.scale='std': must be one of group, batch, none"),
        ({"eps": -1.0}, "grpo.eps=-1.0"),
    ],
)
def test_unknown_advantage_settings_name_field_value_and_choices(settings, words):
    with pytest.raises(ValueError, match=words):
        grpo.advantages([1.0], [0], **settings)


def test_rewards_and_ids_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\(B,\)"):
        grpo.advantages([1.0, 2.0], [0])


# --- losses against TRL -------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TRL["cases"]))
def test_loss_gradient_and_metrics_agree_with_trl(name):
    case, inputs = TRL["cases"][name], TRL["inputs"]
    mask_BT = np.asarray(inputs["completion_mask"])
    if case["config"]["tool_mask"]:
        mask_BT = mask_BT * np.asarray(inputs["tool_mask"])
    ids_BT = jnp.asarray(inputs["completion_ids"])
    old = None if case["config"]["on_policy"] else np.asarray(inputs["old_per_token_logps"])
    reference = np.asarray(inputs["ref_per_token_logps"]) if "beta" in case["config"] else None

    def loss_of(logits_BTV):
        logps_BTV = jax.nn.log_softmax(logits_BTV[:, 2 : 2 + ids_BT.shape[1]])
        return grpo.policy_loss(
            jnp.take_along_axis(logps_BTV, ids_BT[..., None], axis=-1)[..., 0],
            mask_BT,
            np.asarray(inputs["advantages"], np.float32),
            old_logprobs=old,
            reference_logprobs=reference,
            entropy=-jnp.sum(jnp.exp(logps_BTV) * logps_BTV, axis=-1),
            **TRL_SETTINGS[name],
        )

    (loss, metrics), gradient_BTV = jax.value_and_grad(loss_of, has_aux=True)(
        jnp.asarray(inputs["logits"], jnp.float32)
    )
    assert abs(float(loss) - case["loss"]) < 1e-6
    np.testing.assert_allclose(gradient_BTV, case["grad_logits"], atol=1e-6, rtol=0)
    np.testing.assert_allclose(metrics["entropy"], case["metrics"]["entropy"], rtol=1e-6)
    for ours, theirs in (("low_share", "low"), ("high_share", "high"), ("share", "region")):
        expected = case["metrics"][f"clip_ratio/{theirs}_mean"]
        np.testing.assert_allclose(metrics[f"clip/{ours}"], expected, atol=1e-6)
    if reference is not None:
        np.testing.assert_allclose(metrics["kl/mean"], case["metrics"]["kl"], rtol=1e-5)


# --- losses against plain formulas --------------------------------------------------------------


def numpy_gain(data, objective, low, high, dual=0.0, tau=(1.0, 1.05)):
    """The objective of each token as the formula reads, and its derivative by log p, in float64."""
    logp, old = (np.asarray(data[k], np.float64) for k in ("logprobs", "old_logprobs"))
    adv = np.broadcast_to(np.asarray(data["advantages"], np.float64)[:, None], logp.shape)
    r = np.exp(logp - old)
    if objective == "clip":
        plain, clipped = r * adv, np.clip(r, 1 - low, 1 + high) * adv
        gain, slope = np.minimum(plain, clipped), np.where(plain <= clipped, r * adv, 0.0)
        if dual:
            bounded = (adv < 0) & (gain < dual * adv)
            gain, slope = np.where(bounded, dual * adv, gain), np.where(bounded, 0.0, slope)
    elif objective == "cispo":
        slope = np.minimum(r, 1 + high) * adv
        gain = slope * logp
    elif objective == "sapo":
        t = np.where(adv > 0, *tau)
        s = 1 / (1 + np.exp(-t * (r - 1)))
        gain, slope = 4 / t * s * adv, 4 * s * (1 - s) * r * adv
    else:
        gain, slope = adv * logp, adv
    return gain, slope


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("clip", {}),
        ("clip", {"dual_clip": 1.6}),
        ("cispo", {"clip_high": 0.28}),
        ("sapo", {"sapo_tau_pos": 0.8, "sapo_tau_neg": 1.3}),
        ("reinforce", {}),
    ],
)
def test_each_objective_is_its_formula_in_value_and_gradient(objective, settings):
    data = batch(rows=16, seed=3, spread=0.7)
    del data["weights"]
    gain_BT, slope_BT = numpy_gain(
        data,
        objective,
        0.2,
        settings.get("clip_high", 0.2),
        settings.get("dual_clip", 0.0),
        (settings.get("sapo_tau_pos"), settings.get("sapo_tau_neg")),
    )
    mask_BT = data["loss_mask"]
    loss, gradient_BT = loss_and_gradient(data, objective=objective, **settings)
    np.testing.assert_allclose(loss, -gain_BT[mask_BT].mean(), rtol=2e-6, atol=1e-6)
    expected_BT = np.where(mask_BT, -slope_BT, 0.0) / mask_BT.sum()
    np.testing.assert_allclose(gradient_BT, expected_BT, atol=1e-6)


def test_dual_clip_binds_only_where_the_advantage_is_negative():
    rows = {
        "logprobs": np.log([[5.0, 1.1], [5.0, 1.1]]),
        "loss_mask": np.ones((2, 2)),
        "advantages": np.asarray([1.0, -1.0]),
        "old_logprobs": np.zeros((2, 2)),
    }
    loss, gradient_BT = loss_and_gradient(rows, dual_clip=3.0)
    np.testing.assert_allclose(loss, -(1.2 + 1.1 - 3.0 - 1.1) / 4, rtol=1e-6)
    np.testing.assert_allclose(gradient_BT, [[0, -1.1 / 4], [0, 1.1 / 4]], rtol=1e-6)
    _, metrics = grpo.policy_loss(**rows, dual_clip=3.0)
    assert float(metrics["clip/dual_share"]) == 0.25
    rows["logprobs"] = np.log([[5.0, 1.1], [5.0, 4.0]])
    assert float(grpo.policy_loss(**rows, dual_clip=3.0)[1]["clip/dual_share"]) == 0.5


def test_metrics_of_ratios_are_their_formulas_over_the_trained_tokens():
    data = batch(seed=13)
    mask_BT = data["loss_mask"]
    gap = (data["logprobs"] - data["old_logprobs"])[mask_BT].astype(np.float64)
    _, metrics = grpo.policy_loss(**data)
    expected = {
        "tokens": mask_BT.sum(),
        "ratio/min": np.exp(gap).min(),
        "ratio/max": np.exp(gap).max(),
        "ratio/mean": np.exp(gap).mean(),
        # k3 of KL(old || current) for tokens that the old policy sampled.
        "approx_kl": (np.exp(gap) - 1 - gap).mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_cispo_keeps_the_gradient_of_a_ratio_however_small():
    rows = {
        "logprobs": np.full((1, 2), -3.0),
        "loss_mask": np.ones((1, 2)),
        "advantages": np.asarray([-2.0]),
        "old_logprobs": np.asarray([[0.0, -5.0]]),
    }
    _, gradient_BT = loss_and_gradient(rows, objective="cispo", clip_low=0.2, clip_high=0.5)
    np.testing.assert_allclose(gradient_BT, [[2 * np.exp(-3.0) / 2, 2 * 1.5 / 2]], rtol=1e-6)


@pytest.mark.parametrize("objective", ["clip", "cispo", "sapo", "reinforce"])
def test_a_sequence_ratio_is_the_exponential_of_the_mean_log_ratio(objective):
    data = batch(seed=4)
    mask_BT = data["loss_mask"]
    ratio_B = [
        np.exp((a[m] - b[m]).mean()) if m.any() else 1.0
        for a, b, m in zip(data["logprobs"], data["old_logprobs"], mask_BT, strict=True)
    ]
    same = dict(data, old_logprobs=data["logprobs"] - np.log(ratio_B)[:, None].astype(np.float32))
    loss, _ = loss_and_gradient(data, objective=objective, ratio="sequence", clip_high=0.1)
    expected, _ = loss_and_gradient(same, objective=objective, clip_high=0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["clip", "sapo"])
def test_the_gradient_goes_through_a_sequence_ratio(objective):
    data = batch(seed=5)
    settings = {"objective": objective, "ratio": "sequence", "clip_low": 0.9, "clip_high": 9.0}
    _, gradient_BT = loss_and_gradient(data, **settings)
    bump = 1e-2
    for b, t in ((0, 0), (0, 1), (2, 1)):
        moved = []
        for sign in (1, -1):
            logprobs_BT = data["logprobs"].copy()
            logprobs_BT[b, t] += sign * bump
            moved.append(loss_and_gradient(dict(data, logprobs=logprobs_BT), **settings)[0])
        np.testing.assert_allclose(gradient_BT[b, t], (moved[0] - moved[1]) / 2 / bump, atol=3e-5)


@pytest.mark.parametrize("objective", ["clip", "cispo", "sapo", "reinforce"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_on_policy_every_objective_has_the_policy_gradient(objective, ratio):
    data = batch(seed=6)
    del data["old_logprobs"], data["weights"]
    settings = {"clip_low": 0.0, "clip_high": 0.0, "aggregate": "sequence_mean"}
    _, gradient_BT = loss_and_gradient(data, objective=objective, ratio=ratio, **settings)
    mask_BT = data["loss_mask"]
    expected_BT = (
        -data["advantages"][:, None] * mask_BT / np.maximum(mask_BT.sum(1, keepdims=True), 1)
    )
    np.testing.assert_allclose(gradient_BT, expected_BT / len(mask_BT), atol=1e-7)


def test_old_logprobs_none_is_the_current_ones_without_gradient():
    data = batch(seed=7)
    explicit = loss_and_gradient(dict(data, old_logprobs=data["logprobs"]), kl_weight=0.1)
    implied = loss_and_gradient(dict(data, old_logprobs=None), kl_weight=0.1)
    assert explicit[0] == implied[0]
    np.testing.assert_array_equal(explicit[1], implied[1])


def test_advantages_may_differ_from_token_to_token():
    data = batch(seed=8)
    per_token = dict(data, advantages=np.repeat(data["advantages"][:, None], 7, axis=1))
    assert loss_and_gradient(data)[0] == loss_and_gradient(per_token)[0]
    per_token["advantages"] = per_token["advantages"] * np.arange(7, dtype=np.float32)[None, :]
    assert np.all(loss_and_gradient(per_token)[1][:, 0] == 0)


def test_aggregates_are_their_formulas():
    data = batch(seed=9)
    gain_BT, _ = numpy_gain(data, "clip", 0.2, 0.2)
    mask_BT, weights_B = data["loss_mask"], np.asarray(data["weights"], np.float64)
    loss_BT = -gain_BT * mask_BT * weights_B[:, None]
    rows = len(mask_BT)
    expected = {
        "token_mean": loss_BT.sum() / mask_BT.sum(),
        "sequence_mean": (loss_BT.sum(1) / np.maximum(mask_BT.sum(1), 1)).sum() / rows,
        "constant": loss_BT.sum() / (rows * 11),
    }
    for aggregate, value in expected.items():
        loss, _ = loss_and_gradient(data, aggregate=aggregate, max_tokens=11)
        np.testing.assert_allclose(loss, value, rtol=1e-5, atol=1e-7)


def test_truncated_importance_sampling_weighs_the_objective_alone_and_without_gradient():
    data = batch(seed=10)
    weight_BT = np.exp(data["old_logprobs"] - data["sampler_logprobs"])
    capped_BT = np.minimum(weight_BT, 1.3)
    _, slope_BT = numpy_gain(data, "clip", 0.2, 0.2)
    mask_BT = data["loss_mask"]
    del data["weights"]
    with_kl = {"kl_weight": 0.3, "kl": "k1"}
    _, gradient_BT = loss_and_gradient(data, tis_cap=1.3, **with_kl)
    expected_BT = mask_BT * (0.3 - slope_BT * capped_BT) / mask_BT.sum()
    np.testing.assert_allclose(gradient_BT, expected_BT, atol=1e-6)
    metrics = grpo.policy_loss(**data, tis_cap=1.3)[1]
    np.testing.assert_allclose(metrics["tis/mean"], capped_BT[mask_BT].mean(), rtol=1e-5)
    share = (weight_BT > 1.3)[mask_BT].mean()
    np.testing.assert_allclose(metrics["tis/capped_share"], share, rtol=1e-5)


def test_the_entropy_bonus_is_a_token_mean_under_every_aggregate():
    data = batch(seed=11)
    mask_BT = data["loss_mask"]
    bonus = (data["entropy"] * data["weights"][:, None])[mask_BT].sum() / mask_BT.sum()
    for aggregate in ("token_mean", "sequence_mean", "constant"):
        settings = {"aggregate": aggregate, "max_tokens": 9}
        plain, _ = loss_and_gradient(data, **settings)
        with_bonus, _ = loss_and_gradient(data, entropy_weight=0.2, **settings)
        np.testing.assert_allclose(plain - with_bonus, 0.2 * bonus, rtol=1e-4)

    def loss_of(entropy_BT):
        return grpo.policy_loss(**dict(data, entropy=entropy_BT), entropy_weight=0.2)[0]

    expected_BT = -0.2 * mask_BT * data["weights"][:, None] / mask_BT.sum()
    np.testing.assert_allclose(jax.grad(loss_of)(data["entropy"]), expected_BT, rtol=1e-5)


# --- KL -----------------------------------------------------------------------------------------


def expected_kl_gradient(theta_V, old_V, reference_V, kl, times_ratio):
    """Gradient by the logits of the KL term, its expectation taken over every token of the
    vocabulary.
    """
    old_V = jax.nn.log_softmax(old_V)
    reference_V = jax.nn.log_softmax(reference_V)

    def loss_of(theta_V):
        return grpo.policy_loss(
            jax.nn.log_softmax(theta_V)[:, None],
            np.ones((len(theta_V), 1)),
            np.zeros(len(theta_V)),
            old_logprobs=old_V[:, None],
            reference_logprobs=reference_V[:, None],
            weights=jnp.exp(old_V),  # how often the token is sampled
            kl_weight=1.0,
            kl=kl,
            kl_times_ratio=times_ratio,
            normalizer=1.0,
        )[0]

    return np.asarray(jax.grad(loss_of)(theta_V))


def exact_gradients(theta_V, reference_V):
    reference_V = jax.nn.log_softmax(reference_V)

    def reverse(theta_V):
        logp_V = jax.nn.log_softmax(theta_V)
        return jnp.sum(jnp.exp(logp_V) * (logp_V - reference_V))

    def forward(theta_V):
        return jnp.sum(jnp.exp(reference_V) * (reference_V - jax.nn.log_softmax(theta_V)))

    def half_square(theta_V):
        logp_V = jax.nn.log_softmax(theta_V)
        return jnp.sum(jnp.exp(logp_V) * 0.5 * (logp_V - reference_V) ** 2)

    return {
        "reverse": np.asarray(jax.grad(reverse)(theta_V)),
        "forward": np.asarray(jax.grad(forward)(theta_V)),
        "half_square": np.asarray(jax.grad(half_square)(theta_V)),
        "zero": np.zeros(len(theta_V)),
    }


LOGITS = [jnp.asarray(x) for x in np.random.default_rng(12).normal(0, 1, (3, 6)).astype(np.float32)]


@pytest.mark.parametrize(
    ("kl", "times_ratio", "truth"),
    [
        ("k1", False, "zero"),
        ("k2", False, "reverse"),
        ("k3", False, "forward"),
        ("k1", True, "reverse"),
        ("k2", True, "half_square"),
        ("k3", True, "reverse"),
    ],
)
def test_the_on_policy_kl_gradient_is_what_the_module_says(kl, times_ratio, truth):
    theta_V, _, reference_V = LOGITS
    gradient_V = expected_kl_gradient(theta_V, theta_V, reference_V, kl, times_ratio)
    exact = exact_gradients(theta_V, reference_V)
    np.testing.assert_allclose(gradient_V, exact[truth], atol=1e-6)
    others = {name: value for name, value in exact.items() if name != truth}
    assert all(np.abs(gradient_V - other).max() > 1e-2 for other in others.values())


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("times_ratio", [False, True])
def test_off_policy_only_the_ratio_makes_k1_and_k3_exact(kl, times_ratio):
    theta_V, old_V, reference_V = LOGITS
    gradient_V = expected_kl_gradient(theta_V, old_V, reference_V, kl, times_ratio)
    gap = np.abs(gradient_V - exact_gradients(theta_V, reference_V)["reverse"]).max()
    if times_ratio and kl != "k2":
        assert gap < 1e-6
    else:
        assert gap > 1e-2


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "constant"])
def test_kl_is_aggregated_like_the_loss(aggregate):
    data = batch(seed=13)
    gap_BT = data["logprobs"] - data["reference_logprobs"]
    settings = {"aggregate": aggregate, "max_tokens": 9}
    plain, _ = loss_and_gradient(data, **settings)
    with_kl, _ = loss_and_gradient(data, kl_weight=0.5, kl="k2", **settings)
    # With a ratio of 1 the loss of an advantage of -k per token is k, aggregated.
    stand_in = dict(data, old_logprobs=None, advantages=-0.5 * gap_BT**2)
    expected, _ = loss_and_gradient(stand_in, **settings)
    np.testing.assert_allclose(with_kl - plain, 0.5 * expected, rtol=1e-4, atol=1e-6)


# --- parts, masks, refusals ---------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_of_a_batch_add_up_to_the_whole(aggregate, ratio, parts):
    data = batch(seed=14)  # row 1 has nothing to train on, one of eight parts is that row alone
    settings = {
        "aggregate": aggregate,
        "ratio": ratio,
        "max_tokens": 9,
        "kl_weight": 0.1,
        "kl_times_ratio": True,
        "entropy_weight": 0.05,
        "tis_cap": 1.5,
    }
    whole, gradient_BT = loss_and_gradient(data, **settings)
    whole_metrics = grpo.policy_loss(**data, **settings)[1]
    tokens = int(data["loss_mask"].sum())
    settings |= {
        "normalizer": {"token_mean": tokens, "sequence_mean": 8, "constant": 8 * 9}[aggregate],
        "token_normalizer": tokens,
    }
    losses, gradients, metrics = [], [], []
    for rows in np.split(np.arange(8), parts):
        part = {name: value[rows] for name, value in data.items()}
        loss, gradient = loss_and_gradient(part, **settings)
        losses.append(loss)
        gradients.append(gradient)
        metrics.append(grpo.policy_loss(**part, **settings)[1])
    np.testing.assert_allclose(sum(losses), whole, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(gradients), gradient_BT, atol=1e-6)
    merged = merging.merge_micro_batches(
        {name: jnp.stack([m[name] for m in metrics]) for name in metrics[0]}
    )
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


EVERY_PATH = [
    {"objective": "clip", "dual_clip": 3.0, "kl": "k1"},
    {"objective": "clip", "ratio": "sequence", "kl": "k2"},
    {"objective": "cispo", "ratio": "sequence"},
    {"objective": "sapo", "aggregate": "sequence_mean"},
    {"objective": "reinforce", "aggregate": "constant", "max_tokens": 5},
]


@pytest.mark.parametrize("settings", EVERY_PATH)
def test_what_stands_outside_of_the_mask_reaches_neither_loss_nor_gradient(settings):
    data = batch(seed=15)
    settings = settings | {
        "kl_weight": 0.1,
        "kl_times_ratio": True,
        "entropy_weight": 0.1,
        "tis_cap": 2.0,
    }
    clean, clean_gradient_BT = loss_and_gradient(data, **settings)
    outside_BT = ~data["loss_mask"]
    arrays = [name for name, value in data.items() if np.ndim(value) == 2 and name != "loss_mask"]
    for garbage in (np.nan, -np.inf, np.inf, -1e30):
        for name in arrays:
            dirty = dict(data, **{name: np.where(outside_BT, garbage, data[name])})
            loss, gradient_BT = loss_and_gradient(dirty, **settings)
            assert loss == clean
            np.testing.assert_array_equal(gradient_BT, clean_gradient_BT)
            assert np.all(gradient_BT[outside_BT] == 0)
            metrics = grpo.policy_loss(**dirty, **settings)[1]
            assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("settings", EVERY_PATH)
def test_a_batch_with_nothing_to_train_on_has_loss_and_gradient_zero(settings):
    data = batch(seed=16)
    data["loss_mask"] = np.zeros_like(data["loss_mask"])
    loss, gradient_BT = loss_and_gradient(data, kl_weight=0.1, entropy_weight=0.1, **settings)
    assert loss == 0
    assert np.all(gradient_BT == 0)


def test_parts_without_any_token_merge_into_a_batch_without_any():
    data = batch(seed=16)
    data["loss_mask"] = np.zeros_like(data["loss_mask"])
    alone = grpo.policy_loss(**data, tis_cap=2.0)[1]
    merged = merging.merge_micro_batches(
        {name: jnp.stack([value] * 2) for name, value in alone.items()}
    )
    assert {name: float(value) for name, value in merged.items()} == {
        name: float(value) for name, value in alone.items()
    }
    assert float(merged["ratio/min"]) == float(merged["ratio/max"]) == 1.0


@pytest.mark.parametrize("settings", EVERY_PATH)
def test_lists_are_taken_like_arrays(settings):
    data = batch(seed=15)
    lists = {name: value.tolist() for name, value in data.items()}
    expected = grpo.policy_loss(**data, **settings, kl_weight=0.1, tis_cap=2.0)[0]
    found = grpo.policy_loss(**lists, **settings, kl_weight=0.1, tis_cap=2.0)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("preset", sorted(grpo.PRESETS))
def test_equal_rewards_give_exactly_zero_gradient(preset):
    fields = dict(grpo.preset_fields(preset), max_tokens=7, kl_weight=0.0)
    how = {name: fields.pop(name) for name in grpo.ADVANTAGE_DEFAULTS}
    data = dict(batch(seed=17), advantages=grpo.advantages([0.1] * 8, [0] * 4 + [1] * 4, **how))
    loss, gradient_BT = loss_and_gradient(data, **fields)
    assert loss == 0
    assert np.all(gradient_BT == 0)


def test_extreme_ratios_stay_finite():
    rows = {
        "logprobs": np.asarray([[-0.1, -500.0]]),
        "loss_mask": np.ones((1, 2)),
        "old_logprobs": np.asarray([[-500.0, -0.1]]),
        "reference_logprobs": np.asarray([[-500.0, -0.1]]),
    }
    for advantage in (-1.0, 0.0, 1.0):
        loss, gradient_BT = loss_and_gradient(
            rows | {"advantages": np.asarray([advantage])}, kl_weight=0.1
        )
        assert np.isfinite(loss)
        assert np.all(np.isfinite(gradient_BT))


def test_half_precision_inputs_are_computed_in_float32():
    data = batch(seed=18)
    half = {k: jnp.asarray(v, jnp.bfloat16) if k != "loss_mask" else v for k, v in data.items()}
    loss, _ = grpo.policy_loss(**half, kl_weight=0.1)
    wide = {k: v.astype(jnp.float32) if k != "loss_mask" else v for k, v in half.items()}
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, grpo.policy_loss(**wide, kl_weight=0.1)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"kl_weight": 0.1}, "reference_logprobs"),
        ({"tis_cap": 2.0}, "sampler_logprobs"),
        ({"entropy_weight": 0.1}, "entropy"),
    ],
)
def test_missing_inputs_are_refused_and_never_taken_as_zero(settings, missing):
    data = batch()
    data[missing] = None
    with pytest.raises(ValueError, match=missing):
        grpo.policy_loss(**data, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "ppo"}, "grpo.objective='ppo': must be one of clip, cispo, sapo, reinforce"),
        ({"ratio": "word"}, "grpo.ratio='word': must be one of token, sequence"),
        ({"aggregate": "sum"}, "grpo.aggregate='sum': must be one of token_mean"),
        ({"kl": "k4"}, "grpo.kl='k4': must be one of k1, k2, k3"),
        ({"clip_low": -0.1}, "grpo.clip_low=-0.1"),
        ({"clip_low": None}, "grpo.clip_low=None"),
        ({"clip_high": float("nan")}, "grpo.clip_high=nan"),
        ({"dual_clip": 0.5}, "grpo.dual_clip=0.5: .* above 1"),
        ({"sapo_tau_neg": 0.0}, "grpo.sapo_tau_neg"),
        ({"aggregate": "constant"}, "grpo.max_tokens=0"),
        (
            {"aggregate": "sequence_mean", "entropy_weight": 0.1, "normalizer": 8},
            "token_normalizer",
        ),
    ],
)
def test_settings_that_make_no_sense_name_field_and_value(settings, words):
    with pytest.raises(ValueError, match=words):
        grpo.policy_loss(**batch(), **settings)


def test_arrays_of_other_shapes_are_refused_by_name():
    data = batch()
    data["old_logprobs"] = data["old_logprobs"][:, :-1]
    with pytest.raises(ValueError, match="old_logprobs"):
        grpo.policy_loss(**data)


def test_metrics_carry_no_gradient():
    data = batch()
    rest = {name: value for name, value in data.items() if name != "logprobs"}

    def total(logprobs_BT):
        metrics = grpo.policy_loss(logprobs_BT, **rest, tis_cap=2.0)[1]
        return sum(jnp.sum(value) for value in metrics.values())

    assert np.all(np.asarray(jax.grad(total)(jnp.asarray(data["logprobs"]))) == 0)


# --- presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(grpo.PRESETS))
def test_every_preset_runs_under_jit_with_a_gradient(preset):
    fields = dict(grpo.preset_fields(preset), max_tokens=7)
    how = {name: fields.pop(name) for name in grpo.ADVANTAGE_DEFAULTS}
    rewards = np.random.default_rng(19).normal(size=8)
    data = dict(batch(seed=19), advantages=grpo.advantages(rewards, [0, 1] * 4, **how))
    data["old_logprobs"] = None
    rest = {name: value for name, value in data.items() if name != "logprobs"}
    loss_of = jax.jit(lambda logprobs_BT: grpo.policy_loss(logprobs_BT, **rest, **fields)[0])
    gradient_BT = np.asarray(jax.grad(loss_of)(jnp.asarray(data["logprobs"])))
    assert np.isfinite(loss_of(data["logprobs"]))
    assert np.all((gradient_BT != 0) == data["loss_mask"])


def test_presets_hold_the_documented_values():
    table = {
        name: tuple(
            grpo.preset_fields(name)[field]
            for field in (
                *("baseline", "scale", "objective", "ratio"),
                *("clip_low", "clip_high", "aggregate", "kl_weight"),
            )
        )
        for name in grpo.PRESETS
    }
    group = ("mean", "group")
    assert table == {
        "grpo": (*group, "clip", "token", 0.2, 0.2, "sequence_mean", 0),
        "dr_grpo": ("mean", "none", "clip", "token", 0.2, 0.2, "constant", 0),
        "dapo": (*group, "clip", "token", 0.2, 0.28, "token_mean", 0),
        "gspo": (*group, "clip", "sequence", 3e-4, 4e-4, "sequence_mean", 0),
        "cispo": (*group, "cispo", "token", 0.2, 0.28, "token_mean", 0),
        "rloo": ("leave_one_out", "none", "reinforce", "token", 0.2, 0.2, "token_mean", 0),
        "reinforce_pp": ("batch_mean", "batch", "clip", "token", 0.2, 0.2, "token_mean", 0),
        "fireworks_grpo": (*group, "clip", "token", 0.2, 0.2, "token_mean", 0.001),
        "fireworks_dapo": (*group, "clip", "token", 0.2, 0.28, "token_mean", 0),
        "fireworks_gspo_token": (*group, "clip", "sequence", 3e-4, 4e-4, "sequence_mean", 0),
    }


def test_a_given_field_wins_over_the_preset_and_none_does_not():
    fields = grpo.preset_fields("dapo", {"clip_high": 0.5, "clip_low": None, "kl": "k2"})
    assert (fields["clip_high"], fields["clip_low"], fields["kl"]) == (0.5, 0.2, "k2")
    assert grpo.preset_fields("dapo")["clip_high"] == 0.28


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("ppo", {}, "grpo.preset='ppo': must be one of cispo, dapo"),
        ("grpo", {"clip": 0.2}, "grpo.clip=0.2: no such field; the fields are aggregate"),
        ("grpo", {"scale": "std"}, "grpo.scale='std': must be one of group"),
    ],
)
def test_unknown_presets_fields_and_values_are_refused(preset, overrides, words):
    with pytest.raises(ValueError, match=words):
        grpo.preset_fields(preset, overrides)


@pytest.mark.parametrize(
    "names",
    [("grpo", "gspo", "fireworks_gspo_token"), ("dapo", "cispo", "fireworks_dapo")],
)
def test_presets_that_part_only_where_the_ratio_is_not_one_have_one_gradient_at_first(names):
    rng = np.random.default_rng(3)
    logprobs = jnp.asarray(-rng.exponential(size=(6, 9)), jnp.float32)
    mask = jnp.asarray(np.arange(9)[None] < rng.integers(1, 10, size=(6, 1)))
    rewards, groups = [1.0, 0.0, 0.0, 2.0, 1.0, 1.0], [0, 0, 0, 1, 1, 1]
    gradients = []
    for name in names:
        fields = grpo.preset_fields(name)
        scaled = grpo.advantages(rewards, groups, **{k: fields[k] for k in grpo.ADVANTAGE_DEFAULTS})
        loss = {k: fields[k] for k in grpo.LOSS_DEFAULTS}
        gradients.append(
            jax.grad(lambda x, a=scaled, f=loss: grpo.policy_loss(x, mask, a, **f)[0])(logprobs)
        )
    assert float(jnp.abs(gradients[0]).max()) > 0.01
    for other in gradients[1:]:
        np.testing.assert_allclose(other, gradients[0], atol=1e-6)


@pytest.mark.parametrize("aggregate", ["sequence_mean", "constant"])
def test_the_sequences_of_one_trajectory_weigh_as_one(aggregate):
    """Trajectories of 6 and 3 tokens; the first one is also laid out as sequences of 2 and 4."""
    rng = np.random.default_rng(0)
    values, old = rng.normal(-1, 0.3, (2, 9)), rng.normal(-1, 0.3, 9)
    own = [np.arange(6), np.arange(6, 9)]
    split = [np.arange(2), np.arange(2, 6), np.arange(6, 9)]

    def loss(logprobs_T, rows, advantages, shares):
        at_BT = np.zeros((len(rows), 6), int)
        mask_BT = np.zeros((len(rows), 6), bool)
        for row, chosen in enumerate(rows):
            at_BT[row, : len(chosen)], mask_BT[row, : len(chosen)] = chosen, True
        value, _ = grpo.policy_loss(
            logprobs_T[at_BT],
            mask_BT,
            jnp.asarray(advantages),
            old_logprobs=old[at_BT],
            shares=shares,
            aggregate=aggregate,
            max_tokens=10,
        )
        return value

    found = jax.value_and_grad(loss)(jnp.asarray(values[0]), own, [1.0, -0.5], None)
    shares = np.array([2 / 6, 4 / 6, 1.0])
    parts = jax.value_and_grad(loss)(jnp.asarray(values[0]), split, [1.0, 1.0, -0.5], shares)
    np.testing.assert_allclose(parts[0], found[0], rtol=1e-6)
    np.testing.assert_allclose(parts[1], found[1], rtol=1e-6)
    unweighted = jax.grad(loss)(jnp.asarray(values[0]), split, [1.0, 1.0, -0.5], None)
    assert not np.allclose(unweighted, found[1])
