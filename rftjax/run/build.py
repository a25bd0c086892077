"""Builds the parts of a run from its config."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rftjax import config as configs
from rftjax import grpo, policy, tasks
from rftjax.config.fields import expand_home, expand_value, flatten
from rftjax.config.stored import merge_resume
from rftjax.devices import processes, sharding
from rftjax.devices.compilation import Compilations
from rftjax.environments import Environments
from rftjax.learning import custom
from rftjax.models import logical_axes
from rftjax.rollout import Sampling
from rftjax.run import checkpoint, checks
from rftjax.run.binding import stored_config
from rftjax.run.heldout import MAIN, HeldOut, set_field
from rftjax.run.hooks import Hook
from rftjax.run.sampling import SamplerWeights, make_rollout, open_agent_rollout
from rftjax.run.start import StateBuilder, keeps_masters
from rftjax.scoring import Scorer
from rftjax.serving.agents import Agents, open_agents
from rftjax.types import Task
from rftjax.weights import lora

log = logging.getLogger(__name__)

TIS_CAP = 2.0  # the default of grpo.tis_cap where a step trains on tokens of older weights


def complete_config(
    config: ConfigDict,
    *,
    resumed: bool = False,
    needs: Collection[str] = tuple(configs.REQUIRED),
    devices: int = -1,
) -> ConfigDict:
    """Returns the config with its preset's fields filled in; raises UserError listing everything wrong with it.

    `needs` are the fields that must be given. `devices` is how many there will be (-1: as many as here, 0: unknown).
    """
    config = expand_home(config)
    names = {**grpo.ADVANTAGE_DEFAULTS, **grpo.LOSS_DEFAULTS}
    given = {name: config.grpo[name] for name in names if name in config.grpo}
    if config.rollout.get("partial") and given.get("tis_cap") is None:
        given["tis_cap"] = TIS_CAP
    fields = grpo.preset_fields(config.grpo.preset, given)
    if fields["max_tokens"] == 0:
        fields["max_tokens"] = config.sampler.max_new_tokens * config.rollout.max_turns
    with config.unlocked():
        config.grpo.update(fields)
    devices = jax.device_count() if devices < 0 else devices
    configs.check(
        config, devices=devices, processes=processes.count(), resumed=resumed, needs=needs
    )
    return config


def open_config(workdir: Path, given: ConfigDict, flags: dict[str, Any]) -> ConfigDict:
    """Returns the config to run: the workdir's own where a step has bound it to one, else the given one."""
    given = expand_home(given)
    stored = stored_config(workdir)
    if stored is None:
        return complete_config(given)
    flags = {field: expand_value(field, value) for field, value in flatten(flags).items()}
    return complete_config(merge_resume(stored, given, flags), resumed=True)


def load_tasks(config: ConfigDict) -> tuple[list[Task], dict[str, list[Task]]]:
    """Returns training tasks and the held-out sets by name, disjoint from training in text.

    `tasks.allow_overlap` lets them overlap. The set that the section tasks names, if any, is the first.
    """
    section = config.tasks
    train = tasks.read(
        section.train,
        map=section.map,
        split=section.split,
        limit=section.limit,
        weight=section.weight,
        temperature=section.temperature,
    )
    heldout: dict[str, list[Task]] = {}

    def add(name: str, source: str, split: str) -> None:
        field = set_field(name)
        split = split or section.heldout_split or section.split
        heldout[name] = tasks.read(source, map=section.map, split=split, field=field)
        tasks.check_overlap(train, heldout[name], allow=section.allow_overlap, field=field)

    if section.heldout or section.heldout_split:
        add(MAIN, section.heldout or section.train, "")
    elif section.heldout_count:
        train, heldout[MAIN] = tasks.split(train, section.heldout_count, config.seed)
    for text in config.eval.sets:
        add(*configs.heldout_set(text))
    most = config.eval.max_tasks or None
    return train, {name: found[:most] for name, found in heldout.items()}


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of. The training state is not among it: `state_builder` makes that."""

    given: ConfigDict  # as config.json has it
    config: ConfigDict  # the same, with lengths that the model can take
    workdir: Path
    mesh: Mesh
    policy: policy.Policy
    state_builder: StateBuilder
    train_tasks: list[Task]
    scorer: Scorer
    environments: Environments
    rollout: Sampling
    sampler_weights: SamplerWeights
    heldout: HeldOut
    hook: Hook
    replicated: list[str]  # what the mesh cannot share out, a sentence each
    prompt_tokens: list[int]  # of the training tasks
    compilations: Compilations


@contextlib.contextmanager
def build(config: ConfigDict, workdir: Path, *, read_ahead: bool = True) -> Iterator[Parts]:
    """Builds the parts; leaving the block ends worker processes and threads.

    With `read_ahead` a thread begins to read the weights where a run starts. Raises UserError for what the user can
    mend, in all processes of the run.
    """
    with contextlib.ExitStack() as closing:
        with processes.together():
            parts = closing.enter_context(_build(config, workdir, read_ahead))
        yield parts


@contextlib.contextmanager
def _build(config: ConfigDict, workdir: Path, read_ahead: bool) -> Iterator[Parts]:
    with contextlib.ExitStack() as closing:
        given = config
        train_tasks, heldout = load_tasks(config)
        # Worker processes start before anything else.
        scorer = Scorer(config.evaluator, seed=config.seed, **config.scoring)
        closing.callback(scorer.close)
        heldout_scorer = scorer
        if other := config.eval.evaluator:
            heldout_scorer = Scorer(
                other, seed=config.seed, field="eval.evaluator", **config.scoring
            )
            closing.callback(heldout_scorer.close)
        environments = Environments(config.environment, **config.environments)
        closing.callback(environments.close)
        agents = _open_agents(config, closing)
        mesh = sharding.make_mesh(**config.mesh)
        custom.check(config.grpo)
        hook = Hook(config.hooks)
        model = open_model(config, mesh)
        closing.callback(model.close)
        resumes = checkpoint.exists(workdir / "checkpoints")
        if read_ahead and not resumes:
            model.read_ahead()
        checks.check_replay(config, model)
        config = checks.fit_context(config, model)
        axes = logical_axes(model.config)
        replicated = sharding.replicated_axes(mesh, axes, model.abstract_params)
        for text in replicated:
            log.warning("%s", text)
        checks.check_environment(config, environments.active)
        checks.check_agent(config)
        named = {set_field(name): found for name, found in heldout.items()}
        fitting, prompt_tokens = checks.fit_prompts(
            config, model.tokenizer, {"tasks.train": train_tasks} | named, environments.tools
        )
        state_builder = StateBuilder(config, model, mesh)
        if not resumes:
            _ = state_builder.adapters  # those of lora.path are checked before anything is sampled
        rollout: Sampling
        if agents is None:
            rollout = make_rollout(config, model, environments)
        else:
            rollout = closing.enter_context(open_agent_rollout(config, model, agents))
        compilations = Compilations()
        closing.callback(compilations.close)
        sets = {name: fitting[set_field(name)] for name in heldout}
        yield Parts(
            given=given,
            config=config,
            workdir=workdir,
            mesh=mesh,
            policy=model,
            state_builder=state_builder,
            train_tasks=fitting["tasks.train"],
            scorer=scorer,
            environments=environments,
            rollout=rollout,
            sampler_weights=SamplerWeights(rollout, model.config, mesh, lora_scale(config)),
            heldout=HeldOut(config, sets, rollout, heldout_scorer),
            hook=hook,
            replicated=replicated,
            prompt_tokens=prompt_tokens,
            compilations=compilations,
        )


def _open_agents(config: ConfigDict, closing: contextlib.ExitStack) -> Agents | None:
    if not config.agent:
        return None
    settings = {name: config.agents[name] for name in ("workers", "timeout_s", "env")}
    agents = open_agents(config.agent, **settings)
    closing.callback(agents.close)
    return agents


def open_model(config: ConfigDict, mesh: Mesh) -> policy.Policy:
    """Returns the model of the config; its parameters are read when they are needed."""
    return policy.load(
        config.model.path,
        dtype=config.model.dtype,
        attention=config.model.attention,
        mesh=mesh,
        init=config.model.init,
        seed=config.seed,
        lazy=True,
        masters=keeps_masters(config),
        chat_settings=config.chat.to_dict(),
    )


def lora_scale(config: ConfigDict) -> float:
    """Returns the factor on the adapters' product, 0 in full fine-tuning."""
    return lora.scale(config.lora.rank, config.lora.alpha)
