"""Reads a field that names evaluators: one source, or several with names and weights.

"reward.py:evaluate" is one; "form=reward.py:form*0.2, rftjax.evaluators.number:evaluate" are two. Standard library
only: worker processes and the config's rules import this module.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re

from rftjax.errors import UserError

GRADER = ".json"  # the suffix of a source that is a file of data, without the name of a function
GYM = "reasoning_gym:"  # the beginning of a source that names a task of that package
_ENTRY = re.compile(
    r"(?:(?P<name>[A-Za-z_][\w-]*)=)?(?P<source>.*?)(?:\*(?P<weight>[^*/\\]*))?", re.DOTALL
)
# Names of functions that say nothing of what they reward.
_PLAIN = ("evaluate", "evaluate_group", "compute_score", "reward", "score", "grade")


@dataclasses.dataclass(frozen=True)
class Named:
    """One evaluator of a field: its source, and the name and weight of its reward in the sum."""

    name: str
    source: str
    weight: float = 1.0


def parse(text: str, field: str = "evaluator") -> list[Named]:
    """Returns the evaluators that a field's text names; raises UserError that names `field` for a wrong form."""
    if _is_file(text):
        return [Named(_default_name(text.strip()), text.strip())]
    found = []
    for part in text.split(","):
        match = _ENTRY.fullmatch(part.strip())
        assert match is not None
        source, weight = match["source"].strip(), match["weight"]
        if not source:
            raise UserError(
                f"{field}={text!r}: names no evaluator between two commas; "
                "write 'NAME=module:function*WEIGHT, ...'"
            )
        try:
            number = 1.0 if weight is None else float(weight)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"{field}={text!r}: the weight {weight!r} must be a finite number, as in '{source}*0.5'"
            )
        found.append(Named(match["name"] or _default_name(source), source, number))
    counts = collections.Counter(one.name for one in found)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise UserError(
            f"{field}={text!r}: two evaluators have the name {', '.join(twice)}; give each a name of its own, "
            "as in 'form=reward.py:form*0.2, answer=reward.py:answer'"
        )
    return found


def is_sum(text: str) -> bool:
    """Says whether the text is more than the source of one evaluator, so that its reward is a weighted sum."""
    if _is_file(text):
        return False
    match = _ENTRY.fullmatch(text.strip())
    return "," in text or bool(match and (match["name"] or match["weight"] is not None))


def _is_file(text: str) -> bool:
    """Says whether the text as it stands is one source in a file, whose path may have a comma or a sign of the sum."""
    text = text.strip()
    path, _, name = (text, "", "grade") if text.endswith(GRADER) else text.rpartition(":")
    named = re.fullmatch(r"[^\W\d][\w.]*", name) is not None
    return named and os.path.isfile(os.path.expanduser(path))


def _default_name(source: str) -> str:
    if source.endswith(GRADER):
        return os.path.splitext(os.path.basename(source))[0]
    module, _, name = source.rpartition(":")
    if name not in _PLAIN:
        return name
    return os.path.basename(module).removesuffix(".py").rpartition(".")[2]
