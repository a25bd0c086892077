"""User functions inside the algorithm: `grpo.baseline` and `grpo.loss` by "module:name" or "file.py:name"."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rftjax.errors import UserError
from rftjax.grpo import LossInputs
from rftjax.workers.user_code import check_arguments, load_function, traceback_text


def baseline(spec: str) -> str | Callable[..., Any]:
    """Returns the function `baseline(rewards, group_ids) -> (B,)` that is named, or the name of a built-in one."""
    if ":" not in spec:
        return spec
    function = _guarded(spec, "grpo.baseline")
    check_arguments(function, "baseline(rewards, group_ids)", f"grpo.baseline={spec!r}")
    return function


def loss_term(spec: str) -> Callable[[LossInputs], Any] | None:
    """Returns the function `term(inputs: grpo.LossInputs) -> (B, T)` that is named, None for "".

    Raises ValueError where it cannot be traced on inputs that have everything but reference log-probabilities.
    """
    if not spec:
        return None
    term = _guarded(spec, "grpo.loss")
    numbers = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    shapes: dict[str, Any] = dict.fromkeys(LossInputs._fields, numbers)
    shapes["mask"] = jax.ShapeDtypeStruct((2, 3), jnp.bool_)
    shapes["weights"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    found = jax.eval_shape(term, LossInputs(**shapes))
    if getattr(found, "shape", None) != numbers.shape:
        raise UserError(
            f"grpo.loss={spec!r}: must return one number a token, of shape (B, T) like inputs.logprobs, and returned"
            f" {found}; leave sums and means to grpo.aggregate"
        )
    return term


def check(fields: Mapping[str, Any]) -> None:
    """Raises ValueError where a function that the section grpo names cannot be used."""
    baseline(fields["baseline"])
    loss_term(fields["loss"])


def _guarded(spec: str, field: str) -> Callable[..., Any]:
    """Returns the function, what it raises said to be the user's."""
    function = load_function(spec, field=field)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise UserError(
                f"{field}={spec!r}: must not raise, and raised this; correct it and start again\n"
                + traceback_text(error)
            ) from error

    return call
