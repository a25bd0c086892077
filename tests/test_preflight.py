import json

import pytest
from test_chat import CHATML, make

from rftjax import config as configs
from rftjax import modes
from rftjax.errors import UserError
from rftjax.run import preflight
from rftjax.scoring import EvaluatorError
from rftjax.types import Task, Trajectory

EVALUATOR = """
def evaluate(task, trajectory):
    words = trajectory.completion.split()
    if trajectory.sample == 3:
        raise ValueError(f"no number in {' '.join(words)!r} of draw {trajectory.draw}")
    return sum(map(ord, "".join(words))) % 7 / 7

def broken(task, trajectory):
    return float(f"the answer is {trajectory.sample}")
"""


@pytest.fixture
def config(tiny_dir, tmp_path):
    rows = [{"prompt": f"w{i} w{i + 7} w{i % 5}"} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "evaluator.py").write_text(EVALUATOR)
    config = configs.base_config()
    config.steps, config.model.path = 2, str(tiny_dir)
    config.tasks.train, config.tasks.heldout_count = str(tmp_path / "rows.jsonl"), 2
    config.evaluator = f"{tmp_path / 'evaluator.py'}:evaluate"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 4, 4, 64
    config.sampler.max_new_tokens, config.sampler.slots = 4, 8
    config.rollout.max_length = 16
    config.scoring.workers, config.scoring.timeout_s = 1, 120.0
    config.eval.every = 0
    return config


def test_the_check_shows_prompt_stops_samples_and_grouped_reasons_and_keeps_them(
    config, tmp_path, capsys
):
    workdir = tmp_path / "run"
    modes.run("check", config, {}, workdir, 0)
    out = capsys.readouterr().out
    for wanted in (
        "prompt      of task",
        "stops       '",
        "rows        of 64 packed tokens in an update (batch.pack_tokens)",
        "best ",
        "worst ",
        "example ",
        "rollouts ",
        "evaluator   evaluate",
        "WARNING     the answer '0' to 4 tasks scores 0.857 on average",
    ):
        assert wanted in out, wanted
    assert "4 of 16 samples\n            4 x ValueError: no number in '…' of draw …" in out
    assert [path.name for path in workdir.iterdir()] == ["check"]
    report = (workdir / "check" / "report.txt").read_text()
    assert report in out and "check       passed" in report
    samples = [json.loads(x) for x in (workdir / "check" / "samples.jsonl").read_text().splitlines()]  # fmt: skip
    assert len(samples) == 16 and sum(not one["valid"] for one in samples) == 4


def test_a_check_that_fails_shows_and_keeps_what_it_sampled(config, tmp_path, capsys):
    config.evaluator = config.evaluator.replace(":evaluate", ":broken")
    with pytest.raises(EvaluatorError, match="16 of 16 samples"):
        modes.run("check", config, {}, tmp_path / "run", 0)
    out = capsys.readouterr().out
    assert "16 x ValueError: could not convert string to float: '…'" in out
    assert "check       passed" not in out
    assert (tmp_path / "run" / "check" / "report.txt").read_text() in out


def test_a_check_without_a_score_says_so(config, tmp_path):
    config.evaluator = config.evaluator.replace(":evaluate", ":broken")
    config.scoring.max_error_share = 1.0
    with pytest.raises(UserError, match="none of 16 samples has a score, for the reasons above"):
        modes.run("check", config, {}, tmp_path / "run", 0)


def test_a_workdir_that_cannot_be_written_is_refused_before_the_check_samples(
    config, tmp_path, capsys
):
    with pytest.raises(UserError, match="--workdir=.*cannot be written to"):
        modes.run("check", config, {}, tmp_path / "rows.jsonl" / "run", 0)
    assert capsys.readouterr().out == ""


def test_a_warning_says_that_every_answer_was_cut_and_what_to_raise():
    config = configs.base_config()
    found = [
        Trajectory(Task("t", []), 0, sample, finish_reason="length", turn_rewards=[0.0])
        for sample in range(3)
    ]
    assert "all 3 answers were cut" in preflight.all_cut(found, config)
    assert "sampler.max_new_tokens=256" in preflight.all_cut(found, config)
    found[1].finish_reason = "stop"
    assert not preflight.all_cut(found, config)


SHOWN = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
# As Qwen's template writes calls, and as another family's does.
CALLS = "{% for call in m.tool_calls or [] %}OPEN{{ call.function | tojson }}CLOSE{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]


def calling(before, after):
    """A template that shows tools and writes calls between these texts."""
    calls = CALLS.replace("OPEN", before).replace("CLOSE", after)
    return SHOWN + CHATML.replace("+ '<|im_end|>", "}}" + calls + "{{ '<|im_end|>")


@pytest.mark.parametrize(
    "template, told",
    [
        (CHATML, ["WARNING: the chat template drops the", "WARNING: the chat template writes no"]),
        (SHOWN + CHATML, ["WARNING: the chat template writes no calls"]),
        (
            calling("<tool_call>\n", "\n</tool_call>"),
            ["a call, written by the template and read back: '<tool_call>"],
        ),
        (calling("[CALL]", ""), ["WARNING: rftjax.environments.tools does not read a call as"]),
    ],
)
def test_the_check_says_whether_tools_are_seen_and_calls_are_read(template, told):
    asked = [{"role": "user", "content": "find ab"}]
    found = preflight.tool_findings(make(template), asked, TOOLS)
    assert len(found) == len(told)
    for one, start in zip(found, told, strict=True):
        assert one.startswith(start), one


@pytest.mark.parametrize(
    "example, told",
    [
        ('<tool_call>{"name": "find"}</tool_call>', ["a call, written by an example and read"]),
        ("<tool_call>find(ab)</tool_call>", ["WARNING: the call of an example is not read"]),
        ("ab", ["WARNING: the chat template writes no calls"]),
    ],
)
def test_tools_that_the_messages_teach_are_seen_and_their_examples_are_read(example, told):
    shown = [("system", "find"), ("user", "ab"), ("assistant", example), ("user", "ab")]
    messages = [{"role": role, "content": text} for role, text in shown]
    found = preflight.tool_findings(make(CHATML), messages, TOOLS)
    assert [one.startswith(start) for one, start in zip(found, told, strict=True)] == [True], found
