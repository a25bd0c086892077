"""The agent of the spec `agent`: it leads the talk of `directory.py` itself, with the plain `openai` client."""

from __future__ import annotations

from typing import Any

from directory import reply
from openai import AsyncOpenAI

from rftjax.types import Task

TURNS = 3


async def run(task: Task, base_url: str, api_key: str, model: str) -> None:
    """Asks the model until it answers, and looks up what it wants to find; the spec's evaluator scores the answer."""
    messages: list[Any] = list(task.messages)
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        for _ in range(TURNS):
            answer = await client.chat.completions.create(model=model, messages=messages)
            messages.append(answer.choices[0].message.to_dict())
            found = reply(task, messages)
            if found is None:
                return
            messages += found
