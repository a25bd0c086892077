"""`--mode=serve` and `--mode=chat`: a checkpoint or a model behind an engine that serves requests."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rftjax import policy
from rftjax.config.fields import assign, expand_value, flatten
from rftjax.devices import sharding
from rftjax.environments import Environments
from rftjax.errors import UserError
from rftjax.models import logical_axes
from rftjax.run import checks, evaluating
from rftjax.run.binding import stored_config
from rftjax.run.build import complete_config, lora_scale, open_model
from rftjax.run.checkpoint import Checkpoints
from rftjax.run.results import choose_step
from rftjax.run.sampling import SamplerWeights, make_rollout
from rftjax.run.start import StateBuilder
from rftjax.serving.service import Service
from rftjax.serving.terminal import talk
from rftjax.serving.turns import Model
from rftjax.types import SamplingParams, TrainState

log = logging.getLogger(__name__)

KEY = "RFTJAX_API_KEY"  # the environment variable with the bearer token
EXTRA = "it needs the extra `serve` (pip install 'rftjax[serve]', or ./scripts/setup.sh serve)"


def served_config(given: ConfigDict, flags: Mapping[str, Any], workdir: Path | None) -> ConfigDict:
    """Returns the config to serve: the workdir's own with the flags on top, else the given one, of which the model
    alone must be there."""
    if workdir is not None:
        evaluating.check_run(workdir)
        stored = stored_config(workdir)
        assert stored is not None
        with stored.unlocked():
            for field, value in flatten(flags).items():
                assign(stored, field, expand_value(field, value))
        given = stored
    config = complete_config(given, needs=("model.path",))
    with config.unlocked():
        config.grpo.routing_replay = False  # nothing is trained on what is served
    return config


@contextlib.contextmanager
def opened(
    config: ConfigDict, workdir: Path | None, wanted: str = ""
) -> Iterator[tuple[Service, Model]]:
    """Opens an engine with the weights of a checkpoint of `workdir` ("": the best, else the last), or of the model."""
    mesh = sharding.make_mesh(**config.mesh)
    with contextlib.ExitStack() as closing:
        model = open_model(config, mesh)
        closing.callback(model.close)
        config = checks.fit_context(config, model)
        state, step = _state(config, model, mesh, workdir, wanted)
        rollout = make_rollout(config, model, Environments(""))
        SamplerWeights(rollout, model.config, mesh, lora_scale(config)).load(state)
        del state
        service = Service(rollout.engine)
        closing.callback(service.stop)
        name = Path(config.model.path).stem if workdir is None else f"{workdir.name}-step-{step}"
        stops = model.stop_tokens(config.sampler.stop)
        yield (
            service,
            Model(name, model.tokenizer, stops, rollout.stop_strings, config.rollout.max_length),
        )


def _state(
    config: ConfigDict, model: policy.Policy, mesh: Mesh, workdir: Path | None, wanted: str
) -> tuple[TrainState, int]:
    """Returns a state of weights alone, and its step."""
    if workdir is None:
        return StateBuilder(config, model, mesh).initial_policy(), 0
    metric = config.checkpoint.best_metric
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True, best_metric=metric)
    try:
        step = choose_step(checkpoints, wanted)
        trainable, frozen = checkpoints.restore_params(step)
    finally:
        checkpoints.close()
    axes = logical_axes(model.config)
    if config.lora.rank and not frozen:
        frozen = model.take(masters=False)
    parts = [sharding.shard_tree(mesh, axes, part) for part in (trainable, frozen)]
    return TrainState(jax.numpy.int32(step), parts[0], parts[1], ()), step


def sampling(config: ConfigDict) -> SamplingParams:
    """Returns what holds where a request says nothing: the sampler's settings, and as many turns as fit."""
    section = config.sampler
    return SamplingParams(
        section.max_new_tokens, 2**31 - 1, section.temperature, section.top_p, section.top_k
    )


def serve(config: ConfigDict, workdir: Path | None, wanted: str = "") -> None:
    """Serves until a signal ends it; says where, and which key opens it."""
    try:
        from rftjax.serving.app import App
        from rftjax.serving.server import address, listen
        from rftjax.serving.server import serve as serve_on
        from rftjax.serving.tracing import Tracing
    except ModuleNotFoundError as error:
        raise UserError(f"--mode=serve: {error}; {EXTRA}") from error
    section = config.serving
    found = listen(section.host, section.port)
    with found, opened(config, workdir, wanted) as (service, model):
        given = os.environ.get(KEY, "")
        key = given or secrets.token_urlsafe(24)
        app = App(
            service,
            model,
            sampling(config),
            Tracing(),
            key=key,
            max_bytes=section.max_request_bytes,
            max_waiting=section.max_waiting,
        )
        print(f"serving {model.name} at {address(found)}/v1", flush=True)
        print(f"key: {'that of $' + KEY if given else key}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            serve_on(app.routes(), found)


def chat(config: ConfigDict, workdir: Path | None, wanted: str = "") -> None:
    """Talks to the model in the terminal."""
    with (
        opened(config, workdir, wanted) as (service, model),
        contextlib.suppress(KeyboardInterrupt),
    ):
        talk(service, model, sampling(config), seed=config.seed)
