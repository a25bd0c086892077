"""Formats trajectories: complete as JSON lines, readable as Markdown."""

from __future__ import annotations

import collections
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rftjax.monitor import reasons
from rftjax.types import Message, Trajectory

SHOWN_CHARACTERS = 4000  # of one message in Markdown; JSON lines are not cut
SHOWN_GROUPS = 8  # rows of the table of groups


def sampled_tokens(trajectory: Trajectory) -> int:
    """Number of tokens that the policy sampled in all turns."""
    return sum(sum(sequence.sampled) for sequence in trajectory.sequences)


def trajectory_record(step: int, trajectory: Trajectory, stream: str = "train") -> dict[str, Any]:
    """Returns one trajectory as a record of rollouts/; the reward is None before scoring.

    `stream` is "train", "heldout" or the name of a further held-out set.
    """
    score = trajectory.score
    return {
        "step": step,
        "stream": stream,
        "draw": trajectory.draw,
        "task_id": trajectory.task.id,
        "sample": trajectory.sample,
        "messages": trajectory.messages,
        "sequences": [
            {
                "tokens": sequence.tokens,
                "sampled": sequence.sampled,
                "logprobs": sequence.logprobs,
                "policy_version": sequence.policy_version,
            }
            for sequence in trajectory.sequences
        ],
        "reward": score.reward if score else None,
        "parts": score.parts if score else {},
        "metrics": score.metrics if score else {},
        "valid": bool(score and score.valid),
        "reason": score.reason if score else "",
        "finish_reason": trajectory.finish_reason,
        "error": trajectory.error,
        "advantage": trajectory.advantage,
        **({"turn_advantages": trajectory.turn_advantages} if trajectory.turn_advantages else {}),
        "turn_rewards": trajectory.turn_rewards,
        "infos": trajectory.infos,
        "state": trajectory.state,
    }


def rollouts_markdown(trajectories: Sequence[Trajectory], count: int) -> str:
    """A table of a few groups, then `count` conversations: each group's best and worst in turn."""
    groups = by_draw(trajectories)
    lines = ["| draw | task | rewards | mean | tokens | finish |", "|---|---|---|---|---|---|"]
    for group in groups[:SHOWN_GROUPS]:
        lines.append("| " + " | ".join(_group_cells(group)) + " |")
    if len(groups) > SHOWN_GROUPS:
        lines.append(f"\n{len(groups) - SHOWN_GROUPS} more groups in rollouts/")
    ranked = [sorted(group, key=reward_of, reverse=True) for group in groups]
    chosen = [one for group in ranked for one in ([group[0], group[-1]] if group[1:] else group)]
    return "\n".join(lines) + "\n\n" + "\n\n".join(map(_conversation, chosen[:count]))


def commonest(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Returns the share of the commonest answer as `commonest_share`, and its mean reward, where it has valid ones, as
    `commonest_reward`; {} without trajectories. Of a turn that ended in its thinking the whole text is the answer."""
    texts = [one.answer.strip() or one.completion.strip() for one in trajectories]
    if not texts:
        return {}
    ((text, count),) = collections.Counter(texts).most_common(1)
    pairs = zip(trajectories, texts, strict=True)
    same = [one for one, said in pairs if said == text and is_valid(one)]
    found = {"commonest_share": count / len(trajectories)}
    if same:
        found["commonest_reward"] = float(np.mean([reward_of(one) for one in same]))
    return found


def dropped(trajectories: Sequence[Trajectory]) -> str:
    """Returns a text with the number of samples without a score and the commonest reason; "" without any."""
    lost = [one for one in trajectories if one.score and not one.score.valid]
    if not lost:
        return ""
    (reason, *_) = reasons.commonest((one.score.reason for one in lost if one.score), 1)
    return f"{len(lost)} of {len(trajectories)} samples have no score and are left out; {reason}"


def by_draw(trajectories: Iterable[Trajectory]) -> list[list[Trajectory]]:
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.draw, []).append(trajectory)
    return list(groups.values())


def is_valid(trajectory: Trajectory) -> bool:
    return trajectory.score is not None and trajectory.score.valid


def policy_versions(trajectories: Iterable[Trajectory]) -> collections.Counter[int]:
    """Returns how many tokens each version of the policy sampled."""
    counts = collections.Counter[int]()
    for trajectory in trajectories:
        for sequence in trajectory.sequences:
            counts.update(itertools.compress(sequence.policy_version, sequence.sampled))
    return counts


def ages(trajectories: Iterable[Trajectory], now: int) -> dict[str, float]:
    """Returns metrics of how many updates the policy `now` is ahead of those that sampled the tokens."""
    counts = policy_versions(trajectories)
    total = max(counts.total(), 1)
    return {
        "rollout/staleness": float(now - min(counts, default=now)),
        "rollout/older_share": sum(n for version, n in counts.items() if version < now) / total,
        "rollout/age_mean": sum((now - version) * n for version, n in counts.items()) / total,
    }


def reward_of(trajectory: Trajectory) -> float:
    """The reward, -inf without a valid score."""
    score = trajectory.score
    return float(score.reward) if score is not None and score.valid else -math.inf


def mean_tokens(trajectories: Sequence[Trajectory]) -> float:
    return sum(map(sampled_tokens, trajectories)) / len(trajectories)


def mean_by_name(prefix: str, records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of each name over the records that have it."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            values.setdefault(name, []).append(value)
    return {prefix + name: math.fsum(found) / len(found) for name, found in sorted(values.items())}


def to_json(value: Any) -> str:
    """Returns one line of strict JSON: NaN becomes null, unsupported types become text."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, default=_plain)
    except ValueError:
        loose = json.dumps(value, ensure_ascii=False, default=_plain)
        strict = json.loads(loose, parse_constant=lambda _: None)
        text = json.dumps(strict, ensure_ascii=False)
    return text + "\n"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def encode(text: str) -> bytes:
    """Encodes as UTF-8; a lone surrogate becomes its JSON escape."""
    return text.encode("utf-8", "backslashreplace")


def _group_cells(group: list[Trajectory]) -> list[str]:
    rewards = [reward_of(one) for one in group if is_valid(one)]
    finishes = collections.Counter(one.finish_reason for one in group)
    return [
        str(group[0].draw),
        _one_line(group[0].task.id),
        " ".join(f"{reward_of(one):.2f}" if is_valid(one) else "invalid" for one in group),
        f"{np.mean(rewards):.2f}" if rewards else "none",
        f"{mean_tokens(group):.0f}",
        ", ".join(f"{name} {count}" for name, count in finishes.items()),
    ]


def _conversation(trajectory: Trajectory) -> str:
    score = trajectory.score
    facts = [
        f"reward **{score.reward:.3g}**" if score and score.valid else "**no valid reward**",
        f"advantage {trajectory.advantage:+.3g}",
        *(
            [
                f"{_one_line(name)} {value:.3g}"
                for name, value in [*score.parts.items(), *score.metrics.items()]
            ]
            if score
            else []
        ),
        f"finish {trajectory.finish_reason or 'unknown'}",
        f"{sampled_tokens(trajectory)} tokens",
    ]
    reasons = [score.reason if score else "", trajectory.error]
    head = f"### draw {trajectory.draw}, sample {trajectory.sample}: "
    blocks = [head + _one_line(trajectory.task.id), ", ".join(facts)]
    blocks += [f"*{_one_line(reason)}*" for reason in reasons if reason]
    for message in trajectory.messages:
        blocks += [f"**{_one_line(str(message.get('role', '?')))}**", _fenced(_text_of(message))]
    return "\n\n".join(blocks)


def _text_of(message: Message) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else to_json(content).strip()
    calls = message.get("tool_calls")
    return "\n".join([text, to_json(calls).strip()]).strip() if calls else text


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any in the text, so that no text can close it."""
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]}\n... ({len(text) - SHOWN_CHARACTERS} more characters)"
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _one_line(text: str) -> str:
    shown = " ".join(text.split())[:200]
    return re.sub(r"([\\`*_|<\[\]])", r"\\\1", shown)
