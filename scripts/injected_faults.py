"""User code with faults: each function fails in its own way in one call of twenty, and is right in the others.

Evaluators choose the call by draw and sample, environments by what the model said, so that
`scripts/fault_table.py` knows from the recorded rollouts which calls were struck.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable
from typing import Any

from rftjax import sandbox
from rftjax.environments import tools
from rftjax.types import Message, Task, Trajectory

ONE_IN = 20


def struck(key: str) -> bool:
    """Says whether a call is one of the five in a hundred that fail."""
    return zlib.crc32(key.encode()) % ONE_IN == 0


def key_of(draw: int, sample: int) -> str:
    """Returns by which a call of an evaluator is chosen."""
    return f"draw {draw} sample {sample}"


def right(draw: int, sample: int) -> float:
    """Returns the reward of a sample whose call did not fail, from 0.25 to 0.75: never 0."""
    return 0.25 + zlib.crc32(f"{sample} of {draw}".encode()) % 101 / 200


def _failing(fault: Callable[[], Any]) -> Callable[[Task, Trajectory], Any]:
    """Makes an evaluator that calls `fault` in some calls, and returns what it returns unless that is `right`."""

    def evaluate(task: Task, trajectory: Trajectory) -> Any:
        reward = right(trajectory.draw, trajectory.sample)
        if not struck(key_of(trajectory.draw, trajectory.sample)):
            return reward
        found = fault()
        return reward if found is right else found

    return evaluate


@_failing
def nothing() -> Any:
    return right


@_failing
def exception() -> Any:
    raise KeyError("answer")


@_failing
def not_a_number() -> Any:
    return float("nan")


@_failing
def none() -> Any:
    return None


def wrong_length(task: Task, trajectories: list[Trajectory]) -> list[float]:
    """Scores a group; a struck one by a list that is too short."""
    rewards = [right(one.draw, one.sample) for one in trajectories]
    return rewards[1:] if struck(key_of(trajectories[0].draw, -1)) else rewards


@_failing
def endless_loop() -> Any:
    while True:
        pass


@_failing
def os_exit() -> Any:
    os._exit(0)


@_failing
def segmentation_fault() -> Any:
    ctypes.string_at(0)


@_failing
def gigabyte_of_output() -> Any:
    line = b"x" * (1 << 20)
    for _ in range(1 << 10):
        sys.stdout.buffer.write(line)
    return right


@_failing
def zombie_children() -> Any:
    for seconds in (0, 0, 0, 0, 1000):
        if not os.fork():
            os.setsid()
            time.sleep(seconds)
            os._exit(0)
    return right


def _sandboxed(code: str) -> Any:
    """Runs code of a model; raises as an evaluator does that finds no answer in it."""
    limits = sandbox.Limits(wall_s=1.0, processes=8, memory_bytes=256 << 20)
    result = sandbox.run_python(code, limits=limits)
    raise ValueError(f"the code ended by {result.reason}, {result.errors[-60:].strip()}")


@_failing
def fork_bomb() -> Any:
    _sandboxed("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass")


@_failing
def ten_gigabytes() -> Any:
    _sandboxed("kept = b'1' * (10 << 30)")


def _reply(task: Task, messages: list[Message], fault: Callable[[str], None]) -> str | None:
    if sum(message["role"] == "assistant" for message in messages) > 1:
        return None
    if struck(str(messages[-1]["content"])):
        fault(task.data["server"])
    return "w1 w2"


def slow_server(task: Task, messages: list[Message]) -> str | None:
    """Answers once; asks a server that takes longer than the environment may."""
    return _reply(task, messages, lambda url: urllib.request.urlopen(f"{url}/slow").close())


def dropped_connection(task: Task, messages: list[Message]) -> str | None:
    """Answers once; asks a server that hangs up in the middle of its answer."""
    return _reply(task, messages, lambda url: urllib.request.urlopen(f"{url}/drop").read())


def ten_thousand_turns(task: Task, messages: list[Message]) -> str | None:
    """Answers once; a struck conversation never ends by itself."""
    if struck(str(messages[len(task.messages)]["content"])):
        return "w1"
    return _reply(task, messages, lambda url: None)


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


class MalformedCall:
    """An episode with a tool whose model writes a call that breaks off; the answer tells it so."""

    def __init__(self, task: Task, seed: int):
        self.inner = tools(add)(task, seed)

    def step(self, message: Message) -> Any:
        """Takes a struck message for a malformed call."""
        said = str(message["content"])
        text = '<tool_call>{"name": "add", "arg' if struck(said) else said
        return self.inner.step(message | {"content": text})


def hook(step: int, metrics: Any, trajectories: Any, state: Any) -> dict[str, float]:
    """Records the resident memory of the training process, in MiB."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return {"resident_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20}
