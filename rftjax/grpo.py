"""Advantages and policy losses of the GRPO family as pure functions, and the named presets that
choose among them.

Nothing here knows of models, batches or devices: arrays are (B,) or (B, T), one sequence a row,
log-probabilities are nats. What the forward pass does to get them (temperature, filters, packing)
is settled before they come here.

Which KL estimator has which gradient, for tokens sampled from the policy itself (d = log p - log
p_ref, and r the ratio to the sampling policy; KL is the reverse one, KL(p || p_ref), of one token
given its prefix):

    estimator            value         gradient expected on-policy           off-policy
    k1 = d               KL            0: noise only, no pull at all         biased
    k2 = d^2 / 2         biased        exactly that of KL                    biased
    k3 = e^-d + d - 1    KL            that of the forward KL(p_ref || p)    biased
    r k1, r k3           KL            exactly that of KL                    the same (token ratio)
    r k2                 biased        that of E[d^2] / 2, not of KL         the same

So without `kl_times_ratio` choose k2 for an unbiased gradient, with it k1 or k3 (k3 has the lower
variance; it is TRL's default). k3 without it, as in the `fireworks_grpo` preset, pulls by the
forward KL, which differs little while the policy stays near the reference. In every case the
gradient is that of the KL of each token given the prefix that was sampled: what a token does to
later prefixes is left out. A sequence ratio in place of r makes no estimator exact. After Schulman,
"Approximating KL divergence" (2020).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from rftjax.errors import UserError
from rftjax.presets import (
    ADVANTAGE_DEFAULTS,
    CHOICES,
    LOSS_DEFAULTS,
    PRESETS,
    LossSettings,
    check_fields,
    preset_fields,
)

__all__ = [
    "ADVANTAGE_DEFAULTS",
    "CHOICES",
    "LOSS_DEFAULTS",
    "PRESETS",
    "LossInputs",
    "LossSettings",
    "advantages",
    "check_fields",
    "entropy_bonus",
    "estimate_kl",
    "kl_term",
    "objective",
    "policy_loss",
    "preset_fields",
    "returns",
    "turn_advantages",
]

# Log-ratios are capped here so that float32 sums stay finite; e^60 is far outside of any clip
# range.
MAX_LOG_RATIO = 60.0

DEFAULT_LOSS = LossSettings()


def advantages(
    rewards: Any,
    group_ids: Any,
    *,
    baseline: str | Callable[..., Any] = "mean",
    scale: str = "group",
    eps: float = 1e-4,
) -> Any:
    """Returns (B,) float32 advantages of (B,) rewards: the reward less its baseline, over a
    standard deviation + eps. `baseline` may be a function of rewards and group ids that returns (B,).

    Groups are the rows with equal `group_ids`, wherever they stand. `leave_one_out` compares a
    reward with the mean of the others; `batch_mean` with all rows; `scale` takes the unbiased
    standard deviation of the rewards of the group or of all rows. Where those are all equal (or one
    alone) there is nothing to scale by and nothing is divided; under `mean` and `leave_one_out`
    such a group gets exactly 0. NumPy in (or lists), NumPy out, computed in float64; JAX in, JAX
    out, and `jax.jit` works. Rewards that are not finite raise ValueError, except under `jax.jit`.
    """
    check_fields({"scale": scale, "eps": eps})
    if not callable(baseline):
        check_fields({"baseline": baseline})
    traced = isinstance(rewards, jax.core.Tracer) or isinstance(group_ids, jax.core.Tracer)
    if not traced and not np.all(np.isfinite(np.asarray(rewards, np.float64))):
        raise UserError(
            "rewards hold NaN or infinite values: leave out the samples that could not be scored"
        )
    on_device = isinstance(rewards, jax.Array) or isinstance(group_ids, jax.Array)
    xp: Any = jnp if on_device else np
    rewards_B = xp.asarray(rewards, xp.float32 if on_device else xp.float64)
    if rewards_B.ndim != 1 or rewards_B.shape != np.shape(group_ids):
        raise UserError(
            f"rewards {rewards_B.shape} and group_ids {np.shape(group_ids)}: must be (B,) both"
        )
    rows = rewards_B.shape[0]
    given_ids = group_ids if on_device else np.asarray(group_ids)
    if not isinstance(group_ids, jax.Array):  # 64-bit ids and names would not survive the device
        group_ids = np.unique(np.asarray(group_ids), return_inverse=True)[1]
    size = {"size": rows} if on_device else {}
    _, first_P, group_B = xp.unique(group_ids, return_index=True, return_inverse=True, **size)
    by_group = _Spread(xp, rewards_B, group_B, rewards_B[first_P][group_B], on_device)
    everything_B = xp.zeros_like(group_B)
    by_batch = _Spread(xp, rewards_B, everything_B, rewards_B[everything_B], on_device)

    if callable(baseline):
        result_B = rewards_B - _own_baseline(xp, baseline(rewards_B, given_ids), rewards_B)
    elif baseline == "mean":
        result_B = by_group.centred_B
    elif baseline == "leave_one_out":
        result_B = by_group.centred_B * by_group.count_B / xp.maximum(by_group.count_B - 1, 1)
    elif baseline == "batch_mean":
        result_B = by_batch.centred_B
    else:
        result_B = rewards_B
    if scale != "none":
        spread = by_group if scale == "group" else by_batch
        result_B = result_B / xp.where(spread.flat_B, 1.0, spread.std_B + eps)
    return result_B.astype(xp.float32)


def returns(turn_rewards: Sequence[float], final: float) -> np.ndarray:
    """Returns the (K,) float64 returns of K turns: the turn's reward, those of later turns, and the final reward."""
    rewards_K = np.asarray(turn_rewards, np.float64)
    return np.cumsum(rewards_K[::-1])[::-1] + final


def turn_advantages(
    turn_rewards: Sequence[Sequence[float]],
    finals: Sequence[float],
    group_ids: Any,
    **settings: Any,
) -> list[np.ndarray]:
    """Returns for each of B samples the (K,) float32 advantages of its K turns: the turn's return less its baseline.

    The return of turn k is G_k = r_k + r_k+1 + ... + the final reward, without a discount: rewards from before a turn
    are not credited to it. `advantages` compares it, by `settings`, with the returns G_k of those samples of the group
    that took a turn k too. Such a baseline by group and turn knows nothing of the turn's own tokens under
    `leave_one_out`, which leaves the gradient unbiased (Sutton et al. 2000); a turn that one sample alone took gets 0.
    Returns by turn in a group: Zeng et al. 2025 (MT-GRPO), Ding et al. 2025 (GTPO). With one turn each this is
    `advantages` of turn reward + final reward.
    """
    found = [returns(rewards, final) for rewards, final in zip(turn_rewards, finals, strict=True)]
    counts = [len(one) for one in found]
    if not sum(counts):
        return [np.zeros(0, np.float32) for _ in found]
    groups = np.unique(np.asarray(group_ids), return_inverse=True)[1]
    turn = np.concatenate([np.arange(count) for count in counts])
    ids = np.repeat(groups, counts) * max(counts) + turn
    values = advantages(np.concatenate(found), ids, **settings)
    return np.split(values, np.cumsum(counts)[:-1])


def _own_baseline(xp: Any, found: Any, rewards_B: Any) -> Any:
    """Returns what a user's function gave as an array; raises ValueError where it is not one finite number a reward."""
    values = xp.asarray(found, rewards_B.dtype)
    if values.shape != rewards_B.shape:
        raise UserError(
            f"grpo.baseline: the function returned shape {values.shape}; must be one number a reward, {rewards_B.shape}"
        )
    if xp is np and not np.all(np.isfinite(values)):
        raise UserError(
            "grpo.baseline: the function returned NaN or infinite values; must be finite numbers"
        )
    return values


class _Spread:
    """What each row's group says of the row's reward; `flat_B` is true where the group's rewards
    are all equal.
    """

    def __init__(self, xp: Any, rewards_B: Any, group_B: Any, first_B: Any, on_device: bool):
        rows = rewards_B.shape[0]
        length = {"length": rows} if on_device else {"minlength": rows}

        def total(values_B: Any) -> Any:
            return xp.bincount(group_B, weights=values_B, **length)[group_B]

        self.count_B = total(xp.ones_like(rewards_B))
        # Measured from a member of the group, so that equal rewards differ from their mean by
        # exactly 0.
        offset_B = rewards_B - first_B
        self.flat_B = total((offset_B != 0).astype(rewards_B.dtype)) == 0
        self.centred_B = offset_B - total(offset_B) / self.count_B
        self.std_B = xp.sqrt(total(self.centred_B**2) / xp.maximum(self.count_B - 1, 1))


class LossInputs(NamedTuple):
    """What the loss of a batch is computed from, for the terms of `policy_loss` and a user's own.

    Arrays are (B, T) and 0 outside of `mask`, but for `weights` (B,). What was not given is None, but `old_logprobs`
    are then the current ones; gradients flow through `logprobs`, `ratio` and `entropy` alone. `ratio` is that of the
    policy to the old one, by token or by sequence.
    """

    logprobs: jax.Array
    mask: jax.Array
    advantages: jax.Array
    old_logprobs: jax.Array
    ratio: jax.Array
    sampler_logprobs: Any
    reference_logprobs: Any
    entropy: Any
    weights: jax.Array


def policy_loss(
    logprobs: Any,
    loss_mask: Any,
    advantages: Any,
    *,
    settings: LossSettings = DEFAULT_LOSS,
    old_logprobs: Any = None,
    reference_logprobs: Any = None,
    sampler_logprobs: Any = None,
    entropy: Any = None,
    weights: Any = None,
    shares: Any = None,
    normalizer: Any = None,
    token_normalizer: Any = None,
    term: Callable[[LossInputs], Any] | None = None,
    **fields: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the scalar loss to minimise and scalar metrics (see `merging`), which carry no gradient.

    Arrays are (B, T), `advantages` (B,) or (B, T), `weights` (B,): a factor on all that a sequence
    contributes, in no denominator. `loss_mask` is true where a token is trained on; what stands
    elsewhere is never read, NaN included. `old_logprobs=None` means the current ones without
    gradient: a ratio of 1. `fields` are those of `LossSettings` and win over `settings`.

    aggregate: `token_mean` over all tokens; `sequence_mean` the mean over all B rows of each row's
    token mean (a row without tokens counts as 0); `constant` the sum over B * max_tokens. Where
    trajectories have several rows, `shares` (B,) holds n_s / n, a row's n_s among the n trained tokens of its
    trajectory, and B is replaced by N, the sum of them, which counts trajectories: `sequence_mean` is then
    1/N sum_i sum_s (n_s / n_i) mean_t l_ist = 1/N sum_i 1/n_i sum_st l_ist, as if the rows were one.
    `normalizer` replaces that denominator (tokens, sequences, sequences * max_tokens) by the whole
    step's, so that the losses of parts add up to the loss of the whole. The KL and what `term` returns, (B, T),
    are aggregated alike. The entropy bonus is a token mean: its denominator in a part is `token_normalizer`, the
    tokens of the whole step, which `token_mean` takes from `normalizer` where not given.
    """
    settings = dataclasses.replace(settings, **fields)
    given = {"reference_logprobs": reference_logprobs, "sampler_logprobs": sampler_logprobs}
    given |= {"entropy": entropy}
    needs = {"kl_weight": "reference_logprobs", "tis_cap": "sampler_logprobs"}
    for field, needed in (needs | {"entropy_weight": "entropy"}).items():
        value = getattr(settings, field)
        if value > 0 and given[needed] is None:
            raise UserError(f"grpo.{field}={value}: needs {needed} (or set it to 0.0)")
    inputs = _inputs(settings, logprobs, loss_mask, advantages, old_logprobs, weights, given)
    mask_BT = inputs.mask
    gain_BT, metrics = objective(settings, inputs)
    loss_BT = -gain_BT
    if inputs.reference_logprobs is not None:
        kl_BT, pull_BT = kl_term(settings, inputs)
        metrics["kl/mean"] = _token_mean(kl_BT, mask_BT)
        if settings.kl_weight > 0:
            loss_BT = loss_BT + pull_BT
    if term is not None:
        term_BT = _where_trained(term(inputs), mask_BT, "grpo.loss: what the function returned,")
        metrics["loss/term"] = _token_mean(term_BT, mask_BT)
        loss_BT = loss_BT + term_BT
    weighted_BT = loss_BT * inputs.weights[:, None]
    shares_B = jnp.ones(mask_BT.shape[0]) if shares is None else jnp.asarray(shares)
    loss = _aggregate(settings, weighted_BT, mask_BT, shares_B, normalizer)
    if inputs.entropy is not None:
        metrics["entropy"] = _token_mean(inputs.entropy, mask_BT)
        if settings.entropy_weight > 0:
            if token_normalizer is None:
                token_normalizer = _token_denominator(mask_BT, settings.aggregate, normalizer)
            loss = loss - entropy_bonus(settings, inputs) / token_normalizer
    return loss, jax.lax.stop_gradient(metrics)


def _inputs(
    settings: LossSettings,
    logprobs: Any,
    loss_mask: Any,
    advantages: Any,
    old_logprobs: Any,
    weights: Any,
    others: Mapping[str, Any],
) -> LossInputs:
    """Returns the arrays in float32 or wider, 0 outside of the mask, with the ratio."""
    mask_BT = jnp.asarray(loss_mask).astype(bool)
    logprobs_BT = _where_trained(logprobs, mask_BT, "logprobs")
    advantages = jnp.asarray(advantages)
    if advantages.ndim == 1:
        advantages = jnp.repeat(advantages[:, None], mask_BT.shape[1], axis=1)
    advantages_BT = _where_trained(advantages, mask_BT, "advantages")
    old_BT = logprobs_BT
    if old_logprobs is not None:
        old_BT = _where_trained(old_logprobs, mask_BT, "old_logprobs")
    old_BT = jax.lax.stop_gradient(old_BT)
    log_ratio_BT = logprobs_BT - old_BT
    ratio_BT = _exp(log_ratio_BT)
    if settings.ratio == "sequence":
        ratio_BT = jnp.broadcast_to(_exp(_row_mean(log_ratio_BT, mask_BT)), mask_BT.shape)
    cleaned = {
        name: None if values is None else _where_trained(values, mask_BT, name)
        for name, values in others.items()
    }
    for name in ("reference_logprobs", "sampler_logprobs"):
        cleaned[name] = jax.lax.stop_gradient(cleaned[name])
    rows = mask_BT.shape[0]
    weights_B = jnp.ones(rows) if weights is None else jnp.asarray(weights).reshape(rows)
    return LossInputs(
        logprobs_BT, mask_BT, advantages_BT, old_BT, ratio_BT, weights=weights_B, **cleaned
    )


def objective(settings: LossSettings, inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the gain of each token, (B, T), and metrics of ratios and clipping.

    With r the ratio and A the advantage: `clip` min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with dual_clip c not
    below c A where A < 0; `cispo` min(r, 1 + clip_high) without gradient, times A log p; `sapo` 4 / tau
    sigmoid(tau (r - 1)) A with tau by the sign of A; `reinforce` A log p. ratio `sequence` is the exponential of the
    row's mean log-ratio. `tis_cap` multiplies the gain by min(p_old / p_sampler, tis_cap).
    """
    ratio_BT, advantages_BT, mask_BT = inputs.ratio, inputs.advantages, inputs.mask
    if settings.objective == "clip":
        gain_BT = _clipped(settings, ratio_BT, advantages_BT)
    elif settings.objective == "cispo":
        capped_BT = jax.lax.stop_gradient(jnp.minimum(ratio_BT, 1 + settings.clip_high))
        gain_BT = capped_BT * advantages_BT * inputs.logprobs
    elif settings.objective == "sapo":
        tau_BT = jnp.where(advantages_BT > 0, settings.sapo_tau_pos, settings.sapo_tau_neg)
        gain_BT = 4 / tau_BT * jax.nn.sigmoid(tau_BT * (ratio_BT - 1)) * advantages_BT
    else:
        gain_BT = advantages_BT * inputs.logprobs
    metrics = _ratio_metrics(inputs) | _clip_metrics(settings, inputs)
    if settings.tis_cap > 0:
        tis_BT = jax.lax.stop_gradient(_exp(inputs.old_logprobs - inputs.sampler_logprobs))
        gain_BT = gain_BT * jnp.minimum(tis_BT, settings.tis_cap)
        metrics["tis/mean"] = _token_mean(jnp.minimum(tis_BT, settings.tis_cap), mask_BT)
        metrics["tis/capped_share"] = _token_mean(tis_BT > settings.tis_cap, mask_BT)
    return gain_BT, metrics


def kl_term(settings: LossSettings, inputs: LossInputs) -> tuple[jax.Array, jax.Array]:
    """Returns the estimate of each token's KL to the reference, (B, T), and what it adds to the loss."""
    kl_BT = estimate_kl(settings.kl, inputs.logprobs, inputs.reference_logprobs)
    pull_BT = kl_BT * inputs.ratio if settings.kl_times_ratio else kl_BT
    return kl_BT, settings.kl_weight * pull_BT


def entropy_bonus(settings: LossSettings, inputs: LossInputs) -> jax.Array:
    """Returns the weighted sum of the tokens' entropies, still without a denominator."""
    entropy_BT = inputs.entropy * inputs.weights[:, None]
    return settings.entropy_weight * jnp.sum(entropy_BT)


def _where_trained(values: Any, mask_BT: jax.Array, name: str) -> jax.Array:
    """Returns values in float32 or wider, 0 outside of the mask, so that nothing there reaches loss
    or gradient.
    """
    values_BT = jnp.asarray(values)
    if values_BT.shape != mask_BT.shape:
        raise UserError(f"{name} {values_BT.shape} and loss_mask {mask_BT.shape} differ in shape")
    values_BT = values_BT.astype(jnp.promote_types(values_BT.dtype, jnp.float32))
    return jnp.where(mask_BT, values_BT, 0.0)


def _exp(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def _clipped(settings: LossSettings, ratio_BT: jax.Array, advantages_BT: jax.Array) -> jax.Array:
    # A selection in place of jnp.minimum, which halves the gradient where both sides are equal: then
    # the gradient is the unclipped one, also at a ratio of 1 with a clip range of 0.
    inside_BT = jnp.clip(ratio_BT, 1 - settings.clip_low, 1 + settings.clip_high)
    plain_BT, clipped_BT = ratio_BT * advantages_BT, inside_BT * advantages_BT
    gain_BT = jnp.where(plain_BT <= clipped_BT, plain_BT, clipped_BT)
    if settings.dual_clip > 0:
        bound_BT = settings.dual_clip * advantages_BT
        gain_BT = jnp.where((advantages_BT < 0) & (gain_BT < bound_BT), bound_BT, gain_BT)
    return gain_BT


def estimate_kl(kind: str, logprobs_BT: jax.Array, reference_BT: jax.Array) -> jax.Array:
    """Returns the estimator `kind` (k1, k2 or k3) of each token's KL to the reference."""
    if kind == "k1":
        return logprobs_BT - reference_BT
    if kind == "k2":
        return 0.5 * (logprobs_BT - reference_BT) ** 2
    gap_BT = jnp.minimum(reference_BT - logprobs_BT, MAX_LOG_RATIO)
    return jnp.exp(gap_BT) - gap_BT - 1


def _aggregate(
    settings: LossSettings,
    loss_BT: jax.Array,
    mask_BT: jax.Array,
    shares_B: jax.Array,
    normalizer: Any,
) -> jax.Array:
    masked_BT = jnp.where(mask_BT, loss_BT, 0.0)
    rows = jnp.sum(shares_B)
    if settings.aggregate == "token_mean":
        total, own = jnp.sum(masked_BT), jnp.maximum(jnp.sum(mask_BT), 1)
    elif settings.aggregate == "sequence_mean":
        total, own = jnp.sum(_row_mean(masked_BT, mask_BT) * shares_B[:, None]), rows
    else:
        if normalizer is None and settings.max_tokens <= 0:
            raise UserError(
                f"grpo.max_tokens={settings.max_tokens}: the constant aggregate divides by it, must be above 0"
            )
        total, own = jnp.sum(masked_BT), rows * settings.max_tokens
    return total / (own if normalizer is None else normalizer)


def _token_denominator(mask_BT: jax.Array, aggregate: str, normalizer: Any) -> Any:
    if normalizer is None:
        return jnp.maximum(jnp.sum(mask_BT), 1)
    if aggregate != "token_mean":
        raise UserError(
            f"grpo.aggregate={aggregate!r} with a normalizer and grpo.entropy_weight above 0 needs token_normalizer, "
            "the number of tokens that the whole step trains on"
        )
    return normalizer


def _row_mean(values_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Returns (B, 1) means over each row's trained tokens, 0 for a row without any; values are 0
    elsewhere.
    """
    count_B1 = jnp.maximum(jnp.sum(mask_BT, axis=-1, keepdims=True), 1)
    return jnp.sum(values_BT, axis=-1, keepdims=True) / count_B1


def _token_mean(values_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask_BT, values_BT, 0.0)) / jnp.maximum(jnp.sum(mask_BT), 1)


def _ratio_metrics(inputs: LossInputs) -> dict[str, jax.Array]:
    mask_BT, ratio_BT = inputs.mask, inputs.ratio
    log_ratio_BT = inputs.logprobs - inputs.old_logprobs
    some = jnp.any(mask_BT)
    return {
        "tokens": jnp.sum(mask_BT).astype(ratio_BT.dtype),
        "ratio/min": jnp.where(some, jnp.min(jnp.where(mask_BT, ratio_BT, jnp.inf)), 1.0),
        "ratio/max": jnp.where(some, jnp.max(jnp.where(mask_BT, ratio_BT, -jnp.inf)), 1.0),
        "ratio/mean": jnp.where(some, _token_mean(ratio_BT, mask_BT), 1.0),
        # The tokens come from the old policy, so this is k3 of KL(old || current).
        "approx_kl": _token_mean(_exp(log_ratio_BT) - 1 - log_ratio_BT, mask_BT),
    }


def _clip_metrics(settings: LossSettings, inputs: LossInputs) -> dict[str, jax.Array]:
    """Returns the shares of trained tokens whose ratio gets no gradient (`clip`) or is capped (`cispo`)."""
    mask_BT, ratio_BT, advantages_BT = inputs.mask, inputs.ratio, inputs.advantages
    low_BT = high_BT = dual_BT = jnp.zeros_like(mask_BT)
    if settings.objective == "clip":
        low_BT = (ratio_BT < 1 - settings.clip_low) & (advantages_BT < 0)
        high_BT = (ratio_BT > 1 + settings.clip_high) & (advantages_BT > 0)
        if settings.dual_clip > 0:
            dual_BT = (ratio_BT > settings.dual_clip) & (advantages_BT < 0)
    elif settings.objective == "cispo":
        high_BT = ratio_BT > 1 + settings.clip_high
    return {
        "clip/low_share": _token_mean(low_BT, mask_BT),
        "clip/high_share": _token_mean(high_BT, mask_BT),
        "clip/dual_share": _token_mean(dual_BT, mask_BT),
        "clip/share": _token_mean(low_BT | high_BT, mask_BT),
    }
