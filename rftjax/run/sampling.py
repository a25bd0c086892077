"""Builds the sampler of a config and the loop over conversations that it serves, and hands weights to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rftjax import policy
from rftjax.devices import processes, sharding
from rftjax.devices.compilation import Program
from rftjax.environments import Environments
from rftjax.errors import UserError
from rftjax.learning import update
from rftjax.models.config import Config
from rftjax.rollout import Rollout, Sampling
from rftjax.sampler import device
from rftjax.sampler.engine import Engine
from rftjax.serving.agents import Agents
from rftjax.text import chat
from rftjax.types import Params, SamplingParams, TrainState


def make_rollout(config: ConfigDict, model: policy.Policy, environments: Environments) -> Rollout:
    """Returns what samples groups of conversations; its sampler has no weights yet."""
    return Rollout(
        make_engine(config, model),
        model.tokenizer,
        environments,
        seed=config.seed,
        stop_strings=model.stop_strings(config.sampler.stop),
    )


@contextlib.contextmanager
def open_agent_rollout(
    config: ConfigDict, model: policy.Policy, agents: Agents
) -> Iterator[Sampling]:
    """Opens what samples groups of rollouts by agents; its sampler has no weights yet."""
    try:
        from rftjax.serving.agent_rollout import AgentRollout
    except ModuleNotFoundError as error:
        raise UserError(
            f"agent={config.agent!r}: {error}; agents need the extra `serve` (pip install 'rftjax[serve]', or"
            " ./scripts/setup.sh serve)"
        ) from error
    rollout = AgentRollout(
        make_engine(config, model),
        model.tokenizer,
        agents,
        seed=config.seed,
        stop_strings=model.stop_strings(config.sampler.stop),
        address=config.agents.address,
        rewarded=not config.evaluator,
        temperature=config.sampler.temperature,
    )
    with contextlib.closing(rollout):
        yield rollout


def make_engine(config: ConfigDict, model: policy.Policy) -> Engine:
    """Returns the sampler of the config on this process's part of the model's mesh and with its share of the rows;
    there are rows for conversations that wait where there is an environment or an agent."""
    section = config.sampler
    slots = -(-section.slots // processes.count())
    waiting = -(-section.pool // processes.count())
    pool = waiting or cache_rows(config, slots)
    shape = model.config.recording() if config.grpo.routing_replay else model.config
    bridge = section.bridge_steps
    if bridge < 0:
        bridge = 0 if jax.default_backend() == "cpu" else section.dispatch_steps // 4
    strings = model.stop_strings(section.stop)
    return Engine(
        shape,
        slots=slots,
        parked=pool - slots,
        max_length=config.rollout.max_length,
        stops=model.stop_tokens(section.stop),
        find_stop=chat.StopStrings(model.tokenizer, strings) if strings else None,
        seed=config.seed,
        limit=model.vocabulary,
        dispatch_steps=section.dispatch_steps,
        bridge_steps=bridge,
        prefill_rows=section.prefill_rows,
        prefill_chunk=section.prefill_chunk,
        mesh=sharding.local_mesh(model.mesh),
    )


def cache_rows(config: ConfigDict, slots: int) -> int:
    """Returns the rows of a cache with so many that decode where `sampler.pool` is 0: as many again for conversations
    that wait for an environment or an agent."""
    return slots * (2 if config.environment or config.agent else 1)


def sampling_params(config: ConfigDict, *, heldout: bool = False) -> SamplingParams:
    """Returns the sampling settings of training or of held-out evaluation."""
    section = config.eval if heldout else config.sampler
    return SamplingParams(
        config.sampler.max_new_tokens,
        config.rollout.max_turns,
        section.temperature,
        section.top_p,
        section.top_k,
        config.rollout.truncated_turns,
    )


class SamplerWeights:
    """Hands the weights of a training state to the sampler, in the sampler's dtype and shardings."""

    def __init__(self, rollout: Sampling, model: Config, mesh: Mesh, lora_scale: float) -> None:
        self._rollout, self._model, self._mesh = rollout, model, mesh
        self._lora_scale = lora_scale

    def load(self, state: TrainState, *, keep: bool = False) -> None:
        """Gives the sampler the state's weights; `keep` copies them, so that they outlive a donated state.

        The sampler's previous weights are freed first.
        """
        self.release()
        with jax.transfer_guard(sharding.GUARD):
            weights = self.program(state, self._lora_scale).run()
            weights = sharding.to_local(self._mesh, weights)
            weights = jax.tree.map(jnp.copy, weights) if keep else weights
        self._rollout.engine.set_params(weights)
        self._rollout.policy_version = int(jax.device_get(state.step))

    def release(self) -> None:
        """Frees the sampler's weights and its cache."""
        self._rollout.engine.set_params(None)

    def program(self, state: TrainState, lora_scale: float = 1.0) -> Program:
        """Returns the call that makes the sampler's weights of a state; the state may be abstract at a scale of 1."""
        params, adapters = update.weights(state, lora_scale)
        mesh = sharding.decode_mesh(self._mesh)
        return Program(_sampler_params, (self._model, params, adapters), {"mesh": mesh})

    def abstract(self, state: TrainState) -> Params:
        """Compiles `program` for an abstract state; returns the abstract form of the weights that the sampler gets."""
        return sharding.to_local(self._mesh, self.program(state).abstract_output())


_sampler_params = jax.jit(device.sampler_params, static_argnames=("config", "mesh"))
