import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of

import rftjax
from rftjax import config as configs
from rftjax import grpo, modes
from rftjax.devices import sharding
from rftjax.devices.compilation import compiling
from rftjax.learning import learner, optim, update
from rftjax.models import FAMILIES
from rftjax.run.checkpoint import Checkpoints
from rftjax.types import Score, Sequence, Task, TrainState, Trajectory

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


def test_two_draws_of_one_task_are_two_groups():
    sampled = [*group(0, [1.0, 0.0]), *group(1, [1.0, 1.0])]
    for one in sampled:
        one.task = Task("same", [])
    learner.set_advantages(sampled, ADVANTAGES)
    assert [one.advantage for one in sampled] == [0.5, -0.5, 0.0, 0.0]


# ---- One learner without sampling

LOGICAL = FAMILIES["qwen2"].LOGICAL_AXES
MESH = mesh_of()
SHAPE = {"rows": 8, "max_length": 16, "pack_tokens": 128}


@pytest.fixture(scope="module")
def model(tiny_dir):
    return rftjax.load(str(tiny_dir), mesh=MESH)


@pytest.fixture(scope="module")
def trainer(model):
    """The optimizer, its update and the scorer of a small model."""
    optimizer = optim.make_optimizer(lr=1e-2, steps=10, schedule="linear", weight_decay=0.1)
    fields = grpo.preset_fields("grpo")
    apply = update.make_update(model.config, optimizer, grpo.LossSettings.of(fields))
    return optimizer, apply, update.make_scorer(model.config)


def fresh_state(model, optimizer):
    params = jax.tree.map(jnp.array, model.params)
    return TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.init(params))


def real_learner(apply=None, score=None, prompts=2, **fields):
    section = configs.base_config().grpo.to_dict() | grpo.preset_fields("grpo") | fields
    return learner.Learner(section, SHAPE, MESH, apply, score, prompts, token_limit=8)


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(two))


def test_a_step_without_a_trained_token_changes_neither_weights_nor_optimizer(model, trainer):
    optimizer, apply, score = trainer
    dropping = real_learner(apply, score, drop_zero_variance=True)
    state = fresh_state(model, optimizer)
    parts, _ = dropping.batch(state, [*group(0, [0, 1]), *group(1, [1, 1])], 1)
    state, first = dropping.update(state, parts, 1)
    assert first["tokens"] == 8 and first["update/skipped_share"] == 0.0
    before = jax.device_get(state)
    assert before.step == 1
    parts, _ = dropping.batch(state, [*group(2, [1, 1]), *group(3, [0, 0])], 2)
    state, second = dropping.update(state, parts, 2)
    assert_same(state, before)
    assert second.keys() == first.keys() and all(map(math.isfinite, second.values()))
    assert second["update/skipped_share"] == 1.0
    assert second["tokens"] == second["loss"] == second["grad_norm"] == 0.0
    # Nor does one whose answers are all masked.
    masking = real_learner(apply, score)
    masking.shape = SHAPE | {"mask_truncated": True}
    parts, _ = masking.batch(state, group(4, [0, 1], finish="length"), 3)
    state, third = masking.update(state, parts, 3)
    assert_same(state, before)
    assert third == second


def test_equal_rewards_alone_have_no_gradient_and_leave_the_rest_to_the_optimizer(model, trainer):
    optimizer, apply, score = trainer
    one = real_learner(apply, score)
    state = fresh_state(model, optimizer)
    parts, _ = one.batch(state, [*group(0, [0, 1]), *group(1, [1, 1])], 1)
    state, _ = one.update(state, parts, 1)
    before = jax.device_get(state)
    parts, _ = one.batch(state, [*group(2, [1, 1]), *group(3, [0, 0])], 2)
    state, metrics = one.update(state, parts, 2)
    assert metrics["grad_norm"] == 0.0 and metrics["tokens"] == 16
    assert metrics["update/skipped_share"] == 0.0 and metrics["entropy"] > 0
    assert state.step == 2
    moved = jax.tree.map(
        lambda new, old: np.abs(new - old).max(), state.trainable, before.trainable
    )
    assert max(jax.tree.leaves(moved)) > 1e-4  # momentum


@pytest.mark.parametrize(
    ("fields", "packed"),
    [
        ({}, {0, 1}),
        ({"kl_weight": 0.1}, {0, 1, 2, 3}),
        ({"kl_weight": 0.1, "kl_in_reward": True}, {0, 1}),
        ({"entropy_weight": 0.1}, {0, 1, 2, 3}),
    ],
)
def test_samples_of_advantage_zero_are_computed_only_where_the_loss_needs_them(
    model, trainer, fields, packed
):
    optimizer, _, score = trainer
    one = real_learner(score=score, **fields)
    state = fresh_state(model, optimizer)._replace(reference=model.params)
    (part,), _ = one.batch(state, [*group(0, [0, 1]), *group(1, [1, 1])], 1)
    rows = np.unique(np.asarray(part.batch.pack.places_RM) // SHAPE["max_length"])
    assert set(rows[rows < SHAPE["rows"]].tolist()) == packed
    assert np.asarray(part.batch.sampled_BT).any(axis=1).tolist() == [True] * 4 + [False] * 4


def test_an_empty_minibatch_is_skipped_and_says_nothing(model, trainer):
    optimizer, apply, score = trainer
    halves = real_learner(apply, score, drop_zero_variance=True, minibatches=2, updates_per_batch=2)
    state = fresh_state(model, optimizer)
    parts, _ = halves.batch(state, [*group(0, [0, 1]), *group(1, [1, 1])], 1)
    assert sorted(int(part.batch.sampled_BT.sum()) for part in parts) == [0, 8]
    after, metrics = halves.update(state, parts, 1)
    assert after.step == 2
    assert metrics["update/skipped_share"] == 0.5
    assert metrics["tokens"] == 8 and metrics["entropy"] > 1


@pytest.mark.parametrize("minibatches", [1, 2])
def test_only_further_updates_of_a_step_are_measured_against_the_policy_before_them(
    model, trainer, minibatches
):
    optimizer, _, score = trainer
    one = real_learner(score=score, minibatches=minibatches)
    sampled = [*group(0, [0, 1]), *group(1, [1, 0])]
    parts, _ = one.batch(fresh_state(model, optimizer), sampled, 1)
    assert [part.old_logprobs_BT is not None for part in parts] == [minibatches > 1] * minibatches


def test_a_trajectorys_kl_is_the_sum_over_the_trained_tokens_of_all_its_sequences():
    one = real_learner(kl="k1")
    two, three = group(0, [0.0, 1.0])
    two.sequences += group(0, [0.0], tokens=2)[0].sequences
    old_BT = np.repeat(np.arange(1.0, 9.0)[:, None], SHAPE["max_length"], axis=1)
    found = one._kl_of([two, three], old_BT, np.zeros_like(old_BT))
    assert found == [(two, 4 * 1.0 + 2 * 2.0), (three, 4 * 3.0)]


def test_advantages_are_those_of_whole_groups_however_minibatches_part_them(model, trainer):
    optimizer, _, score = trainer
    apart = real_learner(score=score, minibatches=4, minibatch_groups=False, scale="none")
    state = fresh_state(model, optimizer)
    found = []
    for step in (1, 2, 1):
        sampled = [*group(0, [0, 1, 1, 1]), *group(1, [4, 0, 0, 0])]
        parts, _ = apart.batch(state, sampled, step)
        rows = [part.batch.advantages_B[:2].tolist() for part in parts]
        assert sorted(value for row in rows for value in row) == [
            -1,
            -1,
            -1,
            -0.75,
            0.25,
            0.25,
            0.25,
            3,
        ]
        assert [int(part.batch.sampled_BT.sum()) for part in parts] == [8] * 4
        found.append(rows)
    assert found[0] != found[1] and found[0] == found[2]


def test_the_overlong_punishment_enters_the_advantages_with_its_weight():
    one = real_learner(overlong_buffer=4, overlong_penalty=2.0, scale="none")
    sampled = [*group(0, [1.0], tokens=4), *group(0, [1.0], tokens=5), *group(1, [1.0, None])]
    sampled[1].sample = 1
    _, metrics = one.batch(TrainState(0, {}, {}, ()), sampled, 1)
    assert [one.advantage for one in sampled] == [0.25, -0.25, 0.0, 0.0]
    np.testing.assert_allclose(metrics["reward/overlong_mean"], -0.5 / 3)
    assert metrics["batch/effective_share"] == 0.5
    assert metrics["groups/replaced_share"] == 0.0


def test_a_transfer_that_the_code_does_not_ask_for_is_refused_in_an_update(model):
    def implicit(state, *_):
        return state, {"tokens": state.step + np.ones(1, np.int32)}

    one = real_learner(implicit, lambda *_: jnp.zeros(1) + 1.5, updates_per_batch=2)
    state = TrainState(jnp.zeros((), jnp.int32), {}, {}, ())
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        one.batch(state, group(0, [0, 1]), 1)
    one = real_learner(implicit)
    parts, _ = one.batch(state, group(0, [0, 1]), 1)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        one.update(state, parts, 1)


def test_answers_of_mixed_lengths_compile_nothing_that_was_not_compiled_ahead(model, trainer):
    optimizer, apply, score = trainer
    one = real_learner(apply, score, updates_per_batch=2)
    one.shape = SHAPE | {"max_length": 100, "pack_tokens": 40, "pack_scored": 36}
    # Placed as an update leaves it.
    state = sharding.shard_tree(MESH, LOGICAL, fresh_state(model, optimizer))
    programs = one.programs(sharding.abstract_tree(MESH, LOGICAL, state))
    assert len(programs) == 2 * 3  # updates and old log-probabilities, of 40, 80 and 128 tokens
    with compiling(programs):
        pass
    compiled = []

    def note(event, duration_secs, **facts):
        if event.endswith("backend_compile_duration"):
            compiled.append(facts.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for step, tokens in enumerate((3, 38, 20, 50, 90, 70), start=1):
            parts, _ = one.batch(state, [*group(0, [0, 1], tokens=tokens), *group(1, [0, 1])], step)
            state, _ = one.update(state, parts, step)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not [name for name in compiled if "update" in name or "score" in name]


def test_ages_are_those_of_the_sampled_tokens_that_are_trained_on():
    one = real_learner(drop_zero_variance=True)
    sampled = [*group(0, [0, 1]), *group(1, [0, 1]), *group(2, [1, 1])]
    for version, trajectory in zip((4, 4, 4, 3, 1, 1), sampled, strict=True):
        trajectory.sequences[0].policy_version = [-1] * 2 + [version] * 4
    _, metrics = one.batch(TrainState(5, {}, {}, ()), sampled, 1)
    assert metrics["rollout/staleness"] == 2.0
    assert metrics["rollout/older_share"] == 1.0
    assert metrics["rollout/age_mean"] == 5 - (4 + 4 + 4 + 3) / 4
    sampled[0].sequences[0].policy_version = [-1, -1, 3, 5, 5, 5]  # of several policies
    _, metrics = one.batch(TrainState(5, {}, {}, ()), sampled, 1)
    assert metrics["rollout/older_share"] == 13 / 16
    assert metrics["rollout/age_mean"] == (2 + 4 + 4 + 8) / 16


@pytest.mark.parametrize("frozen", [{}, {"kernel": jnp.ones(2)}])
def test_a_refreshed_reference_is_kept_as_the_first_one_was(frozen):
    """The weights in the compute dtype, adapters in float32."""
    one = real_learner(
        lambda state, *_: (state, {"tokens": 1.0}), kl_weight=0.1, kl_refresh_steps=2
    )
    one.dtype = "bfloat16"
    trained = {"a": jnp.full(2, 3.0)}
    wanted = jnp.float32 if frozen else jnp.bfloat16
    first = learner.initial_reference(one.fields, trained, trained if frozen else None, one.dtype)
    assert first["a"].dtype == wanted and bool(jnp.all(first["a"] == 3.0))
    batch = update.Batch(None, 1, np.ones((1, 1), bool), None, None, None)
    parts = [learner.Minibatch(batch, None, None)]
    state = TrainState(0, {"a": jnp.full(2, 5.0)}, frozen, (), first)
    same, _ = one.update(state, parts, 1)
    assert same.reference is first
    after, _ = one.update(state, parts, 2)
    assert after.reference["a"].dtype == wanted and bool(jnp.all(after.reference["a"] == 5.0))
    assert after.reference["a"] is not after.trainable["a"]  # which the next update gives away


@pytest.mark.parametrize("adapters", [None, {"a": 1.0}])
def test_no_reference_is_kept_that_nothing_is_measured_against(adapters):
    fields = {"kl_weight": 0.0, "kl_refresh_steps": 0}
    params = {"a": jnp.ones(2)}
    assert learner.initial_reference(fields, params, adapters, "float32") == ()
    kept = learner.initial_reference(fields | {"kl_weight": 0.1}, params, adapters, "float32")
    assert (kept == ()) == (adapters is not None)  # without adapters the base is the reference


# ---- Whole runs of few steps

EVALUATOR = """
def evaluate(task, trajectory):
    return len(set(trajectory.completion.split())) / 8

def equal(task, trajectory):
    return 0.5

def rare(task, trajectory):
    return float("w7" in trajectory.completion.split())
"""


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
        {
            name: x
            for name, x in line.items()
            if not name.startswith(("time/", "compile/", "throughput/"))
        }
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


def test_a_kl_in_the_reward_moves_advantages_and_not_the_loss(spec, model, tmp_path):
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
        shaped = [record["reward"] - 5.0 * drift(model, record) for record in mine]
        wanted = np.asarray(shaped) - np.mean(shaped)
        np.testing.assert_allclose([record["advantage"] for record in mine], wanted, atol=1e-3)
        plain = [record["reward"] for record in mine]
        differences += list(wanted - (np.asarray(plain) - np.mean(plain)))
    assert max(map(abs, differences)) > 1e-2


def drift(model, record):
    """The sum over a record's sampled tokens of what they became more likely than they were for the model."""
    (sequence,) = record["sequences"]
    sampled = np.asarray(sequence["sampled"])
    before = np.asarray(model.logprobs(np.asarray([sequence["tokens"]])))[0]
    return float(np.sum(np.asarray(sequence["logprobs"])[sampled] - before[sampled]))


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


@pytest.mark.parametrize(
    ("reason", "end"), [({"eval__dead_steps": 4}, 4), ({"eval__patience": 3, "eval__every": 1}, 3)]
)
def test_an_early_end_comes_at_the_same_step_in_a_resumed_run(spec, tmp_path, reason, end):
    evaluator = spec.evaluator.replace(":evaluate", ":equal")
    fields = reason | {"steps": 8, "evaluator": evaluator, "tasks__heldout_count": 2}
    fields |= {"checkpoint__keep": 3, "eval__samples": 1}
    config = variant(spec, grpo__drop_zero_variance=True, **fields)
    whole = run(config, tmp_path / "whole")
    assert whole[-1]["step"] == end
    assert all(line["update/skipped_share"] == 1.0 for line in whole if line["step"] > 0)
    assert_same(state_of(tmp_path / "whole", end), rftjax.load(config.model.path).params)
    parts = tmp_path / "parts"
    run(config, parts, 1)
    run(config, parts, 3)
    for step in ("2", "3"):  # as if it had been killed on the way
        shutil.rmtree(parts / "checkpoints" / step)
    assert run(config, parts) == whole
    assert run(config, parts) == whole  # it has ended
