import gzip
import json

import pytest

from rftjax import compare
from rftjax.errors import UserError
from rftjax.run import results


def record(task, reward, said, valid=True, step=0):
    return {
        "step": step, "task_id": task, "sample": 0, "reward": reward, "valid": valid, "parts": {},
        "messages": [{"role": "user", "content": f"q {task}"}, {"role": "assistant", "content": said}],
        "sequences": [{"sampled": [False, True]}], "reason": "", "error": "", "finish_reason": "stop",
    }  # fmt: skip


def make_run(folder, lr, rewards, said="right", packed=False):
    """A run of two evaluations; `rewards` has the rewards of the tasks before and after."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"steps": 4, "optim": {"lr": lr}, "seed": 0}))
    lines = []
    for step, values in zip((0, 4), rewards, strict=True):
        mean = sum(values) / len(values)
        line = {"step": step, "eval/reward": mean, "eval/reward_stderr": 0.1}
        lines.append(line | {"eval/tasks": len(values)})
        records = [
            record(f"t{number}", reward, said if reward else "wrong", step=step)
            for number, reward in enumerate(values)
        ]
        texts = [json.dumps(one) + "\n" for one in records]
        data = "".join(texts).encode()
        name = folder / "rollouts" / f"heldout_{step:06d}.jsonl"
        if packed:
            name.with_name(name.name + ".gz").write_bytes(gzip.compress(data))
        else:
            name.write_bytes(data)
    lines[1] |= {"reward/mean": 0.5, "alarm/truncation": 1.0}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 5, "rew')  # as a kill leaves it
    return compare.Run(folder)


@pytest.fixture
def runs(tmp_path):
    return [
        make_run(tmp_path / "one", 0.1, [[0, 0, 1, 0], [1, 1, 1, 0]]),
        make_run(tmp_path / "two", 0.2, [[0, 0, 1, 0], [1, 0, 1, 0]], packed=True),
    ]


def test_differing_fields_gains_answers_and_alarms_are_shown(runs):
    text = "\n".join(compare.compare(runs))
    assert "optim.lr  0.1  0.2" in text and "seed" not in text
    assert "A    0.250 ± 0.100 (step 0)  0.750 ± 0.100 (step 4)  +0.500 ± 0.289  paired" in text
    assert "B - A: -0.250 ± 0.250 at the end, paired over 4 tasks" in text
    assert "truncation (step 4)" in text
    assert "A: the commonest of 4 answers (heldout, step 4)" in text
    assert "3      75%    1.000   right" in text and "1      25%    0.000   wrong" in text
    assert "B: the best (heldout, step 4)" in text and "B: the worst (heldout, step 4)" in text
    assert "A: answers to task t0 over the steps" in text
    assert "0     0.000   wrong\n  4     1.000   right" in text


@pytest.mark.parametrize(
    ("field", "own", "told"),
    [("evaluator", "", 1), ("eval.sets", "", 1), ("evaluator", "e.py:f", 0), ("optim.lr", "", 0)],
)
def test_a_gain_over_a_changed_evaluator_is_marked(runs, field, own, told):
    run = runs[0]
    (run.path / "config.json").write_text(json.dumps({"steps": 4, "eval": {"evaluator": own}}))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 3, f"changed/{field}": 1.0}) + "\n")
    note = f"earlier rewards are not comparable: changed {field} (step 3)"
    assert "\n".join(compare.compare([run])).count(note) == told
    assert "\n".join(results.held_out(run, "heldout")).count(note) == told


def test_a_part_or_metric_called_reward_is_no_held_out_set(tmp_path):
    run = make_run(tmp_path / "run", 0.1, [[0], [1]])
    for line in run.lines:
        line.update({"eval/part/reward": 0.5, "eval/metric/reward": 2.0})
    assert run.streams() == ["heldout"]


def test_a_gain_without_the_rollouts_of_both_evaluations_adds_the_errors(runs):
    (runs[0].path / "rollouts" / "heldout_000000.jsonl").unlink()
    assert compare.gain(runs[0], "heldout")[2:4] == ["+0.500 ± 0.141", "unpaired"]


def test_one_run_alone_and_a_named_task(runs, capsys):
    assert compare.main([str(runs[1].path), "--task=t2"]) == 0
    out = capsys.readouterr().out
    assert "answers to task t2" in out and "fields that differ" not in out
    assert compare.main([str(runs[1].path), "--task=none"]) == 1
    assert (
        "--task=none: heldout has no such task; it has t0, t1, t2, t3\n" in capsys.readouterr().err
    )


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no workdir of a run"):
        compare._open(str(tmp_path))
