"""Alarms on a run's metrics; each has a threshold in the section `alarms`, and 0 switches it off."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

NAMES = (
    "heldout_falls",
    "length_runs_away",
    "duplicates",
    "part_without_the_rest",
    "sampler_differs",
    "entropy_collapses",
    "truncation",
    "same_answer",
)
FULL = 0.99  # a part with at least this mean counts as reached


def find(
    lines: Sequence[Mapping[str, Any]],
    *,
    window: int = 5,
    heldout_fall: float = 0.05,
    length_factor: float = 2.0,
    duplicate_share: float = 0.5,
    part_fall: float = 0.1,
    logprob_diff: float = 0.1,
    entropy_share: float = 0.1,
    truncated_share: float = 0.5,
    truncated_rise: float = 0.2,
    same_answer_share: float = 0.5,
) -> dict[str, str]:
    """Returns the alarms at the last line of the metrics, a sentence by name; means are over `window` steps."""
    found = (
        _heldout_falls(lines, window, heldout_fall),
        _length_runs_away(lines, window, length_factor),
        _duplicates(lines, window, duplicate_share),
        _part_without_the_rest(lines, window, part_fall),
        _sampler_differs(lines, logprob_diff),
        _entropy_collapses(lines, window, entropy_share),
        _truncation(lines, window, truncated_share, truncated_rise),
        _same_answer(lines, same_answer_share),
    )
    return {name: text for name, text in zip(NAMES, found, strict=True) if text}


def stop_reason(
    lines: Sequence[Mapping[str, Any]], *, metric: str, patience: int = 0, dead_steps: int = 0
) -> str:
    """Returns why a run should end early, "" where it should go on; 0 switches a reason off.

    A run ends after `patience` evaluations in a row without a new best `metric`, and after `dead_steps` steps in a row
    without a group with variance.
    """
    values = _values(lines, metric)
    if patience and len(values) > patience and max(values[-patience:]) <= max(values[:-patience]):
        return f"{metric} has not risen above {max(values):.3f} in {patience} evaluations (eval.patience)"
    shares = _values(lines, "groups/zero_variance_share")[-dead_steps:]
    if dead_steps and len(shares) == dead_steps and min(shares) == 1.0:
        return f"no group had variance in {dead_steps} steps (eval.dead_steps)"
    return ""


def _heldout_falls(lines: Sequence[Mapping[str, Any]], window: int, fall: float) -> str:
    evaluated = [at for at, line in enumerate(lines) if line.get("eval/reward") is not None]
    if not fall or len(evaluated) < 2:
        return ""
    best = max(evaluated, key=lambda at: lines[at]["eval/reward"])
    last = evaluated[-1]
    fell = lines[best]["eval/reward"] - lines[last]["eval/reward"]
    before = _values(lines[: best + 1], "reward/mean") or _values(lines, "reward/mean")
    now = _mean(_values(lines, "reward/mean")[-window:])
    was = _mean(before[-window:] if best else before[:1])
    if fell <= fall or now <= was:
        return ""
    return (
        f"the held-out reward is {fell:.3f} below its best (step {lines[best]['step']}), while the training reward"
        f" rose from {was:.3f} to {now:.3f}: the policy learns what the evaluator misses or the training set alone;"
        " the best checkpoint is kept, and eval.patience ends a run that does not get better"
    )


def _length_runs_away(lines: Sequence[Mapping[str, Any]], window: int, factor: float) -> str:
    values = _values(lines, "rollout/completion_tokens_mean")
    if not factor or len(values) < 2 * window:
        return ""
    first, last = _mean(values[:window]), _mean(values[-window:])
    if last <= factor * first:
        return ""
    return (
        f"completions grew from {first:.0f} to {last:.0f} tokens; where longer answers are no better, start again with"
        " grpo.overlong_buffer=16 (or more tokens) or grpo.preset=dr_grpo"
    )


def _duplicates(lines: Sequence[Mapping[str, Any]], window: int, share: float) -> str:
    values = _values(lines, "rollout/duplicate_wrong_share")
    if not share or len(values) < window or _mean(values[-window:]) <= share:
        return ""
    return (
        f"{_mean(values[-window:]):.0%} of completions are wrong and copies of another one of their group, which"
        " teaches nothing; start again with grpo.entropy_weight=0.001 or a lower optim.lr"
    )


def _entropy_collapses(lines: Sequence[Mapping[str, Any]], window: int, share: float) -> str:
    """Tells of a policy certain of answers below the best reward; a low entropy of right answers is fine."""
    values = _values(lines, "entropy")
    if not share or len(values) < 2 * window:
        return ""
    first, last = _mean(values[:window]), _mean(values[-window:])
    rewards = _values(lines, "reward/mean")
    if last >= share * first or _near_best(lines, _mean(rewards[-window:])):
        return ""
    return (
        f"the entropy fell from {first:.3g} to {last:.3g} nats while the reward is {_mean(rewards[-window:]):.3f}:"
        " samples of a group hardly differ any more; start again with grpo.clip_high=0.28,"
        " grpo.entropy_weight=0.001 or a lower optim.lr"
    )


def _truncation(lines: Sequence[Mapping[str, Any]], window: int, share: float, rise: float) -> str:
    values = _values(lines, "rollout/truncated_share")
    last = values[-window:]
    high = bool(share) and len(values) >= 2 and min(last[-2:]) > share and _mean(last) > share
    first = _mean(values[:window])
    rises = bool(rise) and len(values) >= 2 * window and _mean(last) - first > rise
    if not (high or rises):
        return ""
    now = f"grew from {first:.0%} to {_mean(last):.0%}" if rises else f"is {last[-1]:.0%}"
    return (
        f"the share of answers that a token limit cut {now}: such an answer cannot be right; start again with a"
        " larger sampler.max_new_tokens and rollout.max_length, with grpo.overlong_buffer=16 (or more tokens), or with"
        " prompts that ask for short answers"
    )


def _same_answer(lines: Sequence[Mapping[str, Any]], share: float) -> str:
    """Tells of one wrong text that answers most held-out tasks, or training tasks where none are held out."""
    for prefix, kind in (("eval/", "held-out"), ("rollout/", "training")):
        found = [line for line in lines if line.get(f"{prefix}commonest_share") is not None]
        if not found or not share:
            continue
        now, reward = (
            found[-1][f"{prefix}commonest_share"],
            found[-1].get(f"{prefix}commonest_reward"),
        )
        if now <= share or reward is None or _near_best(lines, reward):
            return ""
        return (
            f"{now:.0%} of the {kind} answers are one and the same text, whose reward is {reward:.3f}; look at it in"
            " rollouts/ (python -m rftjax.compare shows it) and give less reward for it, or more rows of other kinds"
        )
    return ""


def _near_best(lines: Sequence[Mapping[str, Any]], reward: float) -> bool:
    """Whether a reward is within a tenth of the run's best sample, on the scale from its lowest mean."""
    best = max(_values(lines, "reward/max"), default=1.0)
    lowest = min(_values(lines, "reward/mean"), default=0.0)
    return best - reward <= 0.1 * (best - min(lowest, 0.0))


def _part_without_the_rest(lines: Sequence[Mapping[str, Any]], window: int, fall: float) -> str:
    """Tells of a reached part of the reward while another part, or the reward itself, falls."""
    names = sorted({name for line in lines for name in line if name.startswith("reward/part/")})
    series = {name: _values(lines, name) for name in names}
    full = [
        name
        for name, values in series.items()
        if len(values) >= window and _mean(values[-window:]) >= FULL
    ]
    if not fall or not full:
        return ""
    others = {name: values for name, values in series.items() if name not in full}
    for name, values in (others or {"reward/mean": _values(lines, "reward/mean")}).items():
        means = [_mean(values[at : at + window]) for at in range(len(values) - window + 1)]
        if means and max(means) - means[-1] > fall:
            return (
                f"{full[0]} is reached while {name} fell from {max(means):.3f} to {means[-1]:.3f}; look at the best"
                " samples in rollouts/ and give less reward for the first"
            )
    return ""


def _sampler_differs(lines: Sequence[Mapping[str, Any]], limit: float) -> str:
    values = _values(lines[-1:], "sampler/logprob_diff_mean")
    if not limit or not values or values[-1] <= limit:
        return ""
    return (
        f"sampler and trainer differ by {values[-1]:.3g} nats a token; start again with grpo.tis_cap=2.0 or"
        " model.dtype=float32"
    )


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if line.get(name) is not None]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
