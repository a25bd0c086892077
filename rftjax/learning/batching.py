"""Trajectories into arrays: each group's common prefix is laid out once, every sequence keeps a row of its own.

Packing is a layout of the forward pass only; `update.logprobs` puts its results back into one row a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rftjax import types
from rftjax.errors import UserError
from rftjax.learning import credit
from rftjax.types import Batch, Pack, Trajectory


class _Row(NamedTuple):
    """One sequence and where it goes."""

    index: int  # row of the loss
    sequence: types.Sequence
    scored: int  # tokens to train on


class _Room(NamedTuple):
    """The capacity of a packed row, or a need for it: tokens, and scored positions."""

    tokens: int
    scored: int

    def holds(self, other: _Room) -> bool:
        return other.tokens <= self.tokens and other.scored <= self.scored

    def without(self, other: _Room) -> _Room:
        return _Room(self.tokens - other.tokens, self.scored - other.scored)


class _Bundle(NamedTuple):
    """Sequences that share their first `prefix` tokens."""

    prefix: int
    rows: list[_Row]

    @property
    def needs(self) -> _Room:
        tokens = self.prefix + sum(len(row.sequence.tokens) - self.prefix for row in self.rows)
        return _Room(tokens, sum(row.scored for row in self.rows))


def make_batch(
    trajectories: Sequence[Trajectory],
    *,
    rows: int,
    max_length: int,
    pack_tokens: int = 512,
    pack_scored: int = 0,
    pack_rows: int = 1,
    pack_unit: int = 1,
    share_prefix: bool = True,
    mask_truncated: bool = False,
    skip_zero: bool = False,
    temperature: float = 0.0,
    by_turn: bool = False,
    experts: tuple[int, int, str] | None = None,
    longest: int = 0,
) -> Batch:
    """Lays out the valid trajectories' sequences in `rows` loss rows of `max_length` tokens.

    A packed row takes `pack_tokens` tokens, or the first of `widths` that holds the longest sequence, and
    `pack_scored` of `pack_tokens` may be trained on (0: all; see `most_scored`); a micro-batch has `pack_rows` of
    them. Its tokens are filled up to a multiple of `pack_unit`. Shapes depend on the settings and the width alone,
    while there are no more sequences than `rows`. `longest` is a length that the width holds whatever the sequences
    are. `mask_truncated` trains on nothing of a trajectory that a token limit cut. `skip_zero` leaves sequences of
    advantage 0 out of the packed rows, as those without a token to train on always are: they still count in the
    loss's denominators, which are taken from `sampled_BT`.
    `temperature` is that of tasks without one of their own; 0.0 where no task has any, and the batch then names none.
    `by_turn` gives every token the advantage of its turn. `experts` (`Config.choices`) are laid out to be replayed; a
    token of which a sequence has none gets -1, its last one among them, which the sampler has not computed.
    """
    used: list[tuple[int, types.Sequence]] = []
    advantages, weights, trained, temperatures = [], [], [], []
    shares: list[float] = []
    teaches: list[bool] = []
    own_advantages: list[np.ndarray] = []
    for trajectory in trajectories:
        if trajectory.score is not None and not trajectory.score.valid:
            continue
        own = sum(map(sum, (sequence.sampled for sequence in trajectory.sequences)))
        own_advantages += credit.of_tokens(trajectory) if by_turn else []
        for sequence in trajectory.sequences:
            shares.append(sum(sequence.sampled) / max(own, 1))
            _check(sequence, trajectory, max_length)
            used.append((trajectory.draw, sequence))
            advantages.append(trajectory.advantage)
            teaches.append(trajectory.teaches)
            weights.append(trajectory.task.weight)
            temperatures.append(trajectory.task.temperature or temperature)
            trained.append(not (mask_truncated and trajectory.finish_reason == "length"))
    B = -(-max(len(used), 1) // rows) * rows
    sampled_BT = np.zeros((B, max_length), bool)
    sampler_logprobs_BT = np.zeros((B, max_length), np.float32)
    advantages_B, weights_B = np.zeros(B, np.float32), np.zeros(B, np.float32)
    temperatures_B = np.full(B, temperature, np.float32)
    temperatures_B[: len(used)] = temperatures
    shares_B = np.zeros(B, np.float32)
    shares_B[: len(used)] = shares
    for index, (_, sequence) in enumerate(used):
        count = len(sequence.tokens)
        if trained[index]:
            sampled_BT[index, :count] = sequence.sampled
        sampler_logprobs_BT[index, :count] = sequence.logprobs
        advantages_B[index], weights_B[index] = advantages[index], weights[index]
    scored = sampled_BT.sum(axis=1).tolist()
    longest = max(longest, *(len(sequence.tokens) for _, sequence in used), 1)
    lengths = widths(pack_tokens, max_length, pack_unit)
    room = _room(lengths, pack_tokens, pack_scored, _Room(longest, max(scored)))
    packed = [
        (draw, _Row(index, sequence, scored[index]))
        for index, (draw, sequence) in enumerate(used)
        if scored[index] and not (skip_zero and not teaches[index])
    ]
    bundles = list(_bundles(packed, room, share_prefix))
    pack, count = _lay_out(bundles, room, pack_rows, sampled_BT, experts)
    return Batch(
        pack,
        np.int32(count),
        sampled_BT,
        sampler_logprobs_BT,
        advantages_B,
        weights_B,
        temperatures_B if temperature else None,
        shares_B,
        _stacked(own_advantages, B, max_length) if by_turn else None,
    )


def _stacked(rows: Sequence[np.ndarray], B: int, T: int) -> np.ndarray:
    values_BT = np.zeros((B, T), np.float32)
    for index, row in enumerate(rows):
        values_BT[index, : len(row)] = row
    return values_BT


def most_scored(pack_tokens: int, *, prompt: int, sampled: int) -> int:
    """Returns the most tokens of a packed row that can be sampled ones: the head computes no more.

    Groups have prompts of at least `prompt` tokens and sample at most `sampled` in all.
    """
    return -(-pack_tokens * sampled // (prompt + sampled))


def widths(pack_tokens: int, max_length: int, pack_unit: int = 1) -> list[int]:
    """Returns the tokens that a packed row may have: doubled until a sequence of `max_length` fits, so that few shapes
    serve all lengths; multiples of `pack_unit`."""
    found = [pack_tokens]
    while found[-1] < max_length:
        found.append(min(2 * found[-1], -(-max_length // 128) * 128))
    return [width + -width % pack_unit for width in found]


def _room(tokens: list[int], pack_tokens: int, pack_scored: int, needed: _Room) -> _Room:
    """Returns the smallest of the possible rooms that holds the need.

    All have the scored share of `pack_tokens`, but for a last one where every token may be scored: for sequences whose
    prompt is shorter than `most_scored` was told.
    """
    scored = pack_scored or pack_tokens
    rooms = [_Room(width, min(width, -(-width * scored // pack_tokens))) for width in tokens]
    rooms.append(_Room(tokens[-1], tokens[-1]))
    return next(room for room in rooms if room.holds(needed))


def _check(sequence: types.Sequence, trajectory: Trajectory, max_length: int) -> None:
    """Raises UserError for a sequence that cannot be trained on; a missing log-probability never becomes 0."""
    count = len(sequence.tokens)
    lists = (sequence.sampled, sequence.logprobs, sequence.policy_version)
    if any(len(values) != count for values in lists) or not np.isfinite(sequence.logprobs).all():
        raise UserError(
            f"task {trajectory.task.id!r}, draw {trajectory.draw}, sample {trajectory.sample}: every one of the"
            f" {count} tokens needs a flag, a finite log-probability and a policy version"
        )
    if count > max_length:
        raise UserError(
            f"rollout.max_length={max_length}: a sequence of task {trajectory.task.id!r} has {count} tokens"
        )
    if sequence.sampled and sequence.sampled[0]:
        raise UserError(f"task {trajectory.task.id!r}: the first token of a sequence was sampled")


def _bundles(
    packed: Sequence[tuple[int, _Row]], room: _Room, share_prefix: bool
) -> Iterator[_Bundle]:
    """Yields bundles that fit into a row: a draw's sequences with their common prefix of given tokens."""
    draws: dict[int, list[_Row]] = {}
    for draw, row in packed:
        draws.setdefault(draw if share_prefix else row.index, []).append(row)
    for members in draws.values():
        prefix = _common_prefix([row.sequence for row in members]) if len(members) > 1 else 0
        bundle = _Bundle(prefix, [])
        for row in members:
            grown = _Bundle(prefix, [*bundle.rows, row])
            if bundle.rows and not room.holds(grown.needs):
                yield bundle
                grown = _Bundle(prefix, [row])
            bundle = grown
        yield bundle


def _common_prefix(sequences: Sequence[types.Sequence]) -> int:
    """Returns how many leading tokens all have in common and none sampled."""
    limit = min(
        sequence.sampled.index(True) if any(sequence.sampled) else len(sequence.tokens)
        for sequence in sequences
    )
    common = sequences[0].tokens[:limit]
    for sequence in sequences[1:]:
        other = sequence.tokens[: len(common)]
        if other != common:  # a list's own comparison: no Python for each token
            common = common[: int(np.argmax(np.asarray(other) != np.asarray(common)))]
    return len(common)


def _fill(bundles: Sequence[_Bundle], room: _Room) -> list[list[_Bundle]]:
    """Returns rows of bundles that fit into them: first fit, the longest first."""
    filled: list[list[_Bundle]] = []
    left: list[_Room] = []
    for bundle in sorted(bundles, key=lambda bundle: -bundle.needs.tokens):
        needs = bundle.needs
        row = next((i for i, free in enumerate(left) if free.holds(needs)), len(left))
        if row == len(left):
            filled.append([])
            left.append(room)
        filled[row].append(bundle)
        left[row] = left[row].without(needs)
    return filled


def _lay_out(
    bundles: Sequence[_Bundle],
    room: _Room,
    pack_rows: int,
    sampled_BT: np.ndarray,
    experts: tuple[int, int, str] | None,
) -> tuple[Pack, int]:
    """Returns the packed arrays with a leading micro-batch axis, and how many micro-batches hold anything."""
    filled = _fill(bundles, room)
    count = max(1, -(-len(filled) // pack_rows))
    # One row a sequence is the most there can be: the number of rows in use changes no shape.
    N = max(1, -(-sampled_BT.shape[0] // pack_rows))
    T = sampled_BT.shape[1]
    tokens, positions, groups, segments = np.zeros((4, N * pack_rows, room.tokens), np.int32)
    sources, targets = np.zeros((2, N * pack_rows, room.scored), np.int32)
    places = np.full(sources.shape, types.NOWHERE, np.int32)
    chosen = None
    if experts is not None:
        chosen = np.full((*tokens.shape, *experts[:2]), -1, experts[2])
    for row, bundles_of_row in enumerate(filled):
        at = scored = 0
        for group, bundle in enumerate(bundles_of_row, start=1):
            prefix, start = bundle.prefix, at
            first = bundle.rows[0].sequence.tokens
            tokens[row, at : at + prefix] = first[:prefix]
            positions[row, at : at + prefix] = np.arange(prefix)
            groups[row, at : at + prefix] = group
            if chosen is not None:
                _copy(bundle.rows[0].sequence, 0, prefix, chosen[row, at:])
            at += prefix
            for segment, member in enumerate(bundle.rows, start=1):
                own = np.asarray(member.sequence.tokens[prefix:], np.int32)
                end = at + len(own)
                tokens[row, at:end] = own
                positions[row, at:end] = prefix + np.arange(len(own))
                groups[row, at:end], segments[row, at:end] = group, segment
                if chosen is not None:
                    _copy(member.sequence, prefix, prefix + len(own), chosen[row, at:])
                picked = np.flatnonzero(sampled_BT[member.index, prefix : prefix + len(own)])
                last = scored + len(picked)
                # The output before a token scores it: for the first own token that is the prefix's last.
                before = np.where(picked > 0, at + picked - 1, start + prefix - 1)
                sources[row, scored:last] = before
                targets[row, scored:last] = own[picked]
                places[row, scored:last] = member.index * T + prefix + picked
                at, scored = end, last
    arrays = (tokens, positions, groups, segments, sources, targets, places)
    pack = Pack(*(array.reshape(N, pack_rows, -1) for array in arrays))
    if chosen is not None:
        pack = pack._replace(experts_RXLU=chosen.reshape(N, pack_rows, *chosen.shape[1:]))
    return pack, count


def _copy(sequence: types.Sequence, start: int, end: int, to: np.ndarray) -> None:
    """Copies what is known of the experts of tokens `start` to `end` to the beginning of `to`."""
    if sequence.experts is not None:
        found = np.asarray(sequence.experts)[start:end]
        to[: len(found)] = found
