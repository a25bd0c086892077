"""The evaluator `number`: what counts as the final answer, and what is no number."""

import pytest

from rftjax.evaluators import number
from rftjax.types import Score, Task, Trajectory


def score(module, completion, **data) -> Score:
    task = Task("t", [{"role": "user", "content": "?"}], data)
    messages = [*task.messages, {"role": "assistant", "content": completion}]
    return module.evaluate(task, Trajectory(task, 0, 0, messages))


def reward(module, completion, **data) -> float:
    return score(module, completion, **data).reward


RIGHT_NUMBERS = [
    (7, "3 and 4 make 7."),
    ("1234.5", "so $1,234.50!"),
    ("-4", "the result is -4"),
    (-4, "the result is −4"),
    (0.5, "about .5"),
    (1000, "1e3"),
    (0.1, "0.1"),
    ("6 * 7 = 42\n#### 42", "42"),
    (42, "The answer is 42. I checked 3 times."),
    (42, "The answer is 42 (since 6*7=42)"),
    (42, "Answer: **42**"),
    (42, "**Answer:** 42 apples"),
    (42, "Answer:\n\n42"),
    (42, "The answer is 48/2 + 18 = 42."),
    (42, "\\boxed{42\\text{ cm}}"),
    (42, "\\boxed{x = 42}"),
    (42, "<answer>42</answer>"),
    (42, "x = 42"),
    (42, "The total is 42 cm^2"),
    (42, "42%"),
    ("42%", "42"),
    ("50%", "50%"),
    (42, "It costs $42."),
    (-42, "-$42"),
    (-42, "$-42"),
    (1500, "1.5 \\times 10^3"),
    (1500, "1.5 × 10^3"),
    (5000000, "5 million"),
    ("1 1/2", "3/2"),
    ("1 1/2", "1.5"),
    (1.5, "$1\\frac{1}{2}$"),
    (42, "So he has 42 apples left!"),
    (42, "The answer is $42$."),
    (42, "The answer is \\(42\\)."),
    (1080, "\\$1{,}080"),
    (1080, "1\u202f080"),
    (42, "The 3rd try gave 42"),
    (42, "She has 42 (forty-two)."),
    (42, "The answer to the question is 42"),
    (5, "5-year plan"),
    (42, "2 * 21 = 42"),
    (-5, "-5"),
    ("−5", "-5"),
    ("$5", "5"),
    ("5.", "5"),
    (72, "He has 48/2 = <<48/2=24>>24 left, 48+24=<<48+24=72>>72.\n#### 72"),
    (42, "72km... no: 42km"),
    (42, "The answer is not 41 but 42"),
    (3, "#### 3 apples"),
    (42.0, "42"),
    ("42.0", "42"),
    (0, "0"),
    (0, "-0"),
    (42, "42\n"),
    (42, "Final Answer: 42."),
    (42, "6 × 7 = 42"),
    (42, "(42)"),
    (42, "It is *42*."),
    (12, "She pays 12 dollars - a good price"),
    (1000000, "1,000,000"),
    (100000, "1,00,000"),
    (42, "42°"),
    ("\\frac12", "0.5"),
    (0.5, "\\frac12"),
    (42, "Total: $42 / month"),
    (42, "Step 1: 40+2=42"),
    (3, "x^2 = 9 so x = 3"),
    (42, "The answer is: 42 (or 42.0)"),
    (42, "= 42"),
    (42, "Thus, 84 ÷ 2 = 42."),
    (42, "The answer is 42!"),
    (-3, "negative 3"),
    (42, "The answer is \\boxed{42}. Check 6*7."),
    (42, "answer=42"),
    (42, "The answer is 42, since 2x = 84"),
]

WRONG_NUMBERS = [
    (42, "1420"),
    (42, "The answer is 1420"),
    (42, "420"),
    (42, "4.2"),
    (42, "-42"),
    (7, "7 is 3 + 4"),
    (3, "1,2,3"),
    (4, "range 2-4"),
    (5, "v1.5"),
    (0, "none"),
    (1, "1e99999999999"),
    (1, "1e999999999999999999999999999999"),
    (5, "7^{5}"),
    (7, "7^{5}"),
    (5, "5\\sqrt{3}"),
    (3, "5\\sqrt{3}"),
    (3, "\\sqrt{3}"),
    (30, "09:30"),
    (9, "09:30"),
    (2, "(7, 2)"),
    (7, "(7, 2)"),
    (1, "x^2 + 1"),
    (2, "15 cm^2"),
    (24, "48+24"),
    (5, "5x"),
    (5, "5 million"),
    (3, "3.5"),
    (5, "3,5"),
    (3, "3,5"),
    (1, "1/0"),
    (3, "2/3"),
    (2, "2/3"),
    (5, "x - 5"),
    (2, "1/2/2"),
    (5, "2024-05-05"),
    (2024, "2024-05-05"),
    ("0.5", "50%"),
    (2, "\\boxed{\\frac{1}{2}}"),
    (1, "\\boxed{\\frac{1}{2}}"),
    (42, "\\boxed{42, 43}"),
    (43, "\\boxed{42, 43}"),
    (42, "\\boxed{42 + x}"),
    (42, ""),
    (42, "forty"),
    (2, "2\\pi"),
    (2, "2π"),
    (3, "3rd"),
    (42, "The answer is 41. 42 is wrong."),
    (42, "The answer is 6*7"),
    (7, "The answer is 6*7"),
    (1, "1 1/2"),
    ("1/2", "1 1/2"),
    (5, "1:5"),
    (42, "42 or 43"),
    (42, "42/43"),
    (10, "10^5"),
    (5, "10^5"),
    (5, "CO5"),
    (2, "2e3"),
    (1000, "1.000,00"),
    (3, "3-4"),
    (4, "3–4"),
    (42, "0x42"),
    (42, "42k"),
    (43, "42 or 43"),
]


@pytest.mark.parametrize(("answer", "completion"), [*RIGHT_NUMBERS, ("9" * 6000, "9" * 6000)])
def test_number_finds_the_final_answer_and_compares_its_value(answer, completion):
    assert score(number, completion, answer=answer) == Score(1.0, {"format": 1.0})


@pytest.mark.parametrize(("answer", "completion"), [*WRONG_NUMBERS, (1, "1e" + "9" * 30)])
def test_number_takes_no_other_number_for_the_answer(answer, completion):
    assert reward(number, completion, answer=answer) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "12 cm^2",
        "10^{5}",
        "12 000",
        "18:30",
        "(1, 2)",
        "2\\sqrt{3}",
        "x^2 + 1",
        "5 apples",
        "3-4",
        "forty",
        "",
        None,
        True,
        "1,2",
        "5x",
        "A",
        "1/0",
        "½",
        [1],
        "3 to 4",
        "#### x",
    ],
)
def test_number_refuses_a_row_whose_answer_is_not_one_number(answer):
    with pytest.raises(ValueError, match="task 't': field 'answer' is .*evaluators.math"):
        reward(number, "1", answer=answer)
