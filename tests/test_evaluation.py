import itertools
import json
import math
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from rftjax import config as configs
from rftjax import modes, train
from rftjax.errors import UserError
from rftjax.run import build as job
from rftjax.run import heldout as evaluation
from rftjax.run import results
from rftjax.run.checkpoint import Checkpoints
from rftjax.run.heldout import mean_and_stderr, measure, pass_at_k
from rftjax.scoring import EvaluatorError
from rftjax.types import Score, Task, Trajectory


def test_what_a_hook_records_under_eval_is_no_evaluation():
    unused: Any = None
    config = configs.base_config()
    config.eval.every = 1
    sets = {"other": [Task("t", [])]}
    heldout = evaluation.HeldOut(config, sets, unused, unused)
    assert heldout.missing(2, [{"step": 2, "eval/of_a_hook": 1.0}])
    assert not heldout.missing(2, [{"step": 2, "eval/other/reward": 1.0, "eval/other/tasks": 1.0}])


@pytest.mark.parametrize("samples", [1, 3, 6])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations(range(samples), k))
        share = sum(any(one < right for one in subset) for subset in subsets) / len(subsets)
        assert pass_at_k(samples, right, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plain_formula_is_not():
    chance, samples, k = 0.3, 5, 3
    exact = 1 - (1 - chance) ** k
    weights = [
        math.comb(samples, c) * chance**c * (1 - chance) ** (samples - c)
        for c in range(samples + 1)
    ]
    ours = math.fsum(w * pass_at_k(samples, c, k) for c, w in enumerate(weights))
    plain = math.fsum(w * (1 - (1 - c / samples) ** k) for c, w in enumerate(weights))
    assert ours == pytest.approx(exact, abs=1e-12)
    assert abs(plain - exact) > 0.05


def test_more_samples_than_there_are_are_refused():
    with pytest.raises(ValueError, match="eval.pass_k: 4 must be between 1 and the 3 samples"):
        pass_at_k(3, 1, 4)


def test_standard_errors_are_those_of_a_mean():
    values = [0.0, 0.5, 1.0, 1.0]
    mean, stderr = mean_and_stderr(values)
    assert mean == statistics.mean(values)
    assert stderr == pytest.approx(statistics.stdev(values) / 2)
    assert mean_and_stderr([0.5]) == (0.5, 0.0)
    assert all(math.isnan(value) for value in mean_and_stderr([]))


def scored(*tasks):
    """Trajectories of tasks, each a list of its samples' scores (a number, a Score, or None for one without)."""
    return [
        Trajectory(
            Task(f"t{draw}", []),
            draw,
            sample,
            finish_reason="stop",
            score=Score(score) if isinstance(score, (int, float)) else score,
        )
        for draw, samples in enumerate(tasks)
        for sample, score in enumerate(samples)
    ]


INVALID = Score(1.0, {"form": 1.0}, valid=False, reason="the judge is gone")


def test_a_task_counts_once_however_many_of_its_samples_were_scored():
    metrics = measure(scored([1, 0, 0, 1], [1, INVALID, INVALID, None], [0, 0, 0, INVALID]))
    means = [0.5, 1.0, 0.0]
    assert metrics["reward"] == pytest.approx(statistics.mean(means))
    # The samples of one task are not independent: the error is that of three values, not of eight.
    assert metrics["reward_stderr"] == pytest.approx(statistics.stdev(means) / math.sqrt(3))
    assert metrics["tasks"] == 3
    assert metrics["error_share"] == pytest.approx(4 / 12)


def test_truncated_answers_are_counted_whether_they_were_scored_or_not():
    trajectories = scored([1, INVALID], [0, 0])
    trajectories[0].finish_reason = trajectories[1].finish_reason = "length"
    assert measure(trajectories)["truncated_share"] == 0.5


def test_pass_at_k_is_over_the_tasks_that_have_k_scores_and_right_ones_reach_the_threshold():
    tasks = [0.9, 0.1, 0.1], [0.1, 0.1, 0.1], [0.9, 0.9, INVALID], [0.9, INVALID, None]
    metrics = measure(scored(*tasks), pass_k=(1, 2, 3), pass_reward=0.9)
    for k, chances in {1: [1 / 3, 0, 1, 1], 2: [2 / 3, 0, 1], 3: [1, 0]}.items():
        assert metrics[f"pass_at_{k}"] == pytest.approx(statistics.mean(chances))
        error = statistics.stdev(chances) / math.sqrt(len(chances))
        assert metrics[f"pass_at_{k}_stderr"] == pytest.approx(error)
    assert measure(scored(*tasks), pass_k=(1,), pass_reward=0.95)["pass_at_1"] == 0


def parts(*values):
    return Score(0.0, dict(zip(("form", "keys", "fields"), values, strict=False)))


def test_strict_needs_every_part_and_lenient_takes_their_mean():
    tasks = [parts(1, 1, 1), parts(1, 0.5, 0)], [parts(1, 1, 0.7), parts(0, 0, 0)], [INVALID, None]
    metrics = measure(scored(*tasks))
    assert (metrics["strict"], metrics["lenient"]) == (pytest.approx(0.25), pytest.approx(0.6))
    assert metrics["strict_stderr"] == pytest.approx(statistics.stdev([0.5, 0]) / math.sqrt(2))
    assert metrics["lenient_stderr"] == pytest.approx(statistics.stdev([0.75, 0.45]) / math.sqrt(2))
    assert metrics["part/form"] == 0.75
    assert metrics["part/fields"] == pytest.approx(0.425)
    assert measure(scored(*tasks), pass_reward=0.7)["strict"] == 0.5


def test_a_sample_without_parts_counts_with_its_reward_among_others_that_have_parts():
    metrics = measure(scored([parts(1, 1), Score(0.0), Score(1.0), Score(0.0)]))
    assert (metrics["strict"], metrics["lenient"], metrics["part/form"]) == (0.5, 0.5, 1.0)


def test_numbers_that_are_only_recorded_change_no_share():
    one = Score(1.0, {"form": 1.0}, metrics={"words": 12.0})
    other = Score(0.0, {"form": 0.0}, metrics={"words": 3.0, "cost": 0.5})
    metrics = measure(scored([one, other, Score(1.0, {"form": 1.0}), INVALID]))
    assert (metrics["strict"], metrics["lenient"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (metrics["metric/words"], metrics["metric/cost"]) == (7.5, 0.5)
    assert "strict" not in measure(scored([Score(1.0, metrics={"words": 12.0})]))


def test_scores_without_parts_are_neither_strict_nor_lenient():
    assert not {"strict", "lenient"} & set(measure(scored([1, 0], [0, INVALID])))


def test_the_noise_of_a_set_follows_from_its_name_alone():
    names = ["heldout", *(f"set{number}" for number in range(500))]
    streams = {evaluation.stream(name) for name in names}
    assert len(streams) == len(names)
    assert all(0 < stream < 2**31 for stream in streams)
    assert evaluation.stream("heldout") == 1  # 0 is training's
    assert evaluation.stream("ood") == 342918952


EVALUATOR = """
from rftjax.types import Score

def evaluate(task, trajectory):
    return float("w7" in trajectory.completion.split())

def heldout(task, trajectory):
    count = len(trajectory.completion.split())
    return Score(0.25 + count / 100, {"some": float(count > 0), "many": count / 6})

def failing(task, trajectory):
    raise RuntimeError("the judge is gone")
"""


def write_rows(path, numbers):
    rows = [{"prompt": f"w{i} w{i + 7} w{i % 5}"} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def config(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    for name, first in (("train", 0), ("heldout", 20), ("other", 30)):
        write_rows(folder / f"{name}.jsonl", range(first, first + 6))
    (folder / "evaluator.py").write_text(EVALUATOR)
    config = configs.base_config()
    config.steps, config.export = 20, False
    config.model.path = str(tiny_dir)
    config.tasks.train = str(folder / "train.jsonl")
    config.tasks.heldout = str(folder / "heldout.jsonl")
    config.evaluator = f"{folder / 'evaluator.py'}:evaluate"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 2, 2, 128
    config.sampler.max_new_tokens, config.sampler.slots = 6, 8
    config.rollout.max_length = 16
    config.scoring.workers, config.scoring.timeout_s = 1, 120.0
    config.optim.lr = 1e-12  # nothing changes, so nothing becomes better
    config.eval.every, config.checkpoint.every = 1, 0
    return config


def changed(config, **fields):
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return copy


def folder_of(config):
    return config.tasks.train.removesuffix("train.jsonl")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_reports_pass_at_k_and_ends_where_its_metric_stays(config, tmp_path):
    config = changed(
        config,
        eval__samples=4,
        eval__pass_k=(1, 4),
        eval__patience=2,
        checkpoint__best_metric="eval/pass_at_4",
    )
    state, done = train.train(job.open_config(tmp_path, config, {}), tmp_path)
    assert done and int(state.step) == 2
    lines = lines_of(tmp_path / "metrics.jsonl")
    for line in lines:
        assert line["eval/pass_at_1"] == pytest.approx(line["eval/reward"])
        assert line["eval/pass_at_4"] > line["eval/pass_at_1"] > 0
        assert line["eval/pass_at_4_stderr"] > 0
    checkpoints = Checkpoints(
        tmp_path / "checkpoints", read_only=True, best_metric="eval/pass_at_4"
    )
    assert checkpoints.metric(2) == lines[-1]["eval/pass_at_4"]
    checkpoints.close()


@pytest.fixture(scope="module")
def many_sets(config):
    """A job of one step with three held-out sets, two of the same tasks, and an evaluator for them."""
    folder = folder_of(config)
    return changed(
        config,
        steps=1,
        eval__sets=(f"twin={folder}heldout.jsonl", f"other={folder}other.jsonl#test"),
        eval__evaluator=f"{folder}evaluator.py:heldout",
        checkpoint__best_metric="eval/other/lenient",
        # Metrics of their own, which the reference has to have.
        grpo__tis_cap=2.0,
        grpo__overlong_buffer=2,
        grpo__kl_weight=0.1,
        grpo__kl_in_reward=True,
        grpo__minibatches=2,
        alarms__duplicate_share=1e-9,
        alarms__window=1,
    )


@pytest.fixture(scope="module")
def finished(many_sets, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sets")
    train.train(job.open_config(workdir, many_sets, {}), workdir)
    return workdir


def test_every_held_out_set_has_metrics_and_rollouts_of_its_own(finished):
    for line in lines_of(finished / "metrics.jsonl"):
        for prefix in ("eval/", "eval/twin/", "eval/other/"):
            assert line[f"{prefix}tasks"] == 6
            assert {f"{prefix}{name}" for name in ("reward", "strict", "lenient")} <= set(line)
    sampled = {}
    for stem, stream in (("", "heldout"), ("-twin", "twin"), ("-other", "other")):
        sampled[stream] = lines_of(finished / "rollouts" / f"heldout{stem}_000001.jsonl")
        assert {record["stream"] for record in sampled[stream]} == {stream}
    for record in lines_of(finished / "rollouts" / "step_000001.jsonl"):
        assert record["stream"] == "train"
    tasks = {
        name: [one["messages"][0]["content"] for one in some] for name, some in sampled.items()
    }
    assert tasks["twin"] == tasks["heldout"] != tasks["other"]
    tokens = {
        name: [one["sequences"][0]["tokens"] for one in some] for name, some in sampled.items()
    }
    assert tokens["twin"] != tokens["heldout"]  # the same tasks by other noise


def documented():
    """Patterns of the metric names in the reference, where NAME and K stand for what a run has."""
    text = (Path(__file__).parent.parent / "experiments" / "reference.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| (.*) \|$", text.partition("\n## Metrics\n")[2], re.M)
    names = [name for name, _ in rows]
    names += [f"{name}_stderr" for name, meaning in rows if "(`_stderr`)" in meaning]
    names += [name.replace("eval/", "eval/SET/") for name in names if name.startswith("eval/")]
    stand = {"NAME": ".+", "SET": "[^/]+", "K": r"\d+"}
    return [re.sub("NAME|SET|K", lambda found: stand[found[0]], re.escape(name)) for name in names]


def test_every_metric_of_a_run_is_in_the_reference(finished):
    patterns = documented()
    names = {name for line in lines_of(finished / "metrics.jsonl") for name in line} - {"step"}
    assert {"eval/other/strict_stderr", "kl/sequence_mean", "reward/overlong_mean"} <= names
    assert [
        name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)
    ] == []


def test_held_out_answers_are_scored_by_the_evaluator_of_the_section_eval(finished):
    for record in lines_of(finished / "rollouts" / "step_000001.jsonl"):
        assert record["reward"] in (0.0, 1.0) and not record["parts"]
    for name in ("heldout", "heldout-other"):
        for record in lines_of(finished / "rollouts" / f"{name}_000001.jsonl"):
            words = record["messages"][-1]["content"].split()
            assert record["reward"] == pytest.approx(0.25 + len(words) / 100)
            assert set(record["parts"]) == {"some", "many"}
    line = lines_of(finished / "metrics.jsonl")[-1]
    parts = [line["eval/other/part/some"], line["eval/other/part/many"]]
    assert line["eval/other/lenient"] == pytest.approx(statistics.mean(parts))


def test_a_checkpoint_is_ranked_by_the_metric_of_a_further_set(finished):
    checkpoints = Checkpoints(
        finished / "checkpoints", read_only=True, best_metric="eval/other/lenient"
    )
    line = lines_of(finished / "metrics.jsonl")[-1]
    assert checkpoints.metric(1) == line["eval/other/lenient"] != line["eval/lenient"]
    checkpoints.close()


def test_the_summary_s_command_can_be_copied(tmp_path):
    assert f"tensorboard --logdir '{tmp_path}/a run/tensorboard'" in results.summary(
        tmp_path / "a run"
    )


def test_the_summary_has_the_gain_of_every_set(finished):
    text = results.summary(finished)
    lines = lines_of(finished / "metrics.jsonl")
    for name, prefix in (("twin", "eval/twin/"), ("other", "eval/other/")):
        own = text.partition(f"held-out set {name}\n")[2]
        before, after, gain = own.splitlines()[:3]
        assert f"before  {lines[0][f'{prefix}reward']:.3f} ± " in before
        assert f"after   {lines[1][f'{prefix}reward']:.3f} ± " in after
        value = lines[1][f"{prefix}reward"] - lines[0][f"{prefix}reward"]
        assert gain.split()[:3] == ["gain", f"{value:+.3f}", "±"] and "paired over 6" in gain
    assert text.startswith(f"held-out reward before  {lines[0]['eval/reward']:.3f}")


def test_eval_mode_finds_the_same_of_a_set_whatever_other_sets_there_are(
    many_sets, finished, capsys
):
    given = changed(many_sets, eval__sets=many_sets.eval.sets[1:])
    modes.run("eval", given, {"eval.sets": given.eval.sets}, finished, 0)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    line = lines_of(finished / "metrics.jsonl")[-1]
    assert "eval/twin/reward" not in found
    for name in ("eval/reward", "eval/other/reward", "eval/other/strict_stderr"):
        assert found[name] == line[name]


def test_eval_mode_prints_a_table_and_keeps_its_result_beside_earlier_ones(
    many_sets, finished, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("export", "evaluations"))
    stored = (run / "config.json").read_bytes()
    for step in ("1", "best"):
        given = changed(many_sets, eval__sets=many_sets.eval.sets[1:], eval__samples=2)
        flags = {"eval.sets": given.eval.sets, "eval.samples": 2}
        modes.run("eval", given, flags, run, step=step)
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    (row,) = {one for one in out if one.split()[:1] == ["reward"]}
    assert f"{result['eval/reward']:.3f} ± {result['eval/reward_stderr']:.3f}" in row
    assert f"{result['eval/other/reward']:.3f} ± " in row
    assert {path.name for path in (run / "evaluations").iterdir()} == {
        f"step_000001{again}{kind}"
        for again in ("", "-2")
        for kind in (".json", ".heldout.jsonl", ".other.jsonl")
    }
    kept = json.loads((run / "evaluations" / "step_000001-2.json").read_text())
    assert kept.items() >= result.items() and kept["eval"]["samples"] == 2
    samples = lines_of(run / "evaluations" / "step_000001.other.jsonl")
    assert len(samples) == 12 and {one["stream"] for one in samples} == {"other"}
    assert (run / "config.json").read_bytes() == stored
    with pytest.raises(UserError, match=r"--step=7: there is no such checkpoint; there are \[1\]"):
        modes.run("eval", many_sets, {}, run, step="7")


def test_eval_mode_of_a_folder_without_a_run_is_an_error_and_makes_nothing(many_sets, tmp_path):
    for workdir in (tmp_path / "mistyped" / "run", tmp_path):
        with pytest.raises(UserError, match="holds no checkpoint to evaluate; give the workdir"):
            modes.run("eval", many_sets, {}, workdir)
    assert not [*tmp_path.iterdir()]


def test_a_set_that_overlaps_with_training_is_refused_by_its_name(many_sets, tmp_path):
    write_rows(tmp_path / "leak.jsonl", [40, 3])
    (tmp_path / "leak.jsonl").write_text((tmp_path / "leak.jsonl").read_text().replace("w3", "W3 "))
    leaky = changed(many_sets, eval__sets=(f"leak={tmp_path / 'leak.jsonl'}",))
    with pytest.raises(
        ValueError, match=r"eval.sets\[leak\]: 1 of 2 held-out tasks .* tasks.allow_overlap"
    ):
        job.load_tasks(leaky)
    leaky.tasks.allow_overlap = True
    assert len(job.load_tasks(leaky)[1]["leak"]) == 2


def test_sets_take_the_split_behind_the_mark_and_the_limit_of_tasks(many_sets, tmp_path):
    source = tmp_path / "rows.py"
    source.write_text(
        "def rows(split='none'):\n    return [{'prompt': f'{split} {i}'} for i in range(5)]\n"
    )
    given = changed(
        many_sets,
        eval__sets=(f"one={source}:rows#hard", f"two={source}:rows"),
        tasks__heldout_split="easy",
        eval__max_tasks=2,
    )
    _, found = job.load_tasks(given)
    assert list(found) == ["heldout", "one", "two"]
    assert [task.prompt for task in found["one"]] == ["hard 0", "hard 1"]
    assert [task.prompt for task in found["two"]] == ["easy 0", "easy 1"]
    assert len(found["heldout"]) == 2


def test_a_prompt_of_a_set_that_leaves_no_room_is_named(config, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "w1 " * 20, "id": "big"}) + "\n")
    long = changed(config, eval__sets=(f"long={tmp_path / 'long.jsonl'}",))
    with (
        pytest.raises(
            UserError,
            match=r"no prompt of eval.sets\[long\] leaves room .*\n.*task 'big'.*: 20 tokens",
        ),
        job.build(job.complete_config(long), tmp_path),
    ):
        pytest.fail("it was built")


def test_check_mode_tries_the_held_out_sets_and_their_evaluator(many_sets, tmp_path, capsys):
    modes.run("check", changed(many_sets, batch__group_size=16), {}, tmp_path, 0)
    out = capsys.readouterr().out
    assert "6 in held-out set twin" in out and "6 in held-out set other" in out
    for name in ("heldout", "twin", "other"):
        (line,) = [one for one in out.splitlines() if one.startswith(f"held out    {name}: ")]
        assert 0.25 <= float(line.split()[4]) <= 0.31 and line.endswith("in 4 samples")


def test_check_mode_refuses_a_best_metric_that_the_evaluator_does_not_give(many_sets, tmp_path):
    given = changed(many_sets, batch__group_size=16, checkpoint__best_metric="eval/other/part/none")
    with pytest.raises(ValueError, match="best_metric='eval/other/part/none': must be a metric of"):
        modes.run("check", given, {}, tmp_path, 0)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("failing", EvaluatorError, r"(?s)6 of 6 .* by eval.evaluator='.*:failing'.*judge is gone"),
        ("missing", ValueError, "eval.evaluator='.*:missing': .* must define 'missing'"),
    ],
)
def test_a_fault_of_the_held_out_evaluator_is_told_by_its_field(
    many_sets, tmp_path, name, error, message
):
    given = changed(many_sets, eval__evaluator=f"{folder_of(many_sets)}evaluator.py:{name}")
    with pytest.raises(error, match=message):
        train.train(job.open_config(tmp_path, given, {}), tmp_path)
