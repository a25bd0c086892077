"""Tasks and tool of the spec `tools`: the questions of `directory.py`, whose entries are found by a call.

The embedded model's chat template shows no tools. So the system message says what there is and how a call is written,
and two examples show it. A template that shows tools needs neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from directory import ENTRY, EXAMPLES, QUESTION
from directory import rows as questions

from rftjax.environments import tools
from rftjax.types import Message, Task

SYSTEM = """You have one tool: find(name) returns a person's entry. Call it with
<tool_call>{"name": "find", "arguments": {"name": ...}}</tool_call>"""


def find(name: str, task: Task) -> str:
    """Returns a person's entry in the directory.

    Args:
        name: the person's name
    """
    entry = task.data["directory"].get(name)
    return ENTRY.format(name=name, **entry) if entry else f"{name}: no entry"


environment = tools(find)


def rows(split: str = "train") -> Iterator[dict[str, Any]]:
    """Yields the rows of a split: 2,000 to train on, 200 held out; `directory` is for the tool alone."""
    shown: list[Message] = [{"role": "system", "content": SYSTEM}]
    for name, field, entry in EXAMPLES:
        call = json.dumps({"name": "find", "arguments": {"name": name}})
        shown += [
            {"role": "user", "content": QUESTION.format(field=field, name=name)},
            {"role": "assistant", "content": f"<tool_call>{call}</tool_call>"},
            {"role": "tool", "content": ENTRY.format(name=name, **entry)},
            {"role": "assistant", "content": entry[field]},
        ]
    for row in questions(split):
        yield row | {"messages": [*shown, row["messages"][-1]]}
