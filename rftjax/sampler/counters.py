"""What a sampler did."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Counters:
    """What the device did since the last reset, in tokens, steps and calls."""

    decode_steps: int = 0
    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    copied_rows: int = 0
    evicted_rows: int = 0
    dispatches: int = 0
