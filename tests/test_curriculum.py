"""The user's code chooses the order of tasks; its state survives a restart."""

import collections
import json
import textwrap

import pytest

from rftjax import config as configs
from rftjax import modes
from rftjax.tasks import TaskStream
from rftjax.tasks.curriculum import task_stream
from rftjax.types import Score, Task, Trajectory

SOURCE = """
import random

class Hardest:
    '''Draws the tasks of the lowest rewards, and a random one at each place with a chance of a quarter.'''

    def __init__(self, tasks, seed):
        self.rewards, self.random = [1.0] * len(tasks), random.Random(seed)

    def next(self, count):
        order = sorted(range(len(self.rewards)), key=lambda place: self.rewards[place])
        return [self.random.choice([*order, *order[:1] * 9, *order[1:2] * 9]) for _ in range(count)]

    def observe(self, places, rewards):
        for place, group in zip(places, rewards):
            self.rewards[place] = sum(group) / max(1, len(group))

    def state(self):
        version, numbers, rest = self.random.getstate()
        return {"rewards": self.rewards, "random": [version, numbers, rest]}

    def restore(self, state):
        self.rewards = state["rewards"]
        version, numbers, rest = state["random"]
        self.random.setstate((version, tuple(numbers), rest))

class Stateless:
    def __init__(self, tasks, seed): pass
    def next(self, count): return [0] * count

class Wrong(Hardest):
    def next(self, count): return self.bad(count)
    def bad(self, count): return [99] * count

class Short(Wrong):
    def bad(self, count): return [0]

class Failing(Wrong):
    def bad(self, count): raise KeyError("no such level")

class Lasting(Hardest):
    def state(self): return {"random": self.random}

def third(tasks, draw, rewards):
    return [float(place % 3 == 0) for place in range(len(tasks))]

def unseen(tasks, draw, rewards):
    return [0.001 if seen else 1.0 for seen in rewards]

def ramp(tasks, draw, rewards):
    return [1 + place for place in range(len(tasks))]

def nothing(tasks, draw, rewards):
    return [0] * len(tasks)

def negative(tasks, draw, rewards):
    return [-1] * len(tasks)

def few(tasks, draw, rewards):
    return [1.0]
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("curriculum") / "order.py"
    path.write_text(textwrap.dedent(SOURCE))
    return path


def tasks(count):
    return [Task(str(n), [{"role": "user", "content": f"question {n}"}]) for n in range(count)]


@pytest.fixture
def stream(source):
    def build(name, count=9, seed=3):
        return task_stream(tasks(count), seed, f"{source}:{name}")

    return build


def play(stream, steps, count=4):
    """Task ids of some steps; the reward of a task is its number over ten, and one sample of three has no score."""
    ids = []
    for _ in range(steps):
        draws = stream.next(count)
        ids += [task.id for _, task in draws]
        scores = (lambda task: Score(int(task.id) / 10), lambda task: Score(9.0, valid=False))
        stream.observe(
            Trajectory(task, draw, sample, score=scores[sample](task))
            for draw, task in reversed(draws)
            for sample in (0, 1)
        )
    return ids


def test_without_a_name_each_task_comes_once_an_epoch():
    plain = task_stream(tasks(5), 1)
    assert type(plain) is TaskStream
    ahead = [task.id for task in plain.upcoming(7)]
    assert play(plain, 1, 7) == ahead


@pytest.mark.parametrize("name", ["Hardest", "unseen", "ramp"])
def test_a_restored_stream_goes_on_as_if_it_had_never_stopped(stream, name):
    whole, first, second = stream(name), stream(name), stream(name)
    expected = play(whole, 6)
    head = play(first, 3)
    stored = json.loads(json.dumps(first.state()))
    play(first, 2)  # what comes later changes no state that was stored before
    second.restore(stored)
    assert head + play(second, 3) == expected
    assert second.state() == whole.state() and second.draw == 24
    assert play(stream(name, seed=4), 6) != expected


def test_a_restored_stream_knows_the_draws_that_are_under_way(stream):
    first, second = stream("Hardest"), stream("Hardest")
    draws = first.next(4)
    second.restore(json.loads(json.dumps(first.state())))
    assert [second.task(draw).id for draw, _ in draws] == [task.id for _, task in draws]


def test_looking_ahead_changes_nothing(stream):
    for name in ("Hardest", "ramp"):
        looking, other = stream(name), stream(name)
        ids = [task.id for task in looking.upcoming(4)]
        assert play(looking, 3) == play(other, 3) and ids == play(stream(name), 1)


def test_rewards_reach_the_object_by_place_without_invalid_samples(stream):
    one = stream("Hardest")
    play(one, 5)
    known = one.state()["sampling"]["rewards"]
    assert all(reward in (1.0, place / 10) for place, reward in enumerate(known))
    assert min(known) < 0.9


def test_weights_choose_and_a_task_comes_once_a_step_while_there_are_enough(stream):
    assert set(play(stream("third"), 5, 3)) == {"0", "3", "6"}
    counts = collections.Counter(play(stream("third"), 1, 7))
    assert sorted(counts.values()) == [2, 2, 3]
    assert sorted(play(stream("unseen"), 1, 9)) == [str(n) for n in range(9)]
    assert len(set(play(stream("unseen"), 2, 4))) == 8
    counts = collections.Counter(play(stream("ramp"), 900, 1))
    assert counts["8"] / counts["0"] == pytest.approx(9, rel=0.5)
    assert counts["8"] == pytest.approx(900 * 9 / 45, rel=0.2)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("Stateless", "must have the methods next, state and restore, and lacks state, restore"),
        ("Wrong", r"next\(4\) must return 4 places .* from 0 to 8"),
        ("Short", r"next\(4\) must return 4 places"),
        ("Failing", r"next raised this\n(.|\n)*KeyError: 'no such level'"),
        ("Lasting", r"state\(\) must return what JSON can say"),
        ("nothing", "one weight at least must be above 0"),
        ("negative", "the weights must be 9 finite numbers"),
        ("few", "the weights must be 9 finite numbers"),
        ("missing", "must define 'missing'"),
    ],
)
def test_a_fault_of_the_user_s_code_is_told_with_its_field(stream, name, fault):
    with pytest.raises(ValueError, match=f"tasks.sampling(.|\n)*{fault}"):
        stream(name).next(4)
        stream(name).state()


def test_a_run_with_a_curriculum_resumes_bit_for_bit_with_overlap_too(source, tiny_dir, tmp_path):
    rows = [{"prompt": f"w{i} w{i + 7} w{i % 5}"} for i in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(
        "def evaluate(task, trajectory):\n    return len(set(trajectory.completion.split())) / 8\n"
    )
    config = configs.base_config()
    config.steps, config.export, config.eval.every, config.checkpoint.every = 4, False, 0, 2
    config.model.path, config.tasks.train = str(tiny_dir), str(tmp_path / "train.jsonl")
    config.evaluator = f"{tmp_path}/reward.py:evaluate"
    config.tasks.sampling = f"{source}:Hardest"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 2, 2, 128
    config.sampler.max_new_tokens, config.sampler.slots, config.rollout.max_length = 8, 4, 24
    config.scoring.workers, config.scoring.timeout_s, config.optim.lr = 1, 120.0, 1e-2
    config.overlap.max_staleness, config.grpo.tis_cap = 1, 2.0

    def sampled(folder):
        lines = [
            json.loads(line)
            for step in range(1, 5)
            for line in (folder / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()
        ]
        return [(line["draw"], line["task_id"], line["sequences"][0]["tokens"]) for line in lines]

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    modes.run("train", config, {}, whole, 0)
    modes.run("train", config, {}, halves, 2)
    modes.run("train", config, {}, halves, 0)
    assert sampled(halves) == sampled(whole)
    assert len({task for _, task, _ in sampled(whole)}) < 8  # each task once would be eight
