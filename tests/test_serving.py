"""A server in OpenAI's formats, asked by the real client and by raw requests."""

import asyncio
import contextlib
import http.client
import itertools
import json
import re
import socket
import time
import urllib.error
import urllib.request

import openai
import pytest
import served
from served import CALL, END, KEY, NAME

from rftjax.evaluators.forms.judge import Judge
from rftjax.sampler.engine import SampledTurn, noise_key
from rftjax.serving import service as service_module
from rftjax.serving.answers import Answer
from rftjax.serving.requests import ChatRequest
from rftjax.serving.service import Service
from rftjax.serving.terminal import talk
from rftjax.serving.turns import Model, answer_to
from rftjax.text import chat
from rftjax.types import SamplingParams

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


@pytest.fixture(scope="module")
def weights():
    return served.make_weights()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return served.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def server(weights, tokenizer):
    found = served.Served(served.make_engine(weights), tokenizer)
    yield found
    found.close()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def user(text):
    return [{"role": "user", "content": text}]


def post(server, path, body, *, key=KEY, headers=()):
    """The status and the JSON of an answer to a raw request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **dict(headers)}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{server.url}{path}", data, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def metrics(server):
    request = urllib.request.Request(
        f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request) as answer:
        text = answer.read().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"rftjax_\w+(\{\w+=\"[^\"]*\"\})? [0-9.e+-]+", line) for line in lines)
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def until(holds, limit_s=20.0):
    end_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_an_answer_is_what_the_engine_samples_for_the_rendered_prompt(
    client, server, weights, tokenizer
):
    answer = client.chat.completions.create(
        model=NAME,
        messages=user("abc"),
        seed=3,
        logprobs=True,
        max_tokens=9,
        n=2,
        extra_body={"return_token_ids": True},
    )
    engine = served.make_engine(weights)
    prompt = chat.render(tokenizer, user("abc"), generation_prompt=True)
    for index in range(2):
        engine.open((index, 0), prompt, 9, noise_key(2**31 - 1, 3, index), SamplingParams())
    turns = {}
    while engine.busy:
        turns |= {turn.key: turn for turn in engine.step()}
    assert answer.prompt_token_ids == prompt
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == sum(len(turn.tokens) for turn in turns.values())
    for index, choice in enumerate(answer.choices):
        turn = turns[index, 0]
        assert choice.token_ids == turn.tokens
        assert [one.logprob for one in choice.logprobs.content] == turn.logprobs
        assert choice.message.content == chat.decode(tokenizer, turn.tokens, stop_tokens=(END,))
        assert choice.finish_reason == ("stop" if turn.stopped else "length")
    assert answer.choices[0].token_ids != answer.choices[1].token_ids


def test_a_stream_adds_up_to_the_whole_answer(client):
    settings = {"model": NAME, "messages": user("b"), "n": 2, "logprobs": True, "tools": TOOLS}
    body = {"return_token_ids": True}
    for seed in range(6):
        whole = client.chat.completions.create(**settings, seed=seed, extra_body=body)
        texts, tokens, logprobs, calls, reasons = {}, {}, {}, {}, {}
        chunks = client.chat.completions.create(
            **settings,
            seed=seed,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=body,
        )
        for chunk in chunks:
            usage = chunk.usage
            for choice in chunk.choices:
                at, delta = choice.index, choice.delta
                texts[at] = texts.get(at, "") + (delta.content or "")
                tokens.setdefault(at, []).extend(getattr(choice, "token_ids", []))
                calls.setdefault(at, []).extend(delta.tool_calls or [])
                if choice.logprobs:
                    logprobs.setdefault(at, []).extend(choice.logprobs.content)
                reasons[at] = choice.finish_reason or reasons.get(at)
        assert usage == whole.usage
        for choice in whole.choices:
            at, message = choice.index, choice.message
            assert texts[at] == (message.content or "") and tokens[at] == choice.token_ids
            assert logprobs[at] == choice.logprobs.content
            assert reasons[at] == choice.finish_reason
            said = [(one.id, one.function.arguments) for one in message.tool_calls or []]
            assert [(one.id, one.function.arguments) for one in calls[at]] == said


def test_calls_of_tools_are_read_and_are_shown_only_where_there_are_tools(client):
    with_tools = without = 0
    for seed in range(12):
        settings = {"model": NAME, "messages": user("c"), "seed": seed}
        plain = client.chat.completions.create(**settings, tools=TOOLS, tool_choice="none")
        assert not plain.choices[0].message.tool_calls
        without += CALL in plain.choices[0].message.content
        (choice,) = client.chat.completions.create(**settings, tools=TOOLS).choices
        for call in choice.message.tool_calls or []:
            with_tools += 1
            assert (call.function.name, call.function.arguments) == ("look", '{"at": "b"}')
            assert choice.finish_reason == "tool_calls"
            assert CALL not in (choice.message.content or "")
    assert with_tools and without


def test_completions_take_texts_and_ids_and_stop_at_texts(client, tokenizer):
    ids = chat.encode_plain(tokenizer, "abcab")
    settings = {"model": NAME, "seed": 1, "max_tokens": 12, "logprobs": 0}
    by_text = client.completions.create(prompt="abcab", **settings)
    by_ids = client.completions.create(prompt=[ids, ids], **settings)
    assert [one.text for one in by_ids.choices] == [by_text.choices[0].text] * 2
    logprobs = by_text.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == by_text.usage.completion_tokens
    whole = by_text.choices[0].text
    assert len(whole) > 3
    stop = whole[2:4]
    for stream in (False, True):
        found = client.completions.create(
            prompt="abcab", **settings, stop=[stop, "no such"], stream=stream
        )
        parts = list(found) if stream else [found]
        assert "".join(part.choices[0].text for part in parts) == whole[: whole.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_greedy_answers_need_no_seed(client):
    settings = {"model": NAME, "messages": user("ab"), "max_tokens": 8}
    greedy = [
        client.chat.completions.create(**settings, temperature=0).choices[0].message.content
        for _ in range(2)
    ]
    drawn = {
        client.chat.completions.create(**settings).choices[0].message.content for _ in range(4)
    }
    assert greedy[0] == greedy[1] and len(drawn) > 1


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"model": "other"}, 404, "there is 'tiny'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
        ({"messages": user("abc" * 5000)[:1]}, 400, "rollout.max_length"),
        ({"messages": user("c" * 118)}, 400, "leaves no room"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"n": 0}, 400, "n="),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, 400, "constrained decoding"),
        ({"tool_choice": "required"}, 400, "a call cannot be forced"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0]"),
        ({"top_logprobs": 3, "logprobs": True}, 400, "only the log-probabilities"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"no_such_field": 1}, 400, "no_such_field"),
        ({"stop": ["a"] * 3 + [str(i) for i in range(17)]}, 400, "stop"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_reason(server, change, status, told):
    body = {"model": NAME, "messages": user("a")} | change
    found, answer = post(server, "/v1/chat/completions", body)
    assert (found, told in answer["error"]["message"]) == (status, True), answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_malformed_and_oversized_bodies_and_wrong_tokens_are_refused(server):
    good = {"model": NAME, "messages": user("a")}
    path = "/v1/chat/completions"
    for body in (b"", b"{", b"[1]", b"\xff", b"[" * 15_000):
        assert post(server, path, body)[0] == 400
    status, answer = post(server, path, {**good, "user": "a" * 20_000})
    assert status == 413 and "serving.max_request_bytes=20000" in answer["error"]["message"]
    for key in ("", "another", "the keys"):
        status, answer = post(server, path, good, key=key)
        assert status == 401 and "token" in answer["error"]["message"]
    for path in ("/nowhere", "/v1/nowhere"):
        assert post(server, path, good)[0] == 404
    assert post(server, "/v1/models", good)[0] == 405
    assert post(server, "/some/thing/chat/completions", good)[0] == 404
    with urllib.request.urlopen(f"{server.url}/health") as answer:  # needs no token
        assert json.load(answer) == {"status": "ok"}


def test_a_body_without_its_length_is_cut_off_at_the_limit(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    parts = (b"a" * 10_000 for _ in range(10))
    headers = {"Authorization": f"Bearer {KEY}"}
    connection.request(
        "POST", "/v1/chat/completions", body=parts, headers=headers, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_models_and_metrics_are_told(client, server):
    assert [one.id for one in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    before = metrics(server)
    answer = client.chat.completions.create(model=NAME, messages=user("abc"))
    post(server, "/v1/chat/completions", {"model": NAME})
    after = metrics(server)
    change = {name: after[name] - before.get(name, 0) for name in after}
    assert change["rftjax_prompt_tokens_total"] == answer.usage.prompt_tokens
    assert change["rftjax_completion_tokens_total"] == answer.usage.completion_tokens
    assert change['rftjax_requests_total{status="200"}'] == 1
    assert change['rftjax_requests_total{status="400"}'] == 1
    assert change["rftjax_time_to_first_token_seconds_count"] == 1
    assert after["rftjax_running"] == after["rftjax_conversations"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(weights, tokenizer, stream):
    """Nothing ends these answers but their limit, which is far away."""
    engine = served.make_engine(weights, slots=1, parked=0, stops=[], max_length=20_000)
    server = served.Served(engine, tokenizer)
    try:
        body = {"model": NAME, "messages": user("a"), "max_tokens": 19_000, "stream": stream}
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + data)
            until(lambda: server.service.active)
        until(lambda: not server.service.conversations)
        sampled = engine.counters.sampled_tokens
        assert sampled < 19_000
        short = {"model": NAME, "messages": user("b"), "max_tokens": 2}
        assert post(server, "/v1/chat/completions", short)[0] == 200
    finally:
        server.close()


def test_too_many_requests_are_told_to_come_again(weights, tokenizer):
    engine = served.make_engine(weights, slots=1, parked=0, stops=[], max_length=20_000)
    server = served.Served(engine, tokenizer, max_waiting=1)
    try:
        hold = [server.service.open([2], 5000, (0, 0, i), SamplingParams()) for i in range(2)]
        until(lambda: server.service.active == 2)
        status, answer = post(
            server, "/v1/chat/completions", {"model": NAME, "messages": user("a")}
        )
        assert status == 429 and "serving.max_waiting=1" in answer["error"]["message"]
        for call in hold:
            server.service.close(call.key)
    finally:
        server.close()


def test_a_fault_of_the_engine_is_told_and_the_next_request_is_served(weights, tokenizer):
    import jax
    import numpy as np

    engine = served.make_engine(jax.tree.map(lambda leaf: leaf * np.nan, weights))
    server = served.Served(engine, tokenizer)
    try:
        body = {"model": NAME, "messages": user("a")}
        status, answer = post(server, "/v1/chat/completions", body)
        assert status == 500 and "not finite" in answer["error"]["message"]
        server.service.run(lambda: engine.set_params(weights))
        assert post(server, "/v1/chat/completions", body)[0] == 200
    finally:
        server.close()


def test_sixty_four_clients_at_once_get_their_own_answers_and_nothing_is_lost(server, weights):
    """Each asks three times, streaming or not, with a length and a seed of its own."""

    async def ask(client, index):
        settings = {
            "model": NAME,
            "messages": user("abc"[index % 3] * (1 + index % 20)),
            "seed": index,
            "max_tokens": 1 + index % 24,
        }
        found = []
        for again in range(3):
            if (index + again) % 2:
                chunks = await client.chat.completions.create(**settings, stream=True)
                pieces = [one async for one in chunks]
                found.append("".join(one.choices[0].delta.content or "" for one in pieces))
            else:
                answer = await client.chat.completions.create(**settings)
                found.append(answer.choices[0].message.content)
        return found

    async def together():
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(64)))

    answers = asyncio.run(together())
    alone = {}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        for index in range(0, 64, 5):
            messages = user("abc"[index % 3] * (1 + index % 20))
            answer = client.chat.completions.create(
                model=NAME, messages=messages, seed=index, max_tokens=1 + index % 24
            )
            alone[index] = answer.choices[0].message.content
    assert all(len(set(found)) == 1 for found in answers)
    assert {index: answers[index][0] for index in alone} == alone
    assert len({found[0] for found in answers}) > 30
    until(lambda: not server.service.conversations)


def test_the_prompts_of_earlier_requests_are_not_computed_again(client, server):
    def prefilled(text):
        before = metrics(server)["rftjax_prefilled_tokens_total"]
        client.chat.completions.create(model=NAME, messages=user(text), max_tokens=2)
        return metrics(server)["rftjax_prefilled_tokens_total"] - before

    shared = "c" * 64
    first = prefilled(f"{shared}a")
    assert first > 50
    assert prefilled(f"{shared}a") < 8  # whole chunks are shared
    assert prefilled(f"{shared}b") < 16


def test_an_idle_connection_outlives_what_a_client_keeps_of_it(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    with contextlib.closing(connection):
        for pause in (0, openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry + 0.5):
            time.sleep(pause)
            connection.request("GET", "/health")
            answer = connection.getresponse()
            assert answer.status == 200 and answer.read()
            assert connection.sock is not None  # the server did not close it


def test_what_goes_on_from_an_answer_finds_it_in_its_row(client, server, weights):
    def sample(prompt, seed):
        before = metrics(server)["rftjax_prefilled_tokens_total"]
        answer = client.completions.create(
            model=NAME,
            prompt=prompt,
            max_tokens=40,
            seed=seed,
            extra_body={"return_token_ids": True},
        )
        computed = metrics(server)["rftjax_prefilled_tokens_total"] - before
        return answer.choices[0].token_ids, computed

    for seed in range(40):
        prompt = [7 + seed % 6, 8, 9, 10]
        answer, _ = sample(prompt, seed)
        if len(answer) > 20:
            break
    again = [*prompt, *answer, 9, 9, 9]
    second, computed = sample(again, 1)
    assert len(answer) > 20 and computed <= 3 + 1 + 8  # whole chunks are shared
    alone = served.make_engine(weights)
    alone.open((0, 0), again, 40, noise_key(2**31 - 1, 1, 0), SamplingParams())
    turns = []
    while alone.busy:
        turns += alone.step()
    assert turns[0].tokens == second


def test_a_talk_goes_on_in_the_same_row_until_it_is_begun_anew(weights, tokenizer):
    engine = served.make_engine(weights)
    service = Service(engine)
    model = Model(NAME, tokenizer, (END,), (), engine.max_length)
    lines = iter(["ab", "", "/what", "c", "/new", "ab", "/system abc", "c", "b" * 120, "c"])
    written, prefilled = [], []

    def read(prompt):
        prefilled.append(engine.counters.prefilled_tokens)
        written.append("\n>")
        return next(lines, "/exit")

    try:
        talk(service, model, SamplingParams(4, 100), read=read, write=written.append, seed=1)
        until(lambda: not service.conversations)
    finally:
        service.stop()
    answers = "".join(written).split("\n>")
    new = [after - before for before, after in itertools.pairwise(prefilled)]
    first = len(chat.render(tokenizer, user("ab"), generation_prompt=True))
    again = 1 + 1 + first  # the last token sampled, the end of the turn, and the next message
    assert new[0] == first - 1 and new[1] == new[2] == 0 and 4 <= new[3] <= again
    assert "/new begins" in answers[3] and "max_length" in answers[-3]
    assert answers[1] != answers[6] and answers[-2]  # other noise; and the talk goes on


def test_a_judge_of_an_evaluator_gets_this_server_s_answers_and_counts_their_tokens(
    server, client, monkeypatch
):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    sampling = {"max_tokens": 4, "temperature": 1.0, "seed": 3}
    judge = Judge("tiny", base_url=f"{server.url}/v1", key_variable="JUDGE_KEY", sampling=sampling)
    texts = [f"w{number}" for number in range(6)]

    async def ask():
        return await asyncio.gather(*(judge.ask(user(text)) for text in texts))

    try:
        found = asyncio.run(ask())
    finally:
        judge.close()
    for text, answer in zip(texts, found, strict=True):
        wanted = client.chat.completions.create(model="tiny", messages=user(text), **sampling)
        assert answer.text == (wanted.choices[0].message.content or "")
        assert answer.completion_tokens == wanted.usage.completion_tokens > 0
        assert answer.prompt_tokens == wanted.usage.prompt_tokens


@pytest.mark.parametrize(
    ("text", "shown", "arguments"),
    [
        (
            'Well.\n<tool_call>{"name": "look", "arguments": {"at": 1}}</tool_call>',
            "Well.",
            {"at": 1},
        ),
        ('{"name": "look", "parameters": {"at": 1}}', "", {"at": 1}),
        ('So [TOOL_CALLS][{"name": "look", "arguments": {}}]', "So", {}),
        ('{"an": "object"}', '{"an": "object"}', None),
        ("a < b, and [1] too", "a < b, and [1] too", None),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", None),
    ],
)
def test_calls_in_any_templates_format_are_held_back_in_a_stream_and_other_text_is_not(
    text, shown, arguments
):
    letters = tokenizer_of_letters(text)
    answer = Answer(letters, stop_tokens=(), tools=["look"])
    ids = letters.encode(text, add_special_tokens=False)
    parts = [answer.add([one], [0.0]) for one in ids]
    before = "".join(parts)
    parts.append(answer.finish(SampledTurn((0, 0), ids, [0.0] * len(ids), stopped=True)))
    assert "".join(parts) == shown == (answer.message["content"] or "")
    assert shown.startswith(before)
    calls = answer.message.get("tool_calls")
    assert (calls and json.loads(calls[0]["function"]["arguments"])) == arguments


@pytest.mark.parametrize("begun", [False, True])
def test_calls_within_thinking_that_the_prompt_begins_are_not_made(begun):
    call = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    prompt, text = f"hi{'<think>' * begun}", f"I may {call}"
    letters = tokenizer_of_letters(prompt + text)
    model = Model(NAME, letters, (), (), 99)
    tool = {"type": "function", "function": {"name": "look"}}
    asked = ChatRequest.model_validate({"model": NAME, "messages": user("hi"), "tools": [tool]})
    answer = answer_to(asked, model, letters.encode(prompt, add_special_tokens=False))
    ids = letters.encode(text, add_special_tokens=False)
    shown = "".join(answer.add([one], [0.0]) for one in ids)
    assert shown == (text if begun else "I may")
    assert not answer.finish(SampledTurn((0, 0), ids, [0.0] * len(ids), stopped=True))
    assert bool(answer.message.get("tool_calls")) != begun


def tokenizer_of_letters(text):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(sorted(set(text)))}
    built = Tokenizer(models.WordLevel(letters, unk_token=text[0]))
    built.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    built.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=built)


def test_requests_that_come_within_a_moment_begin_in_one_dispatch(weights, monkeypatch):
    monkeypatch.setattr(service_module, "GATHER_S", 0.4)
    monkeypatch.setattr(service_module, "GATHER_MOST_S", 0.4)
    engine = served.make_engine(weights)
    service = Service(engine)
    try:
        service.open([7], 4, (0, 0, 0), SamplingParams()).future.result()  # compiles
        before = engine.counters.decode_steps
        calls = [service.open([7, 8], 4, (0, 1, 9), SamplingParams())]
        time.sleep(0.05)
        calls += [service.open([7, 8], 4, (0, 1, i), SamplingParams()) for i in range(3)]
        for call in calls:
            call.future.result()
        assert engine.counters.decode_steps - before == 4
    finally:
        service.stop()


def test_an_engine_at_rest_begins_with_short_dispatches_and_their_tokens_are_the_same(weights):
    alone = served.make_engine(weights, stops=[])
    alone.open((0, 0), [7, 8], 15, (0, 0, 0), SamplingParams())
    turns = []
    while alone.busy:
        turns += alone.step()
    service, heard = Service(served.make_engine(weights, stops=[])), []

    def hear(tokens, logprobs):
        heard.append(len(tokens))

    try:
        for _ in range(2):
            heard.clear()
            call = service.open([7, 8], 15, (0, 0, 0), SamplingParams(), listener=hear)
            assert call.future.result().tokens == turns[0].tokens
            assert heard == [1, 2, 4, 4, 4]
            service.close(call.key)
    finally:
        service.stop()
