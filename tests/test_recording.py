"""What is said under a rollout's address becomes token sequences, id for id as it was sampled."""

import asyncio
import json
import socket
import time

import jax.numpy as jnp
import numpy as np
import openai
import pytest
import served
from served import CALL, END, KEY, NAME

from rftjax import policy
from rftjax.models import decoder
from rftjax.serving.tracing import Tracing
from rftjax.serving.turns import Recording
from rftjax.text import chat
from rftjax.types import SamplingParams, Task

PARAMS = SamplingParams(max_new_tokens=10, max_turns=8, temperature=1.8)
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
# Only the last answer stays as it was.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and not loop.last %}c{% else %}{{ m.content }}{% endif %}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def weights():
    return served.make_weights()


class Recorded(served.Served):
    """A server whose address /rollouts/NAME/v1 records into `recordings[NAME]`; (0, N, 0) is the noise of "N..."."""

    def __init__(self, weights, tokenizer, *, params=PARAMS, **settings):
        self.recordings, self.params = {}, params
        engine = served.make_engine(weights, **settings)
        super().__init__(engine, tokenizer, tracing=Tracing(find=self.find))

    def find(self, name):
        if name not in self.recordings:
            if not name[:1].isdigit():
                return None
            noise = (0, int(name[:1]), 0)
            self.recordings[name] = Recording(
                self.service, self.model, self.params, noise, policy_version=7
            )
        return self.recordings[name]

    def client(self, name, **settings):
        url = f"{self.url}/rollouts/{name}/v1"
        return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, **settings)

    def close_recording(self, name):
        """The rollout's sequences, in their order."""
        found = self.recordings.pop(name)
        self.background.call(found.close)
        return [thread.sequence for thread in found.threads if thread.sampled]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return served.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def server(weights, tokenizer):
    found = Recorded(weights, tokenizer)
    yield found
    found.close()


def user(text):
    return {"role": "user", "content": text}


def ask(client, messages, **settings):
    """An answer's message as a dict, as the client's own type writes it."""
    answer = client.chat.completions.create(
        model="any", messages=messages, extra_body={"return_token_ids": True}, **settings
    )
    (choice,) = answer.choices
    return choice.message.to_dict(), choice, answer.prompt_token_ids


def talk(client, texts, **settings):
    messages, asked = [], []
    for text in texts:
        messages.append(user(text))
        message, choice, prompt = ask(client, messages, **settings)
        asked.append((prompt, choice.token_ids))
        messages.append(message)
    return messages, asked


def test_turns_that_extend_what_was_said_are_one_sequence_and_compute_new_tokens_only(
    server, tokenizer
):
    counters, drifts = server.engine.counters, 0
    for number in range(4):
        before, name = counters.prefilled_tokens, f"{number} turns"
        with server.client(name) as client:
            messages, asked = talk(client, ["abc", "ab", "c", "b"])
        (sequence,) = server.close_recording(name)
        for prompt, tokens in asked:
            assert sequence.tokens[: len(prompt) + len(tokens)] == [*prompt, *tokens]
        own = [at for at, sampled in enumerate(sequence.sampled) if sampled]
        sampled = [token for _, tokens in asked for token in tokens]
        assert [sequence.tokens[at] for at in own] == sampled
        assert {sequence.policy_version[at] for at in own} == {7}
        given = len(sequence.tokens) - len(sampled)
        assert counters.prefilled_tokens - before <= given + len(asked)
        text = chat.prompt_text(tokenizer, Task("", messages[:-1]))
        drifts += asked[-1][0] != chat.encode(tokenizer, text)
    assert drifts  # encoded again, some of it would have been other ids


def gaps(sequence):
    tokens_BT = np.zeros((1, 128), np.int32)
    tokens_BT[0, : len(sequence.tokens)] = sequence.tokens
    params = decoder.init(served.CONFIG, served.jax.random.key(0))
    plain_BT = policy._logprobs(served.CONFIG, params, jnp.asarray(tokens_BT), PARAMS.temperature)
    plain_T = np.asarray(plain_BT)[0, : len(sequence.tokens)]
    return np.abs(plain_T - np.asarray(sequence.logprobs))[np.asarray(sequence.sampled)]


def test_diverging_calls_become_sequences_that_hold_the_ids_that_were_sampled(server):
    """A retry of the second turn, another question after the first, and a talk of a sub-agent."""
    with server.client("2 diverging") as client:
        messages, asked = talk(client, ["abc", "ab"])
        retried = ask(client, messages[:3])
        other = ask(client, [*messages[:2], user("c")])
        sub = ask(client, [{"role": "system", "content": "b"}, user("abc")])
        further = ask(client, [*messages, user("a")])
    sequences = server.close_recording("2 diverging")
    prompts = [asked[1], retried[2:], other[2:], sub[2:]]
    assert len(sequences) == 4
    for (_, choice, prompt), sequence in zip((retried, other, sub), sequences[1:], strict=True):
        assert sequence.tokens == [*prompt, *choice.token_ids]
        assert sum(sequence.sampled) == len(choice.token_ids)
    first = [*asked[0][0], *asked[0][1]]
    assert sequences[0].tokens[: len(first)] == sequences[1].tokens[: len(first)] == first
    assert sequences[2].tokens[: len(first)] == first
    assert sequences[0].tokens == [*further[2], *further[1].token_ids]
    assert retried[1].token_ids != asked[1][1]  # its noise is its own
    gap = np.concatenate([gaps(sequence) for sequence in sequences])
    assert len(gap) > 20 and gap.max() < 1e-4
    assert prompts


def test_a_history_that_begins_otherwise_still_holds_the_ids_that_were_sampled(server):
    """As where an agent drops old messages to save room."""
    with server.client("3 shortened") as client:
        messages, asked = talk(client, ["abc", "ab", "c"])
        _, choice, prompt = ask(client, [*messages[2:], user("b")])
    sequence = server.close_recording("3 shortened")[1]
    joined = " ".join(map(str, sequence.tokens))
    for _, tokens in asked[1:]:
        assert " ".join(map(str, tokens)) in joined
    assert sequence.tokens == [*prompt, *choice.token_ids]


def test_calls_of_tools_come_back_as_the_ids_that_were_sampled(server):
    for number in range(40):
        name = f"4 tools {number}"
        with server.client(name) as client:
            message, choice, prompt = ask(client, [user("ab" * (number % 7 + 1))], tools=TOOLS)
            if not message.get("tool_calls"):
                server.close_recording(name)
                continue
            answers = [
                {"role": "tool", "tool_call_id": call["id"], "content": "b"}
                for call in message["tool_calls"]
            ]
            history = [user("ab" * (number % 7 + 1)), message, *answers]
            _, second, after = ask(client, history, tools=TOOLS)
        (sequence,) = server.close_recording(name)
        assert after[: len(prompt) + len(choice.token_ids)] == [*prompt, *choice.token_ids]
        assert sequence.tokens == [*after, *second.token_ids]
        assert server.model.tokenizer.convert_tokens_to_ids(CALL) in choice.token_ids
        return
    pytest.fail("no call was sampled")


def test_parallel_calls_and_choices_give_the_same_sequences_in_any_order(server):
    texts = ["a", "b", "c", "ab", "a"]

    async def together(name, order):
        url = f"{server.url}/rollouts/{name}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            calls = []
            for text in order:
                create = client.chat.completions.create
                calls.append(asyncio.create_task(create(model="m", messages=[user(text)])))
                await asyncio.sleep(0.002)
            await asyncio.gather(*calls)
            await client.chat.completions.create(model="m", messages=[user("bc")], n=3)

    found = []
    for number, order in enumerate((texts, texts[::-1])):
        asyncio.run(together(f"5 order {number}", order))
        sequences = server.close_recording(f"5 order {number}")
        found.append(sorted(sequence.tokens for sequence in sequences))
    assert found[0] == found[1] and len(found[0]) == 8
    assert len({str(tokens) for tokens in found[0]}) > 6


def test_a_stream_is_recorded_and_a_completions_prompt_goes_on_where_it_ended(server, tokenizer):
    with server.client("6 stream") as client:
        chunks = client.chat.completions.create(model="m", messages=[user("c")], stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    (sequence,) = server.close_recording("6 stream")
    sampled = [t for t, own in zip(sequence.tokens, sequence.sampled, strict=True) if own]
    assert chat.decode(tokenizer, sampled, stop_tokens=(END,)) == text
    with server.client("6 plain") as client:
        body = {"return_token_ids": True}
        first = client.completions.create(model="m", prompt="abc", extra_body=body).choices[0]
        again = [*first.prompt_token_ids, *first.token_ids, *tokenizer.encode("ab")]
        client.completions.create(model="m", prompt=again)
        client.completions.create(model="m", prompt=f"abc{first.text}b")
        client.completions.create(model="m", prompt="no such start"[:0] + "ca")
    one, *others = server.close_recording("6 plain")
    assert one.tokens[: len(again)] == again and sum(one.sampled) > len(first.token_ids)
    assert len(others) == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": 0.2}, "sampler.temperature=1.8"),
        ({"top_p": 0.5}, "sampler.top_p=1.0"),
        ({"extra_body": {"top_k": 5}}, "sampler.top_k=0"),
        ({"seed": 1}, "the run draws the noise"),
        ({"n": 9}, "rollout.max_turns=8"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
    ],
)
def test_another_distribution_than_the_specs_is_refused(server, settings, told):
    with server.client("7 refused") as client:
        with pytest.raises(openai.BadRequestError, match=told):
            client.chat.completions.create(model="m", messages=[user("a")], **settings)
        same = {"temperature": 1.8, "top_p": 1.0, "extra_body": {"top_k": -1}}
        client.chat.completions.create(model="m", messages=[user("a")], max_tokens=3, **same)
    (sequence,) = server.close_recording("7 refused")
    assert sum(sequence.sampled) <= 3


def test_a_request_that_was_given_up_leaves_nothing_and_is_answered_as_it_would_have_been(
    server, weights, tokenizer
):
    messages = [user("ab")]
    with server.client("8 calm") as client:
        first = ask(client, messages)
        calm = ask(client, [*messages, first[0], user("c")])
    with server.client("8 hasty") as client:
        assert ask(client, messages)[1].token_ids == first[1].token_ids
        body = {"model": "m", "messages": [*messages, first[0], user("c")]}
        leave(server, "8%20hasty", body)
        again = ask(client, body["messages"])
    assert again[1].token_ids == calm[1].token_ids and again[2] == calm[2]
    calm_one, hasty_one = server.close_recording("8 calm"), server.close_recording("8 hasty")
    assert [one.tokens for one in calm_one] == [one.tokens for one in hasty_one]
    assert [one.sampled for one in calm_one] == [one.sampled for one in hasty_one]


def leave(server, name, body):
    """Sends a request and goes away at once."""
    data = json.dumps(body).encode()
    head = (
        f"POST /rollouts/{name}/v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + data)
    time.sleep(0.3)


def test_a_template_that_rewrites_history_goes_on_in_a_further_sequence(weights, tmp_path):
    server = Recorded(weights, served.make_tokenizer(tmp_path / "forgetful", FORGETFUL))
    try:
        with server.client("9 forgetful") as client:
            _, asked = talk(client, ["abc", "ab", "c"])
        sequences = server.close_recording("9 forgetful")
        assert [one.tokens for one in sequences] == [[*p, *t] for p, t in asked]
    finally:
        server.close()


def test_answers_whose_thinking_the_prompt_began_are_marked_and_still_one_sequence(
    weights, tmp_path
):
    thinking = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think>{% endif %}"
        "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    server = Recorded(weights, served.make_tokenizer(tmp_path / "thinking", thinking))
    try:
        with server.client("9 thinking") as client:
            talk(client, ["abc", "ab"])
        (thread,) = server.recordings["9 thinking"].threads
        said = [one for one in thread.messages if one["role"] == "assistant"]
        assert [one.get("begins_thinking") for one in said] == [True, True]
    finally:
        server.close()


def test_a_rollout_that_is_over_or_that_there_is_none_of_is_told_so(server):
    with server.client("none of mine") as client, pytest.raises(openai.APIStatusError) as caught:
        ask(client, [user("a")])
    assert caught.value.status_code == 410 and "there is none, or it is over" in str(caught.value)
    url = f"{server.url}/v1"
    with (
        openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client,
        pytest.raises(openai.PermissionDeniedError, match="base_url that the agent got"),
    ):
        client.chat.completions.create(model=NAME, messages=[user("a")])


def test_what_leaves_no_room_is_refused_and_remembered(server):
    with (
        server.client("9 full") as client,
        pytest.raises(openai.BadRequestError, match="leaves no room") as caught,
    ):
        ask(client, [user("c" * 118)])
    assert caught.value.code == "context_length_exceeded"
    assert server.recordings["9 full"].refused == "length"
    assert server.close_recording("9 full") == []
