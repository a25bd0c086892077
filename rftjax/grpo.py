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

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from rftjax.errors import UserError

CHOICES = {
    "baseline": ("mean", "leave_one_out", "batch_mean", "none"),
    "scale": ("group", "batch", "none"),
    "objective": ("clip", "cispo", "sapo", "reinforce"),
    "ratio": ("token", "sequence"),
    "aggregate": ("token_mean", "sequence_mean", "constant"),
    "kl": ("k1", "k2", "k3"),
}

ADVANTAGE_DEFAULTS: dict[str, Any] = {"baseline": "mean", "scale": "group", "eps": 1e-4}

LOSS_DEFAULTS: dict[str, Any] = {
    "objective": "clip",
    "ratio": "token",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": 0.0,
    "sapo_tau_pos": 1.0,
    "sapo_tau_neg": 1.05,
    "aggregate": "token_mean",
    "max_tokens": 0,
    "kl_weight": 0.0,
    "kl": "k3",
    "kl_times_ratio": False,
    "entropy_weight": 0.0,
    "tis_cap": 0.0,
}

# What each preset changes of the defaults above. Sources: Shao et al. 2024 (GRPO), Liu et al. 2025
# (Dr. GRPO), Yu et al. 2025 (DAPO), Zheng et al. 2025 (GSPO), MiniMax 2025 (CISPO), Ahmadian et
# al. 2024 (RLOO), Hu 2025 (REINFORCE++).
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregate": "sequence_mean"},
    "dr_grpo": {"scale": "none", "aggregate": "constant"},
    "dapo": {"clip_high": 0.28},
    "gspo": {
        "ratio": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregate": "sequence_mean",
    },
    "cispo": {"objective": "cispo", "clip_high": 0.28},
    "rloo": {"baseline": "leave_one_out", "scale": "none", "objective": "reinforce"},
    "reinforce_pp": {"baseline": "batch_mean", "scale": "batch"},
    "fireworks_grpo": {"kl_weight": 0.001, "kl": "k3"},
    "fireworks_dapo": {"clip_high": 0.28},
    "fireworks_gspo_token": {
        "ratio": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregate": "sequence_mean",
    },
}

# Log-ratios are capped here so that float32 sums stay finite; e^60 is far outside of any clip
# range.
MAX_LOG_RATIO = 60.0


def resolve_preset(preset: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns every advantage and loss field of a preset with the overrides that are not None put
    in.

    `max_tokens` stays 0 unless given: with the `constant` aggregate the caller fills in its own
    limit. Raises ValueError for an unknown preset or field and for a value that its field does not
    take.
    """
    if preset not in PRESETS:
        raise UserError(f"grpo.preset={preset!r}: must be one of {', '.join(sorted(PRESETS))}")
    fields = {**ADVANTAGE_DEFAULTS, **LOSS_DEFAULTS, **PRESETS[preset]}
    for name, value in (overrides or {}).items():
        if name not in fields:
            raise UserError(
                f"grpo.{name}={value!r}: no such field; the fields are {', '.join(sorted(fields))}"
            )
        if value is not None:
            fields[name] = value
    check_fields(fields)
    return fields


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, for a value that an advantage or loss field does not
    take.
    """
    for name, value in fields.items():
        if name in CHOICES:
            if value not in CHOICES[name]:
                choices = ", ".join(CHOICES[name])
                raise UserError(f"grpo.{name}={value!r}: must be one of {choices}")
        elif value is None or isinstance(value, str) or not np.isfinite(value) or value < 0:
            raise UserError(f"grpo.{name}={value!r}: must be a finite number that is not negative")
    for name in ("sapo_tau_pos", "sapo_tau_neg"):
        if fields.get(name) == 0:
            raise UserError(f"grpo.{name}=0: a temperature, must be positive")
    dual_clip = fields.get("dual_clip", 0.0)
    if 0 < dual_clip <= 1:
        raise UserError(
            f"grpo.dual_clip={dual_clip!r}: a bound on the ratio, must be above 1 (0.0 switches it off)"
        )


def advantages(
    rewards: Any,
    group_ids: Any,
    *,
    baseline: str = "mean",
    scale: str = "group",
    eps: float = 1e-4,
) -> Any:
    """Returns (B,) float32 advantages of (B,) rewards: the reward less its baseline, over a
    standard deviation + eps.

    Groups are the rows with equal `group_ids`, wherever they stand. `leave_one_out` compares a
    reward with the mean of the others; `batch_mean` with all rows; `scale` takes the unbiased
    standard deviation of the rewards of the group or of all rows. Where those are all equal (or one
    alone) there is nothing to scale by and nothing is divided; under `mean` and `leave_one_out`
    such a group gets exactly 0. NumPy in (or lists), NumPy out, computed in float64; JAX in, JAX
    out, and `jax.jit` works. Rewards that are not finite raise ValueError, except under `jax.jit`.
    """
    check_fields({"baseline": baseline, "scale": scale, "eps": eps})
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
    if not isinstance(group_ids, jax.Array):  # 64-bit ids and names would not survive the device
        group_ids = np.unique(np.asarray(group_ids), return_inverse=True)[1]
    size = {"size": rows} if on_device else {}
    _, first_P, group_B = xp.unique(group_ids, return_index=True, return_inverse=True, **size)
    by_group = _Spread(xp, rewards_B, group_B, rewards_B[first_P][group_B], on_device)
    everything_B = xp.zeros_like(group_B)
    by_batch = _Spread(xp, rewards_B, everything_B, rewards_B[everything_B], on_device)

    if baseline == "mean":
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


def policy_loss(
    logprobs: Any,
    loss_mask: Any,
    advantages: Any,
    *,
    old_logprobs: Any = None,
    reference_logprobs: Any = None,
    sampler_logprobs: Any = None,
    entropy: Any = None,
    weights: Any = None,
    objective: str = "clip",
    ratio: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    sapo_tau_pos: float = 1.0,
    sapo_tau_neg: float = 1.05,
    aggregate: str = "token_mean",
    max_tokens: int = 0,
    kl_weight: float = 0.0,
    kl: str = "k3",
    kl_times_ratio: bool = False,
    entropy_weight: float = 0.0,
    tis_cap: float = 0.0,
    normalizer: Any = None,
    token_normalizer: Any = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the scalar loss to minimise and scalar metrics (see `merge_metrics`), which carry no
    gradient.

    Arrays are (B, T), `advantages` (B,) or (B, T), `weights` (B,): a factor on all that a sequence
    contributes, in no denominator. `loss_mask` is true where a token is trained on; what stands
    elsewhere is never read, NaN included. `old_logprobs=None` means the current ones without
    gradient: a ratio of 1. 0.0 switches a thing off.

    objective, with r the ratio and A the advantage: `clip` min(r A, clip(r, 1 - clip_low, 1 +
    clip_high) A), with dual_clip c not below c A where A < 0; `cispo` min(r, 1 + clip_high) without
    gradient, times A log p; `sapo` 4 / tau sigmoid(tau (r - 1)) A with tau by the sign of A;
    `reinforce` A log p. ratio `sequence` is the exponential of the row's mean log-ratio. `tis_cap`
    multiplies the objective by min(p_old / p_sampler, tis_cap).

    aggregate: `token_mean` over all tokens; `sequence_mean` the mean over all B rows of each row's
    token mean (a row without tokens counts as 0); `constant` the sum over B * max_tokens.
    `normalizer` replaces that denominator (tokens, sequences, sequences * max_tokens) by the whole
    step's, so that the losses of parts add up to the loss of the whole. The KL term is aggregated
    alike. The entropy bonus is a token mean: its denominator in a part is `token_normalizer`, the
    tokens of the whole step, which `token_mean` takes from `normalizer` where not given.
    """
    check_fields({name: value for name, value in locals().items() if name in LOSS_DEFAULTS})
    if kl_weight > 0 and reference_logprobs is None:
        raise UserError(f"grpo.kl_weight={kl_weight}: needs reference_logprobs (or set it to 0.0)")
    if tis_cap > 0 and sampler_logprobs is None:
        raise UserError(f"grpo.tis_cap={tis_cap}: needs sampler_logprobs (or set it to 0.0)")
    if entropy_weight > 0 and entropy is None:
        raise UserError(f"grpo.entropy_weight={entropy_weight}: needs entropy (or set it to 0.0)")

    mask_BT = jnp.asarray(loss_mask).astype(bool)
    logprobs_BT = _where_trained(logprobs, mask_BT, "logprobs")
    advantages = jnp.asarray(advantages)
    if advantages.ndim == 1:
        advantages = jnp.repeat(advantages[:, None], mask_BT.shape[1], axis=1)
    advantages_BT = _where_trained(advantages, mask_BT, "advantages")
    if old_logprobs is None:
        old_BT = jax.lax.stop_gradient(logprobs_BT)
    else:
        old_BT = jax.lax.stop_gradient(_where_trained(old_logprobs, mask_BT, "old_logprobs"))
    log_ratio_BT = logprobs_BT - old_BT
    if ratio == "sequence":
        log_ratio_B1 = _row_mean(log_ratio_BT, mask_BT)
        ratio_BT = jnp.broadcast_to(_exp(log_ratio_B1), mask_BT.shape)
    else:
        ratio_BT = _exp(log_ratio_BT)

    if objective == "clip":
        gain_BT = _clipped(ratio_BT, advantages_BT, clip_low, clip_high, dual_clip)
    elif objective == "cispo":
        capped_BT = jax.lax.stop_gradient(jnp.minimum(ratio_BT, 1 + clip_high))
        gain_BT = capped_BT * advantages_BT * logprobs_BT
    elif objective == "sapo":
        tau_BT = jnp.where(advantages_BT > 0, sapo_tau_pos, sapo_tau_neg)
        gain_BT = 4 / tau_BT * jax.nn.sigmoid(tau_BT * (ratio_BT - 1)) * advantages_BT
    else:
        gain_BT = advantages_BT * logprobs_BT

    metrics = _ratio_metrics(log_ratio_BT, ratio_BT, advantages_BT, mask_BT)
    metrics |= _clip_metrics(
        objective, ratio_BT, advantages_BT, mask_BT, clip_low, clip_high, dual_clip
    )
    if tis_cap > 0:
        sampler_BT = _where_trained(sampler_logprobs, mask_BT, "sampler_logprobs")
        tis_BT = jax.lax.stop_gradient(_exp(old_BT - sampler_BT))
        gain_BT = gain_BT * jnp.minimum(tis_BT, tis_cap)
        metrics["tis/mean"] = _token_mean(jnp.minimum(tis_BT, tis_cap), mask_BT)
        metrics["tis/capped_share"] = _token_mean(tis_BT > tis_cap, mask_BT)
    loss_BT = -gain_BT
    if reference_logprobs is not None:
        reference_BT = jax.lax.stop_gradient(
            _where_trained(reference_logprobs, mask_BT, "reference_logprobs")
        )
        kl_BT = estimate_kl(kl, logprobs_BT, reference_BT)
        metrics["kl/mean"] = _token_mean(kl_BT, mask_BT)
        if kl_weight > 0:
            loss_BT = loss_BT + kl_weight * (kl_BT * ratio_BT if kl_times_ratio else kl_BT)
    rows = mask_BT.shape[0]
    row_weights_B1 = jnp.ones((rows, 1))
    if weights is not None:
        row_weights_B1 = jnp.asarray(weights).reshape(rows, 1)
    loss = _aggregate(loss_BT * row_weights_B1, mask_BT, aggregate, max_tokens, normalizer)
    if entropy is not None:
        entropy_BT = _where_trained(entropy, mask_BT, "entropy")
        metrics["entropy"] = _token_mean(entropy_BT, mask_BT)
        if entropy_weight > 0:
            if token_normalizer is None:
                token_normalizer = _token_denominator(mask_BT, aggregate, normalizer)
            loss = loss - entropy_weight * jnp.sum(entropy_BT * row_weights_B1) / token_normalizer
    return loss, jax.lax.stop_gradient(metrics)


def merge_metrics(metrics_N: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the metrics of a whole from its N parts' stacked ones: `tokens` adds up, the rest are
    token means.

    `ratio/min` and `ratio/max` are extremes, 1 where no part has tokens. A part without tokens says
    nothing, whatever it holds.
    """
    tokens_N = metrics_N["tokens"]
    some = jnp.any(tokens_N > 0)
    merged = {}
    for name, value_N in metrics_N.items():
        if name == "tokens":
            merged[name] = jnp.sum(tokens_N)
        elif name == "ratio/min":
            lowest = jnp.min(jnp.where(tokens_N > 0, value_N, jnp.inf))
            merged[name] = jnp.where(some, lowest, 1.0)
        elif name == "ratio/max":
            highest = jnp.max(jnp.where(tokens_N > 0, value_N, -jnp.inf))
            merged[name] = jnp.where(some, highest, 1.0)
        else:
            total = jnp.sum(jnp.where(tokens_N > 0, value_N * tokens_N, 0.0))
            merged[name] = total / jnp.maximum(jnp.sum(tokens_N), 1)
    return merged


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


def _clipped(
    ratio_BT: jax.Array, advantages_BT: jax.Array, low: float, high: float, dual_clip: float
) -> jax.Array:
    # A selection in place of jnp.minimum, which halves the gradient where both sides are equal: then
    # the gradient is the unclipped one, also at a ratio of 1 with a clip range of 0.
    inside_BT = jnp.clip(ratio_BT, 1 - low, 1 + high)
    plain_BT, clipped_BT = ratio_BT * advantages_BT, inside_BT * advantages_BT
    gain_BT = jnp.where(plain_BT <= clipped_BT, plain_BT, clipped_BT)
    if dual_clip > 0:
        bound_BT = dual_clip * advantages_BT
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
    loss_BT: jax.Array, mask_BT: jax.Array, aggregate: str, max_tokens: int, normalizer: Any
) -> jax.Array:
    masked_BT = jnp.where(mask_BT, loss_BT, 0.0)
    rows = mask_BT.shape[0]
    if aggregate == "token_mean":
        total, own = jnp.sum(masked_BT), jnp.maximum(jnp.sum(mask_BT), 1)
    elif aggregate == "sequence_mean":
        total, own = jnp.sum(_row_mean(masked_BT, mask_BT)), rows
    else:
        if normalizer is None and max_tokens <= 0:
            raise UserError(
                f"grpo.max_tokens={max_tokens}: the constant aggregate divides by it, must be above 0"
            )
        total, own = jnp.sum(masked_BT), rows * max_tokens
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


def _ratio_metrics(
    log_ratio_BT: jax.Array, ratio_BT: jax.Array, advantages_BT: jax.Array, mask_BT: jax.Array
) -> dict[str, jax.Array]:
    some = jnp.any(mask_BT)
    return {
        "tokens": jnp.sum(mask_BT).astype(ratio_BT.dtype),
        "ratio/min": jnp.where(some, jnp.min(jnp.where(mask_BT, ratio_BT, jnp.inf)), 1.0),
        "ratio/max": jnp.where(some, jnp.max(jnp.where(mask_BT, ratio_BT, -jnp.inf)), 1.0),
        "ratio/mean": _token_mean(ratio_BT, mask_BT),
        # The tokens come from the old policy, so this is k3 of KL(old || current).
        "approx_kl": _token_mean(_exp(log_ratio_BT) - 1 - log_ratio_BT, mask_BT),
    }


def _clip_metrics(
    objective: str,
    ratio_BT: jax.Array,
    advantages_BT: jax.Array,
    mask_BT: jax.Array,
    low: float,
    high: float,
    dual_clip: float,
) -> dict[str, jax.Array]:
    """Returns the shares of trained tokens whose ratio gets no gradient (`clip`) or is capped
    (`cispo`).
    """
    low_BT = high_BT = dual_BT = jnp.zeros_like(mask_BT)
    if objective == "clip":
        low_BT = (ratio_BT < 1 - low) & (advantages_BT < 0)
        high_BT = (ratio_BT > 1 + high) & (advantages_BT > 0)
        if dual_clip > 0:
            dual_BT = (ratio_BT > dual_clip) & (advantages_BT < 0)
    elif objective == "cispo":
        high_BT = ratio_BT > 1 + high
    return {
        "clip/low_share": _token_mean(low_BT, mask_BT),
        "clip/high_share": _token_mean(high_BT, mask_BT),
        "clip/dual_share": _token_mean(dual_BT, mask_BT),
        "clip/share": _token_mean(low_BT | high_BT, mask_BT),
    }
