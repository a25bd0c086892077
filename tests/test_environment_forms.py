"""Environments as other libraries write them; their packages are not installed, so small classes have their methods."""

import asyncio
import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rftjax.environments.handler import environment_handler
from rftjax.errors import UserError
from rftjax.evaluators import end_state
from rftjax.tasks.rows import Checker
from rftjax.types import Task, Trajectory, Turn

USER_CODE = '''
import sys, types
import numpy as np
from rftjax.environments import adapted

class Discrete:
    n, start = np.int64(3), np.int64(1)

class Box:
    shape, dtype = (2,), np.dtype("float32")

class Grid:
    """Gymnasium's methods; ends at 3."""
    action_space, render_mode = Discrete(), "ansi"
    def reset(self, *, seed=None, options=None):
        self.at = (options or {}).get("at", seed)
        return np.int64(self.at), {}
    def step(self, action):
        assert isinstance(action, int)
        self.at = action
        return np.int64(action), np.float32(action / 2), action == 3, False, {"p": np.float64(1.0)}
    def render(self):
        return f"at \\x1b[41m{self.at}\\x1b[0m\\n"
    def close(self):
        global closed
        closed = True

class Words:
    def __init__(self, word="stop"):
        self.word = word
    def reset(self, seed=None, options=None):
        return {"text": "speak"}, {}
    def step(self, action):
        return [action, len(action)], 1, False, action == self.word, {}
    def close(self):
        pass

class Plane(Words):
    action_space = Box()
    def step(self, action):
        return action * 2, 0.0, False, False, {}

class Needing(Words):
    def __init__(self, word):
        super().__init__(word)

grid, words = Grid(), Words()

def of_task(task, seed):
    return Words(task.data["word"])

async def of_task_later(task, seed):
    return Words(task.data["word"])

turned = adapted(of_task, action=lambda text: text[::-1], observation=lambda seen: f"saw {seen}")
turned_later = adapted(of_task_later, action=lambda text: text[::-1])

class Game:
    """TextArena's methods: players name numbers in turn, who says 7 wins."""
    def reset(self, num_players, seed=None):
        self.players, self.turn, self.over = num_players, 0, False
        self.new = {p: [(-1, f"You are {p} of {num_players}.", "PROMPT")] for p in range(num_players)}
    def get_observation(self):
        seen, self.new[self.turn] = self.new[self.turn], []
        return self.turn, seen
    def step(self, action):
        for player in self.new:
            self.new[player].append((self.turn, action, "ACTION"))
        self.over, self.winner = action == "7", self.turn
        self.turn = (self.turn + 1) % self.players
        return self.over, {}
    def close(self):
        rewards = {player: 1 if player == self.winner else -1 for player in range(self.players)}
        return rewards, {player: {"turns": 1} for player in range(self.players)}

class Telling(Game):
    """Repeats all that was said in each observation."""
    said = ""
    def get_observation(self):
        player, seen = super().get_observation()
        self.said += "".join(f"\\n[{sender}] {text}" for sender, text, _ in seen)
        return player, self.said

alone, telling, two = Game(), Telling(), adapted(Game(), players=2, opponent=lambda text: text[-1])
without = adapted(Game(), players=2)
'''
CLIENT = """
import dataclasses, sys, types
from typing import Generic, TypeVar

package = sys.modules.setdefault("openenv", types.ModuleType("openenv"))
A = TypeVar("A")

class EnvClient(Generic[A]):
    __module__ = "openenv.core.env_client"

@dataclasses.dataclass
class Say:
    message: str
    loud: bool = False

@dataclasses.dataclass
class Move:
    x: int
    y: int

@dataclasses.dataclass
class Seen:
    echoed: str
    done: bool = False
    reward: float = 0.0
    metadata: dict = dataclasses.field(default_factory=dict)

@dataclasses.dataclass
class Result:
    observation: Seen
    reward: float | None = None
    done: bool = False

class Echo(EnvClient[Say]):
    async def reset(self, **kwargs):
        return Result(Seen(f"ready {kwargs['seed']}"))
    async def step(self, action):
        return Result(Seen(action.message.upper()), 0.5, action.message == "end")
    async def close(self):
        global closed
        closed = True

class Moving(EnvClient[Move]):
    def reset(self):
        return Result(Seen("go"))
    def step(self, action):
        if action.x > 9:
            raise RuntimeError("Server error: too far (code: VALIDATION_ERROR)")
        return Result({"at": [action.x, action.y], "done": False})
    def close(self):
        pass

echo, moving = Echo(), Moving()
"""


class Played:
    """One episode, by the operations that a worker process runs."""

    def __init__(
        self,
        runner: asyncio.Runner,
        name: str,
        data: dict[str, Any] | None = None,
        limits: Any = None,
    ):
        self._runner, self._handler = runner, environment_handler(name, "environment")
        task = Task("t", [{"role": "user", "content": "?"}], data or {})
        self.first = [message["content"] for message in self.run("start", task, 2, limits or {})]

    def run(self, operation: str, *arguments: Any) -> Any:
        result = self._handler(operation, "a", *arguments)
        return self._runner.run(result) if asyncio.iscoroutine(result) else result

    def say(self, text: str) -> tuple[str, float, bool]:
        turn: Turn = self.run("step", {"role": "assistant", "content": text})
        return "|".join(one["content"] for one in turn.messages), turn.reward, turn.done


Play = Callable[..., Played]


@pytest.fixture
def play() -> Iterator[Play]:
    """Begins episodes of a name, which run on one event loop."""
    with asyncio.Runner() as runner:
        yield functools.partial(Played, runner)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("forms") / "foreign_environments.py"
    path.write_text(USER_CODE)
    return str(path)


@pytest.mark.parametrize("name", ["grid", "Grid"])
def test_gymnasium_takes_the_last_number_and_shows_what_it_renders(
    play: Play, user: str, name: str
):
    played = play(f"{user}:{name}")
    assert played.first == ["at [2]"]
    assert played.say("not 3 but 1") == ("at [1]", 0.5, False)
    assert played.say("0") == ("Error: answer with a whole number from 1 to 3", 0.0, False)
    assert played.say("none") == ("Error: answer with a whole number from 1 to 3", 0.0, False)
    assert played.say("I choose 3.") == ("at [3]", 1.5, True)
    seeded = play(f"{user}:{name}", {"seed": 5})
    assert seeded.first == ["at [5]"]
    assert play(f"{user}:{name}", {"options": {"at": 1}}).first == ["at [1]"]


def test_gymnasium_without_numbered_actions_takes_texts_or_json(play: Play, user: str):
    played = play(f"{user}:words")
    assert played.first == ["speak"]
    assert played.say(" hello ") == ('["hello", 5]', 1.0, False)
    assert played.say("<think>Or stop?</think>\n hello ") == ('["hello", 5]', 1.0, False)
    assert played.say("stop")[2]
    played = play(f"{user}:Plane")
    assert played.say("[1, 2.5]") == ("[2.0, 5.0]", 0.0, False)
    assert played.say("[1]")[0].startswith("Error: answer with an action of ")
    assert played.say("left")[0].startswith("Error: answer with an action of ")


@pytest.mark.parametrize("name", ["of_task", "of_task_later"])
def test_a_function_of_the_task_may_return_such_an_environment(play: Play, user: str, name: str):
    played = play(f"{user}:{name}", {"word": "halt"})
    assert not played.say("stop")[2]
    assert played.say("halt")[2]


def test_actions_and_observations_may_have_rules_of_their_own(play: Play, user: str):
    played = play(f"{user}:turned", {"word": "stop"})
    assert played.first == ["saw {'text': 'speak'}"]
    assert played.say("ab") == ("saw ['ba', 2]", 1.0, False)
    later = play(f"{user}:turned_later", {"word": "stop"})
    assert later.say("pots")[2]


def test_a_class_that_needs_arguments_is_refused_at_the_start(user: str):
    with pytest.raises(UserError, match="Needing is made without arguments, .* a function"):
        environment_handler(f"{user}:Needing", "environment")
    with pytest.raises(UserError, match="gymnasium:X-v0.*pip install gymnasium"):
        environment_handler("gymnasium:X-v0", "environment")
    with pytest.raises(UserError, match="address of a resources server"):
        environment_handler("nemo_gym:counter", "environment")


def test_textarena_shows_what_is_new_and_rewards_at_the_end(play: Play, user: str):
    played = play(f"{user}:alone")
    assert played.first == ["You are 0 of 1."]
    assert played.say("3") == ("(nothing to see)", 0.0, False)
    assert played.say("7") == ("", 1.0, True)
    telling = play(f"{user}:telling")
    assert telling.first == ["[-1] You are 0 of 1."]
    assert telling.say("3") == ("[0] 3", 0.0, False)


def test_other_players_need_an_opponent_who_sees_their_part(play: Play, user: str):
    played = play(f"{user}:two")
    assert played.first == ["You are 0 of 2."]
    assert played.say("3") == ("[Player 1] 3", 0.0, False)
    assert played.say("x7") == ("", -1.0, True)
    alone = play(f"{user}:without")
    with pytest.raises(UserError, match="player 1.*opponent=function"):
        alone.say("3")


def test_openenv_makes_actions_of_the_type_that_the_client_names(play: Play, tmp_path: Path):
    (tmp_path / "openenv_client.py").write_text(CLIENT)
    name = f"{tmp_path / 'openenv_client.py'}"
    echo = play(f"{name}:echo")
    assert echo.first == ["ready 2"]
    assert echo.say("hello") == ("HELLO", 0.5, False)
    assert echo.say("end") == ("END", 0.5, True)
    moving = play(f"{name}:moving")
    assert moving.say('{"x": 1, "y": 2}') == ('{"at": [1, 2]}', 0.0, False)
    assert moving.say("left")[0].startswith("Error: answer with a JSON object of x, y (")
    assert moving.say('{"x": 1}')[0].startswith("Error: answer with a JSON object of x, y (")
    assert (
        moving.say('{"x": 10, "y": 2}')[0]
        == "Error: Server error: too far (code: VALIDATION_ERROR)"
    )


class Counter(BaseHTTPRequestHandler):
    """A resources server with a session a cookie, as NeMo Gym's are."""

    counts: ClassVar[dict[str, int]] = {}
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        session = (self.headers["Cookie"] or "").partition("=")[2] or f"s{len(self.counts)}"
        status, answer = 200, {}
        if self.path == "/seed_session":
            self.counts[session] = body["initial_count"]
        elif self.path == "/add":
            if not isinstance(body.get("count"), int):
                status, answer = 422, {"detail": "count must be an integer"}
            else:
                self.counts[session] += body["count"]
                answer = {"count": self.counts[session]}
        elif self.path == "/verify":
            self.asked.append(body)
            right = float(self.counts[session] == body["expected_count"])
            answer = body | {"reward": right, "steps": len(body["response"]["output"])}
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Set-Cookie", f"session={session}")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def counter() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Counter) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


ROW = {
    "responses_create_params": {
        "input": [{"role": "user", "content": "add 2"}],
        "tools": [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}],
    },
    "initial_count": 1,
    "expected_count": 3,
}  # fmt: skip


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_nemo_gym_keeps_a_session_and_verifies_the_whole_conversation(play: Play, counter: str):
    task, problems = Checker().task(ROW)
    assert task is not None and not problems
    assert task.messages == [{"role": "user", "content": "add 2"}]
    played = play(f"nemo_gym:{counter}", task.data)
    other = play(f"nemo_gym:{counter}", task.data)
    assert played.say(call("add", count=2)) == ('{"count": 3}', 0.0, False)
    assert other.say(call("add", count="two")) == ('{"detail": "count must be an integer"}', 0.0, False)  # fmt: skip
    assert "there is no tool 'drop'; there is add" in other.say(call("drop"))[0]
    assert played.say("It is 3.") == ("", 0.0, True)
    assert played.run("state") == {"reward": 1.0, "steps": 3}
    limited = play(f"nemo_gym:{counter}", task.data, {"max_calls": 1})
    assert "only 1 calls are run" in limited.say(call("add", count=1) * 2)[0]
    assert other.run("state") == {"reward": 0.0, "steps": 4}
    output = Counter.asked[0]["response"]["output"]
    assert [one["type"] for one in output] == ["function_call", "function_call_output", "message"]
    assert json.loads(output[0]["arguments"]) == {"count": 2}
    assert output[0]["call_id"] == output[1]["call_id"]
    assert output[2]["content"][0]["text"] == "It is 3."


def test_a_nemo_gym_server_that_is_gone_is_an_error_of_the_episode(play: Play):
    with pytest.raises(UserError, match="seed_session: the server cannot be reached"):
        play("nemo_gym:http://127.0.0.1:9", ROW)


def test_rows_with_parameters_of_the_responses_api_have_messages_and_tools():
    params = ROW["responses_create_params"] | {"input": "add 2", "instructions": "Be brief."}
    task, _ = Checker().task(ROW | {"responses_create_params": params})
    assert task is not None
    roles = [message["role"] for message in task.messages]
    assert roles == ["system", "user"]
    assert task.data["tools"] == [
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    ]
    _, problems = Checker().task({"responses_create_params": {}})
    assert "messages: is missing" in problems[0]


def test_the_end_states_reward_is_the_score():
    ended = Trajectory(Task("t", []), 0, 0, state={"reward": 0.5, "steps": 3, "note": "x"})
    score = end_state.evaluate(ended.task, ended)
    assert (score.reward, score.parts) == (0.5, {"steps": 3.0})
    with pytest.raises(ValueError, match="must hold a number as 'reward', is None"):
        end_state.evaluate(ended.task, dataclasses.replace(ended, state=None))
