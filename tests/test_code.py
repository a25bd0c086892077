import pytest

from rftjax import sandbox, scoring
from rftjax.errors import UserError
from rftjax.sandbox import running
from rftjax.types import Score, Task, Trajectory

WAY, REASON = sandbox.support()
pytestmark = pytest.mark.skipif(not WAY, reason=REASON)


def score(completion: str, tests, **data) -> Score:
    from rftjax.evaluators import code

    task = Task("one", [{"role": "user", "content": "write it"}], data={"tests": tests, **data})
    messages = [*task.messages, {"role": "assistant", "content": completion}]
    return code.evaluate(task, Trajectory(task, 0, 0, messages))


ADD = "Here:\n```python\ndef add(a, b):\n    return a {} b\n```\nDone."


def test_an_answer_that_passes_its_tests_gets_one_and_the_share_is_told():
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    right, wrong = score(ADD.format("+"), tests), score(ADD.format("-"), tests)
    assert (right.reward, right.metrics, right.parts) == (
        1.0,
        {"passed": 1.0},
        {"tests": 1.0, "format": 1.0},
    )
    assert (wrong.reward, wrong.metrics) == (
        0.0,
        {"passed": 0.5},
    ) and "AssertionError" in wrong.reason


def test_blocks_are_run_in_order_and_bare_code_counts_as_unformatted():
    two = "```python\nx = 1\n```\nNo:\n```\nx = 2\n```"
    assert score(two, "assert x == 2").reward == 1.0
    shown = ADD.format("+") + "\nUse it so:\n```python\nprint(add(2, 2))\n```"
    assert score(shown, "assert add(1, 2) == 3").reward == 1.0
    assert score(two, {"input": "", "output": ""}).reward == 1.0
    bare = score("x = 2", "assert x == 2")
    assert (bare.reward, bare.parts["format"]) == (1.0, 0.0)


def test_an_answer_that_ends_the_process_or_prints_passes_nothing():
    for trick in ("import os; os._exit(0)", "raise SystemExit(0)", "print('0'); print('passed 0')"):
        assert score(f"```python\n{trick}\n```", "assert False").reward == 0.0


def test_programs_are_compared_by_what_they_print():
    tests = [{"input": "2 3\n", "output": "5"}, {"input": "1 1\n", "output": "2\n"}]
    program = "```python\na, b = map(int, input().split())\nprint(a {} b, ' ')\n```"
    assert score(program.format("+"), tests).reward == 1.0
    wrong = score(program.format("*"), tests)
    assert (wrong.reward, wrong.metrics["passed"]) == (
        0.0,
        0.0,
    ) and "another output" in wrong.reason


def test_a_limit_of_the_row_ends_an_answer_and_is_told():
    got = score("```python\nwhile True: pass\n```", "assert True", limits={"wall_s": 0.5})
    assert got.reward == 0.0 and "limit of time" in got.reason


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tests": None}, "field 'tests' is None; it must be a list"),
        ({"tests": [{"input": "1"}]}, "field 'tests' holds"),
        ({"tests": ["pass"], "limits": {"seconds": 3}}, "field 'limits' is .* it may hold wall_s"),
    ],
)
def test_a_fault_of_the_row_is_an_error_and_no_reward(data, message):
    with pytest.raises(ValueError, match=f"task 'one': {message}"):
        score("x", **data)


def test_a_spec_that_asks_for_a_sandbox_does_not_start_without_one(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def evaluate(task, trajectory):\n    return 1.0\n")
    evaluator = f"{tmp_path / 'own.py'}:evaluate"
    scoring.Scorer(evaluator, workers=1, sandbox=True).close()
    monkeypatch.setattr(running, "support", lambda: ("", "no boundary here"))
    with pytest.raises(UserError, match="scoring.sandbox=True: no boundary here"):
        scoring.Scorer(evaluator, workers=1, sandbox=True)


def test_the_evaluator_scores_in_worker_processes():
    task = Task("one", [{"role": "user", "content": "write it"}], data={"tests": ["assert x == 2"]})
    answers = [
        Trajectory(task, 0, n, [*task.messages, {"role": "assistant", "content": f"x = {n}"}])
        for n in (2, 3)
    ]
    scorer = scoring.Scorer("rftjax.evaluators.code:evaluate", workers=2, timeout_s=120.0)
    try:
        for answer in answers:
            scorer.submit(answer)
        scorer.gather(answers)
    finally:
        scorer.close()
    assert [answer.score and answer.score.reward for answer in answers] == [1.0, 0.0]
