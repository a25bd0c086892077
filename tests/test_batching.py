import cProfile
import math
import pstats

import numpy as np
import pytest

from rftjax.learning.batching import make_batch, most_scored, widths
from rftjax.types import NOWHERE, Score, Sequence, Task, Trajectory

EOS = 0  # the id that arrays are padded with, on purpose


def trajectory(draw, sample, prompt, *turns, advantage=1.0, finish_reason="stop"):
    """`turns` alternate between sampled ids and the environment's."""
    sequence = Sequence()
    sequence.extend(list(prompt))
    for index, tokens in enumerate(turns):
        sequence.extend(list(tokens), None if index % 2 else [-1.0] * len(tokens), 0)
    return Trajectory(
        Task(f"task {draw}", []),
        draw,
        sample,
        sequences=[sequence],
        finish_reason=finish_reason,
        score=Score(0.0),
        advantage=advantage,
    )


def scored_tokens(batch):
    """What each loss row scores, as (column, target, token before it), read back from the packed arrays."""
    found = {}
    pack = batch.pack
    T = batch.sampled_BT.shape[1]
    # The loops over micro-batches stop at `micro_batches`.
    for n, r, m in np.argwhere(pack.places_RM[: batch.micro_batches] != NOWHERE):
        place, source = int(pack.places_RM[n, r, m]), int(pack.sources_RM[n, r, m])
        position = int(pack.positions_RX[n, r, source])
        assert position + 1 == place % T
        before = int(pack.tokens_RX[n, r, source])
        entry = (place % T, int(pack.targets_RM[n, r, m]), before)
        found.setdefault(place // T, []).append(entry)
    return {row: sorted(entries) for row, entries in found.items()}


@pytest.mark.parametrize("share_prefix", [True, False])
def test_every_sampled_token_is_scored_once_from_the_token_before_it(share_prefix):
    rng = np.random.default_rng(0)
    made = []
    for draw in range(5):
        prompt = rng.integers(1, 60, rng.integers(3, 9))
        for sample in range(3):
            turns = [rng.integers(1, 60, rng.integers(2, 12)) for _ in range(3)]
            made.append(trajectory(draw, sample, prompt.tolist(), *(t.tolist() for t in turns)))
    batch = make_batch(
        made, rows=15, max_length=64, pack_tokens=128, pack_rows=2, share_prefix=share_prefix
    )
    found = scored_tokens(batch)
    for row, one in enumerate(made):
        tokens, sampled = one.sequences[0].tokens, one.sequences[0].sampled
        wanted = [(t, tokens[t], tokens[t - 1]) for t in range(len(tokens)) if sampled[t]]
        assert found[row] == wanted
    sizes = (batch.pack.groups_RX > 0).sum()
    assert sizes == sum(
        len(one.sequences[0].tokens)
        - (one.sequences[0].sampled.index(True) if share_prefix and one.sample else 0)
        for one in made
    )


def test_what_two_samples_both_answered_is_no_common_prefix():
    made = [trajectory(0, sample, [5, 6], [7, 8], [4], [9]) for sample in range(2)]
    batch = make_batch(made, rows=2, max_length=8, pack_tokens=128)
    wanted = [(2, 7, 6), (3, 8, 7), (5, 9, 4)]
    assert scored_tokens(batch) == {0: wanted, 1: wanted}


def test_one_end_token_is_trained_on_where_it_is_also_the_padding():
    made = [
        trajectory(0, 0, [5, EOS, 6], [7, 8, EOS]),
        trajectory(0, 1, [5, EOS, 6], [9, EOS], [EOS, 4], [3, EOS]),
        trajectory(1, 0, [5], [7, 7, 7]),  # cut
    ]
    batch = make_batch(made, rows=4, max_length=16, pack_tokens=128)
    ends = [
        sum(target == EOS for _, target, _ in entries) for entries in scored_tokens(batch).values()
    ]
    assert ends == [1, 2, 0]  # one a turn
    assert batch.sampled_BT.sum(axis=1).tolist() == [3, 4, 3, 0]
    for row, one in enumerate(made):
        assert not batch.sampled_BT[row, len(one.sequences[0].tokens) :].any()


def test_a_sequence_without_log_probabilities_is_refused():
    sequence = Sequence()
    with pytest.raises(ValueError, match="2 sampled tokens came with 1 log-probabilities"):
        sequence.extend([1, 2], [-1.0])
    spoiled = [lambda s, x=x: s.logprobs.__setitem__(-1, x) for x in (math.nan, -math.inf)]
    for spoil in (lambda s: s.logprobs.pop(), *spoiled):
        broken = trajectory(3, 1, [5, 6], [7, 8])
        spoil(broken.sequences[0])
        with pytest.raises(ValueError, match="draw 3, sample 1.*log-probability"):
            make_batch([broken], rows=1, max_length=8)


def test_a_sequence_beyond_the_limit_is_refused():
    with pytest.raises(ValueError, match="rollout.max_length=4: .* has 6 tokens"):
        make_batch([trajectory(0, 0, [5, 6], [7, 8, 9, 9])], rows=1, max_length=4)


def test_invalid_samples_are_left_out_and_cut_ones_teach_nothing_when_masked():
    made = [trajectory(0, i, [5, 6], [7, 8], advantage=float(i)) for i in range(4)]
    made[1].score = Score(0.0, valid=False)
    made[2].finish_reason = "length"
    made[3].finish_reason = "turns"
    batch = make_batch(made, rows=4, max_length=8)
    assert batch.advantages_B.tolist() == [0.0, 2.0, 3.0, 0.0]
    assert batch.sampled_BT.sum(axis=1).tolist() == [2, 2, 2, 0]
    masked = make_batch(made, rows=4, max_length=8, mask_truncated=True)
    assert masked.sampled_BT.sum(axis=1).tolist() == [2, 0, 2, 0]
    assert set(scored_tokens(masked)) == {0, 2}


def test_what_teaches_nothing_is_not_packed_and_still_counts_in_the_denominators():
    made = [trajectory(0, i, [5, 6], [7, 8], advantage=float(i % 2)) for i in range(4)]
    made[3].finish_reason = "length"
    full = make_batch(made, rows=4, max_length=8, mask_truncated=True)
    lean = make_batch(made, rows=4, max_length=8, mask_truncated=True, skip_zero=True)
    assert (full.pack.segments_RX.max(), lean.pack.segments_RX.max()) == (3, 1)
    assert set(scored_tokens(full)) == {0, 1, 2} and set(scored_tokens(lean)) == {1}
    assert (lean.sampled_BT == full.sampled_BT).all()
    assert lean.pack.tokens_RX.shape == full.pack.tokens_RX.shape


def test_groups_are_draws_and_never_texts():
    made = [trajectory(draw, 0, [5, 6, 7], [8, 9]) for draw in range(2)]
    batch = make_batch(made, rows=2, max_length=8)
    assert batch.pack.groups_RX.max() == 2  # the same prompt twice: two packs, no shared prefix


def test_sequences_of_one_trajectory_share_its_advantage_and_weight():
    made = trajectory(0, 0, [5, 6], [7, 8], advantage=0.5)
    made.sequences.append(trajectory(0, 0, [5, 9, 9], [4]).sequences[0])
    batch = make_batch([made], rows=2, max_length=8)
    assert batch.advantages_B.tolist() == [0.5, 0.5]
    np.testing.assert_allclose(batch.shares_B, [2 / 3, 1 / 3], rtol=1e-6)
    assert scored_tokens(batch) == {0: [(2, 7, 6), (3, 8, 7)], 1: [(3, 4, 9)]}


def test_shapes_do_not_depend_on_how_many_rows_are_filled():
    shapes = set()
    for count in range(1, 9):
        made = [trajectory(i, 0, [5], [6] * 99) for i in range(count)]
        batch = make_batch(made, rows=8, max_length=128, pack_tokens=128)
        assert batch.micro_batches == count and batch.sampled_BT.shape == (8, 128)
        shapes.add(batch.pack.tokens_RX.shape)
    assert shapes == {(8, 1, 128)}


def test_mixed_lengths_need_few_shapes_known_before():
    assert widths(128, 100) == [128]
    assert widths(128, 1000) == [128, 256, 512, 1000 + 24]
    assert widths(500, 1024) == [500, 1000, 1024]
    settings = {"rows": 8, "max_length": 512, "pack_tokens": 128}
    room = most_scored(128, prompt=16, sampled=4 * 400)

    def shape(batch):
        return batch.pack.tokens_RX.shape, batch.pack.targets_RM.shape, batch.sampled_BT.shape

    known = {
        shape(make_batch([], **settings, pack_scored=room, longest=width))
        for width in widths(128, 512)
    }
    assert len(known) == 3
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(50):
        prompt = [1] * int(rng.integers(16, 100))
        lengths = np.exp(rng.uniform(0, np.log(400), rng.integers(1, 9))).astype(int)
        made = [trajectory(0, i, prompt, [7] * int(n)) for i, n in enumerate(lengths)]
        found.add(shape(make_batch(made, **settings, pack_scored=room)))
    assert found == known


def test_no_valid_sample_at_all_gives_a_batch_of_padding():
    batch = make_batch([], rows=4, max_length=8)
    assert batch.sampled_BT.shape == (4, 8) and not batch.sampled_BT.any()
    assert not scored_tokens(batch)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_row_scores_no_more_than_it_has_room_for(share_prefix):
    rng = np.random.default_rng(4)
    made = [
        trajectory(draw, sample, [draw + 1] * 6, rng.integers(1, 60, rng.integers(1, 21)).tolist())
        for draw in range(6)
        for sample in range(4)
    ]
    settings = {"rows": 24, "max_length": 32, "pack_tokens": 128, "share_prefix": share_prefix}
    wide = make_batch(made, **settings)
    narrow = make_batch(made, pack_scored=40, **settings)
    assert wide.pack.sources_RM.shape[-1] == 128
    assert narrow.pack.sources_RM.shape == narrow.pack.targets_RM.shape == (24, 1, 40)
    assert narrow.pack.tokens_RX.shape == wide.pack.tokens_RX.shape
    assert narrow.micro_batches >= -(-int(narrow.sampled_BT.sum()) // 40) > 1
    assert scored_tokens(narrow) == scored_tokens(wide)


def test_the_most_that_a_row_scores_leaves_the_packing_as_it_is():
    made = [
        trajectory(draw, sample, list(range(1, 9 + draw % 2)), [7] * 5)
        for draw in range(5)
        for sample in range(4)
    ]
    settings = {"rows": 20, "max_length": 32, "pack_tokens": 64}
    room = most_scored(64, prompt=8, sampled=4 * 5)
    assert room == 46
    wide, narrow = make_batch(made, **settings), make_batch(made, pack_scored=room, **settings)
    assert wide.micro_batches == narrow.micro_batches
    np.testing.assert_array_equal(wide.pack.tokens_RX, narrow.pack.tokens_RX)


def test_a_sequence_that_scores_more_than_a_row_has_room_for_makes_all_rows_wider():
    one = trajectory(0, 0, [1, 2], [3] * 50)
    batch = make_batch([one], rows=1, max_length=64, pack_tokens=128, pack_scored=40)
    assert batch.pack.sources_RM.shape[-1] == 128
    assert len(scored_tokens(batch)[0]) == 50


def test_a_tasks_weight_is_that_of_its_rows():
    made = [trajectory(draw, 0, [5], [6, 7]) for draw in range(2)]
    made[1].task = Task("heavy", [], weight=2.5)
    assert make_batch(made, rows=3, max_length=8).weights_B.tolist() == [1.0, 2.5, 0.0]


def test_a_sequence_whose_first_token_was_sampled_is_refused():
    broken = trajectory(0, 0, [], [7, 8])
    with pytest.raises(ValueError, match="task 'task 0': the first token of a sequence was"):
        make_batch([broken], rows=1, max_length=8)


def test_the_longest_are_packed_first_so_that_rows_are_few():
    made = [trajectory(i, 0, [5], [6] * (n - 1)) for i, n in enumerate((50, 50, 80, 80))]
    assert make_batch(made, rows=4, max_length=128, pack_tokens=130).micro_batches == 2


def test_host_work_on_a_shared_prompt_does_not_grow_with_its_tokens():
    def calls_of(length):
        prompt = [7] * length
        members = [trajectory(0, i, prompt + [i], [8, 9]) for i in range(4)]
        profile = cProfile.Profile()
        batch = profile.runcall(make_batch, members, rows=4, max_length=4096, pack_tokens=4096)
        segments_RX = batch.pack.segments_RX[0]
        assert (segments_RX == 0).sum() == segments_RX.size - 4 * 3  # the prompt is laid out once
        return pstats.Stats(profile).total_calls

    make_batch([trajectory(0, 0, [5], [6])], rows=4, max_length=4096)
    assert calls_of(4000) <= calls_of(40) + 20
