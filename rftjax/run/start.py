"""Builds the training state: of step 0, in its abstract form, or from a checkpoint."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rftjax import config as configs
from rftjax.devices import memories, sharding
from rftjax.errors import UserError
from rftjax.learning import optim, update
from rftjax.learning.learner import initial_reference
from rftjax.models import decoder, logical_axes
from rftjax.policy import Policy
from rftjax.run.checkpoint import Checkpoints
from rftjax.types import Params, TrainState
from rftjax.weights import lora

ALL = "all"  # of optim.offload: the trained parameters too, not the moments alone


class StateBuilder:
    """Builds states from a base model, whose parameters are read when they are needed, and from adapters."""

    def __init__(self, config: ConfigDict, model: Policy, mesh: Mesh) -> None:
        self.config, self.policy, self.mesh = config, model, mesh

    @functools.cached_property
    def adapters(self) -> Params | None:
        """The adapters of step 0, None in full fine-tuning; raises UserError where those of `lora.path` do not fit."""
        return first_adapters(self.config, self.policy, self.mesh)

    @functools.cached_property
    def optimizer(self) -> Any:
        """The Optax chain of the config, its schedule stretched over all updates of the steps."""
        section, settings = self.config.grpo, self.config.optim.to_dict()
        updates = section.updates_per_batch * section.minibatches
        settings["warmup_steps"] *= updates
        for name in ("max_nonfinite", "offload", "rounding"):  # the loop's, and of the state
            del settings[name]
        # A resume may lower `steps` so that the run ends within its warm-up: the decay is never read then.
        horizon = max(self.config.steps * updates, settings["warmup_steps"] + 1)
        return optim.make_optimizer(steps=horizon, **settings)

    def state(self, checkpoints: Checkpoints, step: int) -> TrainState:
        """Returns the state after a step: from its checkpoint, and what never changes from the base model.

        A resume makes no other part of step 0.
        """
        if step == 0:
            return self.initial_state()
        fixed = [
            name
            for name in checkpoints.fixed
            if jax.tree.leaves(getattr(self.abstract_state, name))
        ]
        example = self.abstract_state
        if fixed:
            base = self._sharded(self.policy.take(masters=False))
            example = example._replace(**dict.fromkeys(fixed, base))
        return checkpoints.restore(step, example)[0]

    def initial_state(self) -> TrainState:
        """Returns step 0 with the shardings that an update returns: others would compile the second update again."""
        adapters = self.adapters
        params = self.policy.take(masters=keeps_masters(self.config))
        state = self._make(params, adapters)
        wanted = self.abstract_state
        places = jax.tree.map(lambda leaf: leaf.sharding, wanted._replace(opt_state=()))
        state = sharding.put(state, places)
        # Adam's moments and counts begin as zeros, made where they are to lie.
        opt_state = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), wanted.opt_state
        )
        return state._replace(opt_state=opt_state)

    def initial_policy(self) -> TrainState:
        """Returns the policy of step 0 alone, without what only training needs."""
        step = jnp.zeros((), jnp.int32)
        if self.adapters is None:
            return TrainState(step, self.policy.params, {}, ())
        return TrainState(step, self.adapters, self.policy.params, ())

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """The abstract state: shapes, dtypes and shardings without data."""
        adapters = jax.eval_shape(lambda: new_adapters(self.config, self.policy))
        shapes = jax.eval_shape(self._make, self.policy.abstract_params, adapters)
        wide = jax.eval_shape(_float32, shapes.trainable)
        shapes = shapes._replace(opt_state=jax.eval_shape(self.optimizer.init, wide))
        state = sharding.abstract_tree(self.mesh, logical_axes(self.policy.config), shapes)
        if self.config.optim.offload:
            state = state._replace(opt_state=_on_host(state.opt_state))
        if self.config.optim.offload == ALL:
            state = state._replace(trainable=_on_host(state.trainable))
        return state

    def _sharded(self, tree: Params) -> Any:
        return sharding.shard_tree(self.mesh, logical_axes(self.policy.config), tree)

    def _make(self, params: Params, adapters: Params | None) -> TrainState:
        trainable, frozen, dtype = params, {}, self.config.model.dtype
        if self.config.optim.rounding:
            trainable = decoder.cast(params, dtype)
        if adapters is not None:
            trainable, frozen = adapters, decoder.cast(params, dtype)
        loaded = bool(self.config.lora.path)
        reference = initial_reference(self.config.grpo, params, adapters, dtype, loaded=loaded)
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, trainable, frozen, (), reference)


def _on_host(tree: Any) -> Any:
    """Returns abstract matrices as ones of the host's memory; norm gains and biases are too small to be worth it."""
    return memories.abstract_on_host(tree, optim.decay_mask(tree))


def _float32(tree: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def keeps_masters(config: ConfigDict) -> bool:
    """Whether training needs the model's parameters in float32."""
    return not config.lora.rank and not config.optim.rounding


def new_adapters(config: ConfigDict, model: Policy) -> Params | None:
    """Returns fresh adapters, None in full fine-tuning."""
    section = config.lora
    if not section.rank:
        return None
    return lora.init(model.config, rank=section.rank, targets=section.targets, seed=config.seed)


def first_adapters(config: ConfigDict, model: Policy, mesh: Mesh) -> Params | None:
    """Returns fresh adapters or those of `lora.path`, None in full fine-tuning."""
    section, adapters = config.lora, new_adapters(config, model)
    if adapters is None:
        return None
    if section.path:
        found = load_adapters(section.path, model.config, section.alpha)
        lora.check_like(section.path, found, adapters)
        adapters = found
    return sharding.shard_tree(mesh, logical_axes(model.config), adapters)


def load_adapters(path: str, model: Any, alpha: float) -> Params:
    """Returns the adapters of a PEFT directory, or of the last checkpoint of a run's workdir, scaled for `alpha`."""
    folder = Path(path).expanduser()
    if (folder / "adapter_config.json").exists():
        return lora.load_peft(folder, model, alpha=alpha)
    if not (folder / "config.json").exists() or not (folder / "checkpoints").is_dir():
        raise UserError(f"lora.path={path}: {lora.instead_of_adapter(folder)}")
    run: Any = configs.from_json((folder / "config.json").read_text(), str(folder / "config.json"))
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        step = checkpoints.latest_step()
        if not run.lora.rank or step is None:
            raise UserError(f"lora.path={path}: that run has no adapters in a checkpoint")
        adapters, _ = checkpoints.restore_params(step)
    finally:
        checkpoints.close()
    return update.scale_adapters(adapters, run.lora.alpha / alpha)
