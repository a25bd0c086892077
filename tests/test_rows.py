"""A row in any of the usual forms becomes a task; its digest is the same in every process."""

import dataclasses
import datetime
import decimal
import io
import subprocess
import sys

import numpy as np
import pytest

from rftjax import tasks
from rftjax.tasks.rows import Checker, digest
from rftjax.types import Task

USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def made(row, **options) -> Task:
    task, problems = Checker(**options).task(row)
    assert task is not None, problems
    return task


def faults(row, **options) -> list[str]:
    task, problems = Checker(**options).task(row)
    assert task is None
    return problems


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [{"role": "developer", "content": "s"}, USER],
            [{"role": "developer", "content": "s"}, USER],
        ),
        ([{**USER, "tool_calls": [], "name": "", "tool_call_id": ""}], [USER]),
        ([{**USER, "tool_calls": None, "name": "Ada"}], [{**USER, "name": "Ada"}]),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}],
                }
            ],
            [USER],
        ),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": "hi", "image_url": None}],
                }
            ],
            [USER],
        ),
        ([{"role": "user", "content": ["h", "i"]}], [USER]),
        (
            [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": None}]},
                USER,
            ],
            [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, USER],
        ),
        (
            [USER, {"role": "assistant", "content": [], "tool_calls": [CALL]}, USER],
            [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, USER],
        ),
    ],
)
def test_messages_in_the_forms_of_openai_and_its_exporters_are_taken(messages, expected):
    assert made({"messages": messages}).messages == expected


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0]: must be a text part, is 'image_url'",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "input_audio"}]},
            "messages[0].content[1]: must be a text part, is 'input_audio'",
        ),
        ({"role": "user", "content": None}, "messages[0].content: must be a text, is a null"),
        ({"role": "user", "content": []}, "messages[0].content: the last must not be empty"),
        (
            {"role": "user", "content": {"type": "text"}},
            "messages[0].content: must be a text, is a dict",
        ),
        (
            {"role": "human", "content": "a"},
            "messages[0].role: must be one of system, developer, user",
        ),
        ({"from": "human", "value": "a"}, "is None (the message's fields: from, value)"),
        ({"role": "user", "content": "a", "name": 3}, "messages[0].name: must be a text, is a int"),
    ],
)
def test_what_a_template_cannot_take_is_refused_by_name(message, fault):
    assert any(fault in one for one in faults({"messages": [message]}))


def test_a_row_without_messages_lists_its_fields_and_names_the_map():
    (fault,) = faults({"question": "q", "answer": "#### 1"})
    assert "question, answer" in fault and "tasks.map=" in fault
    (fault,) = faults({f"column {n}": n for n in range(40)})
    assert "column 11 and 28 more" in fault
    assert "fields are none" in faults({})[0]


def test_every_field_beside_the_conversation_reaches_the_evaluator():
    row = {"messages": [USER], "weight": 70, "id": 12, "temperature": "cold", "answer": "x"}
    task = made(row)
    assert task.data == {"weight": 70, "id": 12, "temperature": "cold", "answer": "x"}
    assert (task.id, task.weight, task.temperature) == ("12", 1.0, 0.0)


@pytest.mark.parametrize("value", [2, "2", 2.0, np.float32(2), decimal.Decimal(2)])
def test_a_field_by_name_is_the_weight_or_the_temperature(value):
    names = {"weight": "loss", "temperature": "heat"}
    task = made({"prompt": "a", "loss": value, "heat": value}, **names)
    assert (task.weight, task.temperature) == (2.0, 2.0)
    for empty in ({}, {"loss": None, "heat": ""}):
        task = made({"prompt": "a", **empty}, **names)
        assert (task.weight, task.temperature) == (1.0, 0.0)


@pytest.mark.parametrize("value", [-1, "heavy", float("nan"), True, [1], 10**400, "inf"])
def test_a_weight_that_is_no_number_is_a_fault_of_its_row(value):
    (fault,) = faults({"prompt": "a", "loss": value}, weight="loss")
    assert fault.startswith("loss: must be ") and "tasks.weight" in fault


def test_a_temperature_of_zero_is_refused_as_greedy_samples_teach_nothing():
    assert "above 0 for tasks.temperature" in faults({"prompt": "a", "t": 0}, temperature="t")[0]


def test_a_field_that_no_row_has_is_refused_with_those_there_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "loss": 1}\n')
    with pytest.raises(ValueError, match="tasks.weight='los': must name a field .* prompt, loss"):
        tasks.load(str(path), weight="los")


def test_ids_that_repeat_are_numbered_and_stay_different():
    checker = Checker()
    rows = [{"prompt": "a", "id": name} for name in ("x", "x", "x-2", "x", None, "")]
    names = [checker.task(row)[0].id for row in rows]
    assert names[:4] == ["x", "x-2", "x-2-2", "x-3"] and len(set(names)) == 6


def test_a_field_that_no_process_can_be_sent_is_refused_by_name():
    told = faults({"prompt": "What?", "answer": "5", "check": lambda said: said == "5"})
    assert len(told) == 1 and "check: cannot be sent to an evaluator, is a function" in told[0]


def test_a_row_nested_too_deep_to_be_sent_is_refused():
    deep = []
    for _ in range(200):
        deep = [deep]
    assert faults({"prompt": "a", "x": deep}) == [
        "row: is nested more than 100 levels deep; make it flatter"
    ]


# ---- Digests


@dataclasses.dataclass
class Point:
    x: int


class Plain:
    def __init__(self, value):
        self.value = value


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Shown(Plain):
    def __repr__(self):
        return f"<Shown at {hex(id(self))}>"


def picture(red, form=""):
    images = pytest.importorskip("PIL.Image")
    image = images.new("RGB", (2, 2), (red, 0, 0))
    if not form:
        return image
    file = io.BytesIO()
    image.save(file, form)
    return images.open(file)


OBJECTS = {
    "bytes": bytes,
    "dataclass": Point,
    "plain": Plain,
    "slots": Slots,
    "address in its repr": Shown,
    "image": picture,
    "image of a file": lambda red: picture(red, "PNG"),
    "image as a record": lambda red: {"bytes": bytes([red]), "path": None},
    "array": lambda n: np.full(3, n),
    "objects in an array": lambda n: np.array([Plain(n), None], dtype=object),
    "date": lambda n: datetime.date(2000, 1, n),
    "huge": lambda n: 10**5000 + n,
    "function": lambda n: {"call": Plain(n).__init__},
}


@pytest.mark.parametrize("name", OBJECTS)
def test_equal_objects_have_equal_digests_and_others_have_not(name):
    make = OBJECTS[name]
    assert digest({"a": make(3)}) == digest({"a": make(3)})
    if name != "function":
        assert digest({"a": make(3)}) != digest({"a": make(4)})


def test_an_object_that_holds_itself_has_a_digest():
    one = Plain(0)
    one.value = [one]
    assert digest(one) == digest(one)


def test_digests_are_the_same_in_every_process():
    code = "import sys; sys.path.insert(0, 'tests'); import test_rows as t;"
    code += "print(t.digest([make(3) for name, make in t.OBJECTS.items() if name != 'function'] + [{'b', 'a'}]))"
    outs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(outs) == 1
