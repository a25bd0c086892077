r"""Reward 1.0 for the right label of a multiple-choice question: a letter, or a digit where the row has digits.

The label is looked for in this order: in the last "\boxed{B}" or "<answer>B</answer>"; behind the last "the answer
is" or "answer:"; before "is correct" and behind "I choose"; at the start, as in "B) Paris"; in the last "(B)", "**B**"
or "option B"; alone on the last line; at last as the text of one of the row's choices. Only labels of the row's own
choices count, and of several labels in one place, as in "A or B", none does.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from rftjax.types import Score, Task, Trajectory

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ANY: Mapping[str, str] = MappingProxyType(dict.fromkeys(_LETTERS, ""))
# Digits as labels are read as these letters, without I, which is a word.
_OF_DIGITS = dict(zip("1234567890", "ABCDEFGHJK", strict=True))
_ONE_LETTER = re.compile(r"(?<![\w'\\])[A-HJKa-k](?![\w'\u2019])")
_ONE_DIGIT = re.compile(
    r"(?<![\w.,/$%-])[0-9](?![\w%/\u00b0]|[.,:][0-9])|(?<=\$)[0-9](?=\$)"  # part of no number or price
)
_FIELDS = ("choices", "options")
# Words that follow a letter where "A" is no article and "I" no pronoun.
_AFTER = "and|as|because|but|by|due|for|from|given|if|in|is|or|since|so|that|the|this|which|with|correct|only"
_BARE = rf"(?<![\w'$\\])([A-Z])(?![\w'\u2019]|-\w| (?!(?:{_AFTER})\b)[a-z])"
_EXPLICIT = (
    r"(?<!\w)\(([A-Za-z])\)|\b(?i:option|choice|letter):? \(?([A-Z])\)?(?!\w)|(?<!\w)([A-Z])\)"
)
_NOT = re.compile(
    r"\b(?i:not|isn't|neither|nor|than|eliminated?|exclude[ds]?|rule[ds]? out) (?i:option )?\(?$"
)
_ANSWER = re.compile(
    r"(?i:\b(?:answer|ans|solution|(?:correct|right|best|my|final) (?:option|choice|letter|pick))\b"
    r"(?: (?:to|that|which|for|of) [^.\n:]{0,80}?)?[^\w\n(]{0,4}"
    r"(?:\b(?:is|was|would be|should be|must be)\b|[:=]| -(?= ))"
    r"|\b(?:correct|choice|option|response|conclusion|selected)\b[^\w\n(]{0,4}[:=])"
)
_FILLER = re.compile(
    r"\W*(?:(?i:clearly|definitely|likely|probably|most likely|therefore|the|option|choice|letter|answer)\W+)*"
    r"\(?(?:([A-Z])(?![\w'\u2019]|-\w)|([a-z])(?=\)|[.:,]?\s*(?:\n|\Z)))"
)
# What may follow a letter that ends a statement.
_END = r"(?=\s*(?:[.,;:!]|\n|\Z)|\s+(?:because|since|as|it is|it's)\b)"
_STATEMENTS = re.compile(
    r"\(?(?<![\w'])([A-Z])(?![\w'])(?:\)?:? ?\([^)\n]{0,60}\)|[):.] ?(?:(?! is )[^.;\n()]){0,60}?)?"
    r"\s+(?:is|was|must be|seems) (?:the |most |therefore |clearly )*(?i:correct|right|best|true|answer)\b"
    r"|\b(?:I|I'd|I'll|I'm|[Ww]e|[Ss]o|[Tt]hus|[Tt]herefore),?\s+(?:(?:would|will|must|to)\s+)*"
    r"(?:choose|pick|select|go with|going with|chose|picked|selected)\s+(?:(?i:option|choice|answer|letter)\s+)?"
    r"\(?([A-Z])(?![\w'])"
    rf"|\b(?i:it's|it is|it must be|that is|that's)\s+\(?([A-Z])\)?{_END}"
    r"|(?:\b(?i:think|believe|guess|say|probably|likely|perhaps|maybe|so|thus|hence|therefore|leaving|leaves)\b[,:]?"
    rf"|->|=>|\u2192)\s+\(?([A-Z])\)?{_END}"
)
_START = re.compile(r"\A\W*(?:([A-Z])(?:[).:,]|\s*\Z|\s*\n|\s+[-\u2013\u2014(])|([a-z])\)\s)")
_LAST_LINE = re.compile(r"(?:\A|\n)\W*(?:(?:[Qq]uestion )?[0-9]+[.:)]\s*)?([A-Z])\W*\Z")
_LISTED = re.compile(r"(?m)^[ \t>*-]*\(?([A-Z])[).:] ?\S|(?<=[\s(])\(?([A-Z])\) ?\S")
_TOGETHER = re.compile(
    r"(?<!\w)\(?([A-Z])\)?\s*(?:\bor\b|\band\b|/|,|&|\+)\s*(?:(?i:maybe|perhaps|possibly|option|choice) )*"
    r"\(?(?:([B-HJ-Z])\)?(?!\w|')|([AI])\)?(?!\w|'| [a-z]))"
)


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Compares the chosen label with the row's `answer`: a label, or an index counted from 0 where labels are letters.

    The row's choices are its field `choices` or `options` (a list of texts, or labels with their texts), else the
    letters that its last user message lists. The part `format` is 1.0 where the completion names one label.
    """
    choices = _choices(task)
    wanted = _wanted(task, choices)
    got = _chosen(trajectory.answer, choices)
    reason = "" if got else "no label found, or several"
    return Score(float(got == wanted), {"format": float(bool(got))}, reason=reason)


def _choices(task: Task) -> dict[str, str]:
    """Labels of the row's choices with their texts; every letter where the row does not show them."""
    given = next((task.data[name] for name in _FIELDS if task.data.get(name)), None)
    if isinstance(given, Mapping):
        labels, texts = given.get("label"), given.get("text")
        if isinstance(labels, (list, tuple)) and isinstance(texts, (list, tuple)):
            given = dict(zip(labels, texts, strict=False))
        found = {str(label).strip().upper(): str(text) for label, text in given.items()}
        for labels in (_LETTERS, "".join(_OF_DIGITS)):
            if found and all(label in labels and len(label) == 1 for label in found):
                return found
    elif isinstance(given, (list, tuple)) and len(given) <= len(_LETTERS):
        texts = (re.sub(r"\A\(?[A-Z][).:]\s*", "", str(text)) for text in given)
        return dict(zip(_LETTERS, texts, strict=False))
    question = next((m for m in reversed(task.messages) if m.get("role") == "user"), {})
    listed = {"".join(pair) for pair in _LISTED.findall(str(question.get("content", "")))}
    count = next(i for i, letter in enumerate([*_LETTERS, ""]) if letter not in listed)
    return dict.fromkeys(_LETTERS[:count], "") if count > 1 else dict(_ANY)


def _wanted(task: Task, choices: Mapping[str, str]) -> str:
    answer = task.data.get("answer")
    digits = _are_digits(choices)
    label = answer.strip(" ().:\n").upper() if isinstance(answer, str) else ""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < 26 and not digits:
        label = _LETTERS[answer]
    if label not in choices:
        # Beside digits a number may be a label or an index.
        form = (
            f"one of the row's labels {', '.join(choices)}, as a text"
            if digits
            else f"a letter, or an index counted from 0, of the row's choices {', '.join(choices)}"
        )
        raise ValueError(f"task {task.id!r}: field 'answer' is {answer!r}; choice needs {form}")
    return label


def _are_digits(choices: Mapping[str, str]) -> bool:
    return not any(label in _LETTERS for label in choices)


def _chosen(completion: str, choices: Mapping[str, str] = _ANY) -> str:
    """Label that the completion names, empty where it names none or several."""
    text = _plain(completion)
    label_of = {label: label for label in choices}
    shown = text
    if _are_digits(choices):
        label_of = {_OF_DIGITS[label]: label for label in choices}
        shown = _plain(_digits_as_letters(completion))
    for found in _places(shown):
        letters = [letter for letter in found if letter in label_of]
        if letters:
            return label_of[letters[-1]] if "" not in found else ""
    lines = [line.strip() for line in text.strip().split("\n")]
    named = [
        k for k, v in choices.items() if v and _folded(v) in (_folded(text), _folded(lines[-1]))
    ]
    return named[0] if len(named) == 1 else ""


def _digits_as_letters(text: str) -> str:
    """The text with letters for the digits that stand alone, and without the letters that stood alone before."""
    text = _ONE_LETTER.sub(lambda found: 2 * found[0].lower(), text)
    return _ONE_DIGIT.sub(lambda found: _OF_DIGITS[found[0]], text)


def _places(text: str) -> Iterator[list[str]]:
    """Yields the letters of each place where an answer may stand, surest first; "" among them says: several."""
    for mark, end in (("\\boxed{", "}"), ("<answer>", "</answer>")):
        _, found, rest = text.rpartition(mark)
        if found:
            inside = rest.partition(end)[0]
            one = re.match(r"\W*([A-Za-z])(?:\W*\Z|[).:,]\s)", inside)
            letters = [one[1].upper()] if one else _in_sentence(inside)
            yield letters if len(set(letters)) < 2 else ["", *letters]
    for mark in reversed(list(_ANSWER.finditer(text))):
        if letters := _behind(text[mark.end() :]):
            yield letters
            break
    statements = [found for found in _STATEMENTS.finditer(text) if not _negated(text, found)]
    yield [_letter(found) for found in statements]
    listed = {found[1] or found[2] for found in _LISTED.finditer(text)}
    if len(text.strip()) == 1:
        yield [text.strip().upper()]
    if len(listed) < 2 and (start := _START.match(text)):
        yield [_letter(start)]
    explicit = [found for found in re.finditer(_EXPLICIT, text) if not _negated(text, found)]
    pairs = [found.span() for found in _TOGETHER.finditer(text)]
    if explicit and any(first <= explicit[-1].start() < last for first, last in pairs):
        yield ["", _letter(explicit[-1])]
    yield [_letter(found) for found in explicit]
    if last := _LAST_LINE.search(text):
        yield [last[1]]


def _behind(text: str) -> list[str]:
    """Letters behind "the answer is": right there, else in that sentence, else in the next line."""
    lines = [line for line in text.split("\n") if line.strip(" .:*")]
    for line in lines[:2]:
        sentence = re.split(
            r"(?<=[^A-Z\W])[.?!](?:\s|\Z)|(?<=[).])[.?!]?\s(?=[A-Z][a-z])", line, maxsplit=1
        )[0]
        at_once = _FILLER.match(line)
        if at_once and at_once[2]:
            return [at_once[2].upper()]
        if at_once and re.match(_BARE + r"|([A-Z])\)", line[at_once.start(1) :]):
            pair = _TOGETHER.match(line, at_once.start(1))
            return [at_once[1]] if pair is None else ["", at_once[1]]
        if letters := _in_sentence(sentence):
            return letters
        if line is lines[0] and sentence.strip(" .:*"):
            return []
    return []


def _in_sentence(text: str) -> list[str]:
    if several := _several(text):
        return several
    for form in (_EXPLICIT, _BARE):
        found = [_letter(one) for one in re.finditer(form, text) if not _negated(text, one)]
        if found:
            return found
    return []


def _several(text: str) -> list[str]:
    found = _TOGETHER.search(text)
    if found and found[1] != (found[2] or found[3]) and not _negated(text, found):
        return ["", found[1], found[2] or found[3]]
    return []


def _negated(text: str, found: re.Match[str]) -> bool:
    return bool(_NOT.search(text[max(0, found.start() - 40) : found.start()]))


def _letter(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group).upper()


def _plain(text: str) -> str:
    r"""The text without LaTeX and Markdown around letters: "**B**" and "\text{B}" become "(B)" and "B"."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
    text = re.sub(r"\\(?:text|textbf|mathbf|mathrm|mbox|textrm|bf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"[*_`\"']{1,3}\(?([A-Z])[).:]?\)?[*_`\"']{1,3}", r"(\1)", text)
    return re.sub(r"\*\*|__|[$`]|\\[()\[\]]", "", text)


def _folded(text: str) -> str:
    return " ".join(text.split()).strip(" .").casefold()
