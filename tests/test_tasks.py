"""Rows become tasks, bad rows are told all at once, and the stream goes on where it stopped."""

import json
import subprocess
import sys

import pytest

from rftjax import tasks
from rftjax.types import Task


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Keeps `datasets` off the network and its cache out of the home folder."""
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def write(path, rows) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def user(text):
    return [{"role": "user", "content": text}]


def numbered(count) -> list[Task]:
    return [Task(str(n), user(f"question {n}"), {"answer": n}) for n in range(count)]


def faults(path, **options) -> str:
    with pytest.raises(ValueError) as info:
        tasks.load(str(path), **options)
    return str(info.value)


# ---- Rows


def test_a_row_keeps_its_messages_and_passes_every_other_field_on(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, *user("Hi")]
    row = {"messages": messages, "id": 7, "weight": 2, "answer": {"a": None}, "tools": [1]}
    (task,) = tasks.load(write(tmp_path / "a.jsonl", ["", row, "  "]))
    data = {"id": 7, "weight": 2, "answer": {"a": None}, "tools": [1]}
    assert task == Task("7", messages, data)


def test_a_prompt_is_kept_as_text_and_as_one_user_message(tmp_path):
    (task,) = tasks.load(write(tmp_path / "a.jsonl", [{"prompt": " 2+2=", "answer": 4}]))
    assert (task.prompt, task.messages, task.data) == (" 2+2=", user(" 2+2="), {"answer": 4})


def test_a_missing_id_is_made_from_the_content_alone_and_numbered_when_repeated(tmp_path):
    rows = [{"prompt": "a", "x": 1, "y": 2}, {"prompt": "b"}, {"y": 2, "x": 1, "prompt": "a"}]
    first = [task.id for task in tasks.load(write(tmp_path / "a.jsonl", rows))]
    assert first[2] == f"{first[0]}-2" and len(set(first)) == 3
    assert tasks.load(write(tmp_path / "b.jsonl", rows[1:]))[0].id == first[1]
    assert (
        first[1] == "d62a32812532733a"
    )  # written down: it must not change from version to version


def test_a_tool_calling_history_is_accepted(tmp_path):
    call = {"id": "c", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        *user("add"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "c", "name": "add"},
    ]
    (task,) = tasks.load(write(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert task.messages[1] == {"role": "assistant", "tool_calls": [call], "content": ""}
    assert task.messages[2] == messages[2]


def test_all_bad_rows_are_told_at_once_with_line_field_and_rule(tmp_path):
    rows = [
        {"prompt": "good"},
        '{"prompt": "broken',
        '["not an object"]',
        {"answer": 1},
        {"prompt": "both", "messages": user("both")},
        {"prompt": 3, "loss": -1},
        {"messages": []},
        {"messages": user("x") + [{"role": "bot", "content": 5}]},
        {"messages": "text"},
        {"messages": user("q") + [{"role": "assistant", "content": "a"}]},
        {"messages": user(" ")},
        '{"prompt": "x", "loss": NaN, "id": [1]}',
        {"prompt": "", "loss": float("inf")},
        '{"prompt": "half \\ud800"}',
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
    ]
    path = write(tmp_path / "bad.jsonl", rows)
    message = faults(path, field="tasks.heldout", weight="loss")
    assert message.startswith(f"tasks.heldout={path!r}: 18 faults in its rows")
    for expected in (
        ":2: line: is not valid JSON",
        ":3: row: must be an object",
        ":4: messages: is missing, as is prompt; the row's fields are answer. tasks.map=",
        ":5: prompt: stands beside messages",
        ":6: prompt: must be a text or a list of messages, is a int",
        ":6: loss: must be finite and at least 0 for tasks.weight, is -1",
        ":7: messages: must not be empty",
        ":8: messages[1].role: must be one of system,",
        ":8: messages[1].content: must be a text, is a int",
        ":9: messages: must be a list of messages, is a str",
        ":10: messages[1].role: the last must not be the assistant's",
        ":11: messages[0].content: the last must not be empty",
        ":12: loss: must be finite and at least 0 for tasks.weight, is nan",
        ":12: id: must be a text or a whole number, is a list",
        ":13: prompt: must not be empty",
        ":13: loss: must be finite and at least 0 for tasks.weight, is inf",
        ":14: prompt: holds half of a surrogate pair",
        ":15: messages[0].tool_calls: only the assistant",
    ):
        assert f"\n  {path}{expected}" in message
    assert ":1:" not in message


def test_of_many_bad_rows_twenty_are_shown_and_the_rest_counted(tmp_path):
    message = faults(write(tmp_path / "bad.jsonl", [{"x": n} for n in range(50)]))
    assert "50 faults" in message and message.endswith("and 30 more")
    assert message.count("\n") == 21


def test_a_line_that_is_not_utf8_is_a_bad_row(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n{"prompt": "\xe9"}\n')
    message = faults(path)
    assert f"{path}:2: line: is not UTF-8" in message
    assert "1 fault in" in message  # the mark at the file's start is none


def test_a_source_without_rows_is_an_error_that_names_the_field(tmp_path):
    path = write(tmp_path / "none.jsonl", [])
    assert faults(path).startswith(f"tasks.train={path!r}: holds no rows")


def test_a_missing_file_is_told_with_the_place_that_was_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = faults("rows/train.jsonl", field="tasks.heldout")
    assert message.startswith("tasks.heldout='rows/train.jsonl': there is no such file")
    assert str(tmp_path / "rows" / "train.jsonl") in message


def test_an_unreachable_dataset_is_told_with_everything_that_was_tried():
    message = faults("nobody/nothing:main")
    assert message.startswith("tasks.train='nobody/nothing:main': cannot be read")
    assert "dataset 'nobody/nothing' with configuration 'main'" in message
    assert "no Python module 'nobody/nothing'" in message and "Offline" in message


def test_a_limit_takes_the_first_rows_and_looks_at_no_others(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}, "broken"])
    assert [task.prompt for task in tasks.load(path, limit=2)] == ["a", "b"]
    with pytest.raises(ValueError, match="limit=-1"):
        tasks.load(path, limit=-1)


# ---- Other sources


def test_a_json_file_may_be_an_array_or_lines(tmp_path):
    rows = [{"prompt": "a", "record": {"x": 1}}, {"prompt": "b", "record": {"y": 2}}]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    lines = write(tmp_path / "lines.json", rows)
    loaded = tasks.load(str(tmp_path / "array.json"))
    assert loaded == tasks.load(lines) and loaded[1].data == {"record": {"y": 2}}


def test_csv_and_parquet_files_and_directories_are_read(tmp_path):
    import datasets

    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_csv(str(tmp_path / "a.csv"))
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": dataset}).save_to_disk(str(tmp_path / "parts"))
    (tmp_path / "a.tsv").write_text("prompt\tanswer\na\t1\nb\t2\n")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", rows[:1])
    write(tmp_path / "folder" / "test.jsonl", rows)
    expected = tasks.load(write(tmp_path / "a.jsonl", rows))
    for name in ("a.csv", "a.tsv", "a.parquet", "saved"):
        assert tasks.load(str(tmp_path / name)) == expected
    for name in ("parts", "folder"):
        assert tasks.load(str(tmp_path / name), split="test") == expected
    assert "has no split 'train'; it has test. Set tasks.split" in faults(tmp_path / "parts")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:100])
    assert "torn.parquet': cannot be read" in faults(tmp_path / "torn.parquet")


def test_messages_from_parquet_lose_the_empty_keys_that_arrow_adds(tmp_path):
    import datasets

    call = [{"id": "c"}]
    history = user("a") + [{"role": "assistant", "tool_calls": call}, *user("c")]
    rows = [{"messages": history}, {"messages": user("b")}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    first, second = tasks.load(str(tmp_path / "a.parquet"))
    assert first.messages[1] == {"role": "assistant", "content": "", "tool_calls": call}
    assert second.messages == user("b")


def test_a_mapping_function_makes_rows_and_leaves_rows_out(tmp_path):
    code = (
        "def rows(row):\n    n = int(row['n'])\n"
        "    return {'prompt': f'{6 / n}', 'n': n} if n < 3 else None\n"
    )
    (tmp_path / "maps.py").write_text(code)
    mapping = f"{tmp_path}/maps.py:rows"
    (tmp_path / "a.csv").write_text("n\n1\n2\n3\n")
    loaded = tasks.load(str(tmp_path / "a.csv"), map=mapping)
    assert [(task.prompt, task.data) for task in loaded] == [("6.0", {"n": 1}), ("3.0", {"n": 2})]
    bad = write(tmp_path / "bad.jsonl", [{"n": 1}, {"n": 0}, {"m": 0}])
    message = faults(bad, map=mapping)
    assert f"{bad}:2: map: {mapping} raised ZeroDivisionError: division by zero" in message
    assert f"{bad}:3: map: {mapping} raised KeyError: 'n' (the row's fields: m)" in message
    assert "left out all 1" in faults(write(tmp_path / "c.jsonl", [{"n": 3}]), map=mapping)
    assert faults(bad, map=f"{tmp_path}/nothing.py:rows").startswith("tasks.map=")


def test_a_function_of_rows_is_called_with_the_split_if_it_asks_for_one(tmp_path):
    code = (
        "import itertools\n"
        "def plain():\n    return ({'prompt': str(n)} for n in itertools.count())\n"
        "def parted(split):\n    return [{'prompt': split}]\n"
        "def failing():\n    yield {'prompt': 'a'}\n    raise KeyError('x')\n"
        "def wrong():\n    return [{'prompt': 'a'}, {'answer': 1}]\n"
    )
    (tmp_path / "made.py").write_text(code)
    made = f"{tmp_path}/made.py"
    assert [task.prompt for task in tasks.load(f"{made}:plain", limit=3)] == ["0", "1", "2"]
    assert tasks.load(f"{made}:parted", split="test")[0].prompt == "test"
    assert f"tasks.train='{made}:failing': the function raised KeyError" in faults(
        f"{made}:failing"
    )
    assert f"{made}:wrong[2]: messages: is missing" in faults(f"{made}:wrong")


def test_a_function_of_an_installed_module_is_found_before_a_dataset(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text("def rows():\n    return [{'prompt': 'a'}]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tasks.load("my_rows:rows")[0].prompt == "a"


def test_a_jsonl_file_is_read_without_importing_jax_or_datasets(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    code = f"import sys; from rftjax import tasks; tasks.load({path!r});"
    code += "print({'jax', 'datasets', 'pyarrow'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# ---- Held-out tasks


def test_a_carve_out_is_exact_seeded_and_independent_of_order():
    rows = numbered(50)
    train, held = tasks.split(rows, 10, seed=3)
    assert len(held) == 10 and sorted(train + held, key=lambda t: int(t.id)) == rows
    assert [int(t.id) for t in train] == sorted(int(t.id) for t in train)
    again = tasks.split(rows[::-1], 10, seed=3)[1]
    assert {t.id for t in again} == {t.id for t in held}
    assert {t.id for t in tasks.split(rows, 10, seed=4)[1]} != {t.id for t in held}
    with pytest.raises(ValueError, match="tasks.heldout_count=50"):
        tasks.split(rows, 50, seed=3)


def test_tasks_of_one_text_never_straddle_a_carve_out():
    rows = numbered(20) + [Task(f"{n}b", user(f" Question\n{n} "), {}) for n in range(20)]
    for seed in range(5):
        train, held = tasks.split(rows, 10, seed=seed)
        assert len(held) == 10 and tasks.overlap(train, held) == []
    with pytest.raises(ValueError, match="only 8 could be held out"):
        tasks.split(rows, 9, seed=0)


def test_an_overlap_is_found_whatever_case_and_white_space_and_stops_the_run_unless_allowed():
    train = numbered(5)
    held = [Task("x", user(" QUESTION \t 3"), {}), Task("y", user("question 33"), {})]
    assert tasks.overlap(train, held) == [(train[3], held[0])]
    with pytest.raises(ValueError, match="tasks.heldout: 1 of 2 .*'x' has the text of .* '3'"):
        tasks.check_overlap(train, held)
    assert tasks.check_overlap(train, held, allow=True) == [(train[3], held[0])]
    assert tasks.check_overlap(train, held[1:]) == []


def test_the_system_text_counts_for_overlap_and_the_assistants_does_not():
    def task(system, assistant):
        history = [{"role": "assistant", "content": assistant}, *user("now")]
        return Task("t", [{"role": "system", "content": system}, *history], {})

    assert tasks.overlap([task("s", "a")], [task("s", "b")])
    assert not tasks.overlap([task("s", "a")], [task("other", "a")])


# ---- The stream


def test_every_epoch_has_each_task_once_in_an_order_of_its_own():
    stream = tasks.TaskStream(numbered(20), seed=1)
    draws = stream.next(50)
    assert [draw for draw, _ in draws] == list(range(50))
    epochs = [[task.id for _, task in draws[at : at + 20]] for at in (0, 20)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(task.id for task in stream.tasks)
    assert epochs[0] != epochs[1] and epochs[0] != [task.id for task in stream.tasks]


def test_a_draw_depends_on_seed_and_number_alone():
    stream = tasks.TaskStream(numbered(20), seed=1)
    order = [task.id for _, task in stream.next(60)]
    fresh = tasks.TaskStream(numbered(20), seed=1)
    assert [fresh.task(draw).id for draw in reversed(range(60))] == order[::-1]
    assert fresh.draw == 0
    other = tasks.TaskStream(numbered(20), seed=2)
    assert [task.id for _, task in other.next(60)] != order


def test_the_order_is_the_same_in_every_version_of_numpy():
    stream = tasks.TaskStream(numbered(8), seed=5)
    assert " ".join(task.id for _, task in stream.next(16)) == "3 2 4 6 7 0 5 1 1 0 6 7 4 3 2 5"


def test_without_shuffle_every_epoch_is_in_the_order_given():
    stream = tasks.TaskStream(numbered(3), seed=1, shuffle=False)
    assert [task.id for _, task in stream.next(7)] == ["0", "1", "2", "0", "1", "2", "0"]


def test_a_restored_stream_goes_on_as_if_it_had_never_stopped():
    whole = tasks.TaskStream(numbered(7), seed=9)
    expected = whole.next(30)
    first = tasks.TaskStream(numbered(7), seed=9)
    head = first.next(11)
    stored = json.loads(json.dumps(first.state()))
    second = tasks.TaskStream(numbered(7), seed=9)
    second.restore(stored)
    assert head + second.next(19) == expected


def test_a_stream_refuses_the_state_of_other_tasks_or_another_seed():
    state = tasks.TaskStream(numbered(7), seed=9).state()
    changed = numbered(7)
    changed[3] = Task("3", changed[3].messages, {"answer": "another"})
    for rows in (changed, numbered(7)[::-1]):
        with pytest.raises(ValueError, match="the stored stream has fingerprint="):
            tasks.TaskStream(rows, seed=9).restore(state)
    with pytest.raises(ValueError, match="the stored stream has count=7"):
        tasks.TaskStream(numbered(8), seed=9).restore(state)
    with pytest.raises(ValueError, match="the stored stream has seed=9"):
        tasks.TaskStream(numbered(7), seed=8).restore(state)


def test_a_fingerprint_is_the_same_in_every_process_for_objects_too():
    class Odd:
        pass

    def state():
        data = {"odd": Odd(), "set": {"b", "a"}, (1, 2): b"x", "none": None}
        return tasks.TaskStream([Task("t", user("x"), data)], seed=0).state()

    assert state() == state()


def test_a_stream_of_no_tasks_is_an_error():
    with pytest.raises(ValueError, match="at least one task"):
        tasks.TaskStream([], seed=0)
