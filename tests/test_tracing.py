"""The gateway of the managed service's protocol, asked as Eval Protocol's adapter asks it."""

import json
import urllib.error
import urllib.parse
import urllib.request

import openai
import pytest
import served
from served import KEY

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
PATH = "rollout_id/happy-1/invocation_id/i/experiment_id/e/run_id/r/row_id/7"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    tokenizer = served.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    found = served.Served(served.make_engine(served.make_weights()), tokenizer)
    yield found
    found.close()


def call(server, path, body=None, key=KEY, **query):
    url = f"{server.url}{path}?{urllib.parse.urlencode(query, doseq=True)}"
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
        return json.load(answer)


def entry(code, message, rollout="happy-1"):
    status = None if code is None else {"code": code, "message": message, "details": []}
    tags = [f"rollout_id:{rollout}", "run_id:r"]
    extras = {"logger_name": "agent", "level": "INFO", "cost": 3}
    return {
        "program": "eval_protocol",
        "status": status,
        "message": message,
        "tags": tags,
        "extras": extras,
    }


@pytest.mark.parametrize("version", ["", "/v1"])
def test_calls_under_an_address_become_traces_and_logs_a_status(server, version):
    rollout = f"happy-1{version.replace('/', '-')}"
    path = PATH.replace("happy-1", rollout)
    tag = f"rollout_id:{rollout}"
    assert call(server, f"{version}/status", rollout_id=rollout)["status"] is None
    assert call(server, f"{version}/traces/pointwise", tags=[tag])["traces"] == []
    base = f"{server.url}{version}/{path}"
    with openai.OpenAI(base_url=base, api_key=KEY, max_retries=0) as client:
        messages = [{"role": "user", "content": "ab"}]
        kinds = {"model": "fireworks_ai/any", "temperature": 0.5, "max_tokens": 8, "top_p": None}
        for stream in (False, True):
            answer = client.chat.completions.create(
                messages=messages, tools=TOOLS, stream=stream, **kinds
            )
            if stream:
                text = "".join(part.choices[0].delta.content or "" for part in answer)
            else:
                messages += [
                    answer.choices[0].message.to_dict(),
                    {"role": "user", "content": "c"},
                ]
    first, second = call(
        server, f"{version}/traces/pointwise", tags=[tag], limit=100, max_retries=5
    )["traces"]
    assert first["input"] == {"messages": messages[:1], "tools": TOOLS}
    said = {**messages[1]}
    said.pop("refusal", None)
    assert first["output"] == said
    assert second["input"]["messages"][0] == messages[0] and len(second["input"]["messages"]) == 3
    assert (second["output"]["content"] or "") == text and second["output"]["role"] == "assistant"
    ids = {"invocation_id:i", "experiment_id:e", "run_id:r", "row_id:7", tag}
    assert set(first["tags"]) == ids
    for code, message in ((None, "at work"), (101, "running"), (100, "done"), (None, "later")):
        call(server, f"{version}/logs", entry(code, message, rollout))
    found = call(server, f"{version}/status", rollout_id=rollout)
    assert found["rollout_id"] == rollout and found["status"]["code"] == 100
    assert found["extras"]["cost"] == 3
    entries = call(server, f"{version}/logs", tags=[tag], program="eval_protocol")["entries"]
    assert {one["message"] for one in entries} == {"at work", "running", "done", "later"}
    done = next(one for one in entries if one["status"] and one["status"]["code"] == 100)
    assert done["tags"] == [tag, "run_id:r"] and done["severity"] == "INFO"


def test_the_gateway_asks_for_the_key_and_for_tags(server):
    for path, query in (
        ("/status", {"rollout_id": "x"}),
        ("/logs", {"tags": "rollout_id:x"}),
        ("/v1/traces/pointwise", {"tags": "rollout_id:x"}),
    ):
        with pytest.raises(urllib.error.HTTPError) as told:
            call(server, path, key="wrong", **query)
        assert told.value.code == 401
        told.value.close()
        with pytest.raises(urllib.error.HTTPError) as told:
            call(server, path)
        assert told.value.code == 400
        told.value.close()
    with pytest.raises(urllib.error.HTTPError) as told:
        call(server, "/logs", {"message": "of no rollout", "tags": []})
    assert told.value.code == 400
    told.value.close()
