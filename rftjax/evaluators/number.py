r"""Reward 1.0 when the completion's final answer is the number in the row's field `answer`.

A number is an integer, a decimal, a fraction ("1/2", "\frac{1}{2}", "1 1/2") or a power of ten ("1e3", "1.5 \times
10^3"), with a sign, separators of thousands, a currency sign, a percent sign (which is dropped) or a word from
"thousand" to "trillion". Units behind a number are not compared. Everything else (sums that are not worked out, roots,
powers, ranges, pairs, times, unknowns) is no number; the evaluator `math` compares such answers.
"""

from __future__ import annotations

import decimal
import re
from fractions import Fraction

from rftjax.types import Score, Task, Trajectory

_PLAIN = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"(?:[eE][-+]?[0-9]+(?![0-9]))?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
)
# A sign counts only where no word or bracket ends before it: "5-3" holds 5 and 3.
_SIGN = r"(?:(?<![\w)}\]])[-+]|\b(?:minus|negative)\s+)?(?:[$€£¥]\s?)?(?:[-+](?=[0-9.\\]))?"
_NUMBER = re.compile(
    rf"(?<!\w)(?<![0-9][.,])(?P<sign>{_SIGN})(?:"
    rf"(?P<whole>[0-9]+\s?)?\\frac\{{?(?P<top>{_PLAIN})\}}?\{{?(?P<bottom>{_PLAIN})\}}?"
    rf"|(?P<base>{_PLAIN})\s*(?:\*|x)\s*10\^\{{?(?P<power>[-+]?[0-9]{{1,3}})\}}?"
    rf"|(?P<mixed>[0-9]+)[ ](?P<over>[0-9]+)/(?P<under>[0-9]+)"
    rf"|(?P<left>{_PLAIN})\s?/\s?(?P<right>{_PLAIN})"
    rf"|(?P<plain>{_PLAIN}))(?:\s?(?P<many>thousand|million|billion|trillion)\b)?"
)
_MANY = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NEAR = 60  # characters on each side searched for signs that a number is part of something else

# What makes a number no candidate at all: exponents, indices, ordinals, and what an answer is said not to be.
_SKIPPED_BEFORE = re.compile(r"(?:[\^_]\{?|\bnot\s+)$")
_SKIPPED_BEHIND = re.compile(r"(?:st|nd|rd|th)\b")
# What makes it part of an expression, range, pair, time or version.
_PART_BEFORE = re.compile(
    r"(?:[0-9)}\]%][ \t]*[-+*/^\u2013\u2014][ \t]*|(?<![A-Za-z])[A-Za-z][ \t]*[-+*/^][ \t]*|[0-9]:|[0-9][.,]|[0-9] or "
    r"|\\sqrt(?:\[[0-9]+\])?\{?|\u221a|\\pi[ \t]*|\u03c0)$"
)
_PART_BEHIND = re.compile(
    r"[ \t]*[-+*/^\u2013\u2014][ \t]*[-+]?(?:[0-9(.{]|\\[a-z]|[A-Za-z]\b)|[.,:][0-9]"
    r"|[ \t]*(?:\\sqrt|\u221a|\\pi|\u03c0)"
    r"|[a-ckinxyzBKM](?![A-Za-z])|\((?=[0-9a-z])|\^| or [-+]?[0-9]"
)
_PAIR_BEFORE, _PAIR_BEHIND = re.compile(r"[(\[][^()\[\]]*[0-9]\s*,\s*$"), re.compile(r"\s*[)\]]")
_ANSWER = re.compile(
    r"(?i:answer\b(?: to (?:the|this|your)\b[^.\n:]{0,80}?)?[^\w\n]{0,6}(?:is|was|would be|should be|equals|[:=]))"
)
_UNIT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?|\u00b0")


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    r"""Compares exact values: 0.50 equals 1/2.

    The final answer is what the last "\boxed{...}", "<answer>", "####" or "the answer is" marks, the last number
    where nothing is marked. The row's `answer` is a number, or a text that marks one.
    """
    wanted = _wanted(task.data.get("answer"))
    if wanted is None:
        raise ValueError(
            f"task {task.id!r}: field 'answer' is {task.data.get('answer')!r}; it must be one number, or mark it "
            "as in '#### 42'; for units and expressions use evaluator='rftjax.evaluators.math:evaluate'"
        )
    got = _final(trajectory.answer)
    reason = "" if got is not None else "the final answer is no single number"
    return Score(float(got == wanted), {"format": float(got is not None)}, reason=reason)


def _wanted(answer: object) -> Fraction | None:
    """Value of the row's answer, which must be a number as a whole."""
    if isinstance(answer, bool):
        return None
    text = _plain(str(answer))
    for mark in (_boxed(text), text.rpartition("####")[2] if "####" in text else ""):
        text = mark or text
    return _exact(text)


def _final(completion: str) -> Fraction | None:
    """Value of the completion's final answer, None where that is no number."""
    text = _plain(completion)
    if boxed := _boxed(text):
        return _exact(boxed.rpartition("=")[2])
    if "<answer>" in text:
        return _first(text.rpartition("<answer>")[2].partition("</answer>")[0])
    if "####" in text and (marked := text.rpartition("####")[2].strip()):
        return _first(marked.partition("\n")[0])
    for mark in reversed(list(_ANSWER.finditer(text))):
        if _candidates(text[mark.end() :]):
            return _first(text[mark.end() :])
    found = _candidates(text)
    return _value(text, found[-1]) if found else None


def _first(text: str) -> Fraction | None:
    """Value of the first number, or of what the sum that begins there comes to: "48/2 = 24"."""
    found = _candidates(text)
    if not found:
        return None
    line = text[: found[0].end()] + text[found[0].end() :].partition("\n")[0]
    worked_out = _value(text, found[0]) is None or line[found[0].end() :].lstrip().startswith("=")
    if worked_out and "=" in line[found[0].end() :]:
        text = line.rpartition("=")[2]
        found = _candidates(text)
    return _value(text, found[0]) if found else None


def _plain(text: str) -> str:
    """The text without LaTeX and Markdown around numbers."""
    text = text.replace("\u2212", "-").replace("\u2044", "/").replace("\u00f7", "/")
    text = re.sub(r"(?<=[0-9)])\*\*(?=[0-9(])", "^", text)
    text = re.sub(r"\*\*|__|\\[!,;]|\\left|\\right|`", "", text).replace("{,}", ",")
    text = re.sub(r"(?<![\w)*])\*([^*\s][^*\n]*)\*(?![\w(*])", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\([$%#])", r"\1", text)
    text = re.sub(r"\\times|\\cdot|[\u00d7\u00b7]", "*", text)
    text = re.sub(r"\^\{?\\circ\}?|\\circ", "\u00b0", text)
    groups = r"(?<![\w.,])[0-9]{1,3}(?:[ \u00a0\u2009\u202f][0-9]{3})+(?![0-9/]|[.,][0-9]{4})"
    return re.sub(groups, lambda found: re.sub(r"\s", ",", found[0]), text)


def _boxed(text: str) -> str:
    r"""Contents of the last \boxed{...}, empty where there is none that is closed."""
    _, mark, rest = text.rpartition("\\boxed{")
    depth = 1
    for index, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return rest[:index].strip() if mark else ""
    return ""


def _exact(text: str) -> Fraction | None:
    """Value of a text that is a number as a whole, but for a unit in LaTeX's text mode."""
    text = _UNIT.sub("", text).strip().strip("$").strip().removesuffix(".").rstrip()
    match = _NUMBER.fullmatch(text.removesuffix("%").rstrip())
    return _worth(match) if match else None


def _candidates(text: str) -> list[re.Match[str]]:
    return [
        found
        for found in _NUMBER.finditer(text)
        if not _SKIPPED_BEFORE.search(text[max(0, found.start() - _NEAR) : found.start()])
        and not _SKIPPED_BEHIND.match(text, found.end())
    ]


def _value(text: str, found: re.Match[str]) -> Fraction | None:
    """Value of a number that stands by itself, None where it is part of something else."""
    before, end = text[max(0, found.start() - _NEAR) : found.start()], found.end()
    if _PART_BEFORE.search(before) or _PART_BEHIND.match(text, end):
        return None
    if _PAIR_BEFORE.search(before) and _PAIR_BEHIND.match(text, end):
        return None
    return _worth(found)


def _worth(found: re.Match[str]) -> Fraction | None:
    """Exact value of a match; None where it divides by zero or has an exponent of thousands."""
    part = {name: text for name, text in found.groupdict().items() if text}
    sign = -1 if "-" in part.get("sign", "") or re.search("minus|neg", found["sign"]) else 1
    try:
        if "top" in part:
            value = _decimal(part["top"]) / _decimal(part["bottom"]) + int(part.get("whole", 0))
        elif "power" in part:
            value = _decimal(part["base"]) * Fraction(10) ** int(part["power"])
        elif "mixed" in part:
            value = int(part["mixed"]) + Fraction(int(part["over"]), int(part["under"]))
        elif "left" in part:
            value = _decimal(part["left"]) / _decimal(part["right"])
        else:
            value = _decimal(part["plain"])
    except (ArithmeticError, ValueError):
        return None
    return sign * value * _MANY.get(part.get("many", ""), 1)


def _decimal(text: str) -> Fraction:
    number = decimal.Decimal(text.replace(",", ""))
    if not number.is_finite() or abs(number.adjusted()) > 10_000:
        raise ArithmeticError("an exponent of thousands")
    return Fraction(number)
