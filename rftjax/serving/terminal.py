"""A conversation with the model in the terminal; each turn goes on in the same cached row."""

from __future__ import annotations

import json
import queue
import sys
from collections.abc import Callable
from typing import Any

from rftjax.sampler.engine import SampledTurn
from rftjax.serving.requests import BadRequest, ChatRequest, parse
from rftjax.serving.service import Service
from rftjax.serving.turns import SERVED, Model, Recording, Turn
from rftjax.types import Message, SamplingParams

HELP = "/new begins a new conversation, /system TEXT one with a system message, /exit ends (as Ctrl-D does)"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def talk(
    service: Service,
    model: Model,
    params: SamplingParams,
    *,
    read: Callable[[str], str] = input,
    write: Callable[[str], Any] = _write,
    seed: int = 0,
) -> None:
    """Reads lines and writes answers as they come, until the end of input or /exit."""
    write(f"{model.name}: {HELP}\n")
    number, messages = 0, list[Message]()
    recording = Recording(service, model, params, (SERVED, seed, number))
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            write("\n")
            break
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        if command in ("/new", "/system"):
            recording.close()
            number += 1
            recording = Recording(service, model, params, (SERVED, seed, number))
            messages = [{"role": "system", "content": rest}] if command == "/system" else []
        elif line.startswith("/"):
            write(f"{HELP}\n")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                messages = [*asked, _answer(recording, asked, write)]
            except BadRequest as error:
                write(f"{error}\n{HELP}\n")
    recording.close()


def _answer(recording: Recording, messages: list[Message], write: Callable[[str], Any]) -> Message:
    body = {"model": recording.model.name, "messages": messages}
    asked = parse(json.dumps(body).encode(), ChatRequest)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    (place,) = recording.prompts(asked)
    turn: Turn = recording.begin(asked, place, 0, lambda *event: events.put(event))
    turn.call.future.add_done_callback(events.put)
    try:
        while isinstance(event := events.get(), tuple):
            write(turn.answer.add(*event))
        sampled: SampledTurn = event.result()
    except BaseException:
        recording.give_up(turn)
        raise
    write(turn.answer.finish(sampled))
    write("\n" if sampled.stopped else " ... (cut at sampler.max_new_tokens)\n")
    recording.finish(turn, sampled)
    return {"role": "assistant", "content": turn.answer.text}
