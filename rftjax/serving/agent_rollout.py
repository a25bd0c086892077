"""Groups of rollouts by agents that call the model themselves, over HTTP, in a process or on a machine of their own.

Each rollout has an address. What is said under it becomes the rollout's trajectory, with the ids and log-probabilities
that were sampled (`turns.Recording`).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import secrets
import zlib
from collections.abc import Iterable
from typing import Any

from rftjax import types
from rftjax.rollout import TRAIN, Finish
from rftjax.sampler.engine import Engine
from rftjax.serving.agent_handler import Outcome
from rftjax.serving.agents import Agents, RemoteAgents
from rftjax.serving.app import App
from rftjax.serving.server import Background, listen
from rftjax.serving.service import Service
from rftjax.serving.tracing import Tracing
from rftjax.serving.turns import Model, Recording
from rftjax.types import SamplingParams, Task, Trajectory
from rftjax.workers.pool import WorkerError

MAX_BYTES = 64 * 2**20  # of a request
LOOK_S = 0.2  # between two looks at the time limits


@dataclasses.dataclass(eq=False)
class _Episode:
    trajectory: Trajectory
    key: str
    future: concurrent.futures.Future[Outcome]
    noise: tuple[int, int, int]
    params: SamplingParams
    attempts: dict[str, Recording] = dataclasses.field(default_factory=dict)


class AgentRollout:
    """Samples groups of rollouts with one engine; the counterpart of `rollout.Rollout`.

    `rewarded` says that the reward is what an agent returns; `address` is "host:port" to listen on. At most as many
    rollouts as the cache has rows are under way at once.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        agents: Agents,
        *,
        seed: int = 0,
        stop_strings: tuple[str, ...] = (),
        address: str = "127.0.0.1:0",
        rewarded: bool = False,
        temperature: float = 1.0,
    ) -> None:
        self.engine, self.tokenizer, self.agents = engine, tokenizer, agents
        self.seed, self.policy_version, self.stop_strings = seed, 0, stop_strings
        self._rewarded, self._temperature = rewarded, temperature
        self._key = secrets.token_urlsafe(24)
        self._running: dict[str, _Episode] = {}  # changed between calls of the server's thread
        host, _, port = address.rpartition(":")
        found = listen(host.strip("[]"), int(port))
        self.service = Service(engine)
        self.model = Model(
            "policy", tokenizer, tuple(engine.stops), stop_strings, engine.max_length
        )
        on_status = agents.status if isinstance(agents, RemoteAgents) else None
        tracing = Tracing(find=self._recording, on_status=on_status)
        app = App(
            self.service,
            self.model,
            SamplingParams(),
            tracing,
            key=self._key,
            max_bytes=MAX_BYTES,
            max_waiting=0,
        )
        self._tracing = tracing
        self._server = Background(app.routes(), found)
        self.url = self._server.url

    @property
    def bystanders(self) -> int:
        """Rollouts stopped by another one's fault so far; they are tried again."""
        return self.agents.bystanders

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
        episodes = ((draw, task, sample) for draw, task in draws for sample in range(group_size))
        finished: list[Trajectory] = []
        self.service.fault = None
        self.engine.recording = stream == TRAIN and self.engine.config.routing.recorded
        try:
            while self._begin(episodes, params, stream) or self._running:
                futures = {episode.future for episode in self._running.values()}
                concurrent.futures.wait(
                    futures, LOOK_S, return_when=concurrent.futures.FIRST_COMPLETED
                )
                self.agents.expire()
                if self.service.fault is not None:
                    raise self.service.fault
                for episode in [one for one in self._running.values() if one.future.done()]:
                    self._server.call(lambda episode=episode: self._finish(episode))
                    finished.append(episode.trajectory)
                    on_finish(episode.trajectory)
        finally:
            self._server.call(self._end)
            self.service.quiet()
        return sorted(finished, key=lambda trajectory: (trajectory.draw, trajectory.sample))

    def _begin(self, episodes: Any, params: SamplingParams, stream: int) -> bool:
        """Starts further rollouts while there are rows for them; says whether it started any."""
        before = len(self._running)
        while len(self._running) < self.engine.rows and (following := next(episodes, None)):
            draw, task, sample = following
            key = f"{stream}-{draw}-{sample}-{secrets.token_hex(16)}"
            seed = zlib.crc32(f"{self.seed}/{stream}/{draw}".encode())
            own = task.temperature if stream == TRAIN else 0.0
            settings = dataclasses.replace(params, temperature=own or params.temperature)
            messages = [dict(message) for message in task.messages]
            trajectory = Trajectory(task, draw, sample, messages)
            episode = _Episode(
                trajectory,
                key,
                concurrent.futures.Future(),
                (stream, draw, sample),
                settings,
            )
            self._running[key] = episode
            episode.future = self.agents.start(
                task, key, self.url, self._key, self.model.name, seed, settings
            )
        return len(self._running) > before

    # What follows runs on the server's thread.

    def _recording(self, name: str) -> Recording | None:
        """Returns the recording of a rollout's address, "key" or "key.attempt", None where that is not under way."""
        key, _, attempt = name.partition(".")
        episode = self._running.get(key)
        if episode is None:
            return None
        if attempt not in episode.attempts:
            episode.attempts[attempt] = Recording(
                self.service,
                self.model,
                episode.params,
                episode.noise,
                policy_version=self.policy_version,
                also=self._temperature,
            )
        return episode.attempts[attempt]

    def _finish(self, episode: _Episode) -> None:
        """Closes a rollout and fills in its trajectory."""
        del self._running[episode.key]
        self._tracing.forget(episode.key)
        trajectory, error = episode.trajectory, episode.future.exception()
        attempt, reward, state = ("", None, None) if error else episode.future.result()
        for recording in episode.attempts.values():
            recording.close()
        found = episode.attempts.get(attempt) or next(reversed(episode.attempts.values()), None)
        reason = _fill(trajectory, found)
        trajectory.state = state
        # An agent may well raise where it is refused a further turn: that is the end of its rollout.
        if error is not None and not (found is not None and found.refused):
            trajectory.error, trajectory.finish_reason = str(error), "error"
            trajectory.bystander = isinstance(error, WorkerError) and error.bystander
        elif not reason:
            trajectory.error = (
                "the agent made no call of the model"
                if found is None
                else f"no call of the agent was answered{f': {error}' if error else ''}"
            )
            trajectory.finish_reason = "error"
        elif reward is None and self._rewarded:
            trajectory.error = (
                "the agent returned no reward, and there is no evaluator"
                if error is None
                else str(error)
            )
            trajectory.finish_reason = "error"
        else:
            trajectory.finish_reason = reason
            if reward is not None and trajectory.turn_rewards:
                trajectory.turn_rewards[-1] = reward

    def _end(self) -> None:
        """Closes what is still under way, where a round ends early."""
        for episode in self._running.values():
            for recording in episode.attempts.values():
                recording.close()
        self._running.clear()

    def close(self) -> None:
        """Ends the server and the engine's thread."""
        self._server.close()
        self.service.stop()


def _fill(trajectory: Trajectory, recording: Recording | None) -> str:
    """Puts what was said into a trajectory; returns why it ended, "" where nothing was.

    Its conversation is the one that was asked last; its sequences are all that hold an answer, in the order in which
    they began.
    """
    answered = recording.answered if recording is not None else []
    if recording is None or not answered:
        if recording is not None and recording.refused == "length":
            trajectory.sequences.append(types.Sequence())
            return "length"
        return ""
    last = answered[-1]
    trajectory.messages, trajectory.sampled_messages = last.messages, last.sampled
    trajectory.sequences = [thread.sequence for thread in recording.threads if thread.sampled]
    turns = sum(len(thread.sampled) for thread in answered)
    trajectory.turn_rewards = [0.0] * turns
    cut = last.messages[-1].get("truncated")
    return recording.refused or ("length" if cut else "stop")
