"""Log-probabilities of packed sequences and the jitted GRPO update; pure, no files, no clocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rftjax import grpo
from rftjax.devices import context, memories, sharding
from rftjax.learning import merging, pieces, rounding
from rftjax.models import decoder, experts, wide
from rftjax.models.config import Config
from rftjax.models.distribution import GONE, RowSettings, adjust, by_rows
from rftjax.models.head import Head, shares
from rftjax.models.remat import LAYER
from rftjax.types import NOWHERE, Batch, Pack, Params, TrainState

# A micro-batch's logits of up to so many bytes are computed at once and kept for the backward pass.
HEAD_BYTES = 1 << 28
HEAD_CHUNK = (
    256  # larger ones: a device's scored positions of a packed row whose logits exist at once
)

Metrics = dict[str, jax.Array]


def weights(state: TrainState, lora_scale: float = 1.0) -> tuple[Params, Params | None]:
    """Returns the model's parameters and its scaled adapters (None in full fine-tuning).

    A scale of 1 computes nothing, so that the state may be abstract.
    """
    if not state.frozen:
        return state.trainable, None
    return state.frozen, scale_adapters(state.trainable, lora_scale)


def scale_adapters(adapters: Params, scale: float) -> Params:
    """Returns adapters whose product a @ b carries the factor alpha / rank."""
    return adapters if scale == 1.0 else _scaled(adapters, scale)


@functools.partial(jax.jit, static_argnames="scale")
def _scaled(adapters: Params, scale: float) -> Params:
    def scaled(path: tuple, leaf: jax.Array) -> jax.Array:
        return memories.to_device(leaf) * scale if path[-1].key == "b" else leaf

    return jax.tree_util.tree_map_with_path(scaled, adapters)


def logprobs(
    config: Config, params: Params, adapters: Params | None, pack: Pack, **settings: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns logprobs_RM and entropies_RM of `scores`, which takes the settings."""
    return scores(config, params, adapters, pack, **settings)[:2]


def scores(
    config: Config,
    params: Params,
    adapters: Params | None,
    pack: Pack,
    *,
    temperatures_RM: jax.Array | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    limit: int = 0,
    remat: str = "",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Returns logprobs_RM of the targets and entropies_RM of one micro-batch, in nats, and metrics of the model's
    experts, if it has any.

    The distribution is the sampler's: after temperature (`temperatures_RM` where given, else `temperature`), top-k and
    top-p, without padded ids. Large logits exist for one chunk of scored positions at a time; empty chunks are skipped.
    """
    x_RXD, routed = decoder.walk(
        config,
        params,
        pack.tokens_RX,
        pack.positions_RX,
        pack.groups_RX,
        pack.segments_RX,
        pack.experts_RXLU,
        lora=adapters,
        remat=remat,
        mesh=mesh,
    )
    used_RM = pack.places_RM != NOWHERE
    filtered = top_p < 1 or top_k > 0
    shards = sharding.context_shards(mesh, x_RXD.shape[1])
    over = shares(mesh, config.vocab, context=shards > 1, whole=filtered)
    head = Head(config, params, over)

    def score(
        sources_RM: jax.Array, targets_RM: jax.Array, temperatures_RM: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        x_BD = context.taken(mesh, x_RXD, sources_RM)
        logits_BV = head.logits(x_BD)
        targets_B = head.arranged(context.flat(mesh, shards, targets_RM))
        ones_B = jnp.ones(targets_B.shape)
        own = temperature
        if temperatures_RM is not None:
            own = head.arranged(context.flat(mesh, shards, temperatures_RM))
        settings = RowSettings(
            own * ones_B, top_p * ones_B, jnp.full(targets_B.shape, top_k, jnp.int32)
        )
        adjusted_BV = adjust(logits_BV, settings, filtered=filtered, limit=limit, keep_B=targets_B)
        both = map(head.restored, log_likelihood(adjusted_BV, targets_B))
        M = sources_RM.shape[1]
        logprobs_RM, entropies_RM = (context.unflat(mesh, shards, one_B, M) for one_B in both)
        return logprobs_RM, entropies_RM

    whole = 4 * pack.sources_RM.size * config.vocab <= HEAD_BYTES
    at_once = _padded(score, shards) if shards > 1 else score
    scored = at_once if whole and remat != LAYER else _chunked(score, used_RM, shards)
    own = () if temperatures_RM is None else (temperatures_RM,)
    logprobs_RM, entropies_RM = scored(pack.sources_RM, pack.targets_RM, *own)
    balance = experts.balance(config.routing, routed, pack.groups_RX > 0)
    return jnp.where(used_RM, logprobs_RM, 0.0), jnp.where(used_RM, entropies_RM, 0.0), balance


def _padded(score: Callable[..., tuple], shards: int) -> Callable[..., tuple]:
    """Returns `score` for any number of positions, which it is given a multiple of `shards` of."""

    def scored(*arrays_RM: jax.Array) -> tuple[jax.Array, ...]:
        M = arrays_RM[0].shape[1]
        results = score(*(jnp.pad(one, ((0, 0), (0, -M % shards))) for one in arrays_RM))
        return tuple(values[:, :M] for values in results)

    return scored


def _chunked(score: Callable[..., tuple], used_RM: jax.Array, shards: int) -> Callable[..., tuple]:
    """Returns `score` in chunks of HEAD_CHUNK positions a device: skips unused ones, recomputes each in the backward
    pass."""
    R, M = used_RM.shape
    chunk = min(HEAD_CHUNK * shards, M + -M % shards)
    spare = ((0, 0), (0, -M % chunk))

    def split(values_RM: jax.Array) -> jax.Array:
        return jnp.pad(values_RM, spare).reshape(R, -1, chunk).swapaxes(0, 1)

    def nothing(sources_RM: jax.Array, *_: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(sources_RM.shape), jnp.zeros(sources_RM.shape)

    @jax.checkpoint
    def one(_: None, inputs: tuple[jax.Array, ...]) -> tuple[None, tuple]:
        *arrays, used_RM = inputs
        return None, jax.lax.cond(jnp.any(used_RM), score, nothing, *arrays)

    def scored(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        _, results = jax.lax.scan(one, None, (*map(split, arrays), split(used_RM)))
        return tuple(values.swapaxes(0, 1).reshape(R, -1)[:, :M] for values in results)

    return scored


@jax.custom_vjp
def log_likelihood(logits_BV: jax.Array, targets_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns logprobs_B of the targets and entropies_B; ids with a logit of GONE cannot be drawn."""
    return _log_likelihood(logits_BV, targets_B)[0]


def _log_likelihood(logits_BV: jax.Array, targets_B: jax.Array) -> tuple[tuple, tuple]:
    logprobs_B, entropies_B, total_B = by_rows(_statistics, logits_BV, targets_B)
    return (logprobs_B, entropies_B), (logits_BV, targets_B, total_B, entropies_B)


def _statistics(logits_BV: jax.Array, targets_B: jax.Array) -> tuple[jax.Array, ...]:
    """Returns logprobs_B, entropies_B and the logarithm of the summed exponentials."""
    top_B = jnp.max(logits_BV, axis=-1)
    # Relative to the largest logit: a common offset would cost digits.
    below_BV = logits_BV - top_B[:, None]
    weights_BV = jnp.exp(below_BV)
    sum_B = jnp.sum(weights_BV, axis=-1)
    # A logit of GONE adds nothing: its weight is 0, and it is finite.
    entropies_B = jnp.log(sum_B) - jnp.sum(weights_BV * below_BV, axis=-1) / sum_B
    chosen_B = jnp.take_along_axis(logits_BV, targets_B[:, None], axis=-1)[:, 0]
    return (chosen_B - top_B) - jnp.log(sum_B), entropies_B, top_B + jnp.log(sum_B)


def _log_likelihood_gradient(saved: tuple, gradients: tuple) -> tuple:
    # d logprob / d logit = [target] - p and d entropy / d logit = -p (log p + entropy): one pass over the logits.
    logits_BV, targets_B, total_B, entropies_B = saved
    dlogprobs_B1, dentropies_B1 = (gradient[:, None] for gradient in gradients)
    logprobs_BV = logits_BV - total_B[:, None]
    possible_BV = logits_BV > GONE
    entropy_part_BV = dentropies_B1 * (
        jnp.where(possible_BV, logprobs_BV, 0.0) + entropies_B[:, None]
    )
    chosen_BV = jnp.arange(logits_BV.shape[-1])[None, :] == targets_B[:, None]
    dlogits_BV = jnp.where(chosen_BV, dlogprobs_B1, 0.0) - jnp.exp(logprobs_BV) * (
        dlogprobs_B1 + entropy_part_BV
    )
    return dlogits_BV, None


log_likelihood.defvjp(_log_likelihood, _log_likelihood_gradient)


def to_rows(values_RM: jax.Array, places_RM: jax.Array, like_BT: jax.Array) -> jax.Array:
    """Returns values_BT: each scored value in its sequence's row, 0 elsewhere."""
    flat = jnp.zeros(like_BT.size, values_RM.dtype)
    return (
        flat.at[places_RM.reshape(-1)]
        .add(values_RM.reshape(-1), mode="drop")
        .reshape(like_BT.shape)
    )


def temperatures_of(batch: Batch, pack: Pack) -> jax.Array | None:
    """Returns the temperature of each scored position's sequence, None where the batch names none."""
    if batch.temperatures_B is None:
        return None
    B, T = batch.sampled_BT.shape
    return jnp.asarray(batch.temperatures_B)[jnp.minimum(pack.places_RM // T, B - 1)]


def micro_batch(pack: Pack, index: jax.Array | int) -> Pack:
    """Returns micro-batch `index` of a stacked pack."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), pack
    )


def make_scorer(
    config: Config, *, unroll: bool = False, **settings: Any
) -> Callable[..., jax.Array]:
    """Builds `score(params, adapters, batch) -> logprobs_BT` without gradient; `settings` as `logprobs` takes them.

    `adapters` are scaled ones or None; `unroll` runs the layers one by one instead of in a scan.
    """

    @jax.jit
    def score(params: Params, adapters: Params | None, batch: Batch) -> jax.Array:
        params = decoder.fetched(config, params)
        adapters = decoder.fetched(config, adapters) if adapters else None
        if unroll:
            params = decoder.unroll(config, params)
            adapters = decoder.unroll(config, adapters) if adapters else None

        def one(index: jax.Array, total_BT: jax.Array) -> jax.Array:
            pack = micro_batch(batch.pack, index)
            own_RM = temperatures_of(batch, pack)
            logprobs_RM, _ = logprobs(
                config, params, adapters, pack, temperatures_RM=own_RM, **settings
            )
            return total_BT + to_rows(logprobs_RM, pack.places_RM, total_BT)

        zeros_BT = jnp.zeros(batch.sampled_BT.shape)
        return jax.lax.fori_loop(0, batch.micro_batches, one, zeros_BT)

    return score


def normalizers(batch: Batch, aggregate: str, max_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Returns the whole step's denominators: the loss's for its aggregate, and the number of trained tokens."""
    tokens = jnp.maximum(jnp.sum(batch.sampled_BT), 1)
    trained_B = jnp.any(batch.sampled_BT, axis=1)
    # The sequences of one trajectory count as one together.
    shares_B = 1.0 if batch.shares_B is None else batch.shares_B
    sequences = jnp.maximum(jnp.sum(jnp.where(trained_B, shares_B, 0.0)), 1)
    denominators = {
        "token_mean": tokens,
        "sequence_mean": sequences,
        "constant": sequences * max_tokens,
    }
    return denominators[aggregate], tokens


def make_update(
    config: Config,
    optimizer: optax.GradientTransformation,
    loss: grpo.LossSettings,
    *,
    term: Callable[[grpo.LossInputs], Any] | None = None,
    lora_scale: float = 0.0,
    remat: str = "",
    unroll: bool = False,
    shardings: Any = None,
    seed: int = 0,
    **settings: Any,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds `update(state, batch, old_logprobs_BT=None, reference_logprobs_BT=None) -> (state, metrics)`.

    Donates the state. Sums the gradients of micro-batches in float32 under the whole step's denominators, so that their
    number does not change the result. Where the gradient's norm is not finite the state stays as it was, and
    `update/nonfinite_share` is 1. `shardings` is a TrainState with those of the new state; `unroll` runs the layers one
    by one instead of in a scan; `seed` is that of stochastic rounding. `loss` and `term` are `grpo.policy_loss`'s,
    `settings` are `logprobs`'s.
    """

    def micro_loss(
        given: Params,
        held: Any,
        frozen: Params,
        batch: Batch,
        index: Any,
        old_BT: Any,
        reference_BT: Any,
    ) -> tuple[jax.Array, Metrics]:
        trainable = given if held is None else decoder.joined(config, held, given)
        params, adapters = weights(TrainState(0, trainable, frozen, None), lora_scale)
        pack = micro_batch(batch.pack, index)
        logprobs_RM, entropies_RM, balance = scores(
            config,
            params,
            adapters,
            pack,
            temperatures_RM=temperatures_of(batch, pack),
            remat=remat,
            **settings,
        )
        like_BT = batch.sampled_BT
        scored_RM = (pack.places_RM != NOWHERE).astype(jnp.int32)
        here_BT = (to_rows(scored_RM, pack.places_RM, like_BT) > 0) & like_BT
        logprobs_BT = to_rows(logprobs_RM, pack.places_RM, like_BT)
        denominator, tokens = normalizers(batch, loss.aggregate, loss.max_tokens)
        value, metrics = grpo.policy_loss(
            logprobs_BT,
            here_BT,
            batch.advantages_B if batch.advantages_BT is None else batch.advantages_BT,
            settings=loss,
            term=term,
            old_logprobs=old_BT,
            reference_logprobs=reference_BT,
            sampler_logprobs=batch.sampler_logprobs_BT,
            entropy=to_rows(entropies_RM, pack.places_RM, like_BT),
            weights=batch.weights_B,
            shares=batch.shares_B,
            normalizer=denominator,
            token_normalizer=tokens,
        )
        # The policy that sampled is the one before this batch's updates.
        sampled_by_BT = logprobs_BT if old_BT is None else old_BT
        gap_BT = jnp.where(here_BT, jnp.abs(sampled_by_BT - batch.sampler_logprobs_BT), 0.0)
        count = jnp.maximum(jnp.sum(here_BT), 1)
        metrics["sampler/logprob_diff_mean"] = jnp.sum(gap_BT) / count
        metrics["sampler/logprob_diff_max"] = jnp.max(gap_BT)
        metrics |= balance | {"loss": value}
        return value, jax.lax.stop_gradient(metrics)

    gradient = jax.value_and_grad(micro_loss, has_aux=True)
    optimizer = optax.with_extra_args_support(optimizer)
    stacks = [stack.name for stack in config.stacks]

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def update(
        state: TrainState, batch: Batch, old_BT: Any = None, reference_BT: Any = None
    ) -> tuple[TrainState, Metrics]:
        trainable, frozen = decoder.fetched(config, state.trainable), state.frozen
        if unroll:
            trainable = decoder.unroll(config, trainable)
            frozen = decoder.unroll(config, frozen) if frozen else frozen
        given, held = trainable, None
        if rounding.is_narrow(trainable):
            given, held = wide.zeros_of(trainable), trainable
        rest = frozen, batch

        def one(index: jax.Array, carry: tuple) -> tuple:
            (_, metrics), grads = gradient(given, held, *rest, index, old_BT, reference_BT)
            sums, kept = carry
            kept = {name: kept[name].at[index].set(value) for name, value in metrics.items()}
            return jax.tree.map(jnp.add, sums, grads), kept

        N = batch.pack.tokens_RX.shape[0]
        _, shapes = jax.eval_shape(micro_loss, given, held, *rest, 0, old_BT, reference_BT)
        empty = {name: jnp.zeros(N, value.dtype) for name, value in shapes.items()}
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable)
        grads, metrics_N = jax.lax.fori_loop(0, batch.micro_batches, one, (zeros, empty))
        grads = decoder.roll(config, grads) if unroll else grads
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        metrics = merging.merge_micro_batches(metrics_N)
        metrics |= {"grad_norm": norm, "update/nonfinite_share": 1.0 - finite}

        by = stacks if pieces.needed(state) and not unroll else None
        return pieces.update(optimizer, state, grads, norm, stacks=by, seed=seed), metrics

    return update
