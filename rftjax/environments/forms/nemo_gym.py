"""NeMo Gym's resources servers over HTTP: `/seed_session`, a POST to `/NAME` for each tool call, and `/verify`.

A row holds what such a dataset's row holds: `responses_create_params` and the fields that the server's verification
reads. The session is the server's cookie. `/verify` is asked when the episode is over, however it ended; its answer
is the trajectory's state, whose `reward` is taken by `rftjax.evaluators.end_state`.
"""

from __future__ import annotations

import asyncio
import http.cookiejar
import json
import time
import urllib.error
import urllib.request
from typing import Any

from rftjax.environments.calls import tool_calls
from rftjax.environments.limits import Limits
from rftjax.errors import UserError
from rftjax.types import Message, Task, Turn


class Server:
    """A factory of episodes at one address."""

    asynchronous = True
    has_state = True

    def __init__(self, url: str, field: str = "environment"):
        if not url.startswith(("http://", "https://")):
            raise UserError(
                f"{field}='nemo_gym:{url}': must be the address of a resources server; "
                "write nemo_gym:http://127.0.0.1:8000"
            )
        self._url = url.rstrip("/")

    def __call__(self, task: Task, seed: int) -> Episode:
        """Returns the environment of one episode."""
        return Episode(self._url, task)


class Episode:
    """One session of a server."""

    limits = Limits()

    def __init__(self, url: str, task: Task):
        self._url, self._row = url, dict(task.data)
        self._params = dict(self._row.get("responses_create_params") or {})
        if "input" not in self._params:
            self._params["input"] = [
                {"role": one["role"], "content": one["content"]} for one in task.messages
            ]
        self._row["responses_create_params"] = self._params
        tools = self._params.get("tools") or task.data.get("tools") or []
        self._tools = [tool.get("function", tool).get("name", "") for tool in tools]
        self._output: list[dict[str, Any]] = []
        jar = http.cookiejar.CookieJar()
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(jar)
        )

    async def reset(self) -> list[Message]:
        """Opens the session with the row."""
        await self._post("/seed_session", self._row)
        return []

    async def step(self, message: Message) -> Turn:
        """Runs the calls of a message one after the other; a message without calls ends the episode."""
        calls = self.limits.first(tool_calls(message, self._tools))
        answers = []
        if not calls:
            self._output.append(_message(message.get("content") or "", len(self._output)))
        for call in calls:
            number = f"call_{len(self._output)}"
            arguments = json.dumps(call.get("arguments", {}))
            self._output.append(
                {"type": "function_call", "id": number, "call_id": number, "status": "completed",
                 "name": call.get("name", ""), "arguments": arguments}
            )  # fmt: skip
            try:
                within_s = self.limits.tool_timeout_s or None
                told = await asyncio.wait_for(self._answer(call), within_s)
            except TimeoutError:
                told = json.dumps({"error": self.limits.late})
            self._output.append({"type": "function_call_output", "call_id": number, "output": told})
            answers.append({"role": "tool", "content": told, "name": call.get("name", "")})
        return Turn(answers, done=not calls)

    async def state(self) -> dict[str, Any]:
        """Has the conversation verified; returns what the server says of it, without what it was sent."""
        response = {
            "id": "resp_0",
            "created_at": time.time(),
            "model": self._params.get("model") or "policy",
            "object": "response",
            "output": self._output,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": self._params.get("tools") or [],
        }
        text = await self._post("/verify", self._row | {"response": response})
        said = json.loads(text)
        return {name: value for name, value in said.items() if name not in (*self._row, "response")}

    async def _answer(self, call: dict[str, Any]) -> str:
        if "problem" in call:
            return json.dumps({"error": call["problem"]})
        if call["name"] not in self._tools:
            known = ", ".join(self._tools) or "none"
            return json.dumps({"error": f"there is no tool {call['name']!r}; there is {known}"})
        return await self._post(f"/{call['name']}", call["arguments"], told=True)

    async def _post(self, path: str, body: Any, *, told: bool = False) -> str:
        return await asyncio.to_thread(self._post_now, path, body, told)

    def _post_now(self, path: str, body: Any, told: bool) -> str:
        """Sends JSON; an answer that refuses a tool's call is `told` to the model, others raise UserError."""
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request) as answer:
                return answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode("utf-8", "replace")
            if told:
                return text
            raise UserError(f"{self._url}{path}: status {error.code}: {text[:500]}") from None
        except OSError as error:
            raise UserError(f"{self._url}{path}: the server cannot be reached: {error}") from None


def _message(text: str, number: int) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {
        "type": "message",
        "id": f"msg_{number}",
        "role": "assistant",
        "status": "completed",
        "content": content,
    }
