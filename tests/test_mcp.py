"""Tools of MCP servers, which are real ones written with the package `mcp`."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rftjax.environments import Environments, mcp, mcp_servers, tools
from rftjax.errors import UserError
from rftjax.types import Task, Turn
from rftjax.workers.pool import WorkerError

pytest.importorskip("mcp", reason="the package mcp (extra mcp) is not installed")

SERVER = """
import os, sys, time
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("counter")
total = 0

@server.tool()
def add(number: int, note: str = "") -> str:
    "Adds a number to the total."
    global total
    total += number
    return f"the total is {total} {os.environ.get('UNIT', '')}".strip()

@server.tool()
def point() -> dict[str, int]:
    return {"x": 1, "y": 2}

@server.tool()
def fail() -> str:
    raise ToolError("no such city")

@server.tool()
def picture() -> list:
    return ["here it is", Image(data=b"123", format="png")]

@server.tool()
def die() -> str:
    os._exit(3)

@server.tool()
def hang() -> str:
    while True:
        time.sleep(1)

@server.tool()
def think() -> str:
    time.sleep(3)
    return "done"

if len(sys.argv) > 1:
    server.run(transport="streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
else:
    server.run(transport="stdio")
"""
USER_CODE = """
import sys
from rftjax.environments import mcp

here = mcp(command=[sys.executable, "server.py"], env={"UNIT": "m"}, cwd=FOLDER)
listening = mcp(url=URL)
missing = mcp(command=["no-such-program"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mcp")
    (folder / "server.py").write_text(SERVER)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server that listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(folder / "server.py"), str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp", server
        server.kill()


def user_file(folder: Path, url: str = "http://127.0.0.1:9/mcp") -> str:
    text = USER_CODE.replace("FOLDER", repr(str(folder))).replace("URL", repr(url))
    (folder / "user.py").write_text(text)
    return str(folder / "user.py")


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def say(environments: Environments, key: str, text: str) -> Turn:
    return environments.step(key, [{"role": "assistant", "content": text}]).result(30)


def servers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "server.py" in " ".join(process.cmdline()) and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


def ended() -> bool:
    """Waits until no server is left."""
    until_s = time.monotonic() + 20
    while servers() and time.monotonic() < until_s:
        time.sleep(0.05)
    return not servers()


def contents(turn: Turn) -> list[str]:
    assert all(message["role"] == "tool" for message in turn.messages)
    return [message["content"] for message in turn.messages]


@pytest.fixture(scope="module")
def here(folder: Path) -> Iterator[Environments]:
    """Episodes with a server process each."""
    with Environments(f"{user_file(folder)}:here", timeout_s=60.0) as environments:
        yield environments
    assert not servers()


def test_each_episode_has_a_session_of_its_own_and_leaves_no_process(here: Environments):
    for key in ("a", "b"):
        here.start(key, Task("t", []), 0).result(60)
    assert contents(say(here, "a", call("add", number=2))) == ["the total is 2 m"]
    assert contents(say(here, "a", call("add", number=3))) == ["the total is 5 m"]
    assert contents(say(here, "b", call("add", number=1))) == ["the total is 1 m"]
    assert len(servers()) == 2
    with pytest.raises(WorkerError, match="the server is gone"):
        say(here, "a", call("die"))
    here.close_episode("a")
    assert contents(say(here, "b", call("add", number=1))) == ["the total is 2 m"]
    assert say(here, "b", "that is all").done
    here.finish_episode("b").result(30)
    assert ended()


def test_text_structure_pictures_and_errors_become_tool_messages(here: Environments):
    here.start("a", Task("t", []), 0).result(60)
    wanted = ["point", "fail", "picture", "nothing"]
    point, fail, picture, nothing = contents(say(here, "a", "".join(map(call, wanted))))
    assert json.loads(point) == {"x": 1, "y": 2}
    assert fail.startswith("Error: ") and "no such city" in fail
    assert picture == "here it is\n[image: image/png]"
    assert "there is no tool 'nothing'; there is add, " in nothing
    (wrong,) = contents(say(here, "a", call("add", number="many")))
    assert wrong.startswith("Error: ") and "number" in wrong
    here.close_episode("a")
    assert ended()


def double(number: int) -> int:
    return 2 * number


def test_functions_and_a_server_make_one_environment(folder: Path):
    command = [sys.executable, str(folder / "server.py")]
    joined = tools(double, mcp(command, prefix="far_", include=["add"]))
    described = {one["function"]["name"]: one["function"] for one in joined.schemas}
    assert list(described) == ["double", "far_add"]
    assert described["far_add"]["description"] == "Adds a number to the total."
    parameters = described["far_add"]["parameters"]
    assert parameters["properties"] == {"number": {"type": "integer"}, "note": {"type": "string"}}
    assert parameters["required"] == ["number"]

    async def episode() -> Turn:
        episode = joined(Task("t", []), 0)
        await episode.reset()
        text = call("far_add", number=4) + call("double", number=4)
        turn = await episode.step({"role": "assistant", "content": text})
        await episode.close()
        return turn

    assert contents(asyncio.run(episode())) == ["the total is 4", "8"]
    assert not servers()


def test_a_tool_may_take_longer_than_a_server_may_to_list_its_tools(
    address: tuple[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
):
    far = tools(mcp(url=address[0]))
    assert far.schemas
    monkeypatch.setattr(mcp_servers, "LIST_S", 1.0)

    async def episode() -> Turn:
        episode = far(Task("t", []), 0)
        await episode.reset()
        turn = await episode.step({"role": "assistant", "content": call("think")})
        await episode.close()
        return turn

    assert contents(asyncio.run(episode())) == ["done"]


def test_a_server_that_listens_is_reached_and_one_that_hangs_or_goes_costs_its_sample(
    folder: Path, address: tuple[str, subprocess.Popen[bytes]]
):
    url, server = address
    with Environments(f"{user_file(folder, url)}:listening", timeout_s=4.0) as environments:
        for key in ("a", "b"):
            environments.start(key, Task("t", []), 0).result(60)
        with pytest.raises(WorkerError, match="overran"):
            say(environments, "b", call("hang"))
        environments.close_episode("b")
        assert contents(say(environments, "a", call("add", number=2))) == ["the total is 2"]
        server.kill()
        with pytest.raises(WorkerError, match="the server is gone"):
            say(environments, "a", call("add", number=2))


def test_a_server_that_cannot_be_used_is_refused_before_training(folder: Path):
    program = [sys.executable, str(folder / "server.py")]
    for server, told in (
        (mcp(["no-such-program"]), "must start and list its tools, but FileNotFoundError"),
        (
            mcp(program, include=["add", "subtract"]),
            "names subtract, .* has not; it has add, point",
        ),
        (mcp(url="http://127.0.0.1:9/mcp"), "must start and list its tools, but"),
    ):
        with pytest.raises(UserError, match=told):
            _ = server.schemas
    with pytest.raises(UserError, match="environment=.*must start and list its tools"):
        Environments(f"{user_file(folder)}:missing", timeout_s=30.0)


def test_a_server_is_a_command_or_an_address_and_two_tools_need_two_names():
    for arguments in ({}, {"command": "python server.py"}, {"command": ["a"], "url": "http://b"}):
        with pytest.raises(UserError, match="either a list of arguments or a URL"):
            mcp(**arguments)

    def add() -> int:
        return 1

    one = mcp(command=["x"])
    one.servers[0].schemas = tools(add).schemas
    with pytest.raises(UserError, match="two tools are named add.*prefix"):
        _ = tools(add, one).schemas
