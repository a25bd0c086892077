"""Graders that ask a model: OpenAI's `score_model` and `label_model`, and `rank_model`, which orders a group's answers.

Beside OpenAI's fields (`model`, `input`, `sampling_params`, `range`, `labels`, `passing_labels`) they take `base_url`,
`api_key_env`, `concurrency`, `retries`, `timeout_s` and `cache` (false: ask again; or a folder).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rftjax.errors import UserError
from rftjax.evaluators.forms.form import GROUP, Form
from rftjax.evaluators.forms.judge import Answer, Judge
from rftjax.evaluators.forms.templates import Values, filled, values_of
from rftjax.types import Message, Score, Trajectory

KINDS = ("score_model", "label_model", "rank_model")
_OBJECT = re.compile(r"\{[^{}]*\}")


def grade(grader: Mapping[str, Any]) -> Callable[[Values], Awaitable[Score]]:
    """Returns the coroutine function of a grader of one sample."""
    judge, template = _judge(grader), _template(grader)
    if grader["type"] == "label_model":
        labels: Any = grader.get("labels")
        passing: Any = grader.get("passing_labels")
        if not _texts(labels) or not _texts(passing) or not set(passing) <= set(labels):
            raise UserError(
                "evaluator: a label_model needs labels and passing_labels, lists of texts, the second part of the"
                f" first, and has {labels!r} and {passing!r}"
            )

        def read(answer: Answer) -> float:
            label = _result(answer, "label", labels)
            return float(label in passing)

        form = f'{{"label": LABEL}}, where LABEL is one of {json.dumps(labels)}'
    else:
        low, high = _range(grader)

        def read(answer: Answer) -> float:
            score = _number(answer)
            if not low <= score <= high:
                raise ValueError(f"the judge gave {score:g}, which is not from {low:g} to {high:g}")
            return score

        form = f'{{"result": NUMBER}}, where NUMBER is from {low:g} to {high:g}'

    async def graded(values: Values) -> Score:
        answer = await judge.ask([*_messages(template, values), _asked(form)])
        return Score(read(answer), metrics=answer.metrics)

    return graded


def ranking(grader: Mapping[str, Any]) -> Form:
    """Returns the form that orders the answers of a group in one call: 1.0 for the best, 0.0 for the worst.

    The answers are shown in an order that depends on the draw alone; equal ones are shown once and get the same.
    """
    judge, template = _judge(grader), _template(grader)

    async def rate(trajectories: Sequence[Trajectory]) -> list[Score]:
        first = trajectories[0]
        texts = sorted({one.answer for one in trajectories})
        random.Random(f"{first.task.id} {first.draw}").shuffle(texts)
        if len(texts) == 1:
            return [Score(0.5) for _ in trajectories]
        shown = "\n\n".join(f"[{number}]\n{text}" for number, text in enumerate(texts, start=1))
        values = values_of(first) | {"samples": shown}
        messages = _messages(template, values)
        if shown not in "".join(str(one["content"]) for one in messages):
            messages.append({"role": "user", "content": shown})
        form = (
            f'{{"order": [NUMBER, ...]}}: all numbers from 1 to {len(texts)}, the best answer first'
        )
        answer = await judge.ask([*messages, _asked(form)])
        order = _result(answer, "order")
        if not isinstance(order, list) or sorted(map(str, order)) != sorted(
            str(number) for number in range(1, len(texts) + 1)
        ):
            raise ValueError(f"the judge's order of {len(texts)} answers is {order!r:.100}")
        rewards = {
            texts[int(number) - 1]: 1 - place / (len(texts) - 1)
            for place, number in enumerate(order)
        }
        each = {name: value / len(trajectories) for name, value in answer.metrics.items()}
        return [Score(rewards[one.answer], metrics=dict(each)) for one in trajectories]

    return Form("ranking by a model", rate, GROUP, concurrent=True)


def _judge(grader: Mapping[str, Any]) -> Judge:
    model = grader.get("model")
    if not isinstance(model, str) or not model:
        raise UserError(
            f"evaluator: a grader of type {grader.get('type')!r} needs the field 'model', and has {model!r}"
        )
    cache = grader.get("cache", True)
    folder = Path(cache) if isinstance(cache, str) else None
    if cache is True:
        from rftjax.config.fields import cache_folder

        folder = Path(cache_folder()) / "judge"
    sampling = dict(grader.get("sampling_params") or {})
    if "max_completions_tokens" in sampling:  # as OpenAI's graders spell it
        sampling["max_tokens"] = sampling.pop("max_completions_tokens")
    given = {
        name: grader[name]
        for name in ("base_url", "concurrency", "retries", "timeout_s")
        if name in grader
    }
    if "api_key_env" in grader:
        given["key_variable"] = grader["api_key_env"]
    return Judge(model, sampling=sampling, cache=folder, **given)


def _template(grader: Mapping[str, Any]) -> list[Message]:
    given = grader.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if (
        not isinstance(given, list)
        or not all(isinstance(one, dict) and "content" in one for one in given)
        or not given
    ):
        raise UserError(
            f"evaluator: a grader of type {grader.get('type')!r} needs the field 'input', a list of messages, and has"
            f" {given!r:.200}"
        )
    return [{"role": one.get("role", "user"), "content": _text(one["content"])} for one in given]


def _text(content: Any) -> str:
    parts = content if isinstance(content, list) else [content]
    return "\n".join(one if isinstance(one, str) else str(one.get("text", "")) for one in parts)


def _messages(template: Sequence[Message], values: Values) -> list[Message]:
    return [{**one, "content": filled(one["content"], values)} for one in template]


def _asked(form: str) -> Message:
    return {"role": "user", "content": f"End your answer with one JSON object: {form}."}


def _range(grader: Mapping[str, Any]) -> tuple[float, float]:
    given = grader.get("range") or [0.0, 1.0]
    if not isinstance(given, list) or len(given) != 2 or not given[0] < given[1]:
        raise UserError(
            f"evaluator: the range of a score_model is {given!r}; it must be a list of the lowest and the highest score"
        )
    return float(given[0]), float(given[1])


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _result(answer: Answer, name: str, choices: Sequence[str] = ()) -> Any:
    """Returns the field of the last JSON object that has it, or else a choice that is all of the answer."""
    for text in reversed(_OBJECT.findall(answer.text)):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if name in found and (not choices or found[name] in choices):
            return found[name]
    if answer.text.strip() in choices:
        return answer.text.strip()
    raise ValueError(f"the judge's answer has no {name}: {answer.text.strip()[-200:]!r}")


def _number(answer: Answer) -> float:
    try:
        return float(answer.text.strip())
    except ValueError:
        return float(_result(answer, "result"))
