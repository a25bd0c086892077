"""Metrics, rollouts and TensorBoard say the same, survive kills, and never show a point twice."""

import contextlib
import json
import logging
import math
import os
import re
import sys
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.util import tensor_util

from rftjax.monitor import transcripts
from rftjax.monitor.loggers import Loggers
from rftjax.monitor.progress import format_duration
from rftjax.monitor.recorder import Recorder, check_workdir
from rftjax.monitor.rollouts import rollouts_markdown, trajectory_record
from rftjax.monitor.step_metrics import rollout_metrics
from rftjax.types import Score, Sequence, Task, Trajectory


def make_trajectory(draw=0, sample=0, reward=1.0, completion="four", tokens=(5, 6), **changes):
    sequence = Sequence()
    sequence.extend([1, 2, 3])
    sequence.extend(list(tokens), [-0.1] * len(tokens), policy_version=4)
    asked = [{"role": "user", "content": "2 + 2?"}]
    answered = [*asked, {"role": "assistant", "content": completion}]
    fields = {
        "messages": answered,
        "sequences": [sequence],
        "turn_rewards": [0.0],
        "finish_reason": "stop",
        "score": Score(reward),
        **changes,
    }
    return Trajectory(Task(f"task-{draw}", asked), draw, sample, **fields)


MADE: list[Recorder] = []


@pytest.fixture(autouse=True)
def recorders_are_closed():
    yield
    while MADE:
        with contextlib.suppress(OSError):  # of the test with a full disk
            MADE.pop().close()


def make_recorder(workdir, **changes) -> Recorder:
    MADE.append(Recorder(workdir, **{"steps": 10, "quiet": True, **changes}))
    return MADE[-1]


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def accumulated(workdir) -> EventAccumulator:
    """What TensorBoard itself holds of a run."""
    return EventAccumulator(str(workdir / "tensorboard"), tensor_size_guidance={}).Reload()


def tags(workdir, plugin) -> list[str]:
    events = accumulated(workdir)
    found = events.Tags()["tensors"]
    return sorted(t for t in found if events.SummaryMetadata(t).plugin_data.plugin_name == plugin)


def scalars(workdir, tag) -> dict[int, float]:
    events = accumulated(workdir).Tensors(tag)
    points = [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in events]
    assert len(points) == len(dict(points)), f"{tag} has two points at one step: {points}"
    return dict(points)


def texts(workdir, tag) -> dict[int, str]:
    events = accumulated(workdir).Tensors(tag)
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events}


def test_one_object_a_step_with_the_names_that_tensorboard_has(tmp_path):
    recorder = make_recorder(tmp_path)
    recorder.write(0, {"eval/reward": 0.25}, stream="heldout")
    recorder.flush(0)
    recorder.write(1, {"reward/mean": 0.5, "loss": np.float32(0.1)})
    recorder.write(1, {"eval/reward": 0.75}, stream="heldout")
    recorder.flush(1)
    recorder.close()
    first, second = lines_of(tmp_path / "metrics.jsonl")
    assert first == {"step": 0, "eval/reward": 0.25}
    assert second.pop("time/step_s") >= 0
    assert second == {
        "step": 1,
        "reward/mean": 0.5,
        "loss": pytest.approx(0.1),
        "eval/reward": 0.75,
    }
    first_group = ["_overview/heldout_reward", "_overview/training_reward"]
    named = ["eval/reward", "loss", "reward/mean", "time/step_s"]
    assert tags(tmp_path, "scalars") == [*first_group, *named]
    for tag in ("eval/reward", "_overview/heldout_reward"):
        assert scalars(tmp_path, tag) == {0: 0.25, 1: 0.75}


def test_flushing_the_last_step_again_adds_to_its_line(tmp_path):
    recorder = make_recorder(tmp_path)
    for step in (1, 2):
        recorder.write(step, {"loss": 1.0 / step})
        recorder.flush(step)
    recorder.write(2, {"loss": 0.5, "eval/reward": 0.5})
    recorder.close()
    lines = lines_of(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert (lines[1]["loss"], lines[1]["eval/reward"]) == (0.5, 0.5)
    assert scalars(tmp_path, "loss") == {1: 1.0, 2: 0.5}
    with pytest.raises(ValueError, match="step 1 came after those of step 2"):
        recorder.flush(1)


def test_what_is_no_number_is_written_as_null_with_a_warning(tmp_path, caplog):
    recorder = make_recorder(tmp_path)
    recorder.write(1, {"loss": math.nan, "grad_norm": math.inf, "entropy": 2.0})
    with caplog.at_level(logging.WARNING):
        recorder.flush(1)
    assert "written as null: loss, grad_norm" in caplog.text
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert line["entropy"] == 2.0


def record_steps(workdir, first, last, value, **changes):
    recorder = make_recorder(workdir, **changes)
    for step in range(first, last + 1):
        rollouts = [make_trajectory(draw=step)]
        recorder.write(step, {"loss": value}, {"reward": np.arange(3.0)}, rollouts)
        for stream in ("heldout", "hard_1"):
            recorder.write(step, trajectories=rollouts, stream=stream)
        recorder.flush(step)
    return recorder


def test_a_resume_cuts_back_to_the_checkpoint_and_shows_no_point_twice(tmp_path):
    record_steps(tmp_path, 1, 5, 1.0)  # killed: never closed
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    (tmp_path / "rollouts" / ".step_000006.jsonl.tmp").write_text("{")
    recorder = record_steps(tmp_path, 4, 6, 2.0, resume_step=3)
    recorder.close()
    losses = [(line["step"], line["loss"]) for line in lines_of(tmp_path / "metrics.jsonl")]
    assert losses == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert scalars(tmp_path, "loss") == dict(losses)
    steps = [event.step for event in accumulated(tmp_path).Tensors("rollouts/train")]
    assert steps == [1, 2, 3, 4, 5, 6]

    make_recorder(tmp_path, resume_step=2).close()
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    kinds = ("heldout-hard_1", "heldout", "step")
    assert names == [f"{kind}_00000{step}.jsonl" for kind in kinds for step in (1, 2)]
    assert scalars(tmp_path, "loss") == {1: 1.0, 2: 1.0}


def test_a_run_that_starts_over_before_its_first_checkpoint_shows_step_0_once(tmp_path):
    for _ in range(2):
        recorder = make_recorder(tmp_path)
        recorder.write(0, {"eval/reward": 0.25})
        recorder.flush(0)
        recorder.write(1, {"loss": 1.0})
        recorder.flush(1)
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [0, 1]
    assert scalars(tmp_path, "eval/reward") == {0: 0.25}


def test_rollouts_are_written_whole(tmp_path):
    recorder = make_recorder(tmp_path)
    score = Score(0.5, {"format": 1.0}, reason="half", metrics={"words": 3.0})
    one = make_trajectory(
        7,
        3,
        score=score,
        advantage=-0.5,
        completion="ä \ud800 \u2028",
        infos=[{"moves": 2}],
        state={"won": True},
    )
    broken = make_trajectory(7, 4, score=Score(math.nan, valid=False, reason="raised"))
    recorder.write(2, trajectories=[one, broken])
    recorder.write(2, trajectories=[make_trajectory(score=None)], stream="heldout")
    recorder.close()
    path = tmp_path / "rollouts" / "step_000002.jsonl"
    record, invalid = lines_of(path)
    assert record == {
        "step": 2,
        "stream": "train",
        "draw": 7,
        "task_id": "task-7",
        "sample": 3,
        "messages": one.messages,
        "sequences": [
            {
                "tokens": [1, 2, 3, 5, 6],
                "sampled": [False, False, False, True, True],
                "logprobs": [0.0, 0.0, 0.0, -0.1, -0.1],
                "policy_version": [-1, -1, -1, 4, 4],
            }
        ],
        "reward": 0.5,
        "parts": {"format": 1.0},
        "metrics": {"words": 3.0},
        "valid": True,
        "reason": "half",
        "finish_reason": "stop",
        "error": "",
        "advantage": -0.5,
        "turn_rewards": [0.0],
        "infos": [{"moves": 2}],
        "state": {"won": True},
    }
    assert (invalid["reward"], invalid["valid"], invalid["reason"]) == (None, False, "raised")
    assert lines_of(tmp_path / "rollouts" / "heldout_000002.jsonl")[0]["reward"] is None


def test_tensorboard_shows_rollouts_as_conversations_and_histograms_as_buckets(tmp_path):
    recorder = make_recorder(tmp_path, every=2, rollouts=2)
    for step in (1, 2):
        recorder.write(
            step,
            histograms={"reward": np.array([0.0, 1.0, 1.0, math.nan]), "empty": np.zeros(0)},
            trajectories=[make_trajectory(0, sample, 0.25 * sample) for sample in range(4)],
            texts={"alarms": "**none**"},
        )
        recorder.flush(step)
    recorder.close()
    text = texts(tmp_path, "rollouts/train").pop(2)
    assert "| 0 | task-0 | 0.00 0.25 0.50 0.75 | 0.38 | 2 | stop 4 |" in text
    assert re.findall(r"### draw 0, sample (\d)", text) == ["3", "0"]
    assert "**user**\n\n```\n2 + 2?\n```\n\n**assistant**\n\n```\nfour\n```" in text
    assert "reward **0.75**" in text
    assert texts(tmp_path, "alarms") == {1: "**none**", 2: "**none**"}
    assert tags(tmp_path, "text") == ["alarms", "rollouts/train"]
    assert tags(tmp_path, "histograms") == ["reward"]
    (event,) = accumulated(tmp_path).Tensors("reward")
    buckets = np.frombuffer(event.tensor_proto.tensor_content).reshape(-1, 3)
    assert buckets[0].tolist() == pytest.approx([0, 1 / 30, 1])
    assert buckets[-1].tolist() == pytest.approx([29 / 30, 1, 2])
    assert buckets[:, 2].sum() == 3


def test_no_text_of_a_model_can_leave_its_block():
    hostile = "```\n# heading\n````\n<script>" + "x" * 5000
    tool_call = {"role": "assistant", "content": None, "tool_calls": [{"id": "a|b"}]}
    one = make_trajectory(completion=hostile, score=Score(0.0, valid=False, reason="a | *b*\nc"))
    one.messages.append(tool_call)
    text = rollouts_markdown([one], 8)
    assert "`````\n```\n# heading\n````\n<script>xxx" in text
    assert re.search(r"x\n\.\.\. \(\d+ more characters\)\n`````", text)
    assert '[{"id": "a|b"}]' in text
    assert r"*a \| \*b\* c*" in text
    assert "**no valid reward**" in text
    html = markdown_to_safe_html(text)
    assert "<h1>" not in html
    assert "<script>" not in html


def test_rewards_count_where_valid_and_groups_are_draws():
    rows = [
        make_trajectory(0, 0, 1.0, tokens=(1, 2, 3), score=Score(1.0, {"format": 1.0})),
        make_trajectory(0, 1, 0.0, tokens=(1, 2, 4), score=Score(0.0, {"format": 0.5})),
        make_trajectory(1, 0, 0.5, tokens=(1,), finish_reason="length", turn_rewards=[0.0] * 3),
        make_trajectory(1, 1, 0.5, tokens=(1,)),
        make_trajectory(2, 0, 1.0, tokens=(1,)),
        make_trajectory(2, 1, score=Score(9.0, valid=False)),
        make_trajectory(2, 2, score=None, tokens=(8, 8)),
        make_trajectory(3, 0, score=None, finish_reason="error", tokens=()),
    ]
    assert rollout_metrics(rows) == pytest.approx(
        {
            "reward/mean": 0.6,
            "reward/std": np.std([1, 0, 0.5, 0.5, 1]),
            "reward/part/format": 0.75,
            "rollout/truncated_share": 1 / 8,
            "rollout/completion_tokens_mean": 13 / 8,
            "rollout/turns_mean": 10 / 8,
            "rollout/duplicate_share": 1 / 8,
            "rollout/duplicate_wrong_share": 0.0,
            "rollout/commonest_share": 7 / 8,
            "rollout/commonest_reward": 0.6,
            "reward/max": 1.0,
            "rollout/tokens_right_mean": 2.0,
            "rollout/tokens_wrong_mean": 5 / 3,
            "evaluator/error_share": 2 / 8,
            "environment/error_share": 1 / 8,
            "rollout/bystander_share": 0.0,
            "rollout/unanswered_share": 0.0,
            "groups/zero_variance_share": 3 / 4,
        }
    )


def test_bystanders_are_counted_apart_from_faults():
    rows = [make_trajectory(0, n, score=Score(0.0, valid=False)) for n in range(4)]
    rows[0].bystander = rows[1].bystander = True
    rows[1].finish_reason = rows[2].finish_reason = "error"
    metrics = rollout_metrics(rows)
    shares = ("rollout/bystander_share", "evaluator/error_share", "environment/error_share")
    assert [metrics[name] for name in shares] == [0.5, 0.25, 0.25]


def test_without_a_valid_score_the_reward_is_no_number():
    metrics = rollout_metrics([make_trajectory(score=None)])
    assert math.isnan(metrics["reward/mean"])
    assert metrics["evaluator/error_share"] == 1.0
    assert metrics["groups/zero_variance_share"] == 1.0
    assert rollout_metrics([]) == {}


def test_timers_add_up_and_throughput_counts_sampled_tokens(tmp_path):
    began_s = time.monotonic()
    recorder = make_recorder(tmp_path)
    for _ in range(2):
        with recorder.time("sample"):
            sum(range(1000))
    with pytest.raises(KeyError), recorder.time("heldout", in_step=False):
        time.sleep(0.02)
        raise KeyError
    recorder.write(1, trajectories=[make_trajectory(tokens=(1, 2, 3))])
    recorder.write(1, trajectories=[make_trajectory()], stream="heldout")
    recorder.flush(1)
    passed_s = time.monotonic() - began_s
    recorder.flush(2)
    first, second = lines_of(tmp_path / "metrics.jsonl")
    assert first["time/step_s"] >= first["time/sample_s"] > 0
    assert first["time/heldout_s"] >= 0.02
    assert first["time/step_s"] + first["time/heldout_s"] <= passed_s
    tokens = first["throughput/sampled_tokens_per_s"] * first["time/sample_s"]
    assert tokens == pytest.approx(3)
    assert set(second) == {"step", "time/step_s"}


def test_progress_is_one_plain_line_a_step_outside_a_terminal(tmp_path, capsys):
    recorder = make_recorder(tmp_path, steps=60, quiet=False)
    recorder.write(0, {"eval/reward": 0.31})
    recorder.flush(0)
    recorder.write(12, {"reward/mean": 0.434})
    recorder.flush(12)
    recorder.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step   0/60  held-out 0.31"
    pattern = r"step  12/60  reward 0\.43  held-out 0\.31  \d+\.\d s/step  left \w+"
    assert re.fullmatch(pattern, second)


def test_progress_without_stdout_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as after `>&-`
    recorder = make_recorder(tmp_path, steps=60, quiet=False)
    recorder.write(1, {"eval/reward": 0.31})
    recorder.flush(1)
    recorder.close()


def test_progress_is_redrawn_on_one_line_in_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    recorder = make_recorder(tmp_path, steps=2, quiet=False)
    for step in (1, 2):
        recorder.write(step, {"reward/mean": 0.5, "eval/reward": 0.5})
        recorder.flush(step)
    recorder.close()
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1
    half, full = (text.strip() for text in shown.split("\r\033[2K")[1:])
    assert half.startswith("[##########..........]  step  1/2  reward 0.50")
    assert full.startswith("[####################]  step  2/2")
    assert max(len(half), len(full)) <= 59


def test_alarms_are_shown_in_metrics_progress_tensorboard_and_log(tmp_path, capsys, caplog):
    def alarms(lines):
        return {"too_high": "above 1"} if lines[-1]["reward/mean"] > 1 else {}

    recorder = make_recorder(tmp_path, quiet=False, alarms=alarms)
    with caplog.at_level(logging.WARNING):
        for step, reward in enumerate([0.5, 2.0, 3.0, 0.5], 1):
            recorder.write(step, {"reward/mean": reward})
            recorder.flush(step)
    recorder.close()
    assert [line.get("alarm/too_high") for line in lines_of(tmp_path / "metrics.jsonl")] == [
        None,
        1.0,
        1.0,
        None,
    ]
    shown = [line.endswith("ALARM too_high") for line in capsys.readouterr().out.splitlines()]
    assert shown == [False, True, True, False]
    assert set(texts(tmp_path, "alarms")) == {2, 3}
    assert scalars(tmp_path, "alarm/too_high") == {2: 1.0, 3: 1.0}
    assert len([record for record in caplog.records if "too_high" in record.message]) == 1


def test_an_alarm_in_a_terminal_begins_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log, both = logging.getLogger("rftjax.monitor.recorder"), logging.StreamHandler(sys.stdout)
    recorder = make_recorder(
        tmp_path, quiet=False, alarms=lambda lines: {"high": "2"} if len(lines) > 1 else {}
    )
    log.addHandler(both)
    try:
        for step in (1, 2):
            recorder.write(step, {"reward/mean": 0.5})
            recorder.flush(step)
    finally:
        log.removeHandler(both)
    recorder.close()
    assert "step 2: alarm high: 2" in capsys.readouterr().out.splitlines()


def test_durations_are_readable():
    durations = [format_duration(seconds) for seconds in (0.4, 59.6, 390, 3599.6, 7500)]
    assert durations == ["0s", "1m00s", "6m30s", "1h00m", "2h05m"]


def test_a_process_that_is_not_primary_writes_and_prints_nothing(tmp_path, capsys):
    recorder = make_recorder(tmp_path / "new", quiet=False, primary=False)
    with recorder.time("sample"):
        recorder.write(1, {"loss": 1.0}, trajectories=[make_trajectory()])
    recorder.flush(1)
    recorder.close()
    assert not (tmp_path / "new").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_said_with_the_way_out(tmp_path):
    recorder = make_recorder(tmp_path)
    recorder.write(1, {"loss": 1.0})
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot record .*No space left.*Free some space") as caught:
        recorder.flush(1)
    assert str(tmp_path) in str(caught.value)


def test_a_workdir_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--workdir=.*file/run: cannot be written to"):
        check_workdir(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match=r"GiB are free there, the run needs about .*keep"):
        check_workdir(tmp_path, needed_bytes=2**60)
    with pytest.raises(ValueError, match=r"--workdir=.*must be UTF-8"):
        check_workdir(tmp_path / os.fsdecode(b"l\xe9n"))
    assert check_workdir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(ValueError, match=r"logging\.every=0"):
        make_recorder(tmp_path, every=0)


def test_a_step_that_leaves_samples_out_says_how_many_and_why(tmp_path, capsys):
    recorder = make_recorder(tmp_path, quiet=False)
    lost = [
        make_trajectory(
            sample=n, score=Score(0.0, valid=False, reason=f"ValueError: no number in 'w{n}'")
        )
        for n in range(2)
    ]
    recorder.write(1, trajectories=[make_trajectory(sample=9), *lost])
    recorder.write(1, trajectories=[make_trajectory()])
    recorder.close()
    out = capsys.readouterr().out
    wanted = (
        "step 1: 2 of 3 samples have no score and are left out; 2 x ValueError: no number in '…'"
    )
    assert out.count("left out") == 1 and wanted in out


def test_copies_of_right_and_of_short_answers_are_no_odd_ones_and_the_commonest_answer_is_found():
    long = tuple(range(8))
    group = [
        make_trajectory(sample=n, reward=reward, completion=text, tokens=tokens)
        for n, (reward, text, tokens) in enumerate(
            [(1.0, "yes", long)] * 3 + [(0.0, "no", (5,))] * 3 + [(0.5, " so", long[::-1])] * 4
        )
    ]
    metrics = rollout_metrics(group)
    assert metrics["rollout/duplicate_share"] == 0.7
    assert metrics["rollout/duplicate_wrong_share"] == 0.3
    assert "rollout/commonest_share" not in metrics and metrics["reward/max"] == 1.0
    for number, one in enumerate(group):
        one.draw = number
    metrics = rollout_metrics(group)
    assert metrics["rollout/commonest_share"] == 0.4 and metrics["rollout/commonest_reward"] == 0.5
    assert metrics["rollout/duplicate_wrong_share"] == 0.0


def test_thoughts_make_no_answers_different():
    texts = ["<think>a</think> 4", "b</think>4 ", "<think>c", "<think>d"]
    made = [make_trajectory(draw=n, completion=text) for n, text in enumerate(texts)]
    assert rollout_metrics(made)["rollout/commonest_share"] == 0.5
    answers = [transcripts.answer(trajectory_record(0, one)) for one in made]
    assert answers == ["4", "4", "<think>c", "<think>d"]


def test_numbers_that_an_evaluator_only_records_are_averaged_apart_from_parts():
    rows = [
        make_trajectory(score=Score(1.0, metrics={"words": 4.0, "cost": 2.0})),
        make_trajectory(sample=1, score=Score(0.0, metrics={"words": 1.0})),
        make_trajectory(sample=2, score=Score(0.0, valid=False, metrics={"words": 99.0})),
    ]
    metrics = rollout_metrics(rows)
    assert (metrics["metric/words"], metrics["metric/cost"]) == (2.5, 2.0)
    assert not any(name.startswith("reward/part/") for name in metrics)


def test_tensorboard_shows_the_config_and_hparams_with_the_held_out_reward(tmp_path):
    config = {"optim.lr": 1e-3, "seed": 3, "evaluator": "a|b:c", "eval.pass_k": (1, 4), "steps": 10}
    config["tasks.train"] = os.fsdecode(b"l\xe9n.jsonl")  # a name in Latin-1
    plain = {"logging.every": 2, "lora.path": "", "grpo.preset": "dapo", "grpo.clip_high": 0.28}
    recorder = make_recorder(tmp_path, config=config | plain)
    recorder.write(1, {"eval/reward": 0.5})
    recorder.close()
    table = texts(tmp_path, "config")[0]
    assert r"| tasks.train | l\udce9n.jsonl |" in table
    assert "| optim.lr | 0.001 |" in table and r"| evaluator | a\|b:c |" in table
    events = accumulated(tmp_path)
    metadata = {tag: events.SummaryMetadata(tag) for tag in tags(tmp_path, "hparams")}
    experiment = hparams.parse_experiment_plugin_data(
        metadata["_hparams_/experiment"].plugin_data.content
    )
    assert [one.name.tag for one in experiment.metric_infos] == ["eval/reward", "reward/mean"]
    session = hparams.parse_session_start_info_plugin_data(
        metadata["_hparams_/session_start_info"].plugin_data.content
    )
    assert session.group_name == tmp_path.name
    assert set(session.hparams) == {*config, "grpo.preset"}
    assert session.hparams["optim.lr"].number_value == 1e-3
    assert session.hparams["eval.pass_k"].string_value == "(1, 4)"


def test_loggers_get_the_lines_and_are_closed_with_the_run(tmp_path):
    lines = []

    class Service:
        log = staticmethod(lambda step, metrics: lines.append((step, metrics["loss"])))
        close = staticmethod(lambda: lines.append("closed"))

    recorder = make_recorder(tmp_path, loggers=Loggers({"own": Service}))
    recorder.write(1, {"loss": 0.5})
    recorder.flush(1)
    recorder.write(2, {"loss": 0.25})
    recorder.close()
    assert lines == [(1, 0.5), (2, 0.25), "closed"]
