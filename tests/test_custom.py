import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rftjax import config as configs
from rftjax import grpo, modes
from rftjax.learning import custom, learner
from rftjax.types import Score, Task, Trajectory

FUNCTIONS = """
import jax.numpy as jnp
import numpy as np

def median(rewards, group_ids):
    return [np.median(rewards[group_ids == one]) for one in group_ids]

def short(rewards, group_ids):
    return rewards[:-1]

def unfinished(rewards, group_ids):
    return rewards / np.zeros_like(rewards)

def lone(rewards):
    return rewards

def broken(*arguments):
    return nothing

def surprise(inputs):
    return 0.5 * inputs.logprobs ** 2 + 0.0 * inputs.entropy

def total(inputs):
    return jnp.sum(inputs.logprobs)

def evaluate(task, trajectory):
    return len(set(trajectory.completion.split())) / 8
"""


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return str(path)


def test_a_functions_baseline_is_taken_off_the_rewards(functions):
    found = grpo.advantages(
        [1.0, 2.0, 6.0, 4.0, 4.5],
        [3, 3, 3, 9, 9],
        baseline=custom.baseline(f"{functions}:median"),
        scale="none",
    )
    np.testing.assert_allclose(found, [-1.0, 0.0, 4.0, -0.25, 0.25])


def test_a_steps_advantages_are_those_of_the_named_function(functions):
    fields = {"baseline": f"{functions}:median", "scale": "none", "eps": 1e-4}
    made = [Trajectory(Task("0", []), 5, i, score=Score(float(i * i))) for i in range(3)]
    learner.set_advantages(made, fields)
    assert [one.advantage for one in made] == [-1.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("short", r"grpo.baseline: .* \(1,\).* one number a reward, \(2,\)"),
        ("unfinished", "grpo.baseline: .* finite"),
        ("broken", "(?s)grpo.baseline='.*broken': must not raise.*NameError: name 'nothing'"),
        ("lone", "grpo.baseline='.*lone': must be callable as baseline"),
        ("absent", "grpo.baseline='.*absent': .* must define 'absent'"),
    ],
)
def test_a_baseline_that_gives_no_number_a_reward_is_refused(functions, name, words):
    with pytest.raises(ValueError, match=words), np.errstate(all="ignore"):
        function = custom.baseline(f"{functions}:{name}")
        grpo.advantages([1.0, 2.0], [0, 0], baseline=function)


def test_a_term_is_added_to_the_loss_and_aggregated_like_it(functions):
    rng = np.random.default_rng(0)
    logprobs_BT, mask_BT = rng.normal(-2, 1, (3, 5)), rng.random((3, 5)) < 0.6
    data = {"loss_mask": mask_BT, "advantages": rng.normal(size=3), "entropy": np.ones((3, 5))}
    data |= {"weights": np.asarray([1.0, 2.0, 0.5]), "aggregate": "sequence_mean"}
    term = custom.loss_term(f"{functions}:surprise")

    def loss(logprobs_BT, **more):
        return grpo.policy_loss(logprobs_BT, **data, **more)[0]

    plain, plain_BT = jax.value_and_grad(loss)(jnp.asarray(logprobs_BT))
    added, added_BT = jax.value_and_grad(lambda x: loss(x, term=term))(jnp.asarray(logprobs_BT))
    counts = np.maximum(mask_BT.sum(1, keepdims=True), 1)
    share_BT = mask_BT * data["weights"][:, None] / counts / 3
    np.testing.assert_allclose(added - plain, (share_BT * 0.5 * logprobs_BT**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(added_BT - plain_BT, share_BT * logprobs_BT, atol=1e-6)
    metrics = grpo.policy_loss(logprobs_BT, **data, term=term)[1]
    np.testing.assert_allclose(
        metrics["loss/term"], (0.5 * logprobs_BT**2)[mask_BT].mean(), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("total", r"grpo.loss='.*total': must return one number a token"),
        ("broken", "(?s)grpo.loss='.*broken': must not raise.*NameError: name 'nothing'"),
    ],
)
def test_a_term_that_gives_no_number_a_token_is_refused(functions, name, words):
    with pytest.raises(ValueError, match=words):
        custom.loss_term(f"{functions}:{name}")


def test_a_term_keeps_samples_of_advantage_zero_in_the_update():
    section = configs.base_config().grpo.to_dict() | grpo.preset_fields("grpo")
    for name, wanted in (("", True), ("file.py:term", False)):
        one = learner.Learner(section | {"loss": name}, {}, None, None, None, 1, 8)
        assert one._skip_zero == wanted


def test_a_run_uses_its_own_functions_and_keeps_them_on_resume(tiny_dir, functions, tmp_path):
    rows = [{"prompt": f"w{i} w{i + 7} w{i % 5}"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configs.base_config()
    config.steps, config.export, config.eval.every = 2, False, 0
    config.model.path, config.tasks.train = str(tiny_dir), str(tmp_path / "train.jsonl")
    config.evaluator = f"{functions}:evaluate"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 2, 3, 128
    config.sampler.max_new_tokens, config.sampler.slots = 6, 6
    config.rollout.max_length, config.scoring.workers = 16, 1
    config.grpo.baseline, config.grpo.scale = f"{functions}:median", "none"
    config.grpo.loss = f"{functions}:surprise"
    modes.run("train", config, {}, tmp_path / "run", 1)
    plain = config.copy_and_resolve_references()
    plain.grpo.baseline, plain.grpo.loss = "mean", ""
    modes.run("train", plain, {}, tmp_path / "run", 0)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss/term"] > 0 for line in lines] == [True, True]
    found = (tmp_path / "run" / "rollouts" / "step_000002.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in found]
    for draw in {record["draw"] for record in records}:
        mine = [record for record in records if record["draw"] == draw]
        middle = np.median([record["reward"] for record in mine])
        for record in mine:
            np.testing.assert_allclose(record["advantage"], record["reward"] - middle, atol=1e-6)
