"""Model, parameters and tokenizer as one thing, for jobs, notebooks and tests."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from rftjax import types
from rftjax.config import ranges
from rftjax.devices import sharding
from rftjax.errors import UserError
from rftjax.learning import update
from rftjax.models import attention as attend
from rftjax.models import decoder, logical_axes
from rftjax.models.config import Config
from rftjax.sampler import device
from rftjax.sampler.conversation import SampledTurn
from rftjax.sampler.engine import Engine, noise_key
from rftjax.text import chat, template, tokenizer
from rftjax.types import Message, Pack, Params, SamplingParams, Task, Trajectory
from rftjax.weights import hf

_PROMPT_RULE = (
    "must be a text, a list of messages ({'role': ..., 'content': ...}) or a list of token ids"
)
# The config's fields whose rules arguments follow.
_FIELDS = {
    "max_new_tokens": ("sampler.max_new_tokens", int),
    "samples": ("eval.samples", int),
    "temperature": ("eval.temperature", float),
    "top_p": ("eval.top_p", float),
    "top_k": ("eval.top_k", int),
    "seed": ("seed", int),
    "slots": ("sampler.slots", int),
}
_SCORED = {"temperature": ("sampler.temperature", float)}


class Policy:
    """A language model with its parameters (nested dict) and, once asked for, its tokenizer.

    Where `params` is a function of `masters` it is called once they are asked for; setting `closed` lets it give up.
    `masters` parameters are float32, others have the dtype in which the forward pass reads them.
    """

    def __init__(
        self,
        path: str,
        config: Config,
        params: Params,
        fields: dict[str, Any],
        mesh: Mesh | None = None,
        closed: threading.Event | None = None,
        masters: bool = True,
        chat_settings: Mapping[str, str] | None = None,
    ) -> None:
        self._chat_settings = dict(chat_settings or {})
        self.path, self.config, self.fields, self.mesh = path, config, fields, mesh
        self._params, self.masters = params, masters
        self._closed = closed or threading.Event()
        self._ahead: concurrent.futures.Future[Params] | None = None

    @functools.cached_property
    def params(self) -> Params:
        """The parameters, as masters where the policy keeps these."""
        if self._ahead is not None:
            return self._ahead.result()
        return self._read(self.masters)

    def take(self, *, masters: bool) -> Params:
        """Returns the parameters to an owner who may donate them: one that reads them lazily keeps none."""
        if self._ahead is None and "params" not in self.__dict__:
            return self._read(masters)
        params = self.params if masters else decoder.cast(self.params, self.config.dtype)
        del self.__dict__["params"]
        self._ahead = None
        return params

    def _read(self, masters: bool) -> Params:
        if callable(self._params):
            return self._params(masters)
        return self._params if masters else decoder.cast(self._params, self.config.dtype)

    def read_ahead(self) -> None:
        """Begins to read the parameters while the caller does something else."""

        def read() -> Params:
            # Reading acquires the GIL thousands of times: let other threads hand it over sooner.
            before_s = sys.getswitchinterval()
            sys.setswitchinterval(1e-4)
            try:
                return self._read(self.masters)
            finally:
                sys.setswitchinterval(before_s)

        reader = concurrent.futures.ThreadPoolExecutor(1)
        self._ahead = reader.submit(read)
        reader.shutdown(wait=False)

    def close(self) -> None:
        """Ends what `read_ahead` began."""
        self._closed.set()

    @property
    def abstract_params(self) -> Params:
        """The abstract masters: shapes, dtypes and shardings without data."""
        shapes = hf.abstract_params(self.config)
        if self.mesh is None:
            return shapes
        return sharding.abstract_tree(self.mesh, logical_axes(self.config), shapes)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model's path; raises ValueError where it has none."""
        return template.settle(tokenizer.load(self.path), **self._chat_settings)

    @functools.cached_property
    def vocabulary(self) -> int:
        """Number of ids that the tokenizer knows; the model's rows beyond them are padding and never sampled."""
        return min(tokenizer.vocabulary(self.tokenizer), self.config.vocab)

    def stop_tokens(self, extra: Sequence[str | int] = ()) -> tuple[int, ...]:
        """Returns the ids that end a turn: the model's own and `extra` ones, given as ids or as texts of one token.

        Texts of several tokens are `stop_strings`.
        """
        tokenizer.check_template(self.tokenizer, self.config.vocab, self.path)
        stops = list(tokenizer.stop_tokens(self.path, self.tokenizer))
        for stop in extra:
            ids = [stop] if isinstance(stop, int) else chat.encode(self.tokenizer, stop)
            if isinstance(stop, int) and not 0 <= stop < self.vocabulary:
                raise UserError(
                    f"sampler.stop: {stop!r} is none of the {self.vocabulary} tokens; give an id below that or a text"
                )
            # An unknown token stands for every text that the tokenizer does not know.
            if len(ids) == 1 and ids[0] != getattr(self.tokenizer, "unk_token_id", None):
                stops.append(ids[0])
        if not stops:
            raise UserError(
                f"model.path={self.path}: generation config, model config, tokenizer and chat template name no stop"
                " token; name one in sampler.stop"
            )
        return tuple(dict.fromkeys(int(stop) for stop in stops))

    def stop_strings(self, extra: Sequence[str | int] = ()) -> tuple[str, ...]:
        """Returns the texts among `extra`: a turn ends with the token that completes one, wherever it begins."""
        texts = [stop for stop in extra if isinstance(stop, str)]
        for text in texts:
            unknown = getattr(self.tokenizer, "unk_token_id", None)
            ids = chat.encode(self.tokenizer, text)
            if not ids or unknown in ids:
                raise UserError(
                    f"sampler.stop: the tokenizer does not know all of {text!r}, which no turn would contain;"
                    " give a text that it can write"
                )
        return tuple(dict.fromkeys(texts))

    def logits(self, tokens: Any) -> jax.Array:
        """Returns float32 logits (B, T, V) of (B, T) token ids, without padding."""
        return _logits(self._portable, self.params, self._rows_of_ids(tokens))

    def logprobs(
        self, tokens: Any, temperature: float = 1.0, *, params: Params | None = None
    ) -> jax.Array:
        """Returns (B, T) log-probabilities: `[:, t]` scores token t given those before it, `[:, 0]` is 0.

        `params` are others of the same shapes than the policy's own: the result is differentiable in them.
        """
        tokens_BT = self._rows_of_ids(tokens)
        temperature = ranges.checked({"temperature": temperature}, _SCORED)["temperature"]
        params = self.params if params is None else params
        return _logprobs(self._portable, params, tokens_BT, temperature)

    def _rows_of_ids(self, tokens: Any) -> jax.Array:
        """Returns (B, T) ids, each with a row in the embedding; traced ones are taken as they are."""
        if not isinstance(tokens, Tracer):
            try:
                found = np.asarray(tokens)
            except ValueError:  # rows of different lengths
                found = np.empty(0)
            if found.ndim != 2 or not found.size or found.dtype.kind not in "iu":
                raise UserError(
                    "tokens must be (B, T) token ids: a list of ids a row, all of one length (pad shorter rows: what"
                    f" stands behind a token does not change its score); found shape {found.shape}, {found.dtype}"
                )
            wrong = np.unique(found[(found < 0) | (found >= self.config.vocab)])
            tokenizer.check_ids(wrong.tolist(), self.config.vocab, "tokens")
        return jnp.asarray(tokens, jnp.int32)

    @property
    def _portable(self) -> Config:
        """The config with an attention for any number of rows, wherever they lie."""
        return dataclasses.replace(self.config, attention="blocked")

    def sample(
        self,
        prompts: Sequence[str] | Sequence[Sequence[Message]] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 256,
        samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: str | int | Sequence[str | int] | None = None,
        slots: int = 0,
        first_draw: int = 0,
    ) -> list[Trajectory]:
        """Returns `samples` one-turn trajectories a prompt, in order.

        A prompt is a list of messages, a text (which no chat template goes around) or a list of token ids; one alone
        may stand in place of the list. Ids need no tokenizer when `stop` is given (a sequence of ids, possibly empty).
        `stop` may hold texts too, or be one: a turn ends with the token that completes it.
        Prompt i is draw `first_draw` + i; its sample j depends on nothing but (seed, draw, j), the weights and the
        settings.
        """
        given = {"max_new_tokens": max_new_tokens, "samples": samples, "seed": seed}
        given |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        ranges.checked(given | ({"slots": slots} if slots else {}), _FIELDS)
        stop = None if stop is None else _stops(stop)
        tasks, tokens = [], []
        for index, prompt in enumerate(_several(prompts)):
            task, ids = self._read_prompt(prompt, index)
            tasks.append(task)
            tokens.append(ids)
        ids = [one for one in stop or () if isinstance(one, int)]
        plain = stop is not None and len(ids) == len(stop)
        stops = tuple(ids) if plain else self.stop_tokens(stop or ())
        tokenizer.check_ids(stops, self.config.vocab, "stop")
        words = self.tokenizer if tokenizer.exists(self.path) else None
        strings = self.stop_strings(stop or ())
        limit = 0 if plain else self.vocabulary
        engine = Engine(
            self.config,
            slots=slots or min(64, len(tokens) * samples),
            max_length=max(map(len, tokens), default=1) + max_new_tokens,
            stops=stops,
            find_stop=chat.StopStrings(self.tokenizer, strings) if strings else None,
            seed=seed,
            limit=limit,
            mesh=self.mesh,
        )
        engine.set_params(device.sampler_params(self.config, self.params, mesh=self.mesh))
        params = SamplingParams(max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
        for index, ids in enumerate(tokens):
            for sample in range(samples):
                noise = noise_key(0, first_draw + index, sample)
                engine.open((index, sample), ids, max_new_tokens, noise, params)
        results: dict[tuple[int, int], Trajectory] = {}
        while engine.busy:
            for turn in engine.step():
                engine.close(turn.key)
                index, sample = turn.key
                text = (
                    chat.decode(words, turn.tokens, stop_tokens=stops, stop_strings=strings)
                    if words is not None
                    else None
                )
                results[turn.key] = self._answered(
                    tasks[index], first_draw + index, sample, tokens[index], turn, text
                )
        return [results[key] for key in sorted(results)]

    def _answered(
        self,
        task: Task,
        draw: int,
        sample: int,
        prompt: list[int],
        turn: SampledTurn,
        text: str | None,
    ) -> Trajectory:
        """Returns a trajectory of one turn, with the message of its text where there is one."""
        sequence = types.Sequence()
        sequence.extend(prompt)
        sequence.extend(turn.tokens, turn.logprobs, 0)
        messages = list(task.messages)
        if text is not None:
            before = chat.show(self.tokenizer, prompt)
            if task.messages or task.prompt is not None:
                before = chat.prompt_text(self.tokenizer, task)
            marks = {types.THINKS: True} if types.begins_thinking(before) else {}
            messages.append({"role": "assistant", "content": text} | marks)
        return Trajectory(
            task,
            draw,
            sample,
            messages,
            [sequence],
            turn_rewards=[0.0],
            finish_reason="stop" if turn.stopped else "length",
            sampled_messages=[len(messages) - 1] if messages else [],
        )

    def _read_prompt(self, prompt: Any, index: int) -> tuple[Task, list[int]]:
        """Returns a task (without messages where a text or ids were given) and the ids of one prompt."""
        if isinstance(prompt, str):
            task = Task(str(index), [], prompt=prompt)
            ids = chat.encode_plain(self.tokenizer, prompt)
        elif not isinstance(prompt, Iterable):
            raise UserError(f"prompt {index}: {_PROMPT_RULE}")
        elif all(isinstance(message, Mapping) for message in prompt):
            task = Task(str(index), [dict(message) for message in prompt])
            ids = (
                chat.render(self.tokenizer, task.messages, generation_prompt=True) if prompt else []
            )
        elif all(isinstance(token, int | np.integer) for token in prompt):
            task, ids = Task(str(index), []), [int(token) for token in prompt]
        else:
            raise UserError(f"prompt {index}: {_PROMPT_RULE}")
        if not ids:
            raise UserError(f"prompt {index} is empty; give at least one token")
        words = self.tokenizer if not isinstance(prompt, str) and task.messages else None
        tokenizer.check_ids(ids, self.config.vocab, f"prompt {index}", words)
        return task, ids

    def export(self, out: str | Path, *, dtype: str = "float32") -> Path:
        """Writes a Hugging Face directory: weights, configs and the tokenizer where there is one."""
        words = self.tokenizer if tokenizer.exists(self.path) else None
        return hf.save(
            out,
            self.config,
            self.params,
            self.fields,
            tokenizer=words,
            generation=tokenizer.generation(self.path, words),
            dtype=dtype,
        )


def load(
    path: str,
    *,
    dtype: str = "float32",
    attention: str = "blocked",
    mesh: Mesh | None = None,
    init: str = "pretrained",
    seed: int = 0,
    lazy: bool = False,
    masters: bool = True,
    chat_settings: Mapping[str, str] | None = None,
) -> Policy:
    """Loads a Hugging Face directory, a hub name or a GGUF file; `dtype` is what the model computes in.

    `attention` is one of `models.attention.FORMS` that the devices have. With `lazy` the parameters are read once they
    are asked for; without `masters` they are kept in the dtype in which the forward pass reads them. `chat_settings`
    are those of `text.template.settle`.
    """
    named = {"model.dtype": dtype, "model.attention": attention}
    named |= {f"chat.{name}": value for name, value in (chat_settings or {}).items()}
    for field, rule in ranges.problems(named):
        raise UserError(f"{field}={named[field]!r}: {rule}")
    attend.check_devices(attention)
    closed = threading.Event()

    def place(masters: bool, at: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, Any]:
        if closed.is_set():
            raise concurrent.futures.CancelledError
        wanted = "float32" if masters else decoder.reading_dtype(at[-1], dtype)
        if mesh is None:
            return wanted, None
        return wanted, sharding.of_parameter(mesh, logical_axes(model.config), at, shape)

    def read(masters: bool) -> Params:
        return model.read(functools.partial(place, masters))

    model = hf.open_model(path, dtype=dtype, init=init, seed=seed)
    config = dataclasses.replace(model.config, attention=attention)
    params = read if lazy else read(masters)
    return Policy(path, config, params, model.fields, mesh, closed, masters, chat_settings)


def _several(prompts: Any) -> list[Any]:
    """Returns a list of prompts where one text, one conversation or one list of ids was given."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise UserError(f"prompts={prompts!r}: each {_PROMPT_RULE}")
    found = list(prompts)
    parts = (Mapping, int, np.integer)
    return [found] if found and all(isinstance(part, parts) for part in found) else found


def _stops(stop: Any) -> list[str | int]:
    """Returns the texts and ids that end a turn, also where one stands alone."""
    found = list(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else [stop]
    for one in found:
        if isinstance(one, bool) or not isinstance(one, str | int | np.integer) or one == "":
            raise UserError(f"stop={stop!r}: must hold texts and token ids only")
    return [one if isinstance(one, str) else int(one) for one in found]


def _rows(tokens_BT: jax.Array) -> Pack:
    """Returns unpacked rows, each scored at every position but its first."""
    B, T = tokens_BT.shape
    ones_BT = jnp.ones((B, T), jnp.int32)
    steps_BT = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
    places_BT = steps_BT + T * jnp.arange(B)[:, None]
    return Pack(
        tokens_BT,
        steps_BT,
        ones_BT,
        ones_BT,
        steps_BT[:, :-1],
        tokens_BT[:, 1:],
        places_BT[:, 1:],
    )


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: Config, params: Params, tokens_BT: jax.Array) -> jax.Array:
    pack = _rows(tokens_BT)
    x_BTD = decoder.hidden(
        config, params, tokens_BT, pack.positions_RX, pack.groups_RX, pack.segments_RX
    )
    flat = decoder.logits(config, params, x_BTD.reshape(-1, config.width))
    return flat.reshape(*tokens_BT.shape, config.vocab)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logprobs(
    config: Config, params: Params, tokens_BT: jax.Array, temperature: float
) -> jax.Array:
    if tokens_BT.shape[1] < 2:
        return jnp.zeros(tokens_BT.shape)
    scored, _ = update.logprobs(config, params, None, _rows(tokens_BT), temperature=temperature)
    return jnp.pad(scored, ((0, 0), (1, 0)))
