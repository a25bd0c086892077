"""What the model sees of the user's functions, and what reaches them of its calls."""

import asyncio
import dataclasses
import enum
import functools
import json
import subprocess
import sys
from typing import Annotated, Any, Literal

import pydantic
import pytest

from rftjax.environments import tools
from rftjax.environments.toolbox import ToolEpisode, _documentation
from rftjax.types import Task


class Unit(enum.Enum):
    CELSIUS = "celsius"
    FAHRENHEIT = "fahrenheit"


@dataclasses.dataclass
class Place:
    title: str
    zone: int = 0


class Own:
    pass


# Defaults that people write in their tools, and that linters dislike.
NO_TAGS: list[str] = []
NO_ROWS: list[dict[str, int]] = []
NO_SPARE: dict[str, int] = {}


def weather(
    city: str,
    unit: Unit,
    scale: Literal["c", "f"],
    days: int | None = None,
    tags: list[str] = NO_TAGS,
    rows: list[dict[str, int]] = NO_ROWS,
    where: Place | None = None,
    near: Annotated[float, pydantic.Field(description="in km", ge=0)] = 0.0,
    free: Any = None,
    other: Own | None = None,
) -> str:
    """Says the weather.

    It may be wrong.

    Args:
        city: name of the town,
            in English
        unit (Unit): of the answer

    Returns:
        the weather
    """
    return repr((city, unit, scale, days, tags, rows, where, near))


def task() -> Task:
    return Task("t", [{"role": "user", "content": "?"}])


def answer(function: Any, **arguments: Any) -> str:
    call = json.dumps({"name": function.__name__, "arguments": arguments})
    said = {"role": "assistant", "content": f"<tool_call>{call}</tool_call>"}
    return ToolEpisode(tools(function), task()).step(said).messages[0]["content"]


def test_a_schema_keeps_choices_items_bounds_and_descriptions():
    function = tools(weather).schemas[0]["function"]
    properties = function["parameters"]["properties"]
    assert function["description"].startswith("Says the weather.\n\nIt may be wrong.")
    assert function["parameters"]["required"] == ["city", "unit", "scale"]
    assert properties["city"] == {"type": "string", "description": "name of the town, in English"}
    assert properties["unit"]["enum"] == ["celsius", "fahrenheit"]
    assert properties["unit"]["description"] == "of the answer"
    assert properties["scale"] == {"enum": ["c", "f"], "type": "string"}
    assert properties["days"] == {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert properties["tags"] == {"type": "array", "items": {"type": "string"}}
    assert properties["rows"]["items"]["additionalProperties"] == {"type": "integer"}
    assert properties["where"]["anyOf"][0]["properties"]["title"] == {"type": "string"}
    assert properties["near"] == {"type": "number", "minimum": 0, "description": "in km"}
    assert properties["free"] == properties["other"] == {}
    assert "$ref" not in json.dumps(properties)


def test_arguments_arrive_in_the_annotated_types():
    got = answer(weather, city=7, unit="celsius", scale="c", days="3", where={"title": "a"})
    place = Place("a")
    assert got == repr(("7", Unit.CELSIUS, "c", 3, [], [], place, 0.0))


class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 2


def order(
    size: Size, count: Literal[1, 2], items: list[int], spare: dict[str, int] = NO_SPARE
) -> str:
    """Orders."""
    return repr((size, count, items, spare))


def test_records_that_a_tool_returns_are_shown_as_json():
    @dataclasses.dataclass
    class Row:
        place: Place
        unit: Unit

    def found() -> list[Row]:
        return [Row(Place("a"), Unit.CELSIUS)]

    assert json.loads(answer(found))[0]["unit"] == "celsius"
    assert json.loads(answer(found))[0]["place"]["title"] == "a"


def test_values_written_as_texts_arrive_in_the_annotated_types():
    got = answer(order, size="2", count="1", items="[3, 4]", spare='{"a": "5"}')
    assert got == repr((Size.LARGE, 1, [3, 4], {"a": 5}))
    assert answer(order, size="2", count="3", items=[]).endswith(
        "count: Input should be 1 or 2, not '3'"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"unit": "kelvin"}, "unit: Input should be 'celsius' or 'fahrenheit', not 'kelvin'"),
        ({"days": "many"}, "days: Input should be a valid integer"),
        ({"rows": [{"a": "b"}]}, "rows[0]['a']: Input should be a valid integer"),
        ({"near": -1}, "near: Input should be greater than or equal to 0"),
    ],
)
def test_the_model_is_told_which_argument_is_wrong(arguments: dict[str, Any], told: str):
    got = answer(weather, **({"city": "a", "unit": "celsius", "scale": "c"} | arguments))
    assert got.startswith("Error: ValueError: ")
    assert told in got


def echo(text, /, *words, count: int = 1):
    return text * count


def test_functions_without_annotations_or_with_positional_parameters_can_be_called():
    assert answer(echo, text="ab", count="2") == "abab"
    assert tools(echo).schemas[0]["function"]["parameters"]["required"] == ["text"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"name": "echo", "arguments": {"text": "a\nb\tc"}}', "a\nb\tc"),
        ('{"name": "echo", "arguments": null}', "missing a required argument: 'text'"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_raw_newlines_are_read_and_bad_json_is_told(text: str, told: str):
    said = {"role": "assistant", "content": f"<tool_call>{text}</tool_call>"}
    assert told in ToolEpisode(tools(echo), task()).step(said).messages[0]["content"]


def test_a_step_that_is_given_up_takes_its_calls_with_it():
    ended: list[str] = []

    async def wait() -> str:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append("wait")
        return ""

    async def give_up() -> None:
        episode = ToolEpisode(tools(wait), task())
        said = {"role": "assistant", "content": '<tool_call>{"name": "wait"}</tool_call>'}
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(episode.step(said), 0.05)
        await asyncio.sleep(0)
        assert ended == ["wait"]

    asyncio.run(give_up())


def test_names_are_unique_and_can_be_called():
    def other():
        pass

    other.__name__ = "echo"
    with pytest.raises(ValueError, match="two functions are named 'echo'"):
        tools(echo, other)
    for nameless in (lambda text: text, functools.partial(echo, "a"), "echo"):
        with pytest.raises(ValueError, match="define it with `def name"):
            tools(nameless)


def test_sphinx_docstrings_are_read_too():
    text = "Adds.\n\n:param int a: one\n    number\n:param b: other\n:returns: the sum"
    assert _documentation(text) == ("Adds.", {"a": "one number", "b": "other"})


def test_the_package_gives_its_modules_and_version_without_importing_jax():
    program = (
        "import sys, rftjax\n"
        "def add(a: int):\n    'Adds.'\n"
        "rftjax.environments.tools(add)\n"
        "assert {'load', 'grpo', 'environments', '__version__'} <= set(dir(rftjax))\n"
        "assert rftjax.__version__[0].isdigit()\n"
        "assert not hasattr(rftjax, 'not_there')\n"
        "print(*sorted({'jax', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("\n", "", 0)
