"""Rollouts are written by a thread, whole, and no more of them than asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rftjax.monitor import rollout_files, transcripts
from rftjax.monitor.rollout_files import RolloutFiles
from rftjax.types import Score, Sequence, Task, Trajectory


def trajectory(draw: int = 0, text: str = "yes") -> Trajectory:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    sequence = Sequence()
    sequence.extend([1, 2])
    sequence.extend([3], [-0.5], 0)
    return Trajectory(Task(f"t{draw}", []), draw, 0, messages, [sequence], score=Score(1.0))


@pytest.mark.parametrize("compress", [False, True])
def test_a_steps_file_has_every_trajectory_by_the_name_of_its_stream(tmp_path: Path, compress):
    files = RolloutFiles(tmp_path / "rollouts", compress=compress)
    files.folder.mkdir()
    for stream in ("train", "heldout", "hard"):
        files.write(3, [trajectory(0), trajectory(1)], stream)
    files.close()
    end = ".jsonl.gz" if compress else ".jsonl"
    assert {path.name for path in files.folder.iterdir()} == {
        f"{name}_000003{end}" for name in ("step", "heldout", "heldout-hard")
    }
    records = transcripts.read(files.folder / f"heldout-hard_000003{end}")
    assert [(one["step"], one["stream"], one["draw"]) for one in records] == [
        (3, "hard", 0),
        (3, "hard", 1),
    ]
    size = (files.folder / f"step_000003{end}").stat().st_size
    assert abs(rollout_files.size([trajectory(0), trajectory(1)], compress=compress) - size) < 20


def test_the_latest_steps_are_kept_and_all_of_held_out_sets(tmp_path: Path):
    files = RolloutFiles(tmp_path / "rollouts", keep=2)
    files.folder.mkdir()
    (files.folder / "step_notes.jsonl").write_text("mine")
    for step in range(5):
        files.write(step, [trajectory()], "train")
        files.write(step, [trajectory()], "heldout")
    files.close()
    assert sorted(transcripts.files(tmp_path, "train")) == [3, 4]
    assert sorted(transcripts.files(tmp_path, "heldout")) == [0, 1, 2, 3, 4]
    assert (files.folder / "step_notes.jsonl").exists()


def test_nothing_is_written_where_they_are_off(tmp_path: Path):
    files = RolloutFiles(tmp_path / "rollouts", keep=0)
    files.write(1, [trajectory()], "train")
    files.close()
    assert not [*tmp_path.iterdir()]


def test_what_lies_beyond_a_step_is_cut_and_files_of_others_stay(tmp_path: Path):
    names = ["step_000001.jsonl", "step_000002.jsonl.gz", "heldout-a_000003.jsonl", "notes.jsonl",
             ".step_000001.jsonl.tmp", "step_000009.txt"]  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("")
    RolloutFiles(tmp_path).cut(1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step_000001.jsonl", "notes.jsonl", "step_000009.txt"}


def test_an_error_of_the_thread_is_raised_by_the_next_calls(tmp_path: Path):
    files = RolloutFiles(tmp_path / "gone")
    files.write(1, [trajectory()], "train")
    with pytest.raises(FileNotFoundError):
        files.wait()
    for step in range(rollout_files.PENDING):
        files.write(step, [trajectory()], "train")
    with pytest.raises(FileNotFoundError):
        files.write(9, [trajectory()], "train")
    with pytest.raises(FileNotFoundError):
        files.close()


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path: Path):
    path = tmp_path / "step_000001.jsonl"
    path.write_text("before")

    def lines():
        yield b"half"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        rollout_files.write_whole(path, lines())
    assert path.read_text() == "before"


def test_packed_files_are_the_same_bytes_at_any_time(tmp_path: Path):
    lines = [json.dumps({"a": 1}).encode()]
    one = rollout_files.write_whole(tmp_path / "a.jsonl", iter(lines), compress=True).read_bytes()
    two = rollout_files.write_whole(tmp_path / "b.jsonl", iter(lines), compress=True).read_bytes()
    assert one == two and gzip.decompress(one) == lines[0]
