"""Evaluators in the forms that people have run as their users wrote them, and a fault in one stays with its sample."""

import inspect
import json
import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import test_judge
from snippets import blocks

from rftjax import config as configs
from rftjax import tasks, train
from rftjax.errors import UserError
from rftjax.evaluators.forms import similarity
from rftjax.evaluators.forms.form import GROUP, SAMPLE, Form, scores
from rftjax.evaluators.forms.load import form_of, load
from rftjax.run.build import complete_config
from rftjax.run.inputs import of_evaluator
from rftjax.scoring import Scorer
from rftjax.types import Score, Sequence, Task, Trajectory
from rftjax.workers import named

FILES = {
    "native.py": """
from rftjax.types import Score

def evaluate(task, trajectory):
    right = task.data["answer"] in trajectory.completion
    return Score(float(right), parts={"answer": float(right)}, metrics={"words": 2})

def evaluate_group(task, trajectories):
    longest = max(trajectories, key=lambda one: len(one.completion))
    if "all" in longest.completion:
        raise RuntimeError("no ranking")
    found = [float(one is longest) for one in trajectories]
    return found[1:] if "short" in longest.completion else found

def places(task, trajectories):
    return [float(at) for at, one in enumerate(trajectories)]

async def rank(task, trajectories):
    order = sorted(trajectories, key=lambda one: one.completion)
    return [order.index(one) / len(order) if "nan" not in one.completion else float("nan") for one in trajectories]
""",
    "trl_rewards.py": '''
import os, re

def format_reward(completions, **kwargs):
    """Reward function that checks for the tags, as in the documentation of TRL."""
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think>", content) else 0.0 for content in contents]

def accuracy_reward(prompts, completions, answer, **kwargs):
    rewards = []
    for prompt, completion, one in zip(prompts, completions, answer):
        assert prompt[0]["role"] == "user"
        content = completion[0]["content"]
        if "raise" in content:
            raise RuntimeError("a hard one")
        if "exit" in content:
            os._exit(1)
        rewards.append(None if "none" in content else float(one in content))
    return rewards

async def length_reward(completions, completion_ids, trainer_state, log_metric, **kwargs):
    log_metric("step", trainer_state.global_step)
    return [len(ids) / 10 for ids in completion_ids]

def plain_reward(prompts, completions, **kwargs):
    return [float(len(set(completions))) if prompt == "?" else 0.0 for prompt in prompts]
''',
    "varied.py": """
from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from eval_protocol.pytest import evaluation_test

MESSAGES = [[[Message(role="user", content="Say some words.")]]]

@evaluation_test(input_messages=MESSAGES, completion_params=[{"model": "m"}], mode="pointwise")
def test_varied(row: EvaluationRow) -> EvaluationRow:
    words = str(row.messages[-1].content).split()
    row.evaluation_result = EvaluateResult(score=len(set(words)) / 9)
    return row
""",
    "verl_reward.py": """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "openai/gsm8k" and extra_info["index"] == 7
    right = ground_truth in solution_str
    return {"score": 1.0 if right else 0.1, "acc": right, "pred": solution_str}

def short(solution_str, ground_truth, method="strict"):
    return solution_str == ground_truth

def batch(data_sources, solution_strs, ground_truths, extra_infos):
    return [float(truth in text) for text, truth in zip(solution_strs, ground_truths)]
""",
}
DATA = Path(__file__).parent / "data"
ROW = {
    "answer": "12",
    "data_source": "openai/gsm8k",
    "reward_model": {"style": "rule", "ground_truth": "12"},
    "extra_info": {"split": "train", "index": 7},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def trajectory(
    completion: str, sample: int = 0, *, draw: int = 0, task: Task | None = None
) -> Trajectory:
    task = task or Task("row-1", [{"role": "user", "content": "?"}], ROW)
    messages = [*task.messages, {"role": "assistant", "content": completion}]
    ids = [5, *range(len(completion.split()))]
    sampled = [False] + [True] * (len(ids) - 1)
    sequence = Sequence(ids, sampled, [0.0] * len(ids), [3 if one else -1 for one in sampled])
    return Trajectory(task, draw, sample, messages, [sequence], [0.0], finish_reason="stop")


def group(*completions: str, draw: int = 0, task: Task | None = None) -> list[Trajectory]:
    task = task or Task("row-1", [{"role": "user", "content": "?"}], ROW)
    return [trajectory(text, at, draw=draw, task=task) for at, text in enumerate(completions)]


def rated(form: Form, trajectories: list[Trajectory]) -> list[Score]:
    """What a form says, in this process."""
    import asyncio

    found = form.rate(trajectories)

    async def result():
        return await found

    return scores(asyncio.run(result()) if inspect.isawaitable(found) else found, len(trajectories))


def rewards(form: Form, *completions: str, task: Task | None = None) -> list[float]:
    if form.scope == SAMPLE:
        return [rated(form, [one])[0].reward for one in group(*completions, task=task)]
    return [one.reward for one in rated(form, group(*completions, task=task))]


@pytest.mark.parametrize(
    ("name", "kind", "scope", "concurrent"),
    [
        ("native.py:evaluate", "evaluate", SAMPLE, False),
        ("native.py:evaluate_group", "evaluate_group", GROUP, False),
        ("native.py:rank", "evaluate_group", GROUP, True),
        ("trl_rewards.py:format_reward", "TRL", GROUP, False),
        ("trl_rewards.py:length_reward", "TRL", GROUP, True),
        ("verl_reward.py:compute_score", "verl", SAMPLE, False),
        ("verl_reward.py:short", "verl", SAMPLE, False),
        ("verl_reward.py:batch", "verl", GROUP, False),
    ],
)
def test_the_form_is_found_out_by_looking_at_the_object(folder, name, kind, scope, concurrent):
    form = load(f"{folder}/{name}")
    assert (form.kind, form.scope, form.concurrent) == (kind, scope, concurrent)


def test_trl_rewards_get_messages_columns_ids_and_what_the_trainer_passes(folder):
    form = load(f"{folder}/trl_rewards.py:format_reward")
    assert rewards(form, "<think>a</think> 12", "12") == [1.0, 0.0]
    assert rewards(load(f"{folder}/trl_rewards.py:accuracy_reward"), "12", "7") == [1.0, 0.0]
    found = rated(load(f"{folder}/trl_rewards.py:length_reward"), group("a b c", "d"))
    assert [(one.reward, one.metrics) for one in found] == [
        (0.3, {"step": 3.0}),
        (0.1, {"step": 3.0}),
    ]


def test_trl_rewards_of_plain_prompts_get_texts_of_the_whole_group(folder):
    task = Task("row-1", [{"role": "user", "content": "?"}], {}, prompt="?")
    assert (
        rewards(load(f"{folder}/trl_rewards.py:plain_reward"), "a", "b", "a", task=task)
        == [2.0] * 3
    )


def test_verl_gets_its_fields_and_its_other_numbers_are_recorded(folder):
    (score,) = rated(load(f"{folder}/verl_reward.py:compute_score"), [trajectory("It is 12")])
    assert (score.reward, score.metrics) == (1.0, {"acc": 1.0})
    assert rewards(load(f"{folder}/verl_reward.py:short"), "12", "It is 12") == [1.0, 0.0]
    assert rewards(load(f"{folder}/verl_reward.py:batch"), "12", "7") == [1.0, 0.0]
    with pytest.raises(ValueError, match="task 'row-2': a verl evaluator needs reward_model"):
        rated(
            load(f"{folder}/verl_reward.py:short"), [trajectory("12", task=Task("row-2", [], {}))]
        )


# ---- Groups, and faults


def test_a_group_is_called_once_its_samples_are_there_in_their_order(folder):
    members = group("bb", "a", "dddd", "ccc")
    with Scorer(f"{folder}/native.py:places", workers=1) as scorer:
        submit = scorer.of_groups(4)
        for one in reversed(members):
            assert not scorer._pending.get(id(one))
            submit(one)
        assert scorer._pending[id(members[0])].future  # the call began before `gather`
        assert [score.reward for score in scorer.gather(members)] == [0.0, 1.0, 2.0, 3.0]


def test_groups_are_draws_and_samples_without_a_score_are_not_in_them(folder):
    same = Task("row-1", [{"role": "user", "content": "?"}], ROW)
    first, second = group("a", "bb", task=same), group("a", "bbb", "x", draw=1, task=same)
    second[2].finish_reason, second[2].error = "error", "it broke"
    with Scorer(f"{folder}/native.py:evaluate_group", workers=1) as scorer:
        found = scorer.gather([*first, *second])
    assert [(one.reward, one.valid) for one in found] == [
        (0.0, True), (1.0, True), (0.0, True), (1.0, True), (0.0, False),
    ]  # fmt: skip


def test_a_fault_of_a_group_is_one_of_its_samples_or_of_that_group(folder):
    broken, fine = group("all", "x"), group("a", "bb", draw=1)
    wrong, some = group("a short one", "x", draw=2), group("a", "nan", draw=3)
    with Scorer(f"{folder}/native.py:evaluate_group", workers=1) as scorer:
        found = scorer.gather([*broken, *fine, *wrong])
    assert [one.valid for one in found] == [False] * 2 + [True] * 2 + [False] * 2
    assert "RuntimeError: no ranking (native.py" in found[0].reason
    assert "returned 1 results for 2 samples" in found[5].reason
    with Scorer(f"{folder}/native.py:rank", workers=1) as scorer:
        found = scorer.gather(some)
    assert [(one.reward, one.valid) for one in found] == [(0.0, True), (0.0, False)]
    assert "must be finite, not nan" in found[1].reason


def test_a_fault_of_a_reward_that_looks_at_each_sample_costs_that_sample_only(folder):
    raising, dying, fine = group("12 raise", "12"), group("7", "exit", draw=1), group("12", draw=2)
    with Scorer(f"{folder}/trl_rewards.py:accuracy_reward", workers=1) as scorer:
        found = scorer.gather([*raising, *dying, *fine, *group("none", "12", draw=3)])
    assert [(one.reward, one.valid) for one in found] == [
        (0.0, False), (1.0, True), (0.0, True), (0.0, False), (1.0, True), (0.0, False), (1.0, True),
    ]  # fmt: skip
    assert "RuntimeError: a hard one" in found[0].reason and "died" in found[3].reason
    assert "returned None: it does not score this sample" in found[5].reason


FAULTS = """
import ctypes, os, time

def reward(completions, **kwargs):
    found = []
    for one in completions:
        what = one[0]["content"]
        if what == "raise":
            raise RuntimeError("a hard one")
        if what == "loop":
            while True:
                pass
        if what == "exit":
            os._exit(3)
        if what == "crash":
            ctypes.string_at(0)
        found.append({"nan": float("nan"), "none": None, "text": "1.0"}.get(what, 0.5))
    contents = [one[0]["content"] for one in completions]
    return found[1:] if "short" in contents else found
"""


def test_faults_of_every_kind_among_many_cost_exactly_their_own_samples(tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS)
    faults = {
        "raise": "RuntimeError: a hard one (faults.py",
        "loop": "overran the time limit of 1 s",
        "exit": "the worker process died (exit status 3)",
        "crash": "the worker process died",
        "nan": "must be finite, not nan",
        "none": "returned None",
        "text": "must be a number, not str",
        "short": "returned 0 results for 1 samples",
    }
    batch = [
        one
        for draw, what in enumerate([*faults, "fine", "fine"])
        for one in group("a", what, "b", "c", draw=draw)
    ]
    with Scorer(f"{tmp_path}/faults.py:reward", workers=2, timeout_s=1.0) as scorer:
        submit = scorer.of_groups(4)
        for one in batch:
            submit(one)
        found = scorer.gather(batch)
        lost = [(one.completion, one.score.reason) for one in batch if not one.score.valid]
    assert [what for what, _ in lost] == list(faults)
    for what, reason in lost:
        assert faults[what] in reason
    assert {one.reward for one in found if one.valid} == {0.5}
    assert not any(one.bystander for one in batch if not one.score.valid)


# ---- Sums


def test_a_sum_has_the_weighted_reward_and_each_one_as_a_part(folder):
    text = f"form={folder}/trl_rewards.py:format_reward*0.5, {folder}/native.py:evaluate*2"
    found = rated(load(text), group("<think>a</think> 12", "12"))
    assert [one.reward for one in found] == [2.5, 2.0]
    assert found[0].parts == {"form": 1.0, "native": 1.0}
    assert found[0].metrics == {"native/answer": 1.0, "native/words": 2.0}
    form = load(text)
    assert (form.scope, form.separable, form.concurrent) == (GROUP, True, False)


def test_a_sum_leaves_out_what_does_not_score_a_sample_and_drops_faults(folder):
    text = f"a={folder}/trl_rewards.py:accuracy_reward, b={folder}/native.py:evaluate"
    with Scorer(text, workers=1) as scorer:
        found = scorer.gather(group("none 12", "12", "12 raise"))
    assert [(one.reward, one.valid) for one in found] == [(1.0, True), (2.0, True), (0.0, False)]
    assert found[0].parts == {"b": 1.0}
    assert "RuntimeError: a hard one" in found[2].reason


def test_a_group_of_a_sum_is_a_draw_also_where_another_evaluator_gets_all(folder):
    every = f"{DATA}/eval_protocol/groups.py:test_against_the_mean"
    one, other = group("aa", "a", draw=1), group("aaaaa", "a", draw=2)
    with Scorer(f"group={folder}/native.py:evaluate_group, all={every}", workers=1) as scorer:
        found = scorer.gather([one[0], other[0], one[1], other[1]])
    assert [score.parts["group"] for score in found] == [1.0, 1.0, 0.0, 0.0]
    assert [score.parts["all"] for score in found] == [1.0, 0.0, 1.0, 1.0]


def test_a_sum_with_a_coroutine_function_runs_many_calls_at_once(folder):
    text = f"{folder}/trl_rewards.py:length_reward*10, {folder}/native.py:rank*0"
    with Scorer(text, workers=1) as scorer:
        assert scorer.scope == GROUP and "10 length_reward (TRL)" in scorer.form
        assert [one.reward for one in scorer.gather(group("a b", "c"))] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a.py:f,", "names no evaluator between two commas"),
        ("a.py:f*x", "the weight 'x' must be a finite number"),
        ("a.py:f*inf", "the weight 'inf' must be a finite number"),
        ("a.py:f, b.py:f", "two evaluators have the name f"),
    ],
)
def test_a_sum_of_a_wrong_form_is_refused_with_the_field(text, fault):
    with pytest.raises(UserError, match="eval.evaluator=.*" + fault):
        named.parse(text, "eval.evaluator")


def test_the_path_of_a_file_may_have_the_marks_of_a_sum(tmp_path):
    folder = tmp_path / "a=b, c*2"
    folder.mkdir()
    for name, source in (("reward.py", "reward.py:evaluate"), ("grade.json", "grade.json")):
        (folder / name).write_text("")
        [one] = named.parse(f"{folder}/{source}")
        assert (one.source, one.weight) == (f"{folder}/{source}", 1.0)
        assert not named.is_sum(one.source) and named.is_sum(f"x={folder}/{source}")
    assert named.parse(f"{tmp_path}/reward.py:evaluate*0.5")[0].weight == 0.5


def test_names_and_weights_have_defaults():
    found = named.parse("x=a.py:f*0.5,rftjax.evaluators.number:evaluate, dir/g.json*-1")
    assert [(one.name, one.source, one.weight) for one in found] == [
        ("x", "a.py:f", 0.5),
        ("number", "rftjax.evaluators.number:evaluate", 1.0),
        ("g", "dir/g.json", -1.0),
    ]
    assert not named.is_sum("dir/reward.py:evaluate") and named.is_sum("a.py:f*2")


def test_the_config_looks_at_each_source_and_a_resume_at_its_contents(folder):
    config = configs.base_config()
    config.evaluator = f"{folder}/native.py:evaluate, x={folder}/gone.py:f*0.1"
    with pytest.raises(UserError, match=r"evaluator=.*there is no file .*gone.py"):
        configs.check(config)
    config.evaluator = f"{folder}/gone.json"
    with pytest.raises(UserError, match=r"evaluator=.*there is no file .*gone.json"):
        configs.check(config)
    one, two = (of_evaluator(f"a={folder}/native.py:rank*{weight}") for weight in (1, 2))
    assert one["a: the file itself"] == two["a: the file itself"]
    assert one["a: weight"] != two["a: weight"]


# ---- OpenAI's graders

CHECK = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{ item.answer }}",
    "operation": "eq",
}


def graded(grader: dict, completion: str, **data) -> float:
    task = Task("row-1", [{"role": "user", "content": "?"}], {"answer": "Paris", **data})
    return rewards(form_of(grader), completion, task=task)[0]


@pytest.mark.parametrize(
    ("operation", "right", "wrong"),
    [
        ("eq", "Paris", "paris"),
        ("ne", "Rome", "Paris"),
        ("like", "It is Paris.", "It is paris."),
        ("ilike", "it is paris", "Pari"),
    ],
)
def test_a_string_check_compares_as_its_operation_says(operation, right, wrong):
    grader = CHECK | {"operation": operation}
    assert (graded(grader, right), graded(grader, wrong)) == (1.0, 0.0)


def test_templates_follow_paths_into_the_row_and_what_was_said():
    row = {"choices": [{"label": "B", "n": 2}]}
    path = CHECK | {"reference": "{{item.choices[0].label}}{{ item.choices[0].n }}"}
    assert graded(path, "B2", **row) == 1.0
    said = CHECK | {"input": "{{sample.output_json.city}}"}
    assert graded(said, '{"city": "Paris"}') == 1.0
    with pytest.raises(ValueError, match="no 'city' in"):
        graded(said, "no JSON")


def test_a_python_grader_gets_sample_and_item():
    source = (
        "def grade(sample, item):\n    return len(sample['output_text']) / len(item['answer'])\n"
    )
    assert graded({"type": "python", "source": source}, "Pari") == 0.8


def test_a_multi_grader_computes_its_output_and_records_each_grade():
    source = "def grade(sample, item):\n    return 0.5"
    grader = {
        "type": "multi",
        "graders": {"exact": CHECK, "half": {"type": "python", "source": source}},
        "calculate_output": "max(0.7 * exact, 0.1) + half ^ 2 - 0.1",
    }
    task = Task("row-1", [], {"answer": "Paris"})
    (score,) = rated(form_of(grader), [trajectory("Paris", task=task)])
    assert score.reward == pytest.approx(0.85)
    assert score.parts == {"exact": 1.0, "half": 0.5}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"type": "magic"}, "has type 'magic'; it must be one of string_check"),
        ({"operation": "contains"}, "operation 'contains'; it must be one of eq"),
        ({"input": 3}, "needs the field 'input'"),
        ({"type": "text_similarity", "evaluation_metric": "cosine"}, "must be one of fuzzy_match"),
        ({"type": "text_similarity", "evaluation_metric": "meteor"}, "'meteor': .* or a function"),
        ({"type": "python", "source": "x = 1"}, "must define grade"),
        (
            {"type": "multi", "graders": {"a": CHECK}, "calculate_output": "a + b"},
            "b is not allowed",
        ),
        ({"type": "multi", "graders": {"a": CHECK}, "calculate_output": "a.real"}, "a.real is not"),
        (
            {"type": "multi", "graders": {"a": CHECK}, "calculate_output": "open(a)"},
            "is not allowed",
        ),
    ],
)
def test_a_grader_that_is_not_understood_is_refused_at_the_start(change, fault):
    with pytest.raises(UserError, match=fault.replace("(", r"\(")):
        form_of(CHECK | change)


def test_a_grader_is_read_from_a_file_also_from_that_of_a_whole_job(tmp_path):
    for text in (
        CHECK,
        {"grader": CHECK},
        {"type": "reinforcement", "reinforcement": {"grader": CHECK}},
    ):
        (tmp_path / "grader.json").write_text(json.dumps(text))
        assert rewards(load(f"{tmp_path}/grader.json"), "12", "7") == [1.0, 0.0]
    (tmp_path / "grader.json").write_text("{")
    with pytest.raises(UserError, match="must be a JSON file with a grader"):
        load(f"{tmp_path}/grader.json")


@pytest.mark.parametrize(
    ("metric", "text", "value"),
    [
        ("rouge_1", "the cat sat", 2 * 2 / 6),
        ("rouge_2", "the cat sat", 0.0),
        ("rouge_2", "a the dog", 2 * 1 / 4),
        ("rouge_l", "dog a the", 2 * 1 / 6),
        ("rouge_l", "the a dog", 2 * 2 / 6),
        ("bleu", "the old dog sat", 0.0),
        ("gleu", "the sat dog", 3 / 6),
    ],
)
def test_similarities_are_those_of_their_definitions(metric, text, value):
    reference = "the dog sat"
    measure = similarity.metric(metric)
    assert measure(reference, reference) == pytest.approx(1.0)
    assert measure("", reference) == 0.0
    if metric != "bleu":
        assert measure(text, reference) == pytest.approx(value)


def test_an_object_that_is_no_evaluator_is_refused(tmp_path):
    (tmp_path / "odd.py").write_text("value = 3\n")
    with pytest.raises(UserError, match=r"is of type int, which is no evaluator"):
        load(f"{tmp_path}/odd.py:value")


# ---- verifiers

VERIFIERS = """
class Parser:
    def parse_answer(self, completion):
        return completion[-1]["content"]

class Rubric:
    def __init__(self, funcs, weights, parser=None):
        self.funcs, self.weights, self.class_objects = funcs, weights, {"parser": parser}

    def add_reward_func(self, func, weight=1.0):
        self.funcs.append(func)
        self.weights.append(weight)

class SingleTurnEnv:
    def __init__(self, dataset, rubric):
        self.dataset, self.rubric = dataset, rubric

    def get_dataset(self):
        user = lambda row: [{"role": "user", "content": row["question"]}]
        return self.dataset.map(lambda row: {"prompt": user(row)})
"""


PLAIN = """
import verifiers as vf

async def short(completion):
    return 1 / (1 + len(completion))

def turns(state):
    return state["turn"]

ENV = vf.SingleTurnEnv(None, vf.Rubric(funcs=[short, turns], weights=[1.0, 0.0]))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> str:
    """A user's environment beside what it needs of the package, which rftjax's requirements do not go with."""
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "verifiers.py").write_text(VERIFIERS)
    (folder / "env.py").write_text((DATA / "verifiers/env.py").read_text())
    (folder / "plain.py").write_text(PLAIN)
    return f"{folder}/env.py"


@pytest.mark.parametrize("name", ["load_environment", "RANKED"])
def test_a_rubric_scores_as_the_package_does(environment, name):
    recorded = json.loads((DATA / "verifiers/scores.json").read_text())
    task = Task("sum-1", [{"role": "user", "content": "5 + 7 ="}], {"answer": "12"})
    with Scorer(f"{environment}:{name}", workers=1) as scorer:
        assert scorer.form == "verifiers rubric"
        samples = group(*recorded["answers"], task=task)
        for one in samples:
            one.sequences = []  # an empty answer is one, too
        found = scorer.gather(samples)
    for score, wanted in zip(found, recorded[name], strict=True):
        assert score.reward == pytest.approx(wanted["reward"])
        named = {k: v for k, v in wanted["metrics"].items() if k != "num_turns"}  # of the package
        assert score.parts | score.metrics == pytest.approx(named)
    assert set(found[0].metrics) == ({"words"} if name == "load_environment" else set())


def test_a_failing_function_of_a_rubric_costs_its_sample_and_is_no_reward_of_0(environment):
    task = Task("sum-1", [{"role": "user", "content": "5 + 7 ="}], {"answer": 12})
    with Scorer(f"{environment}:load_environment", workers=1) as scorer:
        (score,) = scorer.gather([trajectory("12", task=task)])
    assert not score.valid and "TypeError" in score.reason and "env.py" in score.reason


def test_the_rows_of_an_environment_are_tasks(environment):
    found = tasks.read(f"{environment}:load_environment")
    assert [one.data["answer"] for one in found] == ["7", "8", "9", "10"]
    assert found[3].messages == [{"role": "user", "content": "3 + 7 ="}]


# ---- Training


@pytest.fixture
def judge(tmp_path):
    """The file of a grader whose model answers over HTTP."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), test_judge.Handler)
    server.lock, server.say = threading.Lock(), test_judge.say
    server.requests, server.tries, server.open, server.most = [], {}, 0, 0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield test_judge.kept_grader(server, tmp_path)
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_form_trains_a_model_and_its_rewards_are_recorded_one_by_one(
    folder, environment, judge, tiny_dir, tmp_path
):
    """One run whose reward is the sum of one evaluator of each form, over rows as TRL and verl write them."""
    rows = [
        {
            "prompt": f"w{i} w{i + 7}",
            "answer": f"w{i}",
            "data_source": "openai/gsm8k",
            "reward_model": {"ground_truth": "w"},
            "extra_info": {"index": 7},
        }
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = "def grade(sample, item):\n    return len(set(sample['output_text'].split())) / 8"
    grader = {"type": "python", "source": source}
    (tmp_path / "grader.json").write_text(json.dumps(grader))
    config = configs.base_config()
    config.steps, config.export, config.logging.histograms = 2, False, False
    config.model.path, config.tasks.train = str(tiny_dir), str(tmp_path / "rows.jsonl")
    protocol = DATA / "eval_protocol"
    config.evaluator = ", ".join(
        [
            f"native={folder}/native.py:evaluate",
            f"group={folder}/native.py:evaluate_group",
            f"trl={folder}/trl_rewards.py:length_reward",
            f"verl={folder}/verl_reward.py:compute_score*0.5",
            f"openai={tmp_path}/grader.json",
            f"ep={protocol}/groups.py:test_shortest*0.1",
            f"row={folder}/varied.py:test_varied*0.1",
            f"all={protocol}/groups.py:test_against_the_mean*0.1",
            f"rubric={environment.replace('env.py', 'plain.py')}:ENV*0.1",
            f"judge={judge}*0.1",
        ]
    )
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 4, 4, 128
    config.sampler.max_new_tokens, config.sampler.slots, config.rollout.max_length = 8, 8, 24
    config.scoring.workers, config.scoring.timeout_s, config.eval.every = 1, 60.0, 0
    state, done = train.train(complete_config(config), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert done and int(state.step) == 2
    for line in lines:
        weights = dict.fromkeys(("native", "group", "trl", "openai"), 1.0) | {"verl": 0.5}
        weights |= dict.fromkeys(("ep", "row", "all", "rubric", "judge"), 0.1)
        parts = {name: line[f"reward/part/{name}"] for name in weights}
        assert line["evaluator/error_share"] == 0.0 and parts["group"] == 0.25
        assert all(0 < parts[name] < 1 for name in ("ep", "row", "all", "rubric", "judge"))
        assert line["metric/rubric/turns"] == 1.0 and line["metric/judge/judge_calls"] <= 1.0
        total = sum(weights[name] * parts[name] for name in weights)
        assert line["reward/mean"] == pytest.approx(total) and line["grad_norm"] > 0


# ---- The page about them

PAGE = Path(__file__).parents[1] / "docs" / "evaluators.md"
KINDS = {
    "reward.py:evaluate": "evaluate",
    "rank.py:evaluate_group": "evaluate_group",
    "rewards.py:accuracy_reward": "TRL",
    "rewards.py:format_reward": "TRL",
    "compute_score.py:compute_score": "verl",
    "grader.json": "OpenAI grader",
    "test_sums.py:test_sums": "Eval Protocol, pointwise",
    "env.py:load_environment": "verifiers rubric",
    "judge.json": "OpenAI grader",
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """The files of the page, under the names that they have there."""
    folder = tmp_path_factory.mktemp("shown")
    for block in blocks(PAGE, "python"):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name, block
        (folder / name[1]).write_text(block)
    for name, block in zip(("grader.json", "judge.json"), blocks(PAGE, "json"), strict=True):
        (folder / name).write_text(block)
    (folder / "verifiers.py").write_text(VERIFIERS)
    return folder


def test_the_page_shows_an_example_of_each_form_and_names_every_one_of_its_files(shown):
    commands = re.findall(r"--config\.evaluator=(\"[^\"]*\"|[^\s`]+)", PAGE.read_text())
    sources = {one.source for text in commands for one in named.parse(text.strip('"'))}
    assert sources - {"graders.py:GRADER", "rftjax.evaluators.number:evaluate"} == set(KINDS)
    assert {path.name for path in shown.iterdir()} - {"verifiers.py"} == {
        source.partition(":")[0] for source in KINDS
    }


@pytest.mark.parametrize("source", [one for one in KINDS if one != "judge.json"])
def test_what_the_page_shows_runs_and_tells_a_right_answer_from_a_wrong_one(shown, source):
    task = Task("sum", [{"role": "user", "content": "5 + 7 ="}], ROW | {"question": "5 + 7 ="})
    with Scorer(f"{shown}/{source}", workers=1) as scorer:
        assert scorer.form == KINDS[source]
        right, wrong = scorer.gather(
            group("<think>5</think> 12", "it is, let me say, thirteen", task=task)
        )
    assert right.valid and wrong.valid and right.reward > wrong.reward


def test_the_judge_of_the_page_is_understood(shown):
    assert load(f"{shown}/judge.json").concurrent
