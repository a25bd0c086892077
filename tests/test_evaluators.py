"""The ready-made rewards: right and wrong answers, near misses, rows that lack what is needed."""

import concurrent.futures
import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys
import types

import pytest

import rftjax.evaluators
from rftjax import sandbox
from rftjax.evaluators import (
    choice,
    contains,
    exact_match,
    function_call,
    fuzzy_match,
    json_fields,
    json_record,
    json_schema,
    language,
    length,
    math,
    number,
    random_reward,
    reasoning_gym,
    regex,
    repetition,
    tags,
)
from rftjax.types import Score, Task, Trajectory

MODULES = pkgutil.iter_modules(rftjax.evaluators.__path__)
FOUND = sorted(module.name for module in MODULES if not module.ispkg)
NAMES = [name for name in FOUND if name != "code" or sandbox.support()[0]]


def score(module, completion, sample=0, draw=0, task_id="t", **data) -> Score:
    task = Task(task_id, [{"role": "user", "content": "?"}], data)
    messages = [*task.messages, {"role": "assistant", "content": completion}]
    result = module.evaluate(task, Trajectory(task, draw=draw, sample=sample, messages=messages))
    return result if isinstance(result, Score) else Score(result)


def reward(module, completion, **data) -> float:
    return score(module, completion, **data).reward


@pytest.mark.parametrize("name", NAMES)
def test_every_evaluator_module_has_one_public_function(name):
    module = importlib.import_module(f"rftjax.evaluators.{name}")
    own = [
        key
        for key, value in vars(module).items()
        if isinstance(value, types.FunctionType)
        and value.__module__ == module.__name__
        and not key.startswith("_")
    ]
    assert own == ["evaluate"]


def test_evaluators_import_only_the_standard_library_and_the_types():
    code = "import sys\n" + "".join(f"import rftjax.evaluators.{name}\n" for name in NAMES)
    code += "roots = {m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)\n"
    code += (
        "print(sorted(roots & {'jax', 'numpy', 'flax', 'transformers', 'reasoning_gym', 'sympy'}),"
    )
    code += " sorted(m for m in sys.modules if m.startswith('rftjax') and 'evaluators' not in m))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = "'rftjax', 'rftjax.errors', 'rftjax.sandbox', 'rftjax.sandbox.limits', 'rftjax.sandbox.running'"
    assert out.stdout.strip() == f"[] [{ours}, 'rftjax.types']"


@pytest.mark.parametrize(
    "module",
    [
        exact_match,
        contains,
        number,
        math,
        json_record,
        json_fields,
        regex,
        choice,
        reasoning_gym,
        fuzzy_match,
        function_call,
        length,
    ],
)
def test_a_row_without_its_field_raises_with_the_task_id_and_is_no_reward_of_zero(module):
    with pytest.raises(ValueError, match="task 'row-7'"):
        score(module, "anything", task_id="row-7")


def test_exact_match_ignores_only_the_amount_of_white_space():
    assert reward(exact_match, " New \n York ", answer="New York") == 1.0
    assert reward(exact_match, "new york", answer="New York") == 0.0
    assert reward(exact_match, "New York!", answer="New York") == 0.0
    assert reward(exact_match, "7", answer=7) == 1.0
    assert reward(exact_match, "b", answer=["a", "b"]) == 1.0


@pytest.mark.parametrize(
    "completion", ["1420", "It is 420.", "4.42", "1,42", "42.5", "42nd", "x42"]
)
def test_contains_does_not_find_a_number_inside_another(completion):
    assert reward(contains, completion, answer="42") == 0.0
    assert reward(contains, f"{completion} and 42.", answer=42) == 1.0


def test_contains_finds_words_beside_signs_and_in_scripts_without_spaces():
    for completion in ("(Bonn)", "Bonn's", "bonn.", "x=Bonn", "**Bonn**", "Bonn-Beuel"):
        assert reward(contains, completion, answer="Bonn") == 1.0
    assert reward(contains, "Bonnet", answer="Bonn") == 0.0
    assert reward(contains, "\u7b54\u6848\u662f\u4e1c\u4eac\u3002", answer="\u4e1c\u4eac") == 1.0
    assert reward(contains, "C++ is it", answer="c++") == 1.0


def test_contains_ignores_case_and_white_space():
    assert reward(contains, "It is new\nYORK, surely.", answer="New York") == 1.0
    assert reward(contains, "It is York.", answer="New York") == 0.0
    assert reward(contains, "It is Bonn.", answer=["Berlin", "Bonn"]) == 1.0
    with pytest.raises(ValueError, match="not empty"):
        reward(contains, "anything", answer="  ")


RECORD = {"name": "Ada", "age": 36, "tags": ["x", 1.0], "alive": True}
WRITTEN = '{"age": 36, "alive": true, "name": "Ada", "tags": ["x", 1]}'


def test_json_record_rewards_an_equal_object_in_any_order_of_keys():
    assert score(json_record, f"\n{WRITTEN} ", record=RECORD) == Score(
        1.0, {"format": 1.0, "keys": 1.0, "fields": 1.0}
    )
    assert reward(json_record, WRITTEN, record=WRITTEN) == 1.0  # a record as text, from a CSV file


@pytest.mark.parametrize(
    "completion",
    [
        f"Here it is: {WRITTEN}",
        f"```json\n{WRITTEN}\n```",
        WRITTEN + WRITTEN,
        f"[{WRITTEN}]",
        WRITTEN[:-1] + ', "age": 36}',
        WRITTEN.replace("36", "NaN"),
        "[" * 100_000,
        "",
    ],
)
def test_json_record_accepts_nothing_but_one_object(completion):
    result = score(json_record, completion, record=RECORD)
    assert result.reward == 0.0
    assert result.parts == {"format": 0.0, "keys": 0.0, "fields": 0.0}


def test_json_record_names_the_share_of_right_fields_and_wrong_types_are_wrong():
    wrong = WRITTEN.replace("true", "1").replace("36", '"36"')
    assert score(json_record, wrong, record=RECORD) == Score(
        0.0, {"format": 1.0, "keys": 1.0, "fields": 0.5}
    )
    surplus = score(json_record, WRITTEN[:-1] + ', "more": 1}', record=RECORD)
    assert (surplus.reward, surplus.parts["keys"], surplus.parts["fields"]) == (0.0, 0.0, 0.8)
    assert score(json_record, '{"name": "Ada"}', record=RECORD).parts["fields"] == 0.25


def test_json_fields_rewards_the_share_and_logs_the_strict_equality():
    half = score(json_fields, WRITTEN.replace("true", "1").replace("36", "37"), record=RECORD)
    assert (half.reward, half.parts["exact"], half.parts["format"]) == (0.5, 0.0, 1.0)
    full = score(json_fields, WRITTEN, record=RECORD)
    assert (full.reward, full.parts["exact"]) == (1.0, 1.0)
    assert reward(json_fields, "no object", record=RECORD) == 0.0


def test_regex_searches_and_compares_the_last_group_with_the_answer():
    assert reward(regex, "call 555-1234 now", pattern=r"\d{3}-\d{4}") == 1.0
    assert reward(regex, "call me", pattern=r"\d{3}-\d{4}") == 0.0
    both = {"pattern": r"= *(\w+)", "answer": 7}
    assert reward(regex, "x = 3, y = 7", **both) == 1.0
    wrong = score(regex, "y = 7, x = 3", **both)
    assert (wrong.reward, wrong.parts) == (0.0, {"format": 1.0})
    assert score(regex, "7", **both).parts == {"format": 0.0}
    with pytest.raises(ValueError, match="not a regular expression"):
        reward(regex, "x", pattern="(")


def test_random_reward_depends_on_the_rollout_alone_and_is_a_fair_coin():
    first = [reward(random_reward, "same", sample=i, answer=1) for i in range(400)]
    assert first == [reward(random_reward, "same", sample=i) for i in range(400)]
    assert set(first) == {0.0, 1.0} and 160 < sum(first) < 240
    for other in (
        [reward(random_reward, "other", sample=i) for i in range(400)],
        [reward(random_reward, "same", sample=i, draw=1) for i in range(400)],
        [reward(random_reward, "same", sample=i, task_id="u") for i in range(400)],
    ):
        assert 140 < sum(a == b for a, b in zip(first, other, strict=True)) < 260


def test_random_reward_is_the_same_in_every_version():
    coins = [reward(random_reward, "text", sample=i) for i in range(16)]
    assert "".join(f"{coin:.0f}" for coin in coins) == "0000111011001001"


ENTRY = {"question": "4 - 1 - 7 =", "answer": "-4", "metadata": {"source_dataset": "chain_sum"}}


def test_reasoning_gym_scores_with_the_verifier_of_the_entrys_dataset():
    pytest.importorskip("reasoning_gym")
    assert reward(reasoning_gym, " -4\n", entry=ENTRY) == 1.0
    assert reward(reasoning_gym, "<answer>3</answer> no, <answer>-4</answer>", **ENTRY) == 1.0
    assert reward(reasoning_gym, "5", entry=ENTRY) < 0.5


def test_reasoning_gym_says_how_to_install_the_package_where_it_is_missing(monkeypatch):
    reasoning_gym._verifier.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'rftjax\[reasoning-gym\]'"):
        score(reasoning_gym, "-4", entry=ENTRY)


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("1/2", "The answer is 0.5", True),
        (r"2\sqrt{3}", r"so $\boxed{\sqrt{12}}$", True),
        ("x^2 + 1", "$1 + x^2$", True),
        ("He has 24 left.\n#### 24", "So 24.", True),
        ("(1, 2)", "$(2, 1)$", False),
        (42, "1420", False),
        (42, "no idea", False),
        (3, r"\boxed{9^{9^{9^{9}}}}", False),  # it would compute for ever
    ],
)
def test_math_compares_what_expressions_are_worth(answer, completion, right):
    pytest.importorskip("math_verify")
    assert reward(math, completion, answer=answer) == float(right)


def test_math_works_outside_the_main_thread_where_no_signal_limits_it():
    pytest.importorskip("math_verify")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(reward, math, "$x + x$", answer="2x").result() == 1.0


def test_math_says_how_to_install_the_package_where_it_is_missing(monkeypatch):
    math._package.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"pip install 'rftjax\[math\]'"):
        score(math, "4", answer="5 - 1")


def test_the_first_evaluator_of_the_readme_is_not_fooled_by_a_longer_number():
    readme = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    block = re.search(r"reward\.py <<'END'\n(.*?)^END$", readme, re.DOTALL | re.MULTILINE)
    assert block
    names = {}
    exec(block[1], names)
    task = Task("t", [{"role": "user", "content": "What is 17 + 25?"}], {"answer": "42"})

    def reward(said):
        trajectory = Trajectory(task, 0, 0, [{"role": "assistant", "content": said}])
        return names["evaluate"](task, trajectory)

    assert [reward(said) for said in ("17 + 25 is 42.", "42", "1420", "-42", "")] == [1, 1, 0, 0, 0]


def test_fuzzy_match_gives_more_for_fewer_edits():
    pytest.importorskip("rapidfuzz")
    assert score(fuzzy_match, "new  York", answer="New York") == Score(1.0, {"exact": 1.0})
    near, far = (reward(fuzzy_match, text, answer="New York") for text in ("New Yrok", "Boston"))
    assert 0.8 < near < 1.0 and far < 0.5
    assert reward(fuzzy_match, "New Yrok", answer=["Bonn", "New York"]) == near
    assert reward(fuzzy_match, "New Yrok", answer="New York", min_similarity=0.95) == 0.0
    with pytest.raises(ValueError, match="'min_similarity' is 2"):
        reward(fuzzy_match, "x", answer="x", min_similarity=2)


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("completion", "parts", "reason"),
    [
        ('{"age": 3}', (1.0, 1.0), ""),
        ('{"age": -1}', (1.0, 0.0), "$.age: -1 is less than the minimum of 0"),
        ('{"age": 1, "b": 2}', (1.0, 0.0), "$: Additional properties"),
        ('{"age": NaN}', (0.0, 0.0), "not JSON"),
        ('Here: {"age": 3}', (0.0, 0.0), "not JSON"),
    ],
)
def test_json_schema_rewards_one_value_that_follows_the_schema(completion, parts, reason):
    pytest.importorskip("jsonschema")
    for schema in (SCHEMA, json_of(SCHEMA)):
        found = score(json_schema, completion, schema=schema)
        assert (found.parts["format"], found.parts["schema"]) == parts
        assert found.reward == parts[1] and found.reason.startswith(reason)


def json_of(value) -> str:
    import json

    return json.dumps(value)


@pytest.mark.parametrize("schema", [None, 3, "no JSON", {"type": "no such type"}])
def test_a_schema_that_is_none_is_an_error_of_the_row(schema):
    pytest.importorskip("jsonschema")
    with pytest.raises(ValueError, match="task 't': field 'schema'.* is no JSON Schema"):
        reward(json_schema, "{}", schema=schema)


def test_a_reference_of_a_schema_to_another_address_is_not_followed():
    pytest.importorskip("jsonschema")
    with pytest.raises(Exception, match="example.invalid"):
        reward(json_schema, "{}", schema={"$ref": "http://example.invalid/schema.json"})


ADD = {"name": "add", "arguments": {"a": 1, "b": [2, True]}}
CALLED = '{"name": "add", "arguments": {"b": [2.0, true], "a": 1}}'


@pytest.mark.parametrize(
    "completion",
    [
        CALLED,
        f"[{CALLED}]",
        f"Well: <tool_call>\n{CALLED}\n</tool_call>",
        f"```json\n{CALLED}\n```",
        CALLED.replace("arguments", "parameters"),
    ],
)
def test_a_function_call_is_found_where_models_write_it(completion):
    assert score(function_call, completion, calls=[ADD]) == Score(
        1.0, {"format": 1.0, "names": 1.0}, reason="1 calls, 1 wanted"
    )


def test_function_calls_count_in_any_order_with_all_their_arguments():
    other = {"function": {"name": "stop", "arguments": "{}"}}
    both = f'<tool_call>{CALLED}</tool_call><tool_call>{{"name": "stop"}}</tool_call>'
    assert reward(function_call, both, calls=[other, ADD]) == 1.0
    assert reward(function_call, both, calls=[ADD]) == 0.0
    assert reward(function_call, CALLED.replace("true", "1"), calls=[ADD]) == 0.0
    wrong = score(function_call, CALLED.replace("2.0", "3"), calls=[ADD])
    assert (wrong.reward, wrong.parts) == (0.0, {"format": 1.0, "names": 1.0})
    torn = score(function_call, f"<tool_call>{CALLED[:-1]}</tool_call>", calls=[ADD])
    assert (torn.reward, torn.parts["format"]) == (0.0, 0.0)
    assert reward(function_call, "No need.", calls=[]) == 1.0
    assert reward(function_call, CALLED, calls=[]) == 0.0


def test_function_calls_of_the_message_itself_come_before_its_text():
    task = Task("t", [{"role": "user", "content": "?"}], {"calls": [ADD]})
    call = {
        "id": "1",
        "type": "function",
        "function": ADD | {"arguments": '{"a": 1, "b": [2, true]}'},
    }
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert (
        function_call.evaluate(task, Trajectory(task, 0, 0, [*task.messages, said])).reward == 1.0
    )


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think><answer>b</answer>", (1.0, 1.0, 1.0)),
        ("Well <think>a\n</think> so\n<answer>b</answer>.", (1.0, 1.0, 1.0)),
        ("<answer>b</answer><think>a</think>", (0.0, 1.0, 1.0)),
        ("<think>a</think><answer>b", (0.0, 1.0, 0.0)),
        ("<think>a</think><think>a</think><answer>b</answer>", (0.0, 0.0, 1.0)),
        ("<think> </think><answer>b</answer>", (0.0, 0.0, 1.0)),
        ("", (0.0, 0.0, 0.0)),
    ],
)
def test_tags_stand_once_each_closed_and_in_order(completion, expected):
    found = score(tags, completion)
    assert (found.reward, found.parts["think"], found.parts["answer"]) == expected
    assert reward(tags, "<sql>x</sql>", tags=["sql"]) == 1.0


def test_length_falls_outside_of_its_bounds():
    words = {n: "w " * n for n in (0, 2, 4, 6, 9, 12, 20)}
    found = {n: reward(length, text, min_words=4, max_words=6) for n, text in words.items()}
    assert found == {0: 0.0, 2: 0.5, 4: 1.0, 6: 1.0, 9: 0.5, 12: 0.0, 20: 0.0}
    assert score(length, "a b", max_words=3).metrics == {"words": 2.0}
    with pytest.raises(ValueError, match="min_words=4 must not be above max_words=3"):
        reward(length, "", min_words=4, max_words=3)


THOUGHTS = (
    ("<think>\n", "\n</think>\n"),
    ("", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)


@pytest.mark.parametrize(
    ("module", "thought", "said", "row"),
    [
        (exact_match, "Eve", "Ada", {"answer": "Ada"}),
        (contains, "Eve", "It is Ada.", {"answer": "Ada"}),
        (number, "The answer is 9", "8", {"answer": 8}),
        (choice, "The answer is B", "A", {"answer": "A"}),
        (json_record, "{}", '{"a": 1}', {"record": {"a": 1}}),
        (function_call, '<tool_call>{"name": "g"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>',
         {"calls": [{"name": "f"}]}),
    ],
)  # fmt: skip
def test_what_is_thought_is_no_answer(module, thought, said, row):
    for begin, end in THOUGHTS:
        assert reward(module, begin + thought + end + said, **row) == 1.0
        assert reward(module, begin + said + end + thought, **row) == 0.0
    assert reward(module, "<think>" + said, **row) == 0.0  # cut before it answered


def test_repetition_is_the_share_of_distinct_groups_of_words():
    assert reward(repetition, "one two three four") == 1.0
    assert reward(repetition, "a b c a b c") == pytest.approx(3 / 4)
    assert reward(repetition, "no " * 100) == pytest.approx(1 / 98)
    assert reward(repetition, "") == 1.0


def test_language_is_that_of_the_row():
    pytest.importorskip("py3langid")
    german = "Das ist ein ganz normaler Satz, den jeder versteht."
    assert reward(language, german, language="de") == 1.0
    found = score(language, german, language=["fr", "en"])
    assert (found.reward, found.reason) == (0.0, "de")
    assert reward(language, "12 + 4", language="de") == 0.0
    with pytest.raises(ValueError, match="'language' is 'German'; it must be one of"):
        reward(language, german, language="German")
