"""OpenAI's graders in JSON: `string_check`, `text_similarity`, `python`, `score_model`, `label_model` and `multi`.

Templates read `{{ item.FIELD }}`, the row's fields, and `{{ sample.output_text }}`, `output_json`, `output_tools` and
`choices`; paths go on by `.name` and `[index]`. A path that is not there is an error of its sample. The code of a
`python` grader runs in the worker process, like any evaluator.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rftjax.errors import UserError
from rftjax.evaluators.forms import similarity
from rftjax.evaluators.forms.form import Form, is_coroutine, number
from rftjax.types import Score, Trajectory

Values = dict[str, Any]  # {"item": ..., "sample": ...}
Grade = Callable[[Values], Any]  # a number, or an awaitable of one

_TEMPLATE = re.compile(r"\{\{\s*(.+?)\s*\}\}")
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")


def form(grader: Mapping[str, Any]) -> Form:
    """Returns the form of a grader; raises UserError for one that is not understood."""
    parts: dict[str, Grade] = {}
    total: Callable[[Mapping[str, float]], float] | None = None
    if grader.get("type") == "multi":
        given = _field(grader, "graders", dict)
        parts = {name: _grade(one, f"graders.{name}") for name, one in given.items()}
        total = _formula(_field(grader, "calculate_output", str), set(parts))
    else:
        parts = {str(grader.get("name") or grader.get("type")): _grade(grader, "")}
    concurrent = any(map(is_coroutine, parts.values()))

    async def rate_async(trajectories: Sequence[Trajectory]) -> list[Score]:
        (trajectory,) = trajectories
        values = {"item": item_of(trajectory), "sample": sample_of(trajectory)}
        grades = [grade(values) for grade in parts.values()]
        found = await asyncio.gather(*filter(inspect.isawaitable, grades))
        later = iter(found)
        results = [next(later) if inspect.isawaitable(one) else one for one in grades]
        return [_score(dict(zip(parts, results, strict=True)), total)]

    def rate(trajectories: Sequence[Trajectory]) -> list[Score]:
        (trajectory,) = trajectories
        values = {"item": item_of(trajectory), "sample": sample_of(trajectory)}
        return [_score({name: grade(values) for name, grade in parts.items()}, total)]

    return Form("OpenAI grader", rate_async if concurrent else rate, concurrent=concurrent)


def _score(grades: dict[str, Any], total: Callable[[Mapping[str, float]], float] | None) -> Score:
    parts = {name: number(value, f"the grade of {name!r}") for name, value in grades.items()}
    if total is None:
        (reward,) = parts.values()
        return Score(reward)
    return Score(total(parts), parts)


def _grade(grader: Any, place: str) -> Grade:
    kind = grader.get("type") if isinstance(grader, Mapping) else None
    makers = {
        "string_check": _string_check,
        "text_similarity": _text_similarity,
        "python": _python,
    }
    if kind not in makers:
        raise UserError(
            f"evaluator: the grader{' ' + place if place else ''} has type {kind!r}; it must be one of "
            f"{', '.join(makers)} or multi (which stands at the top only)"
        )
    return makers[kind](grader)


def _field(grader: Mapping[str, Any], name: str, kind: type) -> Any:
    value = grader.get(name)
    if not isinstance(value, kind) or not value:
        raise UserError(
            f"evaluator: the grader of type {grader.get('type')!r} needs the field {name!r} "
            f"({kind.__name__}), and has {value!r}"
        )
    return value


def _string_check(grader: Mapping[str, Any]) -> Grade:
    checks: dict[str, Callable[[str, str], bool]] = {
        "eq": operator.eq,
        "ne": operator.ne,
        "like": lambda text, wanted: wanted in text,
        "ilike": lambda text, wanted: wanted.casefold() in text.casefold(),
    }
    name = _field(grader, "operation", str)
    if name not in checks:
        raise UserError(
            f"evaluator: a string_check has the operation {name!r}; it must be one of {', '.join(checks)}"
        )
    text, wanted = _field(grader, "input", str), _field(grader, "reference", str)
    return lambda values: float(checks[name](filled(text, values), filled(wanted, values)))


def _text_similarity(grader: Mapping[str, Any]) -> Grade:
    compare = similarity.metric(_field(grader, "evaluation_metric", str))
    text, wanted = _field(grader, "input", str), _field(grader, "reference", str)
    return lambda values: compare(filled(text, values), filled(wanted, values))


def _python(grader: Mapping[str, Any]) -> Grade:
    names: dict[str, Any] = {"__name__": "grader"}
    exec(compile(_field(grader, "source", str), "<grader>", "exec"), names)
    grade = names.get("grade")
    if not callable(grade):
        raise UserError("evaluator: the source of a python grader must define grade(sample, item)")
    return lambda values: grade(values["sample"], values["item"])


def item_of(trajectory: Trajectory) -> Values:
    """Returns the row: its fields, with `messages` (the prompt) and `id`."""
    task = trajectory.task
    return {"id": task.id, "messages": task.messages, **task.data}


def sample_of(trajectory: Trajectory) -> Values:
    """Returns what the model said in the form that templates read."""
    said = [one for one in trajectory.messages if one.get("role") == "assistant"]
    last = said[-1] if said else {}
    try:
        parsed = json.loads(trajectory.completion)
    except ValueError:
        parsed = None
    return {
        "output_text": trajectory.completion,
        "output_json": parsed if isinstance(parsed, dict) else {},
        "output_tools": last.get("tool_calls") or [],
        "choices": [{"index": 0, "finish_reason": trajectory.finish_reason, "message": dict(last)}],
    }


def filled(template: str, values: Values) -> str:
    """Replaces the variables of a template; raises ValueError for a path that is not there."""

    def one(match: re.Match[str]) -> str:
        found: Any = values
        for name, index in _STEP.findall(match[1]):
            try:
                found = found[int(index)] if index else found[name]
            except (KeyError, IndexError, TypeError):
                there = ", ".join(map(str, found)) if isinstance(found, dict) else repr(found)
                raise ValueError(
                    f"the template's {match[0]} is not there: no {name or index!r} in {there:.200}"
                ) from None
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return _TEMPLATE.sub(one, template)


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}


def _formula(text: str, names: set[str]) -> Callable[[Mapping[str, float]], float]:
    """Returns the function of a `calculate_output`: numbers, graders' names, + - * / ^ and a few functions."""

    def refuse(what: str) -> UserError:
        return UserError(
            f"evaluator: calculate_output={text!r}: {what}; it may hold numbers, the names of the graders "
            f"({', '.join(sorted(names))}), + - * / ^ and {', '.join(_FUNCTIONS)}"
        )

    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
    except SyntaxError:
        raise refuse("is no formula") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            sound = (
                isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
            )
        elif isinstance(node, ast.Name):
            sound = node.id in names or node.id in _FUNCTIONS
        elif isinstance(node, ast.Constant):
            sound = isinstance(node.value, (int, float))
        else:
            sound = isinstance(node, (ast.BinOp, ast.UnaryOp, ast.Load, *_OPERATORS))
        if not sound:
            shown = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
            raise refuse(f"{shown} is not allowed")

    def value(node: ast.AST, found: Mapping[str, float]) -> float:
        if isinstance(node, ast.Constant):
            assert isinstance(node.value, (int, float))
            return node.value
        if isinstance(node, ast.Name):
            return found[node.id]
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](value(node.left, found), value(node.right, found))
        if isinstance(node, ast.UnaryOp):
            return _OPERATORS[type(node.op)](value(node.operand, found))
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        return _FUNCTIONS[node.func.id](*(value(one, found) for one in node.args))

    return lambda found: value(tree, found)
