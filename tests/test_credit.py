"""What tokens are credited with: the trajectory's reward, or the return from their turn on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of

import rftjax
from rftjax import config as configs
from rftjax import grpo
from rftjax.learning import batching, credit, learner, optim, update
from rftjax.scoring import Scorer
from rftjax.types import Score, Sequence, Task, TrainState, Trajectory

FIELDS = {"baseline": "mean", "scale": "none", "eps": 1e-4, "credit": "turn"}
SHAPE = {"rows": 4, "max_length": 16, "pack_tokens": 64}


def made(sample, turn_rewards, reward=None, *, draw=0, split=()):
    """A trajectory of a turn for each reward, of 2, 3 and more tokens; at those in `split` another sequence begins."""
    sequences = [Sequence()]
    sequences[0].extend([1, 2])
    for turn in range(len(turn_rewards)):
        if turn in split:
            sequences.append(Sequence())
        if turn:
            sequences[-1].extend([3])
        tokens = [4 + sample, *[5] * (turn + 1)]
        sequences[-1].extend(tokens, [-1.0] * len(tokens), 0)
    own = None if reward is None else Score(reward)
    found = Trajectory(Task("t", []), draw, sample, sequences=sequences, score=own)
    found.turn_rewards, found.finish_reason = list(turn_rewards), "stop"
    return found


def group(**options):
    # Returns by turn: 2, 1 and 0.5, 0.5 and 1; the third sample took one turn.
    return [made(0, [1.0, 0.0], 1.0, **options), made(1, [0.0, 0.5], 0.0), made(2, [0.0], 1.0)]


def by_token(trajectory):
    counts = [2, 3][: trajectory.turns]
    return np.repeat(trajectory.turn_advantages, counts).tolist()


def test_a_turns_return_is_its_reward_those_of_later_turns_and_the_evaluators():
    sampled = group()
    credit.set_advantages(sampled, FIELDS)
    first = 3.5 / 3
    wanted = [[2 - first, 0.25], [0.5 - first, -0.25], [1 - first]]
    for trajectory, values in zip(sampled, wanted, strict=True):
        assert trajectory.turn_advantages == pytest.approx(values)
        assert trajectory.advantage == pytest.approx(sum(values) / len(values))
    by_trajectory = group()
    credit.set_advantages(by_trajectory, FIELDS | {"credit": "trajectory"})
    assert [one.turn_advantages for one in by_trajectory] == [[], [], []]
    assert [one.advantage for one in by_trajectory] == pytest.approx([1 / 3, -2 / 3, 1 / 3])


def test_without_an_evaluator_turn_rewards_are_not_counted_twice():
    sampled = [made(0, [1.0, 2.0]), made(1, [0.0, 1.0])]
    with Scorer("") as scorer:
        scorer.gather(sampled)
    assert [one.score.reward for one in sampled if one.score] == [3.0, 1.0]
    credit.set_advantages(sampled, FIELDS)
    assert [one.turn_advantages for one in sampled] == [[1.0, 0.5], [-1.0, -0.5]]


def test_penalties_come_at_the_end_and_other_draws_are_other_groups():
    sampled = [made(0, [0.0, 0.0], 1.0), made(1, [0.0, 0.0], 1.0), made(0, [0.0], 9.0, draw=1)]
    credit.set_advantages(sampled, FIELDS, {(0, 1): -1.0})
    turns = [one.turn_advantages for one in sampled]
    assert turns == [[0.5, 0.5], [-0.5, -0.5], [0.0]]


@pytest.mark.parametrize("fields", [{}, {"scale": "group"}, {"baseline": "leave_one_out"},
                                    {"baseline": "batch_mean", "scale": "batch"}])  # fmt: skip
def test_with_one_turn_both_credits_are_the_same_bits(fields):
    rewards = np.random.default_rng(0).normal(size=8)
    both = [[made(i, [0.0], float(r), draw=i // 4) for i, r in enumerate(rewards)] for _ in "ab"]
    credit.set_advantages(both[0], FIELDS | fields)
    credit.set_advantages(both[1], FIELDS | fields | {"credit": "trajectory"})
    assert [one.turn_advantages[0] for one in both[0]] == [one.advantage for one in both[1]]


def test_a_group_varies_by_turn_where_its_total_rewards_are_equal():
    sampled = [made(0, [1.0, 0.0], 0.0), made(1, [0.0, 1.0], 0.0)]
    for one in sampled:
        one.score = Score(1.0, of_turns=True)
    assert not credit.has_variance(sampled)
    assert credit.has_variance(sampled, "turn")
    assert not credit.has_variance([made(0, [0.0, 1.0], 0.0), made(1, [0.0], 1.0)], "turn")
    chosen = learner.choose(sampled, 1, drop=True, credit="turn")
    assert len(chosen) == 2
    credit.set_advantages(chosen, FIELDS)
    # The returns of the first turn are equal; those of the second are 0 and 1.
    assert [one.turn_advantages for one in chosen] == [[0.0, -0.5], [0.0, 0.5]]
    assert all(one.teaches for one in chosen)


@pytest.mark.parametrize("split", [(), (1,)])
def test_a_token_has_the_advantage_of_its_turn_in_one_sequence_or_several(split):
    sampled = group(split=split)
    credit.set_advantages(sampled, FIELDS)
    batch = batching.make_batch(sampled, **SHAPE, by_turn=True)
    rows = [row[flags].tolist() for row, flags in
            zip(batch.advantages_BT, batch.sampled_BT, strict=True)]  # fmt: skip
    one, two, three = map(by_token, sampled)
    first = [one[:2], one[2:]] if split else [one]
    assert rows[: len(first) + 2] == [*first, two, three]
    assert not batch.advantages_BT[~batch.sampled_BT].any()
    assert batching.make_batch(sampled, **SHAPE).advantages_BT is None


def test_sampled_turns_without_an_advantage_are_a_fault():
    sampled = group()
    credit.set_advantages(sampled, FIELDS)
    sampled[0].turn_advantages.pop()
    with pytest.raises(AssertionError, match="2 turns were sampled, and 1 have"):
        batching.make_batch(sampled, **SHAPE, by_turn=True)


def test_an_update_weighs_each_turn_by_its_own_advantage(tiny_dir):
    mesh = mesh_of()
    model = rftjax.load(str(tiny_dir), mesh=mesh)
    preset = grpo.preset_fields("grpo", {"scale": "none"})
    optimizer = optim.make_optimizer(lr=1e-2, steps=10, schedule="constant")
    apply = update.make_update(model.config, optimizer, grpo.LossSettings.of(preset))
    section = configs.base_config().grpo.to_dict() | preset | {"credit": "turn"}
    shape = SHAPE | {"by_turn": True}
    one = learner.Learner(section, shape, mesh, apply, None, 1, token_limit=8)
    params = jax.tree.map(jnp.array, model.params)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.init(params))
    sampled = group()
    minibatches, metrics = one.batch(state, sampled, 1)
    assert metrics["batch/effective_share"] == 1.0
    (program,) = one.programs(state)  # what is compiled ahead takes the same arrays
    ahead, here = (jax.tree.map(np.shape, x) for x in (program.arguments[1], minibatches[0].batch))
    assert ahead == here
    _, metrics = one.update(state, minibatches, 1)
    # At a ratio of 1 the loss is the mean of the rows' mean advantages, taken negative.
    gain = np.mean([np.mean(by_token(trajectory)) for trajectory in sampled])
    assert metrics["loss"] == pytest.approx(-gain, abs=1e-6)
    assert abs(gain - np.mean([trajectory.advantage for trajectory in sampled])) > 1e-3
