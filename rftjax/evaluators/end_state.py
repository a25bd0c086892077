"""Reward of an environment that knows its own at the end."""

from __future__ import annotations

from rftjax.types import Score, Task, Trajectory


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Scores by the field `reward` of the environment's end state; its other numbers become parts.

    Raises ValueError where the state has no such field.
    """
    state = trajectory.state
    if not isinstance(state, dict) or not isinstance(state.get("reward"), (int, float)):
        raise ValueError(
            f"the environment's end state must hold a number as 'reward', is {state!r:.200}; "
            "return one from state(), or name another evaluator"
        )
    parts = {
        name: float(value)
        for name, value in state.items()
        if name != "reward" and isinstance(value, (bool, int, float))
    }
    return Score(float(state["reward"]), parts)
