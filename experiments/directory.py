"""Tasks and environment of the multi-turn spec: questions that only a staff directory can answer.

The model has to ask `find NAME`, read the entry that comes back and answer with one word of it. Without the turns there
is nothing to answer from. Held-out tasks speak of people, jobs and cities that no training task has.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from facts import VALUES

from rftjax.types import Message, Task

QUESTION = "Find the {field} of {name}."
ENTRY = "{name}: {job}, {city}"
EXAMPLES = (
    ("Ada", "city", {"job": "clerk", "city": "Kyiv"}),
    ("Bob", "job", {"job": "judge", "city": "Bern"}),
)


def rows(split: str = "train") -> Iterator[dict[str, Any]]:
    """Yields the rows of a split: 2,000 to train on, 200 held out; `directory` is for the environment alone."""
    rng = random.Random(f"directory/{split}")
    # Every fifth value belongs to the held-out tasks.
    chosen = {
        key: [v for i, v in enumerate(text.split()) if (i % 5 == 4) == (split == "heldout")]
        for key, text in VALUES.items()
    }
    shown: list[Message] = []
    for name, field, entry in EXAMPLES:
        shown += [
            {"role": "user", "content": QUESTION.format(field=field, name=name)},
            {"role": "assistant", "content": f"find {name}"},
            {"role": "user", "content": ENTRY.format(name=name, **entry)},
            {"role": "assistant", "content": entry[field]},
        ]
    for number in range({"train": 2000, "heldout": 200}[split]):
        name, field = rng.choice(chosen["name"]), rng.choice(("city", "job"))
        entry = {"job": rng.choice(chosen["job"]), "city": rng.choice(chosen["city"])}
        question = {"role": "user", "content": QUESTION.format(field=field, name=name)}
        yield {
            "id": f"{split}-{number}",
            "messages": [*shown, question],
            "directory": {name: entry},
            "answer": entry[field],
        }


def reply(task: Task, messages: list[Message]) -> list[Message] | None:
    """Answers `find NAME` with the person's entry; anything else is the model's answer and ends the episode."""
    command, _, name = messages[-1]["content"].strip().partition(" ")
    if command != "find":
        return None
    entry = task.data["directory"].get(name)
    text = ENTRY.format(name=name, **entry) if entry else f"{name}: no entry"
    return [{"role": "user", "content": text}]
