"""A reward for the right number (or choice) at the end of a solution, with the strictness of Eval Protocol's own.

Answers are those in <answer> tags, else in boxes, else behind "####", else every number of the text. Several answers to
a single truth, alternatives with "or", and further numbers beside the right one score 0.0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from rftjax.evaluators.forms.stand_in.models import EvaluateResult, MetricResult
from rftjax.evaluators.forms.stand_in.rewards.said import text_of
from rftjax.evaluators.forms.stand_in.typed_interface import reward_function

Found = tuple[str, float | str]  # what the text says, and its value: a number, or a choice

_NUM = r"-?\d+(?:\.\d+)?"
_FRAC = rf"\\frac\{{({_NUM})\}}\{{({_NUM})\}}"
_FREE = r"(?<![a-zA-Z0-9_])"  # no letter, digit or underscore before it
_UNIT = r"(?:\s*([a-zA-Z%]+))?"
_VARIABLES = frozenset("xyzabcntqpruvw")  # a letter behind a number that makes it a coefficient
_TAGGED = re.compile(r"<(answer|ans)\b[^>]*>(.*?)</\1>", re.I | re.S)
_BOXED = re.compile(r"\\boxed\s*\{\s*((?:[^{}]|\{[^{}]*\})*?)\s*\}")
_MARKED = re.compile(rf"####\s*(-?\d{{1,3}}(?:,\d{{3}})*(?:\.\d+)?|{_NUM})")
_FORMULA = re.compile(r"\$\$(.*?)\$\$|\$(.*?)\$", re.S)
_POWER = re.compile(rf"({_NUM})\s*\\times\s*10\^\{{(.*?)\}}")
_PLAIN = re.compile(rf"{_FREE}({_NUM})(?![a-zA-Z0-9_])")
# Numbers of running text, the kinds in their order of precedence; the last group is a unit.
_KINDS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_FREE}(-?\d+\.?\d*[eE][-+]?\d+){_UNIT}",
        r"(?<!\d/)(?<!\d)(?<!\.)(-?\d+)\s*/\s*(-?\d+)(?!\.\d)(?!\d*/)(?:\s+(?!(?:and|or)\b)([a-zA-Z%]+)\b)?",
        rf"{_FREE}(-?\d{{1,3}}(?:,\d{{3}})*(?:\.\d+)?){_UNIT}",
        rf"{_FREE}(?<!,\d{{3}})(-?\d+\.\d+)(?!\d*[eE]){_UNIT}",
        rf"{_FREE}(?<!\d\.)(-?\d+)(?!\.\d)(?![eE][-+]?\d+)(?!,\d{{3}})(?!\s*/\s*\d+){_UNIT}",
    )
)


@reward_function
def math_reward(
    messages: list[Any],
    *,
    ground_truth: str,
    tolerance: float = 0.001,
    absolute_tolerance: float = 1e-8,
    require_units: bool = False,
    **_: Any,
) -> EvaluateResult:
    """Scores 1.0 within the tolerances, less up to one more `tolerance` away, else 0.0."""
    text = text_of(messages)
    if text is None or not ground_truth:
        return _result(0.0, "no answer, or no ground truth", {"error": 0.0})
    metrics = {"extracted_original_answers": 0.0, "extracted_generated_answers": 0.0}
    wanted, made = extract_numbers(ground_truth), extract_numbers(text)
    if not wanted or not made:
        return _result(0.0, "no number in the answer or in the ground truth", metrics)

    def close(one: Any, other: Any) -> bool:
        both = isinstance(one, float) and isinstance(other, float)
        return both and math.isclose(one, other, rel_tol=tolerance, abs_tol=absolute_tolerance)

    boxed = next((one for one in made if _is_boxed(one) and close(one[1], wanted[0][1])), None)
    lenient = len(wanted) == 1 and _is_boxed(wanted[0]) and boxed is not None
    chosen = [boxed] if lenient and boxed else made
    if lenient:
        metrics["demo_leniency_info"] = 1.0
    several = sum(isinstance(value, float) for _, value in made) > 1
    offered = len(chosen) == 1 and isinstance(chosen[0][1], str) and " or " in chosen[0][1].lower()
    if " or " in text.lower() and several and not offered:
        return _result(
            0.0, "several numbers with 'or'", metrics | {"strictness_penalty_unboxed_or": 0.0}
        )
    if len(wanted) == 1 and len(chosen) > 1:
        return _result(0.0, "several answers", metrics | {"strictness_penalty_ambiguity": 0.0})

    def likeness(one: Found, other: Found) -> float:
        if isinstance(one[1], str) or isinstance(other[1], str):
            return float(
                str(one[1]).lower() == str(other[1]).lower() and type(one[1]) is type(other[1])
            )
        if require_units and _has_unit(*one) != _has_unit(*other):
            return 0.0
        if close(one[1], other[1]):
            return 1.0
        away = abs(one[1] - other[1])
        allowed = absolute_tolerance if one[1] == 0 else tolerance * abs(one[1])
        return max(0.0, 1.0 - min(1.0, away / allowed))

    best = max(likeness(one, other) for one in wanted for other in chosen)
    strange = any(
        isinstance(value, float) and not any(close(value, right) for _, right in wanted)
        for _, value in chosen
    )
    if best == 1.0 and strange and not lenient:
        best = 0.0
        metrics["strictness_penalty_conflicting_answers"] = 0.0
    return _result(best, f"likeness {best:.3f}", metrics | {"answer_comparison": best})


def extract_numbers(text: str) -> list[Found]:
    """Returns the answers of a text, those of the surest kind that it has."""
    if tagged := [found for match in _TAGGED.finditer(text) for found in _in_tag(match)]:
        return tagged
    boxes = list(_BOXED.finditer(text))
    if boxes:
        found = [one for match in boxes for one in _in_box(match)]
        numbers = [value for _, value in found if isinstance(value, float)]
        same = all(math.isclose(one, numbers[0], rel_tol=1e-9, abs_tol=1e-9) for one in numbers)
        return found[:1] if len(numbers) == len(found) and same else found
    marked: list[Found] = [
        (one[0], float(one[1].replace(",", ""))) for one in _MARKED.finditer(text)
    ]
    return marked or _anywhere(text)


def _in_tag(match: re.Match[str]) -> Iterator[Found]:
    inner = re.sub(r"^(?:\$+|\(+|\[+)|[$)\]]+$", "", match[2].strip()).strip()
    value = _number(inner)
    value = _fraction(inner) if value is None else value
    if value is None and re.fullmatch(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?", inner):
        value = float(inner.replace(",", ""))
    if value is None and (unit := re.fullmatch(rf"({_NUM}) *[a-zA-Z%]+", inner)):
        value = float(unit[1])
    if value is not None:
        yield match[0], value


def _in_box(match: re.Match[str]) -> Iterator[Found]:
    content = match[1].strip()
    if " or " in content.lower():
        yield match[0], content
    elif re.fullmatch("[A-Ea-e]", content):
        yield match[0], content.upper()
    else:
        value = _fraction(content)
        value = _number(content) if value is None else value
        if value is None and (unit := re.fullmatch(rf"({_NUM})\s*[a-zA-Z%]+", content)):
            value = float(unit[1])
        if value is not None:
            yield match[0], value


def _number(text: str) -> float | None:
    if re.fullmatch(_NUM, text):
        return float(text)
    parts = re.fullmatch(rf"({_NUM})\s*/\s*({_NUM})", text)
    return float(parts[1]) / float(parts[2]) if parts and float(parts[2]) else None


def _fraction(text: str) -> float | None:
    parts = re.fullmatch(_FRAC, text)
    return float(parts[1]) / float(parts[2]) if parts and float(parts[2]) else None


def _anywhere(text: str) -> list[Found]:
    """Returns the numbers of formulas and of running text from left to right, the longest where several begin."""
    spans: list[tuple[int, int, int, str, float]] = []

    def add(kind: int, start: int, end: int, shown: str, value: float) -> None:
        spans.append((start, start - end, kind, shown, value))

    for formula in _FORMULA.finditer(text):
        group = 2 if formula[1] is None else 1
        inside, at = formula[group], formula.start(group)
        stripped = inside.strip()
        if not (stripped.startswith("\\boxed{") and stripped.endswith("}")):
            for one in re.finditer(_FRAC, inside):
                if float(one[2]):
                    add(1, at + one.start(), at + one.end(), one[0], float(one[1]) / float(one[2]))
            for one in _POWER.finditer(inside):
                if (power := _float(one[2])) is not None:
                    add(2, at + one.start(), at + one.end(), one[0], float(one[1]) * 10**power)
            for one in _PLAIN.finditer(inside):
                if not _is_coefficient(inside, one.end(1), ""):
                    add(3, at + one.start(1), at + one.end(1), one[1], float(one[1]))
    for kind, pattern in enumerate(_KINDS, start=4):
        for one in pattern.finditer(text):
            unit = one[pattern.groups] or ""
            if _is_coefficient(text, one.end(1), unit):
                continue
            if kind != 5:
                add(kind, one.start(), one.end(), one[0], float(one[1].replace(",", "")))
            elif float(one[2]):
                add(kind, one.start(), one.end(), one[0], float(one[1]) / float(one[2]))
    found: list[Found] = []
    covered = -1
    for start, length, _, shown, value in sorted(spans, key=lambda one: one[:3]):
        if start >= covered:
            found.append((shown, value))
            covered = start - length
    return found


def _is_coefficient(text: str, end: int, unit: str) -> bool:
    """Says whether a number that ends at `end` stands before a variable."""
    if len(unit) == 1 and unit.lower() in _VARIABLES:
        return True
    behind = re.compile(r" ?([a-zA-Z])(?![^\W_])").match(text, end)
    return behind is not None and behind[1].lower() in _VARIABLES


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_boxed(found: Found) -> bool:
    return found[0].startswith("\\boxed{") and isinstance(found[1], float)


def _has_unit(shown: str, value: float | str) -> bool:
    """Says whether anything but a number or "or" follows the number in what was found."""
    if shown.startswith("\\boxed{") and shown.endswith("}"):
        shown = shown[7:-1].strip()
    assert isinstance(value, float)
    whole = str(int(value)) if value == int(value) else str(value)
    for term in (str(value), whole):
        _, found, behind = shown.partition(term)
        word = behind.strip().split(" ")[0]
        if found and word and not word.replace(".", "", 1).isdigit() and word.lower() != "or":
            return True
    return False


def _result(score: float, reason: str, metrics: dict[str, float]) -> EvaluateResult:
    found = {name: MetricResult(score=value, reason=reason) for name, value in metrics.items()}
    return EvaluateResult(score=score, reason=reason, metrics=found)
