"""The evaluator `choice`: which letter an answer names."""

import pytest

from rftjax.evaluators import choice
from rftjax.types import Score, Task, Trajectory


def score(module, completion, **data) -> Score:
    task = Task("t", [{"role": "user", "content": "?"}], data)
    messages = [*task.messages, {"role": "assistant", "content": completion}]
    return module.evaluate(task, Trajectory(task, 0, 0, messages))


def reward(module, completion, **data) -> float:
    return score(module, completion, **data).reward


RIGHT_LETTERS = [
    ("B", "Both A and B are plausible, but the answer is B."),
    ("B", "Answer: B\n\nExplanation: A is incorrect because of C."),
    ("B", "B\n\nExplanation: The answer is not A."),
    ("C", "I'm going with C."),
    ("C", "My choice is C"),
    ("C", "Choice: C"),
    ("B", "(A) Rome is wrong; (B) Paris is right."),
    ("B", "Answer: B: Paris"),
    ("B", "<B>"),
    ("B", "It's B because it is."),
    ("B", "I think B."),
    ("B", "Probably B"),
    ("B", "So B it is? Yes: option B"),
    ("B", "-> B"),
    ("B", "Thus => B"),
    ("B", "b) Paris"),
    ("B", "The answer is b) Paris"),
    ("B", "Answer: B, I believe."),
    ("B", "Answer: B. A is wrong"),
    ("B", "The answer is B (not A)"),
    ("B", "The answer isn't A, it's B"),
    ("B", "I would eliminate A and C, leaving B."),
    ("B", "Correct: B"),
    ("B", "Solution: B"),
    ("B", "Option: B"),
    ("B", "Response: B"),
    ("B", "**Final Answer**: B"),
    ("B", "### Answer\nB"),
    ("B", "The answer is:\n\n(B) Paris"),
    ("B", "Answer: [B]"),
    ("B", "Answer: <B>"),
    ("B", "Answer: B;"),
    ("B", "The right letter is B."),
    ("B", "Selected: B"),
    ("B", "I believe the answer is B, since A and C fail."),
    ("B", "Since A is false and C is false, B must be right."),
    ("B", "A is not correct. B is correct."),
    ("B", "Not A, so B."),
    ("B", "The answer: B (Paris)."),
    ("B", "answer: (b)"),
    ("B", 'The answer is "B".'),
    ("B", "The answer is 'B'."),
    ("B", "The answer is B!"),
    ("B", "The answer is B?"),
    ("B", "Answer:  \n B."),
    ("B", "The final answer is **B**. Paris is the capital."),
    ("D", "Answer: D (none of A, B and C)"),
    ("A", "The answer is (A) A cat."),
    ("B", "Question 3: B"),
    ("B", "1. B"),
    ("B", "B is the best choice here."),
    ("B", "Let me think... A? no. C? no. B? Yes. Answer: B"),
    ("C", "A is tempting. However, C is right."),
    ("B", "<think>Perhaps A or C.</think>B"),
    ("B", "<think>The answer is A</think>The answer is B"),
    ("B", "The answer is choice (B)."),
    ("B", "My final answer is B."),
    ("B", "The answer that fits is B."),
    ("B", "I'd say B"),
    ("B", "B"),
    ("B", "(B)"),
    ("B", "B."),
    ("B", "B)"),
    ("B", "b"),
    ("B", "(b)"),
    ("B", "[B]"),
    ("B", "**B**"),
    ("B", "`B`"),
    ("B", "Answer: B"),
    ("B", "answer: b"),
    ("B", "ANSWER: B"),
    ("B", "Answer:B"),
    ("B", "Answer: (B)"),
    ("B", "**Answer:** B"),
    ("B", "**Answer: B**"),
    ("B", "Answer - B"),
    ("B", "The answer is B."),
    ("B", "The answer is B, because A is wrong."),
    ("B", "The correct answer is: B) Paris"),
    ("B", "The best answer is (B)"),
    ("B", "Therefore, the answer is (B)."),
    ("B", "The answer is **B) Paris**."),
    ("B", "Final answer: B"),
    ("B", "$\\boxed{B}$"),
    ("B", "\\boxed{\\text{(B)}}"),
    ("B", "\\boxed{B. Paris}"),
    ("B", "\\boxed{(B)}"),
    ("B", "<answer>B</answer>"),
    ("B", "<answer> (B) Paris </answer>"),
    ("B", "Option B"),
    ("B", "Option B is correct."),
    ("B", "B is the correct answer."),
    ("B", "I choose B."),
    ("B", "I would go with option B"),
    ("B", "The correct choice is B"),
    ("B", "I think (B) is right, while (A) is not."),
    ("B", "(A) is wrong. (C) is wrong. So (B)."),
    ("B", "B) Paris is the capital"),
    ("B", "B: Paris"),
    ("B", "Reasoning about A and C.\n\nB"),
    ("B", "A) no\nB) yes\nC) no\nThe answer is B"),
    ("B", "Answer:\nB"),
    ("B", "Answer:\n\n**B**"),
    ("B", "The answer is not A but B."),
    ("B", "The answer is not (A). It is (B)."),
    ("B", "Let's think. A seems wrong. The answer is B"),
    ("B", "The answer to the question is B."),
    ("A", "The answer is A."),
    ("A", "The answer is A because it fits."),
    ("A", "A"),
    ("A", "A is correct."),
    ("A", "Answer: A"),
    ("A", "(A)"),
    ("I", "The answer is I."),
    ("C", "Answer: I think it is C"),
    ("C", "Answer: A careful look shows (C)."),
    ("C", "Answer: A careful look at it shows C."),
    ("B", "The answer is option (B), Paris."),
    ("B", "My answer is B!"),
    ("B", "So the answer would be B"),
    ("B", "The answer must be B"),
    ("B", "The answer should be (B)"),
    ("B", "Ｂ"),
    ("B", '"B"'),
    ("B", 'Answer: "B"'),
    ("B", "The answer is A? No: the answer is B."),
    ("C", "I picked C"),
    ("B", "I'd pick B."),
    ("B", "B\nbecause A is wrong"),
    ("B", "Correct answer: B"),
    ("B", "B (Paris)"),
    ("B", "B - Paris"),
    ("C", "The answer is C because I computed the integral."),
    ("B", "The answer is (B). Note that A is a distractor."),
    ("D", "D. None of the above"),
    ("B", "the answer is b."),
    ("B", "Answer: option b"),
    ("B", "ANS: B"),
    ("B", "The correct option is B."),
    ("B", "Correct option: (B)"),
    ("B", "So, B is the answer."),
    ("B", "It's B."),
    ("B", "I believe the correct answer is B, Paris"),
    ("B", "The answer is likely B"),
    ("B", "Hence the answer is\n\\[\\boxed{B}\\]"),
    ("B", "I think \\boxed{B}"),
    ("B", "I reason for long.\nB"),
]

WRONG_LETTERS = [
    ("B", "I think A or B."),
    ("B", "Answer: B or maybe C"),
    ("B", "Answer: A and B are both right"),
    ("A", "A good answer is hard."),
    ("A", "Answer: A cat."),
    ("B", "The answer is the B vitamin? No idea: C"),
    ("B", "Both (A) and (B)"),
    ("I", "I think that I am right."),
    ("B", "Not B."),
    ("B", "It is not B."),
    ("B", "It's not (B)"),
    ("B", "A"),
    ("B", "A or B"),
    ("B", "A and B"),
    ("B", "A/B"),
    ("B", "Answer: A or B"),
    ("B", "Answer: A, B, C"),
    ("B", "The answer is either A or B"),
    ("A", "A city I know"),
    ("A", "Answer: A city I know"),
    ("I", "Answer: I do not know"),
    ("B", "Bonn"),
    ("B", ""),
    ("B", "Answer: Bonn"),
    ("B", "The answer is not B"),
    ("B", "(B) is wrong. The answer is A"),
    ("B", "\\boxed{A}. (B) is a distractor"),
    ("I", "I think so"),
    ("A", "A man walks"),
    ("B", "Because"),
    ("B", "The answer is C, not B."),
    ("B", "A) Rome\nB) Paris\nC) Bonn"),
    ("B", "Plan B failed: (A)"),
    ("A", "The answer is a matter of taste."),
    ("B", "The answer is (A) or (B)."),
    ("B", "\\boxed{A, B}"),
    ("B", "\\boxed{AB}"),
    ("B", "<answer>A B</answer>"),
    ("A", "Answer: A and B"),
    ("A", "The answer is unclear. A lot"),
]

QUESTION = "What is the capital?\nA) Rome\nB) Paris\nC) Bonn\nD) Oslo"


@pytest.mark.parametrize(("answer", "completion"), RIGHT_LETTERS)
def test_choice_finds_the_letter(answer, completion):
    assert score(choice, completion, answer=answer) == Score(1.0, {"format": 1.0})
    assert reward(choice, completion, answer=f"({answer.lower()})") == 1.0
    assert reward(choice, completion, answer=ord(answer) - ord("A")) == 1.0
    assert reward(choice, completion, answer="Z") == 0.0


@pytest.mark.parametrize(("answer", "completion"), WRONG_LETTERS)
def test_choice_takes_no_word_and_no_guess_for_the_letter(answer, completion):
    assert reward(choice, completion, answer=answer) == 0.0


@pytest.mark.parametrize(("answer", "completion"), RIGHT_LETTERS)
def test_choice_finds_it_among_the_row_s_choices_too(answer, completion):
    if answer in "ABCD":
        assert reward(choice, completion, answer=answer, choices=["r", "p", "b", "o"]) == 1.0


def test_only_letters_of_the_row_s_choices_are_chosen():
    said = "The answer is E. (C)"
    assert reward(choice, said, answer="E") == 1.0
    for choices in (["w", "x", "y"], {"A": "w", "B": "x", "C": "y"}):
        assert reward(choice, said, answer="C", choices=choices) == 1.0
        assert reward(choice, said, answer="C", options=choices) == 1.0
        with pytest.raises(ValueError, match="of the row's choices A, B, C"):
            reward(choice, said, answer="E", choices=choices)
    task = Task("t", [{"role": "user", "content": QUESTION}], {"answer": "C"})
    trajectory = Trajectory(task, 0, 0, [{"role": "assistant", "content": said}])
    assert choice.evaluate(task, trajectory).reward == 1.0


def test_choice_takes_the_text_of_a_choice_where_no_letter_is_named():
    hub = {"label": ["A", "B"], "text": ["Rome", "Paris"]}
    assert reward(choice, "It is\nparis.", answer="B", choices=hub) == 1.0
    assert reward(choice, "Paris", answer="B", choices=["A) Rome", "B) Paris"]) == 1.0
    assert reward(choice, "Paris or Rome", answer="B", choices=["Rome", "Paris"]) == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "3",
        "(3)",
        "**3**",
        "3) Paris",
        "The answer is 3.",
        "The answer is (3) Paris.",
        "Answer: 3",
        "\\boxed{3}",
        "\\boxed{\\text{3}}",
        "$\\boxed{3}$",
        "<answer>3</answer>",
        "Options 1 and 2 are wrong. Option 3 is correct.",
        "A plant needs 2 things, so I choose 3.",
        "A and B are no labels here. Answer: 3",
        "Paris",
    ],
)
@pytest.mark.parametrize(
    "choices",
    [
        {"label": ["1", "2", "3", "4"], "text": ["Rome", "Oslo", "Paris", "Bonn"]},
        {"1": "Rome", "2": "Oslo", "3": "Paris", "4": "Bonn"},
    ],
)
def test_digits_are_labels_where_the_row_s_choices_say_so(completion, choices):
    assert reward(choice, completion, answer="3", choices=choices) == 1.0
    assert reward(choice, completion, answer="2", choices=choices) == 0.0


@pytest.mark.parametrize(
    "completion",
    ["The answer is 3.5", "The answer is 30", "1/3", "The answer is C", "3 or 4", "-3"],
)
def test_a_number_that_is_no_label_is_none(completion):
    labels = {"label": ["1", "2", "3", "4"], "text": ["Rome", "Oslo", "Paris", "Bonn"]}
    assert score(choice, completion, answer="3", choices=labels) == Score(
        0.0, {"format": 0.0}, reason="no label found, or several"
    )


def test_a_number_as_the_answer_is_refused_beside_labels_that_are_digits():
    labels = {"label": ["1", "2"], "text": ["Rome", "Oslo"]}
    with pytest.raises(ValueError, match="choice needs one of the row's labels 1, 2, as a text"):
        reward(choice, "1", answer=1, choices=labels)
