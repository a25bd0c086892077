"""Builds the parts of a run from its config, and keeps what a restart needs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rftjax import config as configs
from rftjax import grpo, policy, tasks
from rftjax.config.fields import expand_home, expand_value, flatten
from rftjax.config.resume import merge_resume
from rftjax.devices import sharding
from rftjax.devices.compilation import Compilations, Program, compiling
from rftjax.environments import Environments
from rftjax.learning import batching, custom, update
from rftjax.learning.learner import GUARD, Learner
from rftjax.monitor import alarms
from rftjax.monitor import recorder as metrics
from rftjax.monitor.loggers import open_loggers
from rftjax.rollout import Rollout
from rftjax.run import checkpoint, checks
from rftjax.run.binding import Binding, stored_config
from rftjax.run.checkpoint import Checkpoints
from rftjax.run.heldout import MAIN, evaluate
from rftjax.run.hooks import Hook
from rftjax.run.inputs import fingerprints
from rftjax.run.prefetch import Prefetch
from rftjax.run.sampling import make_rollout
from rftjax.run.start import StateBuilder
from rftjax.sampler import device
from rftjax.scoring import Scorer
from rftjax.text import chat
from rftjax.types import SamplingParams, Task, TrainState, Trajectory
from rftjax.weights import lora

log = logging.getLogger(__name__)


def complete_config(config: ConfigDict, *, resumed: bool = False) -> ConfigDict:
    """Returns the config with its preset's fields filled in; raises UserError listing everything wrong with it."""
    config = expand_home(config)
    names = {**grpo.ADVANTAGE_DEFAULTS, **grpo.LOSS_DEFAULTS}
    fields = grpo.preset_fields(
        config.grpo.preset, {name: config.grpo[name] for name in names if name in config.grpo}
    )
    if fields["max_tokens"] == 0:
        fields["max_tokens"] = config.sampler.max_new_tokens * config.rollout.max_turns
    with config.unlocked():
        config.grpo.update(fields)
    devices, processes = jax.device_count(), jax.process_count()
    configs.check(config, devices=devices, processes=processes, resumed=resumed)
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


def set_field(name: str) -> str:
    """Returns how errors name a held-out set."""
    return "tasks.heldout" if name == MAIN else f"eval.sets[{name}]"


@dataclasses.dataclass
class Job:
    """The parts of a run. Worker processes are started before anything else."""

    given: ConfigDict  # as config.json has it
    config: ConfigDict  # the same, with lengths that the model can take
    workdir: Path
    scorer: Scorer
    heldout_scorer: Scorer  # the same one unless `eval.evaluator` names another
    environments: Environments
    train_tasks: list[Task]
    heldout: dict[str, list[Task]]
    policy: policy.Policy
    state_builder: StateBuilder
    mesh: jax.sharding.Mesh
    rollout: Rollout
    replicated: list[str]
    shortest_prompt: int  # tokens, of the training tasks
    hook: Hook
    compilations: Compilations = dataclasses.field(default_factory=Compilations)

    @classmethod
    def build(cls, config: ConfigDict, workdir: Path, *, read_ahead: bool = True) -> Job:
        """Builds everything but the training state, whose weights a thread begins to read with `read_ahead`; raises
        ValueError for what the user can mend."""
        given = config
        train_tasks, heldout = load_tasks(config)
        with contextlib.ExitStack() as workers:
            scorer = Scorer(config.evaluator, seed=config.seed, **config.scoring)
            workers.callback(scorer.close)
            heldout_scorer = scorer
            if other := config.eval.evaluator:
                heldout_scorer = Scorer(
                    other, seed=config.seed, field="eval.evaluator", **config.scoring
                )
                workers.callback(heldout_scorer.close)
            environments = Environments(config.environment, **config.environments)
            workers.callback(environments.close)
            mesh = sharding.make_mesh(**config.mesh)
            checks.check_attention(config)
            custom.check(config.grpo)
            hook = Hook(config.hooks)
            model = policy.load(
                config.model.path,
                dtype=config.model.dtype,
                attention=config.model.attention,
                mesh=mesh,
                init=config.model.init,
                seed=config.seed,
                lazy=True,
                masters=config.lora.rank == 0,
            )
            workers.callback(model.close)
            resumes = checkpoint.exists(workdir / "checkpoints")
            if read_ahead and not resumes:
                model.read_ahead()
            config = checks.fit_context(config, model)
            replicated = sharding.replicated_axes(mesh, model.abstract_params)
            for name in replicated:
                log.warning("%s", name)
            named = {set_field(name): found for name, found in heldout.items()}
            checks.check_environment(config, environments.active)
            fitting, shortest = checks.fit_prompts(
                config, model.tokenizer, {"tasks.train": train_tasks} | named, environments.tools
            )
            train_tasks = fitting["tasks.train"]
            heldout = {name: fitting[set_field(name)] for name in heldout}
            state_builder = StateBuilder(config, model, mesh)
            if not resumes:
                _ = (
                    state_builder.adapters
                )  # those of lora.path are checked before anything is sampled
            rollout = make_rollout(config, model, environments)
            workers.pop_all()  # from here on they are the job's
        return cls(
            given,
            config,
            workdir,
            scorer,
            heldout_scorer,
            environments,
            train_tasks,
            heldout,
            model,
            state_builder,
            mesh,
            rollout,
            replicated,
            shortest,
            hook,
        )

    def close(self) -> None:
        """Ends the worker processes."""
        self.compilations.close()
        self.policy.close()
        self.scorer.close()
        self.heldout_scorer.close()
        self.environments.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sampling_params(self, *, heldout: bool = False) -> SamplingParams:
        """Returns the sampling settings of training or of held-out evaluation."""
        source = self.config.eval if heldout else self.config.sampler
        return SamplingParams(
            self.config.sampler.max_new_tokens,
            self.config.rollout.max_turns,
            source.temperature,
            source.top_p,
            source.top_k,
            self.config.rollout.truncated_turns,
        )

    @property
    def lora_scale(self) -> float:
        """The factor on the adapters' product, 0 in full fine-tuning."""
        return lora.scale(self.config.lora.rank, self.config.lora.alpha)

    def learner(self) -> Learner:
        """Returns what turns scored trajectories into updates."""
        section = self.config.grpo
        return Learner(
            section.to_dict(),
            self.batch_shape,
            self.mesh,
            self.make_update(),
            update.make_scorer(
                self.policy.config,
                unroll=jax.default_backend() == "cpu",
                mesh=self.mesh,
                **self._distribution,
            ),
            self.config.batch.prompts,
            self.config.sampler.max_new_tokens * self.config.rollout.max_turns,
            self.config.seed,
            self.lora_scale,
            self.config.model.dtype,
        )

    @property
    def _distribution(self) -> dict[str, Any]:
        section = self.config.sampler
        return {
            "temperature": section.temperature,
            "top_p": section.top_p,
            "top_k": section.top_k,
            "limit": self.policy.vocabulary,
        }

    def make_update(self) -> Any:
        """Returns the jitted update of the config; it leaves the state where it lies."""
        loss = grpo.LossSettings.of(self.config.grpo)
        if self.config.grpo.kl_in_reward:
            loss = dataclasses.replace(loss, kl_weight=0.0)
        return update.make_update(
            self.policy.config,
            self.state_builder.optimizer,
            loss,
            term=custom.loss_term(self.config.grpo.loss),
            remat=self.config.model.remat,
            unroll=jax.default_backend() == "cpu",
            lora_scale=self.lora_scale,
            mesh=self.mesh,
            **self._distribution,
            shardings=jax.tree.map(lambda leaf: leaf.sharding, self.state_builder.abstract_state),
        )

    @functools.cached_property
    def rewrites_history(self) -> bool:
        """Whether the chat template may make a new sequence of each turn."""
        chats = any(task.prompt is None for task in self.train_tasks)
        several = chats and self.config.rollout.max_turns > 1
        return several and bool(chat.instability(self.policy.tokenizer))

    @property
    def batch_shape(self) -> dict[str, Any]:
        """What `batching.make_batch` takes beside the trajectories."""
        section, params = self.config.batch, self.sampling_params()
        samples = -(-section.prompts * section.group_size // self.config.grpo.minibatches)
        own_temperatures = any(task.temperature for task in self.train_tasks)
        sampled = section.group_size * params.max_new_tokens * params.max_turns
        return {
            "rows": samples * params.max_turns if self.rewrites_history else samples,
            "max_length": self.config.rollout.max_length,
            "pack_tokens": section.pack_tokens,
            "pack_scored": batching.most_scored(
                section.pack_tokens, prompt=self.shortest_prompt, sampled=sampled
            ),
            "pack_rows": section.pack_rows * sharding.row_multiple(self.mesh),
            "mask_truncated": self.config.grpo.mask_truncated
            or self.config.rollout.truncated_turns == "mask",
            "temperature": self.config.sampler.temperature * own_temperatures,
        }

    def set_weights(self, state: TrainState, *, keep: bool = False) -> None:
        """Hands the state's weights to the sampler, with `keep` in buffers that do not go with the state's.

        The sampler's weights of before are freed first.
        """
        self.rollout.engine.set_params(None)
        with jax.transfer_guard(GUARD):
            weights = self.sampler_weights(state, self.lora_scale).run()
            weights = jax.tree.map(jnp.copy, weights) if keep else weights
        self.rollout.engine.set_params(weights)
        self.rollout.policy_version = int(jax.device_get(state.step))

    def sampler_weights(self, state: TrainState, lora_scale: float = 1.0) -> Program:
        """Returns the call that makes the sampler's weights of a state, or of its shapes."""
        params, adapters = update.weights(state, lora_scale)
        return Program(_sampler_params, (self.policy.config, params, adapters), {"mesh": self.mesh})

    @contextlib.contextmanager
    def compiling(
        self, learner: Learner, stream: tasks.TaskStream, recorder: metrics.Recorder
    ) -> Iterator[None]:
        """Compiles what the next step calls while the caller reads weights; says how many programs and how long."""
        began_s = time.monotonic()
        with recorder.time("startup", in_step=False), compiling(self._programs(learner, stream)):
            yield
        found = self.compilations.take()
        recorder.say(
            f"compiled {found['compile/programs']:.0f} programs in {time.monotonic() - began_s:.1f} s,"
            f" {found['compile/cached']:.0f} of them from the cache"
        )

    def _programs(self, learner: Learner, stream: tasks.TaskStream) -> Iterator[Program]:
        yield from learner.programs(self.state_builder.abstract_state)
        weights = self.sampler_weights(self.state_builder.abstract_state).abstract_output()
        ahead = stream.upcoming(self.config.batch.prompts)
        tokenizer, tools = self.policy.tokenizer, self.environments.tools or None
        prompts = chat.prompts(tokenizer, ahead, tools=tools)
        params = self.sampling_params()
        filtered = params.filtered
        yield from self.rollout.engine.programs(
            weights, max(map(len, prompts)), params.max_new_tokens, filtered=filtered
        )

    def sampling(self, stream: tasks.TaskStream) -> Prefetch:
        """Returns what samples the training batches of the stream."""

        def sample(draws: list[tuple[int, Task]]) -> list[Trajectory]:
            size, params = self.config.batch.group_size, self.sampling_params()
            return self.rollout(draws, size, params, on_finish=self.scorer.submit)

        def release() -> None:
            self.rollout.engine.set_params(None)

        prompts = self.config.batch.prompts
        return Prefetch(stream, prompts, self.set_weights, sample, release, **self.config.overlap)

    def counts(self) -> dict[str, float]:
        """Returns metrics of what happened since the last call: programs compiled, and waiting conversations that gave
        up their cache rows."""
        metrics = self.compilations.take()
        if self.config.environment:
            counters = self.rollout.engine.counters
            metrics["throughput/evicted_rows"] = float(counters.evicted_rows)
            counters.evicted_rows = 0
            metrics["environment/bystanders"] = float(self.environments.bystanders)
        metrics["evaluator/bystanders"] = float(self.scorer.bystanders)
        return metrics

    def heldout_due(self, step: int) -> bool:
        """Whether the held-out tasks are evaluated after this step: at the start, the end, and every so often."""
        every = self.config.eval.every
        on = every > 0 and (step % every == 0 or step == self.config.steps)
        return bool(self.heldout) and on

    def heldout_missing(self, step: int, lines: Sequence[Mapping[str, Any]]) -> bool:
        """Whether this run evaluates held-out tasks and has not done so after this step."""
        at_step = [name for line in lines if line["step"] == step for name in line]
        evaluated = any(name.startswith("eval/") for name in at_step)
        return bool(self.heldout) and self.config.eval.every > 0 and not evaluated

    def stop_reason(self, lines: Sequence[Mapping[str, Any]]) -> str:
        """Returns why the run that has these metrics should end early, "" where it should not."""
        section, metric = self.config.eval, self.config.checkpoint.best_metric
        return alarms.stop_reason(
            lines, metric=metric, patience=section.patience, dead_steps=section.dead_steps
        )

    def evaluate(
        self, *, samples: int = 0, tasks_at_most: int = 0
    ) -> tuple[dict[str, float], dict[str, list[Trajectory]]]:
        """Evaluates the sampler's weights; returns the metrics of all held-out sets and each one's trajectories.

        `samples` a task and `tasks_at_most` a set are the config's and all where they are 0.
        """
        section = self.config.eval
        metrics: dict[str, float] = {}
        trajectories: dict[str, list[Trajectory]] = {}
        for name, found in self.heldout.items():
            measured, trajectories[name] = evaluate(
                name,
                found[: tasks_at_most or None],
                samples or section.samples,
                self.sampling_params(heldout=True),
                self.rollout,
                self.heldout_scorer,
                pass_k=section.pass_k,
                pass_reward=section.pass_reward,
            )
            metrics |= measured
        best = self.config.checkpoint.best_metric
        if self.heldout and best not in metrics:
            log.warning(
                "checkpoint.best_metric=%r: this evaluation has no such metric, only %s",
                best,
                ", ".join(metrics),
            )
        return metrics, trajectories

    def binding(self, stream: tasks.TaskStream, accepted: Sequence[str]) -> Binding:
        """Returns the run's tie to its workdir; UserError where its inputs have changed and that is not accepted."""
        named = {set_field(name): found for name, found in self.heldout.items()}
        found = fingerprints(self.config, stream, named)
        primary = jax.process_index() == 0
        return Binding(self.workdir, self.given, found, accepted=accepted, primary=primary)

    def recorder(self, resume_step: int) -> metrics.Recorder:
        """Returns the recorder of the run's workdir, which keeps what it has up to a step to go on from."""
        section = self.config.logging.to_dict()
        fields = configs.flatten(self.config)
        primary = jax.process_index() == 0
        settings = {name: section.pop(name) for name in ("project", "name")}
        loggers = (
            open_loggers(section.pop("to"), self.workdir, fields, **settings) if primary else None
        )
        return metrics.Recorder(
            self.workdir,
            steps=self.config.steps,
            # Without a checkpoint all that lies there is another run's.
            resume_step=resume_step or -1,
            primary=primary,
            alarms=functools.partial(alarms.find, **self.config.alarms),
            config=fields,
            loggers=loggers,
            **section,
        )

    def checkpoints(self, *, read_only: bool = False) -> Checkpoints:
        """Returns the checkpoints of the run's workdir."""
        section = self.config
        # The reference of adapters is written: those of lora.path may be others by the time of a resume.
        still = section.grpo.kl_refresh_steps == 0 and not section.lora.rank
        fixed = ["frozen"] + ["reference"] * still
        return Checkpoints(
            self.workdir / "checkpoints",
            read_only=read_only,
            fixed=fixed,
            **self.config.checkpoint,
        )


_sampler_params = jax.jit(device.sampler_params, static_argnames=("config", "mesh"))
