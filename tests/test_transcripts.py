import gzip
import json

import pytest

from rftjax.errors import UserError
from rftjax.monitor import transcripts

RECORD = {
    "task_id": "t1",
    "sample": 2,
    "messages": [
        {"role": "user", "content": "go\x1b[2J"},
        {"role": "assistant", "content": "x" * 50, "tool_calls": [{"name": "find"}]},
        {"role": "tool", "content": "found"},
    ],
    "sequences": [{"sampled": [False, True, True]}],
    "reward": 0.5,
    "parts": {"form": 1.0},
    "valid": True,
    "reason": "half right",
    "finish_reason": "turns",
    "error": "",
}


def test_compressed_and_plain_rollouts_are_read_by_step_and_stream(tmp_path):
    (tmp_path / "rollouts").mkdir()
    line = (json.dumps(RECORD) + "\n").encode()
    for name in ("step_000002.jsonl", "heldout_000000.jsonl", "heldout-hard_000003.jsonl"):
        (tmp_path / "rollouts" / name).write_bytes(line)
    (tmp_path / "rollouts" / "step_000001.jsonl.gz").write_bytes(gzip.compress(line * 2, mtime=0))
    (tmp_path / "rollouts" / ".step_000004.jsonl.tmp").write_bytes(line)
    found = dict(transcripts.series(tmp_path, "train"))
    assert list(found) == [1, 2] and list(map(len, found.values())) == [2, 1]
    assert list(transcripts.files(tmp_path, "hard")) == [3]
    assert list(transcripts.files(tmp_path, "heldout")) == [0]


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.jsonl", b"{"), ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:20])],
)
def test_a_damaged_file_is_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: is no file of rollouts"):
        transcripts.read(tmp_path / name)


def test_a_transcript_has_every_message_its_calls_and_why():
    text = transcripts.transcript(RECORD)
    assert text.startswith(
        "task t1, sample 2: reward 0.5, form 1, 2 tokens, finish turns\n  ! half right\n  user:\n"
    )
    assert '"find"' in text and "    found" in text and "x" * 50 in text
    assert "    ... (9 more characters)" in transcripts.transcript(RECORD, most=60)


def test_text_from_a_model_does_not_reach_the_terminal_as_commands():
    assert "\x1b" not in transcripts.transcript(RECORD)
    assert transcripts.short("a\nb\u202ec" + "d" * 99) == "a b\\u202ec" + "d" * 49 + "…"
