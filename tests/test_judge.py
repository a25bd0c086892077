"""Evaluators that ask a model: what is sent, kept, tried again and counted, and what becomes of bad answers."""

import asyncio
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rftjax.errors import UserError
from rftjax.evaluators.forms.form import GROUP
from rftjax.evaluators.forms.judge import Judge
from rftjax.evaluators.forms.load import form_of
from rftjax.scoring import Scorer
from rftjax.types import Task, Trajectory


class Handler(BaseHTTPRequestHandler):
    """Speaks enough of chat completions; the question says how the answer goes wrong."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, said = self.server, body["messages"][0]["content"]
        with server.lock:
            server.requests.append((self.path, self.headers.get("Authorization"), body))
            server.open += 1
            server.most = max(server.most, server.open)
            tries = server.tries[said] = server.tries.get(said, 0) + 1
        if "slowly" in said:
            time.sleep(0.2)
        with server.lock:  # before the answer, which may bring the next question at once
            server.open -= 1
        if "busy" in said and tries < 3:
            self.answer(429 if tries == 1 else 503, {"error": "later"}, {"Retry-After": "0.01"})
        elif "dropped" in said and tries < 2:
            self.close_connection = True
        elif "page" in said:
            self.answer(200, b"<html>log in first</html>")
        elif "refused" in said:
            self.answer(400, {"error": {"message": "no such model"}})
        else:
            message = {"role": "assistant", "content": server.say(said)}
            usage = {"prompt_tokens": 7, "completion_tokens": 3}
            self.answer(200, {"choices": [{"message": message}], "usage": usage})

    def answer(self, code, value, headers=None):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def say(question: str) -> str:
    if "order" in question:  # by length, the shortest first
        answers = re.findall(r"\[(\d+)\]\n(.*?)(?:\n\n|\Z)", question, re.S)
        return json.dumps(
            {"order": [int(n) for n, text in sorted(answers, key=lambda one: len(one[1]))]}
        )
    if "label" in question:
        return f'Well. {{"label": "{"good" if "12" in question else "bad"}"}}'
    if "beyond" in question:
        return '{"result": 7}'
    if "prose" in question:
        return "I would rather not say."
    return f'It has {len(question)} letters.\n{{"result": {0.75 if "12" in question else 0.25}}}'


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.lock, server.say = threading.Lock(), say
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def forgotten(server):
    server.requests, server.tries, server.open, server.most = [], {}, 0, 0


def address(server) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


def asked(judge: Judge, *questions: str):
    """The answers to questions that are asked at once, exceptions among them."""

    async def ask():
        calls = (judge.ask([{"role": "user", "content": one}]) for one in questions)
        return await asyncio.gather(*calls, return_exceptions=True)

    try:
        return asyncio.run(ask())
    finally:
        judge.close()


def test_a_request_has_model_messages_sampling_and_key(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    sampling = {"temperature": 0, "seed": 3}
    judge = Judge("j", base_url=address(server), key_variable="JUDGE_KEY", sampling=sampling)
    (answer,) = asked(judge, "12?")
    assert (answer.calls, answer.prompt_tokens, answer.completion_tokens) == (1, 7, 3)
    ((path, key, body),) = server.requests
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body == {"model": "j", "messages": [{"role": "user", "content": "12?"}], **sampling}


def test_what_is_busy_or_drops_the_connection_is_asked_again_and_counted(server):
    found = asked(Judge("j", base_url=address(server), key_variable="NONE"), "busy", "dropped")
    assert [one.calls for one in found] == [3, 2]


def test_what_is_refused_is_not_asked_again_and_says_why(server):
    judge = Judge("j", base_url=address(server), key_variable="NONE")
    (error,) = asked(judge, "refused")
    assert re.search(r"failed after 1 calls: 400 .*no such model", str(error))
    (error,) = asked(Judge("j", base_url=address(server), key_variable="NONE"), "page")
    assert str(error) == (
        f"the judge at {address(server)} answered what is no JSON: '<html>log in first</html>'"
    )
    (error,) = asked(Judge("j", base_url="http://127.0.0.1:9/v1", retries=1), "x")
    assert "failed after 2 calls" in str(error)


def test_elsewhere_a_missing_key_is_named():
    (error,) = asked(
        Judge("j", base_url="http://example.invalid/v1", key_variable="JUDGE_KEY"), "x"
    )
    assert isinstance(error, ValueError) and "environment variable JUDGE_KEY" in str(error)


def test_equal_questions_are_asked_once_and_answers_are_kept(server, tmp_path):
    one = Judge("j", base_url=address(server), cache=tmp_path)
    found = asked(one, "12 slowly", "12 slowly", "12 slowly")
    assert sorted(answer.calls for answer in found) == [0, 0, 1] and len(server.requests) == 1
    (again,) = asked(Judge("j", base_url=address(server), cache=tmp_path), "12 slowly")
    assert (again.text, again.calls, again.prompt_tokens) == (found[0].text, 0, 0)
    asked(Judge("j", base_url=address(server), cache=tmp_path, sampling={"seed": 1}), "12 slowly")
    assert len(server.requests) == 2  # another question


def test_as_many_questions_as_allowed_are_asked_at_once(server):
    asked(Judge("j", base_url=address(server), concurrency=3), *(f"slowly {i}" for i in range(9)))
    assert server.most == 3


# ---- Graders

TASK = Task("sum", [{"role": "user", "content": "5 + 7 ="}], {"answer": "12"})


def grader(server, tmp_path, **fields):
    content = (
        "Rate {{sample.output_text}} against {{item.answer}}." if "input" not in fields else ""
    )
    base = {"type": "score_model", "name": "judge", "model": "j", "base_url": address(server)}
    template = [{"role": "user", "content": [{"type": "input_text", "text": content}]}]
    return {**base, "input": template, "cache": str(tmp_path / "kept"), **fields}


def kept_grader(server, folder):
    """The file of a grader that rates an answer."""
    path = folder / "judge.json"
    path.write_text(json.dumps(grader(server, folder)))
    return path


def scored(grader, folder, *answers: str):
    """Scores of the answers, as one group, in a worker process."""
    (folder / "judge.json").write_text(json.dumps(grader))
    group = [
        Trajectory(TASK, 0, at, [*TASK.messages, {"role": "assistant", "content": text}])
        for at, text in enumerate(answers)
    ]
    with Scorer(f"{folder}/judge.json", workers=1, timeout_s=30.0) as scorer:
        return scorer.gather(group)


def test_a_score_model_reads_the_last_object_and_counts_calls_and_tokens(server, tmp_path):
    template = [{"role": "user", "content": "Is this right? {{sample.output_text}}"}]
    found = scored(grader(server, tmp_path, input=template), tmp_path, "12", "7")
    assert [one.reward for one in found] == [0.75, 0.25]
    assert found[0].metrics == {
        "judge_calls": 1.0, "judge_prompt_tokens": 7.0, "judge_completion_tokens": 3.0,
    }  # fmt: skip
    body = next(body for _, _, body in server.requests if "12" in body["messages"][0]["content"])
    assert body["messages"][-1]["content"].startswith("End your answer with one JSON object")
    again = scored(grader(server, tmp_path, input=template), tmp_path, "12", "7")
    assert [one.reward for one in again] == [0.75, 0.25] and len(server.requests) == 2
    assert again[0].metrics["judge_calls"] == 0.0


def test_an_answer_out_of_range_or_without_a_score_costs_its_sample(server, tmp_path):
    template = "{{sample.output_text}}"
    found = scored(grader(server, tmp_path, input=template), tmp_path, "12", "beyond", "prose")
    assert [one.valid for one in found] == [True, False, False]
    assert "gave 7, which is not from 0 to 1" in found[1].reason
    assert "has no result: 'I would rather not say.'" in found[2].reason
    wide = grader(server, tmp_path, input=template, range=[0, 10])
    assert scored(wide, tmp_path, "beyond")[0].reward == 7.0


def test_a_label_model_passes_its_labels(server, tmp_path):
    labels = {"labels": ["good", "bad"], "passing_labels": ["good"], "type": "label_model"}
    template = "A label: {{sample.output_text}}"
    found = scored(grader(server, tmp_path, input=template, **labels), tmp_path, "12", "7")
    assert [one.reward for one in found] == [1.0, 0.0]


def test_a_rank_model_orders_a_group_in_one_call(server, tmp_path):
    fields = {"type": "rank_model", "input": "Put into an order:\n\n{{samples}}"}
    assert form_of(grader(server, tmp_path, **fields)).scope == GROUP
    found = scored(grader(server, tmp_path, **fields), tmp_path, "bb", "a", "ccc", "bb")
    assert [one.reward for one in found] == [0.5, 1.0, 0.0, 0.5] and len(server.requests) == 1
    assert sum(one.metrics["judge_calls"] for one in found) == 1.0
    wrong = fields | {"input": "Say nothing:\n\n{{samples}}"}
    found = scored(grader(server, tmp_path, **wrong), tmp_path, "bb", "a")
    assert [one.valid for one in found] == [False, False] and "has no order" in found[0].reason


def test_a_judge_is_a_part_of_a_multi_grader(server, tmp_path):
    one = grader(server, tmp_path, input="Right? {{sample.output_text}}")
    check = {
        "type": "string_check", "name": "c", "operation": "eq",
        "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
    }  # fmt: skip
    both = {"type": "multi", "graders": {"j": one, "c": check}, "calculate_output": "(j + c) / 2"}
    (found,) = scored(both, tmp_path, "12")
    assert (found.reward, found.parts) == (0.875, {"j": 0.75, "c": 1.0})
    assert found.metrics["judge_prompt_tokens"] == 7.0


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"model": ""}, "needs the field 'model'"),
        ({"input": []}, "needs the field 'input', a list of messages"),
        ({"range": [1, 0]}, "the range of a score_model is"),
        (
            {"type": "label_model", "labels": ["a"], "passing_labels": ["b"]},
            "needs labels and pass",
        ),
    ],
)
def test_a_grader_that_cannot_ask_is_refused_at_the_start(server, tmp_path, fields, fault):
    with pytest.raises(UserError, match=fault):
        form_of(grader(server, tmp_path, **fields))
