"""Answers that go on in the next step."""

import copy
import json

import jax
import jax.numpy as jnp
import pytest
from test_rollout import CONFIG, END, ambiguous_tokenizer

from rftjax.environments import Environments
from rftjax.models import decoder
from rftjax.rollout import Rollout
from rftjax.run.partial import Partial
from rftjax.sampler import device
from rftjax.sampler.engine import Engine
from rftjax.tasks import TaskStream
from rftjax.types import SamplingParams, Task, TrainState

GROUP = 3
PARAMS = SamplingParams(max_new_tokens=40)


@pytest.fixture(scope="module")
def weights():
    """Weights of four policies, of which each ends its answers late now and then."""
    return [
        device.sampler_params(CONFIG, decoder.init(CONFIG, jax.random.key(seed)))
        for seed in range(4)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ambiguous_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Sampling:
    """Takes batches of two groups, with three more under way, from a policy that differs at each step."""

    def __init__(self, weights, tokenizer, ahead=3, config=CONFIG):
        engine = Engine(
            config, slots=6, max_length=64, stops=[END], prefill_chunk=16, dispatch_steps=4
        )
        self.weights, self.told = weights, []
        self.rollout = Rollout(engine, tokenizer, Environments(""), seed=5)
        texts = ["abc"[: 1 + i % 3] * 3 for i in range(7)]
        tasks = [Task(str(i), [{"role": "user", "content": text}]) for i, text in enumerate(texts)]
        self.stream = TaskStream(tasks, seed=0)
        self.partial = Partial(
            self.stream, self.rollout, self.use, self.sample, lambda: None, ahead
        )

    def use(self, state):
        self.rollout.engine.set_params(self.weights[state.step % len(self.weights)])
        self.rollout.policy_version = state.step

    def sample(self, draws, wanted):
        return self.rollout(draws, GROUP, PARAMS, on_finish=self.told.append, wanted=wanted)

    def take(self, step):
        return self.partial.take(TrainState(step, {}, {}, ()), 2)


def facts(trajectories):
    return [
        (one.draw, one.sample, one.messages, one.sequences, one.finish_reason)
        for one in trajectories
    ]


def sampled(sequence):
    return sequence.sampled.index(True) if True in sequence.sampled else len(sequence.sampled)


def test_with_the_same_weights_answers_are_those_of_one_piece(weights, tokenizer):
    parted = Sampling(weights[:1], tokenizer)
    found = [one for step in range(6) for one in parted.take(step)]
    assert parted.rollout.carried
    draws = [(draw, parted.stream.task(draw)) for draw in sorted({one.draw for one in found})]
    whole = Sampling(weights[:1], tokenizer)
    whole.use(TrainState(0, {}, {}, ()))
    expected = {(one.draw, one.sample): one for one in whole.rollout(draws, GROUP, PARAMS)}
    assert len(expected) == len(found)
    for one in found:
        other = expected[one.draw, one.sample]
        assert one.messages == other.messages and one.finish_reason == other.finish_reason
        (mine,), (theirs,) = one.sequences, other.sequences
        assert mine.tokens == theirs.tokens and mine.sampled == theirs.sampled
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_every_token_keeps_the_version_that_sampled_it_and_its_logprob(weights, tokenizer):
    parted, known, ages = Sampling(weights, tokenizer), {}, set()
    for step in range(8):
        for one in parted.take(step):
            (sequence,) = one.sequences
            start = sampled(sequence)
            before = known.pop((one.draw, one.sample), ([], [], []))
            lists = sequence.tokens, sequence.logprobs, sequence.policy_version
            for values, old in zip(lists, before, strict=True):
                assert values[start : start + len(old)] == old
            assert set(sequence.policy_version[start + len(before[0]) :]) <= {step}
            assert set(sequence.policy_version[:start]) == {-1}
            ages |= {step - version for version in sequence.policy_version[start:]}
        for key, one in parted.rollout.carried.items():
            old = known.get(key, ([], [], []))
            now = one.tokens, one.logprobs, one.versions
            assert len({len(values) for values in now}) == 1
            assert all(new[: len(was)] == was for new, was in zip(now, old, strict=True))
            assert set(one.versions[len(old[0]) :]) <= {step}
            known[key] = copy.deepcopy(now)
    assert {0, 1, 2} <= ages


def test_no_conversation_is_lost_or_doubled(weights, tokenizer):
    parted, taken = Sampling(weights, tokenizer), []
    for step in range(8):
        found = parted.take(step)
        assert len(found) == 2 * GROUP
        taken += [(one.draw, one.sample) for one in found]
        under_way = parted.partial.position()["carried"]["draws"]
        assert len(under_way) == 3
        draws = sorted([*{draw for draw, _ in taken}, *under_way])
        assert draws == list(range(parted.stream.draw))
        assert {draw for draw, _ in parted.rollout.carried} <= set(under_way)
    assert len(taken) == len(set(taken)) == 8 * 2 * GROUP
    # Scoring hears of each sample that is trained on, once.
    assert sorted((one.draw, one.sample) for one in parted.told) == sorted(taken)


def test_a_resumed_run_goes_on_as_one_that_was_not_stopped(weights, tokenizer):
    whole = Sampling(weights, tokenizer)
    for step in range(3):
        whole.take(step)
    stored = json.loads(json.dumps(whole.partial.position()))
    resumed = Sampling(weights, tokenizer)
    resumed.partial.restore(stored)
    ended = [one["ended"] for one in stored["carried"]["turns"]]
    assert set(ended) == {True, False}
    for step in range(3, 7):
        assert facts(resumed.take(step)) == facts(whole.take(step))
    assert resumed.partial.position() == whole.partial.position()


def test_an_evaluation_between_two_steps_changes_nothing(weights, tokenizer):
    plain, disturbed = Sampling(weights, tokenizer), Sampling(weights, tokenizer)
    for step in range(4):
        assert facts(plain.take(step)) == facts(disturbed.take(step))
        disturbed.use(TrainState(step + 1, {}, {}, ()))
        heldout = disturbed.rollout(
            disturbed.stream.next(0) or [(0, Task("x", [{"role": "user", "content": "a"}]))],
            2,
            PARAMS,
            stream=1,
        )
        assert len(heldout) == 2


def test_a_step_does_not_wait_for_its_longest_answer(weights, tokenizer):
    """Decode steps of eight batches, beside those of batches that wait for all of their groups."""
    steps = {}
    for ahead in (3, 0):
        sampling = Sampling(weights[:1], tokenizer, ahead)
        for step in range(8):
            sampling.take(step)
        steps[ahead] = sampling.rollout.engine.counters.decode_steps
    assert steps[3] < 0.9 * steps[0]


def test_nothing_is_sampled_once_the_groups_of_a_step_are_complete(weights, tokenizer):
    sampling = Sampling(weights, tokenizer)
    sampling.rollout.engine.stops.clear()
    sampling.rollout.engine._stops_E = jnp.full(16, -2, jnp.int32)  # answers end after four tokens
    sampling.use(TrainState(0, {}, {}, ()))
    found = sampling.rollout(sampling.stream.next(5), GROUP, SamplingParams(4), wanted=2)
    assert [sum(one.sequences[0].sampled) for one in found] == [4] * 2 * GROUP
    assert sampling.rollout.engine.counters.decode_steps == 4
    assert not sampling.rollout.carried
