"""OpenAI's graders in JSON: `string_check`, `text_similarity`, `python`, `score_model`, `label_model` and `multi`.

The code of a `python` grader runs in the worker process, like any evaluator; `rank_model` is this project's own kind.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rftjax.errors import UserError
from rftjax.evaluators.forms import model_graders, similarity
from rftjax.evaluators.forms.form import Form, as_score, is_coroutine
from rftjax.evaluators.forms.templates import Values, filled, values_of
from rftjax.types import Score, Trajectory

Grade = Callable[[Values], Any]  # a number or a Score, or an awaitable of one
Total = Callable[[Mapping[str, float]], float]


def form(grader: Mapping[str, Any]) -> Form:
    """Returns the form of a grader; raises UserError for one that is not understood."""
    if grader.get("type") == "rank_model":
        return model_graders.ranking(grader)
    parts: dict[str, Grade] = {}
    total: Total | None = None
    if grader.get("type") == "multi":
        given = _field(grader, "graders", dict)
        parts = {name: _grade(one, f"graders.{name}") for name, one in given.items()}
        total = _formula(_field(grader, "calculate_output", str), set(parts))
    else:
        parts = {str(grader.get("name") or grader.get("type")): _grade(grader, "")}
    concurrent = any(map(is_coroutine, parts.values()))

    async def rate_async(trajectories: Sequence[Trajectory]) -> list[Score]:
        (trajectory,) = trajectories
        values = values_of(trajectory)
        grades = [grade(values) for grade in parts.values()]
        later = iter(await asyncio.gather(*filter(inspect.isawaitable, grades)))
        results = [next(later) if inspect.isawaitable(one) else one for one in grades]
        return [_score(dict(zip(parts, results, strict=True)), total)]

    def rate(trajectories: Sequence[Trajectory]) -> list[Score]:
        (trajectory,) = trajectories
        values = values_of(trajectory)
        return [_score({name: grade(values) for name, grade in parts.items()}, total)]

    return Form("OpenAI grader", rate_async if concurrent else rate, concurrent=concurrent)


def _score(grades: Mapping[str, Any], total: Total | None) -> Score:
    """Returns the sum of a multi grader with its grades as parts, and what the models' answers cost together."""
    found = {name: as_score(value) for name, value in grades.items()}
    metrics: dict[str, float] = {}
    for score in found.values():
        for name, value in score.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
    rewards = {name: score.reward for name, score in found.items()}
    if total is None:
        (reward,) = rewards.values()
        return Score(reward, metrics=metrics)
    return Score(total(rewards), rewards, metrics=metrics)


def _grade(grader: Any, place: str) -> Grade:
    kind = grader.get("type") if isinstance(grader, Mapping) else None
    makers: dict[str, Callable[[Mapping[str, Any]], Grade]] = {
        "string_check": _string_check,
        "text_similarity": _text_similarity,
        "python": _python,
        "score_model": model_graders.grade,
        "label_model": model_graders.grade,
    }
    if kind not in makers:
        raise UserError(
            f"evaluator: the grader{' ' + place if place else ''} has type {kind!r}; it must be one of "
            f"{', '.join(makers)}, or at the top multi or rank_model"
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
