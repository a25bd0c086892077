"""The host loop over conversations: environments answer while the device samples others.

Training ids are the prompt's, the sampled and the environment's ids, token for token: nothing sampled is ever encoded
again from text. Where a chat template rewrites history, the conversation goes on in a new sequence.

A call may end once some groups are complete. What was sampled of the others is carried into the next call: there each
conversation goes on with its tokens, their log-probabilities and the versions of the policies that sampled them, while
its keys and values are computed again by the weights of the day, and experts chosen again by its routers.

What a row or an environment says can be too long for the model, or nothing that it can be shown: that ends its own
sample, with finish reason length or error, and no other.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from rftjax import types
from rftjax.environments import Environments
from rftjax.groups import Carried, Finish, Groups, Lengths
from rftjax.sampler.engine import Engine, NoiseKey, SampledTurn, noise_key
from rftjax.text import chat
from rftjax.types import THINKS, Message, SamplingParams, Task, Trajectory, Turn
from rftjax.workers.pool import WorkerError

CARRIED = -(1 << 30)  # the rank of conversations that go on: they get slots before all others
TRAIN = 0  # the noise stream of training; held-out sets have the numbers from 1 on


class Sampling(Protocol):
    """What samples groups of a run: conversations with environments, or rollouts by agents."""

    engine: Engine
    tokenizer: Any
    policy_version: int
    stop_strings: tuple[str, ...]

    @property
    def bystanders(self) -> int:
        """Samples stopped by another one's fault so far; they are tried again."""
        ...

    def __call__(
        self,
        draws: Iterable[tuple[int, Task]],
        group_size: int,
        params: SamplingParams,
        *,
        stream: int = TRAIN,
        on_finish: Finish = lambda trajectory: None,
    ) -> list[Trajectory]:
        """Returns `group_size` trajectories a draw, in order; `on_finish` gets each one as soon as it ends."""
        ...


@dataclasses.dataclass
class _Episode:
    trajectory: Trajectory
    name: str
    future: concurrent.futures.Future[Any]
    started: bool = False  # the environment's first messages are in
    open: bool = False  # the engine holds a conversation
    last_token: int = -1  # the stop token of the last turn
    rank: int = 0  # the engine's
    carried: Carried | None = None
    kept: int = (
        0  # tokens of the turn under way that are in its sequence already, from earlier calls
    )
    turn: SampledTurn | None = None  # the last one
    text: str = ""  # that the last turn went on from, as the template rendered it
    tools: list[Any] = dataclasses.field(default_factory=list)  # the row's and the environment's
    reason: str = ""  # why it ended; then the environment is asked for its end state

    @property
    def key(self) -> tuple[int, int]:
        return self.trajectory.draw, self.trajectory.sample


class Rollout:
    """Samples groups of conversations with one engine; `policy_version` is stamped on every sampled token.

    Environments are open for as many conversations at once as the cache has rows. `stop_strings` are those that the
    engine finds.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        environments: Environments,
        *,
        seed: int = 0,
        stop_strings: tuple[str, ...] = (),
    ) -> None:
        self.engine, self.tokenizer, self.environments = engine, tokenizer, environments
        self.seed, self.policy_version, self.stop_strings = seed, 0, stop_strings
        self.carried: dict[tuple[int, int], Carried] = {}  # by draw and sample
        self._lengths = Lengths()
        # Of each group under way: what its first turns go on from.
        self._openings: dict[int, tuple[list[Message], str, list[int]]] = {}

    @property
    def bystanders(self) -> int:
        """Calls of environments stopped by another call's fault so far."""
        return self.environments.bystanders

    def __call__(
        self,
        draws: Iterable[tuple[int, Task]],
        group_size: int,
        params: SamplingParams,
        *,
        stream: int = TRAIN,
        on_finish: Finish = lambda trajectory: None,
        wanted: int = 0,
    ) -> list[Trajectory]:
        """Returns `group_size` trajectories a draw, in order; `on_finish` gets each one as soon as it ends.

        With `wanted` it returns those of the first so many groups that are complete, of which `on_finish` gets whole
        groups. What was sampled of the others is `carried`: the next such call goes on with it where it gets their
        draws again. There is no environment then.
        """
        self._openings.clear()
        self.engine.recording = stream == TRAIN and self.engine.config.routing.recorded
        assert not (wanted and self.environments.active), "an environment's state is not carried"
        carried, self.carried = (self.carried, {}) if wanted else ({}, self.carried)
        groups = Groups(group_size, wanted, on_finish)
        waiting: dict[tuple[int, int], _Episode] = {}
        sampling: dict[tuple[int, int], _Episode] = {}

        def settle(episode: _Episode, reason: str) -> None:
            if reason not in ("sample", "environment") and not episode.reason:
                reason = self._end(episode, reason)
            if reason == "sample":
                sampling[episode.key] = episode
            elif reason == "environment":
                waiting[episode.key] = episode
            else:
                groups.end(episode)

        def start(draw: int, task: Task, sample: int) -> _Episode:
            episode = self._start(draw, task, sample, stream)
            episode.carried = carried.get(episode.key)
            # What is complete first must not depend on what no checkpoint holds.
            episode.rank = 0 if wanted else self._lengths.rank(stream, task)
            return groups.begin(episode)

        episodes = (start(draw, task, one) for draw, task in draws for one in range(group_size))
        most = self.engine.rows if self.environments.active else math.inf
        while not groups.enough and (
            self._begin(episodes, waiting, most - len(sampling)) or waiting or sampling
        ):
            # An answer may lead to the next one at once, and the last to a group that is complete.
            while done := [episode for episode in waiting.values() if episode.future.done()]:
                for episode in done:
                    del waiting[episode.key]
                    settle(episode, self._answered(episode, params, stream))
            if groups.enough:
                break
            dispatches = self.engine.counters.dispatches
            for turn in self.engine.step() if sampling else []:
                episode = sampling.pop(turn.key)
                settle(episode, self._sampled(episode, turn, params))
            if waiting and self.engine.counters.dispatches == dispatches:
                # Nothing to sample, or every row is held by a conversation that waits.
                self._begin(episodes, waiting, most - len(sampling))
                futures = [episode.future for episode in waiting.values()]
                concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
        if wanted:
            self._carry(groups.rest())
        trajectories = groups.trajectories()
        self._lengths.take(stream, trajectories)
        return trajectories

    def _carry(self, episodes: Iterable[_Episode]) -> None:
        """Closes conversations and keeps what was sampled of them."""
        turns = {turn.key: turn for turn in self.engine.settle()}
        for episode in episodes:
            self.environments.close_episode(episode.name)
            turn = episode.turn or turns.get(episode.key)
            if turn is None and episode.open:
                turn = SampledTurn(episode.key, *self.engine.sampled(episode.key), False)
            if episode.open:
                self.engine.close(episode.key)
            if turn is None or not turn.tokens:
                continue  # the next call begins it as this one did
            known = episode.trajectory.sequences[0].policy_version
            versions = [version for version in known if version >= 0]
            versions += [self.policy_version] * (len(turn.tokens) - len(versions))
            ended = bool(episode.turn) or episode.key in turns
            self.carried[episode.key] = Carried(
                *episode.key,
                turn.tokens,
                turn.logprobs,
                versions,
                ended,
                turn.stopped,
                turn.stop_token,
                turn.experts,
            )

    def _begin(
        self,
        episodes: Iterator[_Episode],
        waiting: dict[tuple[int, int], _Episode],
        most: float,
    ) -> bool:
        """Starts further episodes, in their order, until `most` wait; says whether it started any."""
        before = len(waiting)
        while len(waiting) < most and (episode := next(episodes, None)):
            waiting[episode.key] = episode
        return len(waiting) > before

    def _start(self, draw: int, task: Task, sample: int, stream: int) -> _Episode:
        """Asks the environment for its first messages; the seed is the group's."""
        name = f"{stream}/{draw}/{sample}"
        seed = zlib.crc32(f"{self.seed}/{stream}/{draw}".encode())
        trajectory = Trajectory(task, draw, sample, [dict(message) for message in task.messages])
        return _Episode(trajectory, name, self.environments.start(name, task, seed))

    def _said(self, trajectory: Trajectory, messages: list[Message]) -> None:
        """Appends what the environment said, cut where it is longer than any text that fits."""
        most = chat.CHARACTERS * self.engine.max_length
        for message in messages:
            limit = self.environments.max_message_tokens
            content = chat.shorten(self.tokenizer, message["content"], limit)
            if len(content) > most:
                rest = len(content) - most
                # Longer than what fits by this note, so that the conversation ends.
                content = f"{content[:most]}... ({rest} more characters)"
            trajectory.messages.append(message | {"content": content})

    def _end(self, episode: _Episode, reason: str) -> str:
        """Frees the row; returns "environment" while its end state is awaited, else the reason."""
        episode.reason = episode.trajectory.finish_reason = reason
        if episode.open:
            self.engine.close(episode.key)
            episode.open = False
        if reason == "error":
            self.environments.close_episode(episode.name)
            return reason
        episode.future = self.environments.finish_episode(episode.name)
        return "environment"

    def _answered(self, episode: _Episode, params: SamplingParams, stream: int) -> str:
        """Takes what the environment said; returns "sample" or why the episode ends."""
        trajectory = episode.trajectory
        error = episode.future.exception()
        if error is not None:
            trajectory.error, trajectory.finish_reason = str(error), "error"
            trajectory.bystander = isinstance(error, WorkerError) and error.bystander
            return "error"
        if episode.reason:
            trajectory.state = episode.future.result()
            return episode.reason
        try:
            if episode.started:
                return self._go_on(episode, episode.future.result(), params, stream)
            episode.started = True
            self._said(trajectory, episode.future.result())
            return self._open(episode, params, stream)
        except chat.TooLong:
            if not trajectory.sequences:
                trajectory.sequences.append(types.Sequence())
            return "length"
        except chat.TextError as fault:
            trajectory.error = f"the model cannot be shown the conversation: {fault}"
            return "error"

    def _go_on(self, episode: _Episode, turn: Turn, params: SamplingParams, stream: int) -> str:
        """Takes the answer to a turn; returns "sample" or why the episode ends."""
        trajectory = episode.trajectory
        trajectory.turn_rewards[-1] += turn.reward
        trajectory.infos.append(turn.info)
        history = list(trajectory.messages)
        self._said(trajectory, turn.messages)
        if turn.done or trajectory.turns >= params.max_turns:
            if history[-1].get("truncated"):
                return "length"
            return "stop" if turn.done else "turns"
        if not turn.messages:
            trajectory.error = "the environment neither answered nor ended the episode"
            return "error"
        return self._continue(episode, history, params, stream)

    def _prompt(self, episode: _Episode) -> list[int]:
        """Returns the ids that a sequence begins with; those of a group are rendered once."""
        trajectory = episode.trajectory
        task, messages, draw = trajectory.task, trajectory.messages, trajectory.draw
        episode.tools = chat.tools_of(task, self.environments.tools)
        same, episode.text, ids = self._openings.get(draw, ([], "", []))
        if same != messages:
            episode.text = chat.prompt_text(self.tokenizer, task, messages, tools=episode.tools)
            plain = task.prompt is not None
            ids = chat.encode(self.tokenizer, episode.text, self.engine.max_length, special=plain)
            if not trajectory.sequences:
                self._openings[draw] = list(messages), episode.text, ids
        return ids

    def _open(self, episode: _Episode, params: SamplingParams, stream: int) -> str:
        """Starts a token sequence with all that was said so far."""
        trajectory, prompt = episode.trajectory, self._prompt(episode)
        room = self.engine.max_length - len(prompt)
        if room > 0 or not trajectory.sequences:
            sequence = types.Sequence()
            sequence.extend(prompt[: self.engine.max_length])
            trajectory.sequences.append(sequence)
        if room < 1:
            return "length"
        own = trajectory.task.temperature if stream == TRAIN else 0.0
        noise = noise_key(
            stream, trajectory.draw, trajectory.sample, sequence=len(trajectory.sequences) - 1
        )
        params = dataclasses.replace(params, temperature=own or params.temperature)
        budget = min(params.max_new_tokens, room)
        if episode.carried is not None:
            return self._go_on_carried(episode, episode.carried, budget, noise, params)
        self.engine.open(episode.key, prompt, budget, noise, params, rank=episode.rank)
        episode.open = True
        return "sample"

    def _go_on_carried(
        self,
        episode: _Episode,
        carried: Carried,
        budget: int,
        noise: NoiseKey,
        params: SamplingParams,
    ) -> str:
        """Goes on with a conversation of an earlier call; returns "sample", or what the end of its turn leads to."""
        sequence, tokens = episode.trajectory.sequences[0], carried.tokens
        sequence.extend(tokens, carried.logprobs, carried.versions)
        episode.kept = len(tokens)
        if carried.ended:
            turn = SampledTurn(
                episode.key,
                tokens,
                carried.logprobs,
                carried.stopped,
                carried.stop_token,
                carried.experts,
            )
            return self._sampled(episode, turn, params)
        self.engine.open(
            episode.key,
            sequence.tokens,
            budget - len(tokens),
            noise,
            params,
            rank=CARRIED,
            turn=(tokens, carried.logprobs),
        )
        episode.open = True
        return "sample"

    def _continue(
        self, episode: _Episode, history: list[Message], params: SamplingParams, stream: int
    ) -> str:
        """Appends what follows `history` to the sequence, or starts another where the template rewrites it."""
        trajectory = episode.trajectory
        sequence, messages = trajectory.sequences[-1], trajectory.messages[len(history) :]
        if trajectory.task.prompt is not None:
            text = "\n".join(["", *(str(message["content"]) for message in messages), ""])
            tokens, episode.text = chat.encode(self.tokenizer, text, self.engine.max_length), text
        else:
            try:
                tokens, episode.text = chat.follow(
                    self.tokenizer,
                    episode.text,
                    history,
                    messages,
                    last_token=episode.last_token,
                    tools=episode.tools,
                    most=self.engine.max_length,
                )
            except chat.Rewriting:
                self.engine.close(episode.key)
                episode.open = False
                return self._open(episode, params, stream)
        room = self.engine.max_length - len(sequence.tokens) - len(tokens)
        if room < 1 or not tokens:
            return "length"
        sequence.extend(tokens)
        self.engine.extend(episode.key, tokens, min(params.max_new_tokens, room))
        return "sample"

    def _sampled(self, episode: _Episode, turn: SampledTurn, params: SamplingParams) -> str:
        """Takes a turn; returns "environment", or "length" where a token limit cut it and it goes to none."""
        trajectory, kept = episode.trajectory, episode.kept
        trajectory.sequences[-1].extend(
            turn.tokens[kept:], turn.logprobs[kept:], self.policy_version
        )
        trajectory.sequences[-1].experts = turn.experts
        episode.turn, episode.kept = turn, 0
        content = chat.decode(
            self.tokenizer,
            turn.tokens,
            stop_tokens=(turn.stop_token,),
            stop_strings=self.stop_strings,
        )
        message: Message = {"role": "assistant", "content": content}
        message |= {THINKS: True} if types.begins_thinking(episode.text) else {}
        trajectory.sampled_messages.append(len(trajectory.messages))
        trajectory.messages.append(message if turn.stopped else message | {"truncated": True})
        trajectory.turn_rewards.append(0.0)
        handed_over = self.environments.active and params.truncated_turns == "environment"
        if not turn.stopped and not handed_over:
            return "length"
        episode.last_token = turn.stop_token
        episode.future = self.environments.step(episode.name, trajectory.messages)
        return "environment"
