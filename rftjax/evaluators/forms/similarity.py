"""Similarities of two texts from 0.0 to 1.0, by the names that OpenAI's `text_similarity` graders use.

`fuzzy_match` is rapidfuzz's ratio (an extra of this project). The others are of lower-case words: `bleu` is sentence
BLEU up to 4-grams with add-one smoothing from 2-grams on (Lin and Och 2004), `gleu` the smaller of precision and recall
of 1- to 4-grams (Wu et al. 2016), `rouge_N` and `rouge_l` the F1 of N-grams and of the longest common subsequence (Lin
2004).
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from rftjax.errors import UserError

MAX_ORDER = 4


def metric(name: str) -> Callable[[str, str], float]:
    """Returns a function of a text and its reference; raises UserError for a name that is not known."""
    known: dict[str, Callable[[str, str], float]] = {
        "fuzzy_match": fuzzy_match(),
        "bleu": bleu,
        "gleu": gleu,
        "rouge_l": rouge_l,
    } | {f"rouge_{order}": functools.partial(rouge, order=order) for order in range(1, 6)}
    if name not in known:
        raise UserError(
            f"evaluator: evaluation_metric={name!r}: must be one of {', '.join(known)}; cosine and meteor, which need a"
            " model of embeddings and word lists, come near to rouge_l, a score_model, or a function of your own that"
            " calls a library for them (evaluator='reward.py:evaluate')"
        )
    return known[name]


def fuzzy_match() -> Callable[[str, str], float]:
    """Returns rapidfuzz's ratio of two texts, imported when it is first called."""

    def ratio(text: str, reference: str) -> float:
        return _rapidfuzz().ratio(text, reference) / 100

    return ratio


@functools.cache
def _rapidfuzz() -> Any:
    try:
        return import_module("rapidfuzz.fuzz")
    except ImportError as error:
        raise UserError(
            f"fuzzy matching needs the package rapidfuzz: pip install 'rftjax[evaluators]' ({error})"
        ) from error


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def ngrams(tokens: Sequence[str], order: int) -> collections.Counter[tuple[str, ...]]:
    return collections.Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def rouge(text: str, reference: str, order: int) -> float:
    """Returns the F1 of the texts' n-grams of an order."""
    found, wanted = ngrams(words(text), order), ngrams(words(reference), order)
    return _f1((found & wanted).total(), found.total(), wanted.total())


def rouge_l(text: str, reference: str) -> float:
    """Returns the F1 of the longest common subsequence of words."""
    found, wanted = words(text), words(reference)
    row = [0] * (len(wanted) + 1)
    for word in found:
        before, row = row, [0]
        for index, other in enumerate(wanted):
            row.append(before[index] + 1 if word == other else max(row[-1], before[index + 1]))
    return _f1(row[-1], len(found), len(wanted))


def bleu(text: str, reference: str) -> float:
    """Returns sentence BLEU with smoothing and the penalty for short texts."""
    found, wanted = words(text), words(reference)
    if not found or not wanted:
        return float(found == wanted)
    logs = []
    for order in range(1, MAX_ORDER + 1):
        given = ngrams(found, order)
        extra = int(order > 1)
        right = (given & ngrams(wanted, order)).total() + extra
        if not right:
            return 0.0
        logs.append(math.log(right / (given.total() + extra)))
    return math.exp(sum(logs) / MAX_ORDER + min(0.0, 1 - len(wanted) / len(found)))


def gleu(text: str, reference: str) -> float:
    """Returns the smaller of precision and recall of all n-grams up to 4."""
    found, wanted = words(text), words(reference)
    orders = range(1, MAX_ORDER + 1)
    given = sum((ngrams(found, order) for order in orders), collections.Counter())
    asked = sum((ngrams(wanted, order) for order in orders), collections.Counter())
    most = max(given.total(), asked.total())
    return (given & asked).total() / most if most else 1.0


def _f1(common: int, found: int, wanted: int) -> float:
    return 2 * common / (found + wanted) if found + wanted else 1.0
