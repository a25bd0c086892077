"""Conversations with functions, stateful environments and tools, and what their faults cost."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from snippets import blocks

from rftjax.environments import Environments, ToolEpisode, as_turn, tools
from rftjax.environments.handler import environment_handler
from rftjax.types import Task, Turn
from rftjax.workers.pool import WorkerError

USER_CODE = """
import asyncio, os, time
from rftjax.environments import tools
from rftjax.types import Turn

def reply(task, messages):
    said = messages[-1]["content"]
    if said == "stop":
        return None
    if said == "raise":
        raise RuntimeError("no answer known")
    if said == "loop":
        while True:
            pass
    if said == "exit":
        os._exit(1)
    if said == "number":
        return 5
    if said == "empty":
        return []
    if said == "text":
        return "go on"
    if said == "turn":
        return Turn([{"role": "user", "content": "last"}], done=True, reward=0.5, info={"a": {1}})
    return [{"role": "user", "content": f"{task.data['name']} {len(messages)}"}]

async def reply_async(task, messages):
    await asyncio.sleep(0.05)
    return reply(task, messages)

class Counter:
    def __init__(self, task, seed):
        self.total, self.path = seed, task.data.get("path")
        if seed < 0:
            raise ValueError("a negative seed")

    def reset(self):
        return [{"role": "user", "content": f"start at {self.total}"}]

    def step(self, message):
        if message["content"] == "loop":
            while True:
                pass
        if message["content"] == "exit":
            os._exit(7)
        if message["content"] == "pid":
            return str(os.getpid())
        if message["content"] == "bad":
            return Turn([{"role": "user"}])
        self.total += int(message["content"])
        return Turn([{"role": "user", "content": str(self.total)}], self.total > 9, 0.5)

    def state(self):
        return {"total": self.total, "pair": (1, 2)}

    def close(self):
        if self.path:
            time.sleep(0.2)
            with open(self.path, "a") as file:
                file.write(f"{self.total}\\n")

class Stubborn(Counter):
    def step(self, message):
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass

class AsyncCounter(Counter):
    async def reset(self):
        await asyncio.sleep(0.05)
        return super().reset()

    async def step(self, message):
        if message["content"] == "wait":
            await asyncio.sleep(100)
        return super().step(message)

    async def close(self):
        super().close()

class Slow(Counter):
    def reset(self):
        time.sleep(0.2)
        return "ready"

class OddState(Counter):
    def state(self):
        return {"it": self}

class OnlyStep:
    def __init__(self, task, seed):
        pass

    async def _late(self):
        return "late"

    def step(self, message):
        return self._late()

class NoStep:
    def __init__(self, task, seed):
        pass

def factory(task, seed):
    return Counter(task, seed)

def wrong(task):
    return None

def add(a: int, b: int = 1) -> int:
    "Adds two numbers."
    return a + b

def fail(text: str):
    raise LookupError(text)

async def slow(text: str):
    await asyncio.sleep(0.01)
    return text + "!"

def sleep(seconds: float):
    try:
        time.sleep(seconds)
    except Exception:  # takes no notice of errors
        return "awake"

def secret(task, index: int):
    return task.data["secrets"][index]

sync_tools = tools(add, fail, secret, sleep)
async_tools = tools(add, fail, slow, sleep)
"""


@pytest.fixture(scope="module")
def user_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "world.py"
    path.write_text(USER_CODE)
    return path


def task(**data: Any) -> Task:
    return Task("row-1", [{"role": "user", "content": "?"}], {"name": "Ada", **data})


def said(content: str) -> list[dict[str, Any]]:
    return [*task().messages, {"role": "assistant", "content": content}]


def answer(environments: Environments, key: object, content: str) -> Turn:
    return environments.step(key, said(content)).result(10)


def user(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_without_an_environment_the_first_answer_ends_the_episode():
    with Environments("") as environments:
        assert environments.start("a", task(), 0).result(0) == []
        assert answer(environments, "a", "anything") == Turn(done=True)
        environments.close_episode("a")


@pytest.mark.parametrize("name", ["reply", "reply_async"])
def test_a_function_answers_with_messages_text_a_turn_or_none(user_file: Path, name: str):
    with Environments(f"{user_file}:{name}", workers=1, timeout_s=5.0) as environments:
        assert environments.start(1, task(), 0).result(10) == []
        assert answer(environments, 1, "hello") == Turn(user("Ada 2"))
        assert answer(environments, 1, "text") == Turn(user("go on"))
        assert answer(environments, 1, "turn") == Turn(user("last"), True, 0.5, {"a": [1]})
        assert answer(environments, 1, "stop") == Turn(done=True)


def test_a_fault_of_a_function_fails_only_its_own_episode(user_file: Path):
    with Environments(f"{user_file}:reply", workers=1, timeout_s=0.5) as environments:
        faults = {
            "raise": r"RuntimeError: no answer known \(world.py:",
            "loop": r"overran the time limit of 0.5 s \(environments.timeout_s\)",
            "exit": "the worker process died",
            "number": "must be a list of messages, not int",
            "empty": "does not end the episode",
        }
        for key in ("good", *faults):
            environments.start(key, task(), 0)
        failing = {key: environments.step(key, said(key)) for key in faults}
        assert answer(environments, "good", "hello") == Turn(user("Ada 2"))
        for key, reason in faults.items():
            with pytest.raises(WorkerError, match=reason):
                failing[key].result(10)


@pytest.mark.parametrize("name", ["Counter", "AsyncCounter", "factory"])
def test_stateful_episodes_keep_their_own_state_and_are_closed(
    user_file: Path, tmp_path: Path, name: str
):
    path = tmp_path / "closed"
    with Environments(f"{user_file}:{name}", workers=2, timeout_s=5.0) as environments:
        starts = [environments.start(seed, task(path=str(path)), seed) for seed in range(6)]
        opened = [start.result(10) for start in starts]
        assert opened == [user(f"start at {seed}") for seed in range(6)]
        for step in range(1, 3):
            turns = [environments.step(seed, said("2")) for seed in range(6)]
            totals = [seed + 2 * step for seed in range(6)]
            assert [turn.result(10) for turn in turns] == [
                Turn(user(str(total)), total > 9, 0.5) for total in totals
            ]
        for seed in range(6):
            environments.close_episode(seed)
            environments.close_episode(seed)
        give_up = time.monotonic() + 5.0
        while not path.exists() or len(path.read_text().split()) < 6:
            assert time.monotonic() < give_up
            time.sleep(0.02)
    assert sorted(map(int, path.read_text().split())) == totals


@pytest.mark.parametrize("fault", ["loop", "exit"])
def test_a_hung_or_dead_episode_costs_no_other_even_with_one_worker(user_file: Path, fault: str):
    with Environments(f"{user_file}:Counter", workers=1, timeout_s=0.5) as environments:
        for key in range(4):
            environments.start(key, task(), key).result(10)
        homes = [answer(environments, key, "pid").messages[0]["content"] for key in range(4)]
        assert len(set(homes)) == 4
        reason = "overran the time limit" if fault == "loop" else "exit status 7"
        with pytest.raises(WorkerError, match=reason):
            answer(environments, 0, fault)
        with pytest.raises(WorkerError, match=reason):
            answer(environments, 0, "1")
        for key in (1, 2, 3):
            assert answer(environments, key, "1").messages == user(str(key + 1))
        environments.close_episode(0)
        assert environments.start(0, task(), 5).result(10) == user("start at 5")
        assert answer(environments, 0, "1").messages == user("6")


def test_an_overrun_of_an_asynchronous_episode_costs_no_other(user_file: Path):
    with Environments(f"{user_file}:AsyncCounter", workers=1, timeout_s=0.5) as environments:
        for key in range(3):
            environments.start(key, task(), key).result(10)
        waiting = environments.step(0, said("wait"))
        with pytest.raises(WorkerError, match="overran the time limit"):
            waiting.result(10)
        assert [answer(environments, key, "1").messages for key in (1, 2)] == [user("2"), user("3")]


def test_a_failed_start_and_a_bad_answer_say_what_is_wrong(user_file: Path):
    with Environments(f"{user_file}:Counter", workers=1) as environments:
        with pytest.raises(WorkerError, match=r"ValueError: a negative seed \(world.py:"):
            environments.start("bad", task(), -1).result(10)
        environments.close_episode("bad")
        environments.start("good", task(), 1).result(10)
        with pytest.raises(WorkerError, match="a message needs a str as 'content'"):
            answer(environments, "good", "bad")


def test_reset_and_close_may_be_missing_and_a_result_may_be_awaitable(user_file: Path):
    with Environments(f"{user_file}:OnlyStep", workers=1) as environments:
        assert environments.start(0, task(), 0).result(10) == []
        assert answer(environments, 0, "x") == Turn(user("late"))
        assert answer(environments, 0, "x") == Turn(user("late"))
        environments.close_episode(0)


@pytest.mark.parametrize("name", ["Counter", "AsyncCounter", "factory"])
def test_every_episode_is_closed_also_after_an_error_an_overrun_and_at_the_end(
    user_file: Path, tmp_path: Path, name: str
):
    path = tmp_path / "closed"
    with Environments(f"{user_file}:{name}", workers=1, timeout_s=0.5) as environments:
        for seed in range(4):
            environments.start(seed, task(path=str(path)), seed).result(10)
        for seed, fault in ((0, "loop"), (1, "no number")):
            with pytest.raises(WorkerError):
                answer(environments, seed, fault)
            environments.close_episode(seed)
        running = environments.step(2, said("loop"))
        # The others are still open here.
    assert sorted(path.read_text().split()) == ["0", "1", "2", "3"]
    assert running.exception(0) is not None


def test_a_call_that_cannot_be_interrupted_is_stopped_within_its_limit(user_file: Path):
    with Environments(f"{user_file}:Stubborn", workers=1, timeout_s=0.3) as environments:
        for key in (0, 1):
            environments.start(key, task(), 0).result(10)
        for key in (0, 1):
            with pytest.raises(WorkerError, match="overran the time limit"):
                answer(environments, key, "1")
            environments.close_episode(key)


@pytest.mark.parametrize(
    ("name", "state"),
    [("Counter", {"total": 3, "pair": [1, 2]}), ("factory", {"total": 3, "pair": [1, 2]})]
    + [(name, None) for name in ("OnlyStep", "sync_tools", "reply")],
)
def test_the_end_state_is_read_before_the_episode_closes(
    user_file: Path, tmp_path: Path, name: str, state: Any
):
    path = tmp_path / "closed"
    with Environments(f"{user_file}:{name}", workers=1, timeout_s=5.0) as environments:
        environments.start(0, task(path=str(path)), 1).result(10)
        answer(environments, 0, "2")
        assert environments.finish_episode(0).result(10) == state
        environments.close_episode(0)
    assert path.exists() == (state is not None)


def test_an_end_state_that_is_no_plain_data_is_refused_and_the_episode_closed(
    user_file: Path, tmp_path: Path
):
    path = tmp_path / "closed"
    with Environments(f"{user_file}:OddState", workers=1, timeout_s=5.0) as environments:
        environments.start(0, task(path=str(path)), 1).result(10)
        with pytest.raises(WorkerError, match=r"state\(\)\['it'\] must be plain data .* OddState"):
            environments.finish_episode(0).result(10)
    assert path.exists()


def test_a_queue_takes_nothing_of_a_calls_time(user_file: Path):
    with Environments(f"{user_file}:Slow", workers=1, timeout_s=0.5) as environments:
        starts = [environments.start(key, task(), key) for key in range(6)]
        assert [start.result(10) for start in starts] == [user("ready")] * 6


def test_a_few_bad_episodes_among_many_lose_only_themselves(user_file: Path):
    faults = {3: "loop", 17: "exit", 40: "loop", 41: "exit"}
    with Environments(f"{user_file}:Counter", workers=2, timeout_s=0.5) as environments:
        starts = [environments.start(key, task(), key) for key in range(48)]
        assert [start.result(30) for start in starts] == [
            user(f"start at {key}") for key in range(48)
        ]
        turns = [environments.step(key, said(faults.get(key, "1"))) for key in range(48)]
        failed = {key for key, turn in enumerate(turns) if turn.exception(30)}
    assert failed == set(faults)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", r"must be callable with \(task, messages\)"),
        ("NoStep", r"class NoStep must have a method step\(message\)"),
        ("missing", "must define 'missing'"),
    ],
)
def test_an_environment_that_cannot_be_called_is_refused_at_the_start(
    user_file: Path, name: str, message: str
):
    with pytest.raises(ValueError, match=message):
        Environments(f"{user_file}:{name}", workers=1)


CYCLE: dict[str, Any] = {}
CYCLE["again"] = CYCLE


def turn(**fields: Any) -> Turn:
    return Turn(user("x"), **fields)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Turn([], done=False), "does not end the episode"),
        (turn(done=1), "Turn.done must be a bool"),
        (Turn(user("x"), reward=float("nan")), "Turn.reward must be a finite number"),
        (turn(reward=None), "Turn.reward must be a finite number"),
        (turn(reward=1e39), "Turn.reward must be a finite number"),
        (turn(info=[]), "Turn.info must be a dict"),
        (turn(info={"a": [object()]}), r"Turn.info\['a'\]\[0\] must be plain data .* not a object"),
        (turn(info={"a": "x" * 300_000}), "bytes as JSON, more than the 262144 allowed"),
        (turn(info=CYCLE), "nested more than 100 levels deep"),
        ("half \ud83d", r"holds '\\ud83d', half of a character"),
        ([{"role": "tool", "content": "x", "name": "\udfff"}], "half of a character"),
        ([{"content": "x"}], "a str as 'role'"),
        (["hello"], "must hold dicts, not str"),
        ([{"role": 1, "content": "x"}], "a str as 'role'"),
        ([{"role": "user", "content": None}], "a str as 'content'"),
        ({"role": "user", "content": "x"}, "must be a list of messages, not dict"),
    ],
)
def test_a_turn_of_wrong_form_is_refused(value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        as_turn(value, "the reply")


def call(name: str, **arguments: Any) -> str:
    text = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{text}\n</tool_call>"


@pytest.mark.parametrize("name", ["sync_tools", "async_tools"])
def test_tools_are_called_in_order_and_errors_go_to_the_model(user_file: Path, name: str):
    with Environments(f"{user_file}:{name}", workers=1, timeout_s=5.0) as environments:
        assert environments.start(0, task(), 0).result(10) == []
        text = "Let me see. " + call("add", a=2, b=3) + call("fail", text="gone") + call("add", a=1)
        turn = answer(environments, 0, text)
        assert turn == Turn(
            [
                {"role": "tool", "content": "5", "name": "add"},
                {"role": "tool", "content": "Error: LookupError: gone", "name": "fail"},
                {"role": "tool", "content": "2", "name": "add"},
            ]
        )
        assert answer(environments, 0, "It is 5.") == Turn(done=True)
        assert [schema["function"]["name"] for schema in environments.tools][:2] == ["add", "fail"]


@pytest.mark.parametrize("name", ["sync_tools", "async_tools"])
def test_a_late_tool_and_a_call_too_many_are_told_and_the_episode_goes_on(
    user_file: Path, name: str
):
    limits = {"tool_timeout_s": 1.0, "max_calls": 2}
    with Environments(f"{user_file}:{name}", workers=1, timeout_s=30.0, **limits) as environments:
        environments.start(0, task(), 0).result(30)
        text = call("sleep", seconds=60) + call("add", a=1) + call("add", a=2)
        late, right, beyond = (one["content"] for one in answer(environments, 0, text).messages)
        assert late.startswith("Error: TimeoutError: ") and "within 1 s" in late
        assert right == "2"
        assert beyond.startswith("Error: ValueError: only 2 calls are run in one turn")
        assert answer(environments, 0, call("add", a=2)).messages[0]["content"] == "3"


def test_an_asynchronous_tool_is_awaited(user_file: Path):
    with Environments(f"{user_file}:async_tools", workers=1, timeout_s=5.0) as environments:
        environments.start(0, task(), 0)
        assert answer(environments, 0, call("slow", text="hi")).messages[0]["content"] == "hi!"


def test_a_tool_may_take_the_task_which_the_model_neither_sees_nor_sets(user_file: Path):
    with Environments(f"{user_file}:sync_tools", workers=1, timeout_s=5.0) as environments:
        environments.start(0, task(secrets=["a", "b"]), 0)
        text = call("secret", index=1, task="mine")
        assert answer(environments, 0, text).messages[0]["content"] == "b"
        parameters = environments.tools[2]["function"]["parameters"]
    assert parameters == {
        "type": "object",
        "properties": {"index": {"type": "integer"}},
        "required": ["index"],
    }


def add(a: int, b: int = 1) -> int:
    """Adds two numbers."""
    return a + b


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<tool_call>{broken}</tool_call>", "Error: ValueError: the tool call is not valid JSON"),
        ("<tool_call>[1]</tool_call>", "a tool call must be"),
        (call("subtract", a=1), "there is no tool 'subtract'; there is add"),
        (call("add", b=1), "missing a required argument: 'a'"),
        (call("add", a=1, c=1), "unexpected keyword argument 'c'"),
        ('<tool_call>{"name": "add", "arguments": 5}</tool_call>', "must be a JSON object"),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 4}"}</tool_call>', "5"),
        ('<tool_call>{"name": "add", "arguments": {"a": 4}}', "5"),
    ],
)
def test_a_wrong_call_is_answered_with_what_is_wrong(text: str, content: str):
    turn = ToolEpisode(tools(add), task()).step({"role": "assistant", "content": text})
    assert not turn.done
    assert len(turn.messages) == 1
    assert content in turn.messages[0]["content"]


def test_a_call_without_an_end_does_not_swallow_the_next():
    text = call("add", a=1).removesuffix("</tool_call>") + call("add", a=2)
    turn = ToolEpisode(tools(add), task()).step({"role": "assistant", "content": text})
    assert [message["content"] for message in turn.messages] == ["2", "3"]


def test_structured_calls_come_before_text_and_keep_their_ids():
    function = {"name": "add", "arguments": '{"a": 1}'}
    message = {
        "role": "assistant",
        "content": call("add", a=100),
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    turn = ToolEpisode(tools(add), task()).step(message)
    assert turn.messages == [{"role": "tool", "content": "2", "name": "add", "tool_call_id": "c1"}]


def test_schemas_say_what_the_functions_take():
    assert tools(add).schemas == [
        {
            "type": "function",
            "function": {
                "name": "add",
                "description": "Adds two numbers.",
                "parameters": {
                    "type": "object",
                    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                    "required": ["a"],
                },
            },
        }
    ]


DOCS = Path(__file__).parents[1] / "docs" / "environments.md"
# The forms that need nothing else: the name in the file, the row's fields, what the model says, and the answers to it.
SHOWN = {
    "guess.py": ("reply", {"answer": "3"}, "2", [("No. Try again.", 0.0)]),
    "counter.py": ("Counter", {"count": 2}, "1", [("Go on.", 1.0)]),
    "words.py": ("Guess", {"seed": 1}, "123456789", [("Yes.", 1.0)]),
    "shop.py": (
        "environment",
        {},
        '<tool_call>{"name": "price", "arguments": {"item": "pear", "count": 2}}</tool_call>',
        [("1.5", 0.0)],
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_environments_of_the_docs_answer(tmp_path: Path, name: str):
    (tmp_path / name).write_text(
        next(b for b in blocks(DOCS, "python") if b.startswith(f"# {name}"))
    )
    target, data, said, answers = SHOWN[name]
    handler = environment_handler(f"{tmp_path / name}:{target}", "environment")
    message, task = {"role": "assistant", "content": said}, Task("t", [], data)
    if json.loads(handler.about)["stateful"]:
        handler("start", "a", task, 0, {})
        turns = [handler("step", "a", message)]
    else:
        turns = [handler("reply", "", task, [message])]
    assert [(turn.messages[0]["content"], turn.reward) for turn in turns] == answers
