"""A user's function that sees every step: `hooks=file.py:name`, called as hook(step, metrics, trajectories, state)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rftjax.errors import UserError
from rftjax.types import TrainState, Trajectory
from rftjax.workers.user_code import check_arguments, load_function, traceback_text

CALLED = "hook(step, metrics, trajectories, state)"


class Hook:
    """Calls the function that `spec` names after each step's update; an empty `spec` names none.

    It runs in the training process, may look at everything and must leave the state as it is. What it returns, None or
    numbers by name, is recorded: under `hook/NAME`, or under the name itself where that has a slash. Construction
    raises UserError where the function does not import or takes other arguments; a call raises it, after the step was
    saved, where the function raises or returns something else.
    """

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._function = load_function(spec, field="hooks") if spec else None
        if self._function is not None:
            check_arguments(self._function, CALLED, f"hooks={spec!r}")

    def __call__(
        self,
        step: int,
        metrics: Mapping[str, Any],
        trajectories: Sequence[Trajectory],
        state: TrainState,
    ) -> dict[str, float]:
        """Returns what the function wants recorded of a step."""
        if self._function is None:
            return {}
        try:
            found = self._function(step, dict(metrics), list(trajectories), state)
        except Exception as error:
            raise self._fault(step, f"raised this\n{traceback_text(error)}\n") from error
        if found is None:
            return {}
        if not isinstance(found, Mapping):
            raise self._fault(step, f"returned {type(found).__name__}, not numbers by name or None")
        return {self._name(step, name): self._number(step, name, found[name]) for name in found}

    def _name(self, step: int, name: Any) -> str:
        if not isinstance(name, str) or not name or name == "step":
            raise self._fault(
                step, f"returned the name {name!r}, which is no text that can be recorded"
            )
        return name if "/" in name else f"hook/{name}"

    def _number(self, step: int, name: str, value: Any) -> float:
        if getattr(value, "ndim", None) == 0:  # a scalar of JAX or NumPy
            value = value.item()
        if not isinstance(value, bool | int | float) or not math.isfinite(value):
            raise self._fault(step, f"returned {name}={value!r:.100}, which is no finite number")
        return float(value)

    def _fault(self, step: int, what: str) -> UserError:
        return UserError(
            f"hooks={self._spec!r}: the function, called with step {step}, {what}; the step is saved: correct the"
            " function, and the same command goes on"
        )
