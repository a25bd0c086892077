"""The host loop over conversations: environments answer while the device samples others.

Training ids are the prompt's, the sampled and the environment's ids, token for token: nothing sampled is ever encoded
again from text. Where a chat template rewrites history, the conversation goes on in a new sequence.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from rftjax import chat, types
from rftjax.environments import Environments
from rftjax.sampler.engine import Engine, SampledTurn, Sampling
from rftjax.types import Message, Task, Trajectory, Turn

TRAIN = 0  # the noise stream of training; held-out sets have the numbers from 1 on

Finish = Callable[[Trajectory], None]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How turns are sampled: tokens a turn, turns, and the policy's temperature (0: greedy), top_p and top_k."""

    max_new_tokens: int
    max_turns: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclasses.dataclass
class _Episode:
    trajectory: Trajectory
    name: str
    future: concurrent.futures.Future[Any]
    started: bool = False  # the environment's first messages are in
    open: bool = False  # the engine holds a conversation
    last_token: int = -1

    @property
    def key(self) -> tuple[int, int]:
        return self.trajectory.draw, self.trajectory.sample


class Rollout:
    """Samples groups of conversations with one engine; `policy_version` is stamped on every sampled token."""

    def __init__(
        self, engine: Engine, tokenizer: Any, environments: Environments, *, seed: int = 0
    ) -> None:
        self.engine, self.tokenizer, self.environments = engine, tokenizer, environments
        self.seed, self.policy_version = seed, 0

    def __call__(
        self,
        draws: Iterable[tuple[int, Task]],
        group_size: int,
        limits: Limits,
        *,
        stream: int = TRAIN,
        on_finish: Finish = lambda trajectory: None,
    ) -> list[Trajectory]:
        """Returns `group_size` trajectories a draw, in order; `on_finish` gets each one as soon as it ends."""
        waiting: dict[tuple[int, int], _Episode] = {}
        sampling: dict[tuple[int, int], _Episode] = {}
        finished: list[Trajectory] = []

        def settle(episode: _Episode, reason: str) -> None:
            if reason == "sample":
                sampling[episode.key] = episode
            elif reason == "environment":
                waiting[episode.key] = episode
            else:
                self._close(episode, reason)
                finished.append(episode.trajectory)
                on_finish(episode.trajectory)

        for draw, task in draws:
            for sample in range(group_size):
                episode = self._start(draw, task, sample, stream)
                waiting[episode.key] = episode
        while waiting or sampling:
            for episode in [episode for episode in waiting.values() if episode.future.done()]:
                del waiting[episode.key]
                settle(episode, self._answered(episode, limits, stream))
            dispatches = self.engine.counters.dispatches
            for turn in self.engine.step() if sampling else []:
                episode = sampling.pop(turn.key)
                settle(episode, self._sampled(episode, turn))
            if waiting and self.engine.counters.dispatches == dispatches:
                # Nothing to sample, or every row is held by a conversation that waits.
                futures = [episode.future for episode in waiting.values()]
                concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
        return sorted(finished, key=lambda trajectory: (trajectory.draw, trajectory.sample))

    def _start(self, draw: int, task: Task, sample: int, stream: int) -> _Episode:
        """Asks the environment for its first messages; the seed is the group's."""
        name = f"{stream}/{draw}/{sample}"
        seed = zlib.crc32(f"{self.seed}/{stream}/{draw}".encode())
        trajectory = Trajectory(task, draw, sample, [dict(message) for message in task.messages])
        return _Episode(trajectory, name, self.environments.start(name, task, seed))

    def _close(self, episode: _Episode, reason: str) -> None:
        episode.trajectory.finish_reason = reason
        self.environments.close_episode(episode.name)
        if episode.open:
            self.engine.close(episode.key)

    def _answered(self, episode: _Episode, limits: Limits, stream: int) -> str:
        """Takes what the environment said; returns "sample" or why the episode ends."""
        trajectory = episode.trajectory
        error = episode.future.exception()
        if error is not None:
            trajectory.error = str(error)
            return "error"
        if not episode.started:
            episode.started = True
            trajectory.messages += episode.future.result()
            return self._open(episode, self._prompt(trajectory), limits, stream)
        turn: Turn = episode.future.result()
        trajectory.turn_rewards[-1] += turn.reward
        history = list(trajectory.messages)
        trajectory.messages += turn.messages
        if turn.done:
            return "stop"
        if trajectory.turns >= limits.max_turns:
            return "turns"
        if not turn.messages:
            trajectory.error = "the environment neither answered nor ended the episode"
            return "error"
        return self._continue(episode, history, turn.messages, limits, stream)

    def _prompt(self, trajectory: Trajectory) -> list[int]:
        tools = self.environments.tools or None
        return chat.prompt(self.tokenizer, trajectory.task, trajectory.messages, tools=tools)

    def _open(self, episode: _Episode, prompt: list[int], limits: Limits, stream: int) -> str:
        """Starts a token sequence with a prompt."""
        room = self.engine.max_length - len(prompt)
        sequence = types.Sequence()
        sequence.extend(prompt)
        episode.trajectory.sequences.append(sequence)
        if room < 1:
            return "length"
        noise = (stream, episode.trajectory.draw, episode.trajectory.sample)
        own = episode.trajectory.task.temperature if stream == TRAIN else 0.0
        settings = Sampling(noise, own or limits.temperature, limits.top_p, limits.top_k)
        self.engine.open(episode.key, prompt, min(limits.max_new_tokens, room), settings)
        episode.open = True
        return "sample"

    def _continue(
        self,
        episode: _Episode,
        history: list[Message],
        messages: list[Message],
        limits: Limits,
        stream: int,
    ) -> str:
        """Appends the environment's messages to the sequence, or starts another where the template rewrites it."""
        sequence = episode.trajectory.sequences[-1]
        if episode.trajectory.task.prompt is not None:
            text = "\n".join(["", *(str(message["content"]) for message in messages), ""])
            tokens = list(self.tokenizer.encode(text, add_special_tokens=False))
        else:
            try:
                tokens = chat.continuation(
                    self.tokenizer,
                    history,
                    messages,
                    last_token=episode.last_token,
                    tools=self.environments.tools or None,
                )
            except chat.ChatTemplateError:
                self.engine.close(episode.key)
                episode.open = False
                return self._open(episode, self._prompt(episode.trajectory), limits, stream)
        room = self.engine.max_length - len(sequence.tokens) - len(tokens)
        if room < 1 or not tokens:
            return "length"
        sequence.extend(tokens)
        self.engine.extend(episode.key, tokens, min(limits.max_new_tokens, room))
        return "sample"

    def _sampled(self, episode: _Episode, turn: SampledTurn) -> str:
        """Takes a turn; returns "environment", or "length" where a token limit cut it."""
        trajectory = episode.trajectory
        trajectory.sequences[-1].extend(turn.tokens, turn.logprobs, self.policy_version)
        stops = tuple(self.engine.stops)
        content = chat.decode(self.tokenizer, turn.tokens, stop_tokens=stops)
        trajectory.messages.append({"role": "assistant", "content": content})
        trajectory.turn_rewards.append(0.0)
        if not turn.stopped:
            return "length"
        episode.last_token = turn.tokens[-1]
        episode.future = self.environments.step(episode.name, trajectory.messages)
        return "environment"
