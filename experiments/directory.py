"""Tasks and environment of the multi-turn spec: questions that only a staff directory can answer.

The model asks `find NAME`, reads the entry, looks up the manager it names, and answers with one word. Without the
turns there is nothing to answer from. Held-out tasks speak of people and cities that no training task has.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from experiments.facts import VALUES
from rftjax.types import Message, Task

FIELDS = ("city", "job")
QUESTION = "What is the {field} of {name}'s manager?"
ENTRY = "{name}: {job}, {city}, manager {manager}"


def rows(split: str = "train") -> Iterator[dict[str, Any]]:
    """Yields the rows of a split: 2,000 to train on, 200 held out; `directory` is the environment's alone."""
    rng = random.Random(f"directory/{split}")
    chosen = {
        key: [v for i, v in enumerate(text.split()) if (i % 5 == 4) == (split == "heldout")]
        for key, text in VALUES.items()
    }
    for number in range({"train": 2000, "heldout": 200}[split]):
        name, manager, boss = rng.sample(chosen["name"], 3)
        entries = {
            person: {"job": rng.choice(chosen["job"]), "city": rng.choice(chosen["city"]), "manager": above}
            for person, above in ((name, manager), (manager, boss))
        }
        field = rng.choice(FIELDS)
        yield {
            "id": f"{split}-{number}",
            "messages": [
                {"role": "system", "content": "Ask with find NAME, then answer with one word."},
                {"role": "user", "content": QUESTION.format(field="job", name="Ada")},
                {"role": "assistant", "content": "find Ada"},
                {"role": "user", "content": ENTRY.format(name="Ada", job="clerk", city="Kyiv", manager="Bob")},
                {"role": "assistant", "content": "find Bob"},
                {"role": "user", "content": ENTRY.format(name="Bob", job="judge", city="Bern", manager="Eve")},
                {"role": "assistant", "content": "judge"},
                {"role": "user", "content": QUESTION.format(field=field, name=name)},
            ],
            "directory": entries,
            "answer": entries[manager][field],
        }


def reply(task: Task, messages: list[Message]) -> list[Message] | None:
    """Answers `find NAME` with the person's entry; anything else is the model's answer and ends the episode."""
    command, _, name = messages[-1]["content"].strip().partition(" ")
    if command != "find":
        return None
    entry = task.data["directory"].get(name)
    text = ENTRY.format(name=name, **entry) if entry else f"{name}: no entry"
    return [{"role": "user", "content": text}]
