"""Agents as the main process sees them: functions in worker processes, or a server that speaks the managed service's
protocol (`POST /init`, then a status in the gateway's logs)."""

from __future__ import annotations

import concurrent.futures
import json
import re
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable
from typing import Protocol

from rftjax.serving.agent_handler import Outcome
from rftjax.serving.protocol import FINISHED, OK, RUNNING, SCORE_INVALID, address
from rftjax.text import chat
from rftjax.types import SamplingParams, Task
from rftjax.workers.pool import WorkerError, Workers

INIT_TRIES, INIT_WAIT_S, INIT_LIMIT_S = 3, 0.5, 30.0
INIT_THREADS = 32


class Agents(Protocol):
    """What starts agents; futures raise WorkerError where one fails."""

    @property
    def bystanders(self) -> int:
        """Rollouts stopped by another one's fault so far; they are tried again."""
        ...

    def start(
        self,
        task: Task,
        key: str,
        url: str,
        api_key: str,
        model: str,
        seed: int,
        params: SamplingParams,
    ) -> concurrent.futures.Future[Outcome]:
        """Starts an agent on a task; it calls the model under the address of rollout `key` at `url`."""
        ...

    def expire(self) -> None:
        """Ends what has run too long; called now and then."""
        ...

    def close(self) -> None:
        """Ends all agents."""
        ...


def is_remote(agent: str) -> bool:
    """Whether the config's `agent` is a server's address."""
    return agent.startswith(("http://", "https://"))


def open_agents(agent: str, *, workers: int, timeout_s: float, env: Iterable[str]) -> Agents:
    """Returns what starts the agent of the config; call it before JAX is used."""
    if is_remote(agent):
        return RemoteAgents(agent, timeout_s)
    return LocalAgents(agent, workers=workers, timeout_s=timeout_s, env=env)


class LocalAgents:
    """Runs a function of the user's in worker processes, `timeout_s` seconds a rollout."""

    def __init__(self, agent: str, *, workers: int, timeout_s: float, env: Iterable[str]) -> None:
        self._workers = Workers(
            agent,
            workers,
            timeout_s,
            wrapper="rftjax.serving.agent_handler:agent_handler",
            field="agent",
            limit_field="agents.timeout_s",
            env=env,
            env_field="agents.env",
        )

    @property
    def bystanders(self) -> int:
        """Calls stopped by another call's fault so far."""
        return self._workers.bystanders

    def start(
        self,
        task: Task,
        key: str,
        url: str,
        api_key: str,
        model: str,
        seed: int,
        params: SamplingParams,
    ) -> concurrent.futures.Future[Outcome]:
        """Starts the function; see `Agents.start`."""
        return self._workers.submit(task, url, key, api_key, model, seed)

    def expire(self) -> None:
        """Does nothing: the pool ends calls that overrun."""

    def close(self) -> None:
        """Ends the worker processes."""
        self._workers.close()


class RemoteAgents:
    """Asks a server for each rollout and waits for the status that it logs, `timeout_s` seconds at most."""

    bystanders = 0

    def __init__(self, agent: str, timeout_s: float) -> None:
        self.url, self._timeout_s = agent.rstrip("/"), timeout_s
        self._run = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[float, concurrent.futures.Future[Outcome]]] = {}
        self._threads = concurrent.futures.ThreadPoolExecutor(INIT_THREADS, "agent")

    def start(
        self,
        task: Task,
        key: str,
        url: str,
        api_key: str,
        model: str,
        seed: int,
        params: SamplingParams,
    ) -> concurrent.futures.Future[Outcome]:
        """Sends `POST /init`; see `Agents.start`."""
        future: concurrent.futures.Future[Outcome] = concurrent.futures.Future()
        with self._lock:
            self._waiting[key] = time.monotonic() + self._timeout_s, future
        tags = {
            "invocation_id": self._run,
            "experiment_id": "rftjax",
            "run_id": self._run,
            "row_id": re.sub(r"[^\w.-]", "_", task.id) or "row",
        }
        tools = chat.tools_of(task)
        body = {
            "completion_params": {
                "model": model,
                "temperature": params.temperature,
                "max_tokens": params.max_new_tokens,
            },
            "messages": task.messages,
            "tools": tools or None,
            "model_base_url": f"{url}{address(key, tags)}",
            "metadata": {"rollout_id": key, **tags},
            "api_key": api_key,
        }
        self._threads.submit(self._init, key, json.dumps(body).encode())
        return future

    def _init(self, key: str, body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        reason = ""
        for attempt in range(INIT_TRIES):
            if attempt:
                time.sleep(INIT_WAIT_S * 2**attempt)
            request = urllib.request.Request(f"{self.url}/init", body, headers)
            try:
                with urllib.request.urlopen(request, timeout=INIT_LIMIT_S) as answer:
                    answer.read()
                return
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(500).decode(errors="replace")
                reason = f"answers /init with status {error.code}: {said}"
                if error.code < 500:
                    break
            except Exception as error:
                reason = f"cannot be asked: {error}"
        self._fail(key, f"the agent's server {self.url} {reason}")

    def status(self, key: str, code: int, message: str) -> None:
        """Takes a status that a rollout's agent logged, one of google.rpc.Code or of the protocol's own."""
        if code == RUNNING:
            return
        if code in (OK, FINISHED, SCORE_INVALID):
            found = self._take(key)
            if found is not None:
                found.set_result(("", None, None))
        else:
            self._fail(key, f"the agent ended with status {code}: {message}")

    def expire(self) -> None:
        """Fails the rollouts whose time is over."""
        now_s = time.monotonic()
        with self._lock:
            late = [key for key, (end_s, _) in self._waiting.items() if end_s < now_s]
        for key in late:
            self._fail(key, f"overran the time limit of {self._timeout_s:g} s (agents.timeout_s)")

    def close(self) -> None:
        """Fails what is under way."""
        with self._lock:
            left = list(self._waiting)
        for key in left:
            self._fail(key, "the run has ended")
        self._threads.shutdown(cancel_futures=True)

    def _take(self, key: str) -> concurrent.futures.Future[Outcome] | None:
        with self._lock:
            return self._waiting.pop(key, (0.0, None))[1]

    def _fail(self, key: str, reason: str) -> None:
        future = self._take(key)
        if future is not None:
            future.set_exception(WorkerError(reason))
