"""From scored trajectories to updates: the choice of groups, advantages, minibatches, and the reference policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from rftjax import grpo
from rftjax.devices import memories, processes, sharding
from rftjax.devices.compilation import Program
from rftjax.learning import batching, merging, update
from rftjax.learning.batching import make_batch
from rftjax.learning.credit import has_variance, set_advantages
from rftjax.models import decoder
from rftjax.monitor.rollouts import ages, by_draw, is_valid, sampled_tokens
from rftjax.types import Batch, Params, TrainState, Trajectory


class Minibatch(NamedTuple):
    """One minibatch on the devices, with the log-probabilities that its updates are measured against (or None)."""

    batch: Batch
    old_logprobs_BT: Any
    reference_logprobs_BT: Any


@dataclasses.dataclass
class Learner:
    """What a step does with scored trajectories. `fields` is the section grpo, `shape` holds arguments of `make_batch`.

    `token_limit` is how many tokens a trajectory may sample, `prompts` how many groups a step trains on. `score` gives
    log-probabilities without gradient; it runs only where something is measured against them.
    """

    fields: Mapping[str, Any]
    shape: Mapping[str, Any]
    mesh: Mesh
    apply: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    score: Callable[..., jax.Array]
    prompts: int
    token_limit: int
    seed: int = 0
    lora_scale: float = 0.0
    dtype: str = "float32"

    def wanted(self, trajectories: Sequence[Trajectory]) -> int:
        """Returns how many prompts are to be sampled now: a step's, then replacements of groups without variance."""
        groups = by_draw(trajectories)
        if not groups:
            return self.prompts
        missing = self.prompts - sum(has_variance(group, self._credit) for group in groups)
        left = self.prompts + self.fields["dynamic_prompts"] - len(groups)
        return max(0, min(missing, left))

    def batch(
        self, state: TrainState, trajectories: Sequence[Trajectory], step: int
    ) -> tuple[list[Minibatch], dict[str, float]]:
        """Chooses groups and sets their advantages; returns their minibatches, and metrics of the choice."""
        drop = self.fields["drop_zero_variance"]
        chosen = choose(trajectories, self.prompts, drop=drop, credit=self._credit)
        parts = split(chosen, self.fields["minibatches"], self.fields["minibatch_groups"],
                      seed=(self.seed, step))  # fmt: skip
        penalties, metrics = self._overlong(chosen)
        in_reward = self.fields["kl_weight"] > 0 and self.fields["kl_in_reward"]
        if not in_reward:
            set_advantages(chosen, self.fields, penalties)
        many = self.fields["updates_per_batch"] * len(parts) > 1
        measured = [self._measure(state, part, old=many or in_reward) for part in parts]
        if in_reward:
            kl = [one for part, (old, reference) in zip(parts, measured, strict=True)
                  for one in self._kl_of(part, old, reference)]  # fmt: skip
            for trajectory, value in kl:
                key = trajectory.draw, trajectory.sample
                penalties[key] = penalties.get(key, 0.0) - self.fields["kl_weight"] * value
            metrics["kl/sequence_mean"] = float(np.mean([value for _, value in kl] or [0.0]))
            set_advantages(chosen, self.fields, penalties)
        moved = sum(trajectory.teaches for trajectory in chosen)
        metrics["batch/effective_share"] = moved / max(len(trajectories), 1)
        metrics |= ages(chosen, int(jax.device_get(state.step)))
        metrics["groups/replaced_share"] = max(len(by_draw(trajectories)) / self.prompts - 1, 0.0)
        finished = [
            Minibatch(
                self._lay_out(part, skip_zero=self._skip_zero),
                old if many else None,
                None if in_reward else reference,
            )
            for part, (old, reference) in zip(parts, measured, strict=True)
        ]
        return finished, metrics

    def update(
        self, state: TrainState, minibatches: Sequence[Minibatch], step: int
    ) -> tuple[TrainState, dict[str, float]]:
        """Makes every update of one step, `step` counted from 1, and refreshes the reference when it is due.

        Skips a minibatch without trained tokens (every group dropped, every answer masked): parameters, moments,
        `state.step` and with it the learning rate's schedule stay as they are. A minibatch whose advantages are all 0
        is not skipped: its gradient is exactly 0, but Adam's momentum and weight decay still move the weights.
        """
        # Read from the devices, so that all processes get the same answer.
        some = jax.device_get([jnp.any(one.batch.sampled_BT) for one in minibatches])
        nonempty = [one for one, any_token in zip(minibatches, some, strict=True) if any_token]
        metrics = []
        with jax.transfer_guard(sharding.GUARD):
            for _ in range(self.fields["updates_per_batch"]):
                for minibatch in nonempty:
                    state, measured = self.apply(state, *minibatch)
                    metrics.append(measured)
        skipped = {"update/skipped_share": 1 - len(nonempty) / len(minibatches)}
        if not metrics:
            metrics = [merging.blank(jax.eval_shape(self.apply, state, *minibatches[0])[1])]
        every = self.fields["kl_refresh_steps"]
        if jax.tree.leaves(state.reference) and every and step % every == 0:
            state = state._replace(reference=copy(state.trainable, self._reference_dtype(state)))
        return state, merging.merge_updates(jax.device_get(metrics)) | skipped

    def programs(self, state: TrainState) -> list[Program]:
        """Returns the calls of a step's updates for each width of a packed row, to compile ahead of any samples.

        The state may be abstract.
        """
        names = ("pack_tokens", "max_length", "pack_unit")
        widths = batching.widths(*(self.shape[name] for name in names if name in self.shape))
        return [one for width in reversed(widths) for one in self._programs(state, width)]

    def _programs(self, state: TrainState, width: int) -> list[Program]:
        batch = self._lay_out([], longest=width)
        compared = self.fields["kl_weight"] > 0
        in_reward = compared and self.fields["kl_in_reward"]
        many = self.fields["updates_per_batch"] * self.fields["minibatches"] > 1
        rows_BT = batch.sampler_logprobs_BT
        measured = rows_BT if many else None, rows_BT if compared and not in_reward else None
        programs = [Program(self.apply, (state, batch, *measured))]
        if many or in_reward:
            programs.append(Program(self.score, (*update.weights(state), batch)))
        if compared:
            programs.append(Program(self.score, (*_reference(state), _routing_itself(batch))))
        return programs

    @property
    def _credit(self) -> str:
        return self.fields.get("credit", "")

    def _reference_dtype(self, state: TrainState) -> str:
        return "float32" if state.frozen else self.dtype

    @property
    def _skip_zero(self) -> bool:
        """Whether a sample of advantage 0 adds exactly nothing to the loss and its gradient."""
        in_loss = self.fields["kl_weight"] > 0 and not self.fields["kl_in_reward"]
        return not in_loss and self.fields["entropy_weight"] == 0 and not self.fields["loss"]

    def _lay_out(
        self, part: Sequence[Trajectory], *, skip_zero: bool = False, longest: int = 0
    ) -> Batch:
        # If no sample would be left, all stay: else the step's metrics would be empty.
        masked = self.shape.get("mask_truncated", False)
        trained = [one for one in part if not (masked and one.finish_reason == "length")]
        skip_zero = skip_zero and any(one.teaches for one in trained)
        return sharding.put_batch(
            self.mesh, make_batch(part, **self.shape, skip_zero=skip_zero, longest=longest)
        )

    def _measure(self, state: TrainState, part: Sequence[Trajectory], *, old: bool) -> tuple:
        """Returns log-probabilities by the policy before its updates and by the reference, None where not needed."""
        compared = self.fields["kl_weight"] > 0
        if not (old or compared):
            return None, None
        # A KL in the reward is measured before advantages are known.
        batch = self._lay_out(part, skip_zero=self._skip_zero and not compared)
        with jax.transfer_guard(sharding.GUARD):
            old_BT = self.score(*update.weights(state, self.lora_scale), batch) if old else None
            if not compared:
                return old_BT, None
            measured = *_reference(state, self.lora_scale), _routing_itself(batch)
            return old_BT, self.score(*measured)

    def _kl_of(
        self, part: Sequence[Trajectory], old_BT: Any, reference_BT: Any
    ) -> list[tuple[Trajectory, float]]:
        """Returns each trajectory's KL estimate, summed over the tokens that it is trained on."""
        sampled_BT = make_batch(part, **{**self.shape, "experts": None}).sampled_BT
        kl_BT = processes.to_host(grpo.estimate_kl(self.fields["kl"], old_BT, reference_BT))
        total_B = np.where(sampled_BT, kl_BT, 0.0).sum(axis=1)
        owners = [trajectory for trajectory in part for _ in trajectory.sequences]
        totals: dict[int, float] = {}
        for owner, value in zip(owners, total_B[: len(owners)], strict=True):
            totals[id(owner)] = totals.get(id(owner), 0.0) + float(value)
        return [(trajectory, totals[id(trajectory)]) for trajectory in part]

    def _overlong(
        self, chosen: Sequence[Trajectory]
    ) -> tuple[dict[tuple[int, int], float], dict[str, float]]:
        """Returns the penalty of each answer that comes near the token limit, and their mean."""
        buffer = self.fields["overlong_buffer"]
        if not buffer:
            return {}, {}
        weight = self.fields["overlong_penalty"]
        found = {
            (one.draw, one.sample): weight * overlong(one, self.token_limit, buffer)
            for one in chosen
        }
        return found, {"reward/overlong_mean": float(np.mean(list(found.values()) or [0.0]))}


def initial_reference(
    fields: Mapping[str, Any],
    params: Params,
    adapters: Params | None,
    dtype: str,
    *,
    loaded: bool = False,
) -> Params:
    """Returns what of step 0 must be kept to measure a KL against, () where nothing must.

    With fresh adapters the frozen base is the reference, so they are kept only if they will be refreshed; `loaded`
    adapters are part of the policy that training starts from.
    """
    if fields["kl_weight"] == 0:
        return ()
    if adapters is None:
        return copy(params, dtype)
    return copy(adapters, "float32") if loaded or fields["kl_refresh_steps"] else ()


def _reference(state: TrainState, lora_scale: float = 1.0) -> tuple[Params, Params | None]:
    """Returns the parameters and scaled adapters that a KL is measured against."""
    if not state.frozen:
        return state.reference, None
    adapters = state.reference or None
    if adapters is not None:
        adapters = update.scale_adapters(adapters, lora_scale)
    return state.frozen, adapters


def _routing_itself(batch: Batch) -> Batch:
    """Returns the batch for a model other than the one that sampled: its routers choose the experts."""
    return batch._replace(pack=batch.pack._replace(experts_RXLU=None))


def choose(
    trajectories: Sequence[Trajectory], prompts: int, *, drop: bool, credit: str = ""
) -> list[Trajectory]:
    """Returns the valid trajectories of at most `prompts` groups in the order of their draws.

    Groups with variance come first; those without fill what is left, unless they are dropped.
    """
    groups = by_draw(trajectories)
    live = [group for group in groups if has_variance(group, credit)]
    dead = [] if drop else [group for group in groups if not has_variance(group, credit)]
    taken = sorted([*live, *dead][:prompts], key=lambda group: group[0].draw)
    return [one for group in taken for one in group if is_valid(one)]


def split(
    trajectories: Sequence[Trajectory], count: int, whole_groups: bool, *, seed: tuple[int, int]
) -> list[list[Trajectory]]:
    """Returns `count` random parts of equal size, give or take one group (or one trajectory where groups may part)."""
    if count == 1:
        return [list(trajectories)]
    units = by_draw(trajectories) if whole_groups else [[one] for one in trajectories]
    words = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(units))
    order = np.argsort(np.asarray(words), kind="stable")
    return [
        [one for index in sorted(part) for one in units[index]]
        for part in np.array_split(order, count)
    ]


def overlong(trajectory: Trajectory, limit: int, buffer: int) -> float:
    """Returns DAPO's soft punishment (Yu et al. 2025, equation 13), from 0 down to -1 within the last `buffer` tokens.

    An answer that a token limit cut gets -1 wherever it was cut.
    """
    if trajectory.finish_reason == "length":
        return -1.0
    return max(-1.0, min(0.0, (limit - buffer - sampled_tokens(trajectory)) / buffer))


def copy(params: Params, dtype: str) -> Params:
    """Returns a copy in the dtypes that the forward pass reads; it outlives an update that donates `params`."""

    def one(path: tuple, leaf: Any) -> jax.Array:
        if not isinstance(leaf, Tracer) and memories.on_host(leaf):
            leaf = jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))
        return jnp.array(leaf, decoder.reading_dtype(path[-1].key, dtype), copy=True)

    return jax.tree_util.tree_map_with_path(one, params)
