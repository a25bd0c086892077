"""Groups the reasons why samples have no score: texts that differ only in numbers or quotes become one line."""

from __future__ import annotations

import re
from collections.abc import Iterable

SHOWN = 200  # characters of a reason
# In this order: quoted texts, addresses, numbers and places.
_VARYING = (
    (re.compile(r"(?<!\w)(['\"])(?:\\.|(?!\1).)*\1"), r"\1…\1"),
    (re.compile(r"\b0x[0-9a-fA-F]+\b"), "…"),
    (re.compile(r"(?<![A-Za-z_])[-+]?\d+(?:[.,:]\d+)*(?:e[-+]?\d+)?"), "…"),
)


def first_line(reason: str) -> str:
    """Returns the first line of a reason that has text."""
    return next((line.strip() for line in reason.splitlines() if line.strip()), "no reason given")


def general(reason: str) -> str:
    """Returns the first line of a reason with quoted texts, addresses and numbers replaced."""
    text = first_line(reason)
    for pattern, replacement in _VARYING:
        text = pattern.sub(replacement, text)
    return text


def commonest(reasons: Iterable[str], most: int = 3) -> list[str]:
    """Returns lines "COUNT x REASON", commonest first, and a line that counts the rest.

    A group shows its full text where all its reasons are equal, else the general form.
    """
    groups: dict[str, list[str]] = {}
    for reason in reasons:
        groups.setdefault(general(reason), []).append(first_line(reason))
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    lines = []
    for kind, found in ranked[:most]:
        text = found[0] if len(set(found)) == 1 else kind
        lines.append(f"{len(found)} x {text if len(text) <= SHOWN else text[: SHOWN - 1] + '…'}")
    left = sum(len(found) for _, found in ranked[most:])
    return lines + [f"{left} x {len(ranked) - most} other reasons"] * bool(left)
