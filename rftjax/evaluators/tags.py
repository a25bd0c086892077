"""Reward 1.0 for a completion that has each of its tags once, closed, and in their order."""

from __future__ import annotations

import re

from rftjax.types import Score, Task, Trajectory

DEFAULT = ("think", "answer")


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Looks for the row's `tags` (a list of names, else "think" and "answer") with text between them.

    Text outside of the tags does not count. Each tag is a part: 1.0 where it is opened and closed once.
    """
    tags = task.data.get("tags", DEFAULT)
    if (
        not isinstance(tags, (list, tuple))
        or not all(isinstance(one, str) and one for one in tags)
        or not tags
    ):
        raise ValueError(f"task {task.id!r}: field 'tags' is {tags!r}; it must be a list of names")
    text = trajectory.completion
    whole = {
        tag: re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.S) for tag in tags
    }
    parts = {
        tag: float(
            len(found) == 1
            and bool(found[0].strip())
            and text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1
        )
        for tag, found in whole.items()
    }
    order = "".join(rf"<{re.escape(tag)}>.*?</{re.escape(tag)}>.*?" for tag in tags)
    right = all(parts.values()) and re.search(order, text, re.S) is not None
    return Score(float(right), parts)
