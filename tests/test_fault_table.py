"""The table of faults tells runs that lost what they should from others."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import fault_table
import injected_faults as injected

STEPS = 20


@pytest.fixture
def run(tmp_path):
    """Writes what a run records in which `change` alters a sample; returns what the table says of it."""

    def recorded(fault="exception", change=lambda one, struck: None, growth=0.0):
        (tmp_path / "rollouts").mkdir(exist_ok=True)
        lines = []
        for step in range(1, STEPS + 1):
            samples = []
            for place in range(16):
                draw, sample = 4 * step + place // 4, place % 4
                one = {"draw": draw, "sample": sample, "messages": [], "valid": True}
                one["reward"] = injected.right(draw, sample)
                struck = injected.struck(injected.key_of(draw, sample))
                if struck:
                    one |= {"valid": False, "reward": 0.0}
                change(one, struck)
                samples.append(json.dumps(one) + "\n")
            (tmp_path / f"rollouts/step_{step:06}.jsonl").write_text("".join(samples))
            lines.append(json.dumps({"hook/resident_mib": 400 + growth * step}) + "\n")
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        said = {"fault": fault, "exit": 0, "processes_left": [], "files_left": []}
        said |= fault_table.counted(fault, tmp_path)
        return said, fault_table.wrong(said, STEPS)

    return recorded


def score_struck_with_0(one, struck):
    one["valid"] = True


def lose_another(one, struck):
    one["valid"] &= (one["draw"], one["sample"]) != (4, 0)


def change_a_reward(one, struck):
    one["reward"] += 0.1 * (not struck and one["draw"] == 4)


def test_a_run_that_lost_the_struck_samples_alone_is_right(run):
    said, wrong = run()
    assert wrong == [] and said["samples"] == 320
    assert 0 < said["struck"] == said["lost"] < 40


@pytest.mark.parametrize("settings, told", [
    ({"change": score_struck_with_0}, "lost samples are not the struck ones"),
    ({"change": lose_another}, "other samples than the struck ones were touched"),
    ({"change": change_a_reward}, "other samples than the struck ones were touched"),
    ({"fault": "zombie_children"}, "lost samples are not the struck ones"),
    ({"growth": 10.0}, "memory grows"),
])  # fmt: skip
def test_what_went_otherwise_is_told(run, settings, told):
    assert not injected.struck(injected.key_of(4, 0))
    assert told in run(**settings)[1]


def test_what_is_left_behind_or_ends_otherwise_is_told(run):
    said, _ = run()
    for change in ({"exit": 1}, {"processes_left": ["sleep"]}, {"files_left": ["code"]}):
        assert len(fault_table.wrong(said | change, STEPS)) == 1
    assert "| exception | 320 |" in fault_table.table([said])
