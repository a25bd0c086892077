import json
import math

import jax
import numpy as np
import pytest

from rftjax import config as configs
from rftjax import learner, modes
from rftjax.checkpoint import Checkpoints
from rftjax.types import Score, Sequence, Task, Trajectory

ADVANTAGES = {"baseline": "mean", "scale": "none", "eps": 1e-4}


def group(draw, rewards, *, tokens=4, finish="stop"):
    """A group of one-turn trajectories; a reward of None is an invalid score."""
    made = []
    for sample, reward in enumerate(rewards):
        sequence = Sequence()
        sequence.extend([1, 2])
        sequence.extend(list(range(tokens)), [-1.0] * tokens, 0)
        score = Score(0.0, valid=False) if reward is None else Score(reward)
        made.append(
            Trajectory(
                Task(str(draw), []),
                draw,
                sample,
                sequences=[sequence],
                finish_reason=finish,
                score=score,
            )
        )
    return made


def draws(trajectories):
    return sorted({one.draw for one in trajectories})


def make_learner(**fields):
    config = configs.base_config()
    section = config.grpo.to_dict() | {"kl_weight": 0.0} | fields
    return learner.Learner(section, {}, None, None, None, prompts=3, token_limit=8)


def test_groups_without_variance_are_replaced_up_to_the_limit():
    one = make_learner(dynamic_prompts=3)
    assert one.wanted([]) == 3
    sampled = [*group(0, [1, 1]), *group(1, [0, 1]), *group(2, [0, 0])]
    assert one.wanted(sampled) == 2
    sampled += [*group(3, [1, 1]), *group(4, [1, 0])]
    assert one.wanted(sampled) == 1
    assert one.wanted(sampled + group(5, [0, 0])) == 0  # the limit
    assert one.wanted(sampled + group(5, [0, 1])) == 0  # enough
    assert make_learner().wanted(sampled[:6]) == 0


def test_groups_with_variance_are_chosen_first_and_the_rest_fills_or_is_dropped():
    sampled = [*group(0, [1, 1]), *group(1, [0, 1]), *group(2, [0, 0]), *group(3, [1, 0])]
    assert draws(learner.choose(sampled, 3, drop=False)) == [0, 1, 3]
    assert draws(learner.choose(sampled, 3, drop=True)) == [1, 3]
    assert draws(learner.choose(sampled, 1, drop=False)) == [1]


def test_invalid_samples_are_never_chosen_and_give_no_variance():
    sampled = [*group(0, [1, None, 1]), *group(1, [None, 0, 1])]
    assert not learner.has_variance(sampled[:3])
    chosen = learner.choose(sampled, 2, drop=False)
    assert [(one.draw, one.sample) for one in chosen] == [(0, 0), (0, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize("whole", [True, False])
def test_minibatches_part_a_batch_into_equal_disjoint_halves(whole):
    sampled = [one for draw in range(4) for one in group(draw, [0, 1, 1, 0])]
    parts = learner.split(sampled, 2, whole, seed=(0, 1))
    found = sorted((one.draw, one.sample) for part in parts for one in part)
    assert found == [(one.draw, one.sample) for one in sampled]
    assert [len(part) for part in parts] == [8, 8]
    assert whole == (not set(draws(parts[0])) & set(draws(parts[1])))
    again = learner.split(sampled, 2, whole, seed=(0, 1))
    other = learner.split(sampled, 2, whole, seed=(0, 2))
    assert again == parts and other != parts


def test_the_overlong_punishment_is_dapos():
    expected = {10: 0.0, 16: 0.0, 17: -0.25, 18: -0.5, 20: -1.0}
    for tokens, value in expected.items():
        (one,) = group(0, [1.0], tokens=tokens)
        assert learner.overlong(one, 20, 4) == value
    (cut,) = group(0, [1.0], tokens=3, finish="length")
    assert learner.overlong(cut, 20, 4) == -1.0


def test_penalties_enter_the_advantage_and_leave_the_reward():
    sampled = group(0, [1.0, 1.0])
    learner.set_advantages(sampled, ADVANTAGES, {(0, 1): -0.5})
    assert [one.advantage for one in sampled] == [0.25, -0.25]
    assert [one.score.reward for one in sampled] == [1.0, 1.0]


def test_metrics_of_several_updates_are_means_and_extremes_are_extremes():
    made = [
        {"loss": 1.0, "ratio/max": 1.0, "ratio/min": 1.0, "sampler/logprob_diff_mean": 0.1},
        {"loss": 3.0, "ratio/max": 1.5, "ratio/min": 0.5, "sampler/logprob_diff_mean": 0.3},
    ]
    assert learner.mean_metrics(made) == {
        "loss": 2.0,
        "ratio/max": 1.5,
        "ratio/min": 0.5,
        "sampler/logprob_diff_mean": 0.1,
    }


# ---- Whole runs of few steps

EVALUATOR = """
def evaluate(task, trajectory):
    return len(set(trajectory.completion.split())) / 8

def rare(task, trajectory):
    return float("w7" in trajectory.completion.split())
"""


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def spec(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    rows = [{"prompt": f"w{i} w{i + 7} w{i % 5}"} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluator.py").write_text(EVALUATOR)
    config = configs.base_config()
    config.steps = 2
    config.model.path = str(tiny_dir)
    config.tasks.train = str(folder / "train.jsonl")
    config.evaluator = f"{folder / 'evaluator.py'}:evaluate"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 4, 4, 128
    config.sampler.max_new_tokens, config.sampler.slots = 6, 8
    config.rollout.max_length = 16
    config.scoring.workers = 1
    config.optim.lr = 1e-2
    config.eval.every, config.checkpoint.every, config.export = 0, 1, False
    return config


def variant(spec, **fields):
    config = spec.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def run(config, workdir, stop_after=0):
    modes.run("train", config, {}, workdir, stop_after)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: x for name, x in line.items() if not name.startswith(("time/", "throughput/"))}
        for line in lines
    ]


def state_of(workdir, step):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        return checkpoints.restore_params(step)[0]
    finally:
        checkpoints.close()


def test_several_passes_over_minibatches_measure_against_the_policy_that_sampled(spec, tmp_path):
    config = variant(spec, grpo__updates_per_batch=2, grpo__minibatches=2, optim__warmup_steps=1)
    lines = run(config, tmp_path)
    for line in lines:
        assert line["sampler/logprob_diff_max"] < 1e-4  # of the weights before the updates
        assert line["ratio/max"] > 1.01 and line["ratio/min"] < 0.99
        assert line["clip/share"] > 0
    record = json.loads((tmp_path / "rollouts/step_000002.jsonl").read_text().splitlines()[0])
    assert set(record["sequences"][0]["policy_version"]) == {-1, 4}


def test_one_update_on_a_whole_batch_needs_no_old_log_probabilities(spec, tmp_path):
    for line in run(variant(spec, steps=1), tmp_path):
        assert line["ratio/max"] == line["ratio/min"] == 1.0
        assert "kl/mean" not in line


@pytest.mark.parametrize("rank", [0, 2])
def test_the_kl_is_that_to_the_initial_weights_and_grows_from_zero(spec, tmp_path, rank):
    config = variant(spec, grpo__kl_weight=0.1, lora__rank=rank, optim__lr=3e-2)
    first, second = run(config, tmp_path)
    assert abs(first["kl/mean"]) < 1e-6 < 1e-4 < second["kl/mean"]
    assert not (tmp_path / "checkpoints" / "2" / "reference").exists()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_refreshed_reference_is_the_policy_and_survives_a_resume(spec, tmp_path, rank):
    fields = {"steps": 4, "grpo__kl_weight": 0.1, "grpo__kl_refresh_steps": 2}
    config = variant(spec, lora__rank=rank, optim__lr=3e-2, **fields)
    whole = run(config, tmp_path / "whole")
    kl = [line["kl/mean"] for line in whole]
    assert abs(kl[0]) < 1e-6 and abs(kl[2]) < 1e-6
    assert kl[1] > 1e-4 and kl[3] > 1e-4
    run(config, tmp_path / "parts", 3)
    assert run(config, tmp_path / "parts") == whole
    one, two = state_of(tmp_path / "whole", 4), state_of(tmp_path / "parts", 4)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_resumed_run_measures_its_kl_against_the_same_reference(spec, tmp_path):
    config = variant(spec, steps=3, grpo__kl_weight=0.1, grpo__updates_per_batch=2)
    whole = run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", 2)
    assert run(config, tmp_path / "parts") == whole


def test_a_kl_in_the_reward_moves_advantages_and_not_the_loss(spec, tmp_path):
    fields = {"grpo__kl_weight": 5.0, "grpo__kl": "k1", "grpo__kl_in_reward": True}
    fields |= {"grpo__scale": "none", "optim__lr": 3e-2}
    lines = run(variant(spec, **fields), tmp_path)
    assert abs(lines[0]["kl/sequence_mean"]) < 1e-5 and lines[1]["kl/sequence_mean"] > 1e-3
    assert "kl/mean" not in lines[1]
    path = tmp_path / "rollouts" / "step_000002.jsonl"
    records = [json.loads(text) for text in path.read_text().splitlines()]
    differences = []
    for draw in {record["draw"] for record in records}:
        mine = [record for record in records if record["draw"] == draw]
        mean = math.fsum(record["reward"] for record in mine) / len(mine)
        differences += [record["advantage"] - (record["reward"] - mean) for record in mine]
        assert abs(sum(record["advantage"] for record in mine)) < 1e-5
    assert max(map(abs, differences)) > 1e-3


def test_further_prompts_are_sampled_where_groups_teach_nothing(spec, tmp_path):
    evaluator = spec.evaluator.replace(":evaluate", ":rare")
    fields = {"grpo__dynamic_prompts": 4, "grpo__drop_zero_variance": True, "evaluator": evaluator}
    lines = run(variant(spec, **fields), tmp_path / "whole")
    first = (tmp_path / "whole/rollouts/step_000001.jsonl").read_text().splitlines()
    records = [json.loads(text) for text in first]
    assert draws_of(records) == list(range(8))
    assert lines[0]["groups/replaced_share"] == 1.0
    live = {
        draw
        for draw in range(8)
        if len({record["reward"] for record in records if record["draw"] == draw}) > 1
    }
    assert 0 < len(live) < 4
    moved = {record["draw"] for record in records if record["advantage"] != 0}
    assert moved == live
    assert lines[0]["groups/zero_variance_share"] == 1 - len(live) / 8
    run(variant(spec, **fields), tmp_path / "parts", 1)
    assert run(variant(spec, **fields), tmp_path / "parts") == lines


def draws_of(records):
    return sorted({record["draw"] for record in records})
