"""Agents that call the model themselves, in worker processes and behind the managed service's protocol."""

import http.server
import json
import re
import threading
import urllib.request
from pathlib import Path

import jax
import numpy as np
import openai
import pytest
import served
from snippets import blocks

from rftjax import config as configs
from rftjax import modes
from rftjax.errors import NotFinite, UserError
from rftjax.run import checks
from rftjax.serving import agents as agents_module
from rftjax.serving.agent_rollout import AgentRollout
from rftjax.serving.agents import LocalAgents, RemoteAgents
from rftjax.types import SamplingParams, Task

PAGE = Path(__file__).parents[1] / "docs" / "agents.md"
PARAMS = SamplingParams(max_new_tokens=10, max_turns=6, temperature=1.8)
AGENT = """
import asyncio, os, time
import openai


async def ask(client, model, messages, **settings):
    answer = await client.chat.completions.create(model=model, messages=messages, **settings)
    return answer.choices[0].message.to_dict()


async def run(task, base_url, api_key, model):
    '''Two turns, and a sub-agent's in between; fails in the way that the task asks for.'''
    kind = task.data.get("kind", "")
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        messages = list(task.messages)
        if kind == "silent":
            return None
        if kind == "crowd":
            await ask(client, model, messages, n=7)
        if kind == "mute":
            try:
                await ask(client, model, messages, temperature=0.1)
            except openai.APIError:
                return None
        messages.append(await ask(client, model, messages))
        sub = await ask(client, model, [{"role": "user", "content": "bc"}])
        if kind == "raises":
            raise RuntimeError("the tool is gone")
        if kind == "dies":
            os._exit(3)
        if kind == "hangs":
            await asyncio.sleep(60)
        if kind == "nan":
            return float("nan")
        if kind == "hot":
            await ask(client, model, messages, temperature=0.1)
        if kind == "endless":
            while True:
                messages.append({"role": "user", "content": "a"})
                messages.append(await ask(client, model, messages))
        messages.append({"role": "user", "content": "c"})
        messages.append(await ask(client, model, messages))
        if kind == "says":
            return {"answer": messages[-1]["content"], "sub": sub["content"]}
        return len(messages[-1]["content"]) / 10


def plain(task, base_url, api_key, model, seed):
    with openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        client.chat.completions.create(model=model, messages=task.messages)
    return float(seed % 1000)


def wrong(task):
    return 0.0


async def completes(task, base_url, api_key, model):
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        answer = await client.completions.create(model=model, prompt=task.prompt)
        again = task.prompt + answer.choices[0].text + " w3"
        answer = await client.completions.create(model=model, prompt=again)
    return len(set(answer.choices[0].text.split())) / 8
"""


@pytest.fixture(scope="module")
def weights():
    return served.make_weights()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return served.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def agent_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("agent") / "the_agent.py"
    path.write_text(AGENT)
    return path


@pytest.fixture(scope="module")
def local(agent_file):
    found = LocalAgents(f"{agent_file}:run", workers=2, timeout_s=120.0, env=())
    yield found
    found.close()


@pytest.fixture
def led(weights, tokenizer):
    """Builds rollouts by the given agents."""
    opened = []

    def build(agents, **settings):
        engine = served.make_engine(weights)
        found = AgentRollout(engine, tokenizer, agents, seed=5, **settings)
        opened.append(found)
        found.policy_version = 7
        return found

    yield build
    for found in opened:
        found.close()


def draws(*kinds):
    return [
        (
            draw,
            Task(f"task {draw}", [{"role": "user", "content": "abc"[: 1 + draw % 3]}], {"kind": k}),
        )
        for draw, k in enumerate(kinds)
    ]


def test_an_agents_calls_are_its_trajectory_and_the_same_in_every_run(led, local):
    found = [led(local, rewarded=True)(draws("", "", ""), 2, PARAMS) for _ in range(2)]
    first, second = found
    assert [(one.draw, one.sample) for one in first] == [(d, s) for d in range(3) for s in range(2)]
    for one, again in zip(first, second, strict=True):
        assert one.sequences == again.sequences and one.messages == again.messages
        assert one.finish_reason in ("stop", "length") and one.turns == 3
        assert len(one.sequences) == 2  # the agent's and its sub-agent's
        last = one.messages[one.sampled_messages[-1]]
        assert one.sampled_messages == [1, 3] and one.completion == last["content"]
        assert one.turn_rewards == [0.0, 0.0, len(last["content"]) / 10]
        assert sum(map(sum, (sequence.sampled for sequence in one.sequences))) > 3
    assert first[0].sequences != first[1].sequences


def test_faults_of_an_agent_cost_its_own_sample_and_are_kept_as_data(led, local, agent_file):
    kinds = ["", "raises", "dies", "hangs", "nan", "hot", "silent", "endless", "", "says"]
    kinds += ["crowd", "mute"]
    led(local)(draws("endless"), 1, PARAMS)  # compiles outside the time limit
    hasty = LocalAgents(f"{agent_file}:run", workers=2, timeout_s=5.0, env=())
    run = led(hasty)
    try:
        found = dict(zip(kinds, run(draws(*kinds), 1, PARAMS), strict=True))
    finally:
        hasty.close()
    told = {
        "raises": "the tool is gone",
        "dies": "exit",
        "hangs": "agents.timeout_s",
        "nan": "must be finite, not nan",
        "hot": "sampler.temperature=1.8",
        "silent": "made no call",
        "crowd": "no call of the agent was answered: BadRequestError: Error code: 400 - rollout.max_turns=6: the"
        " rollout has 0 answers, those under way counted, and 7 more asked for",
        "mute": "no call of the agent was answered",
    }
    for kind, text in told.items():
        one = found[kind]
        assert one.finish_reason == "error" and text in one.error, (kind, one.error)
        if kind not in ("silent", "crowd", "mute"):
            assert len(one.sequences) == 2 and one.turns == 2, kind
    assert found["endless"].finish_reason == "turns" and found["endless"].turns == 6
    assert found[""].error == "" and found["says"].state.keys() == {"answer", "sub"}
    assert run.service.conversations == 0


def test_a_fault_of_the_model_ends_the_round_by_its_own_name(led, local, weights):
    run = led(local)
    run.engine.set_params(jax.tree.map(lambda leaf: leaf * np.nan, weights))
    with pytest.raises(NotFinite, match="not finite"):
        run(draws("", ""), 2, PARAMS)
    run.engine.set_params(weights)
    assert [one.error for one in run(draws(""), 1, PARAMS)] == [""]


def test_without_an_evaluator_the_agent_must_return_a_reward(led, local):
    rewarded, said = led(local, rewarded=True)(draws("", "says"), 1, PARAMS)
    assert rewarded.error == "" and rewarded.turn_rewards[-1] > 0
    assert said.finish_reason == "error" and "returned no reward" in said.error


def test_a_plain_function_gets_the_seed_of_its_group_and_a_wrong_one_is_refused(led, agent_file):
    agents = LocalAgents(f"{agent_file}:plain", workers=2, timeout_s=20.0, env=())
    try:
        trajectories = led(agents)(draws("", ""), 2, PARAMS)
    finally:
        agents.close()
    seeds = [one.turn_rewards[-1] for one in trajectories]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    with pytest.raises(UserError, match=r"run\(task, base_url, api_key, model\)"):
        LocalAgents(f"{agent_file}:wrong", workers=1, timeout_s=5.0, env=())


class Remote(http.server.ThreadingHTTPServer):
    """An agent's server: answers /init, asks the model twice in a thread and logs its status as the protocol says."""

    def __init__(self):
        self.initialised, self.threads = [], []
        super().__init__(("127.0.0.1", 0), RemoteHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()

    def stop(self):
        self.shutdown()
        self.thread.join()
        for thread in self.threads:
            thread.join()
        self.server_close()

    def work(self, asked):
        name = asked["metadata"]["rollout_id"]
        kind = asked["messages"][0]["content"]
        gateway = asked["model_base_url"].partition("/rollout_id/")[0]
        params = asked["completion_params"]

        def log(code, message=""):
            body = {
                "program": "eval_protocol",
                "status": {"code": code, "message": message, "details": []},
                "message": "a line",
                "tags": [f"rollout_id:{name}"],
                "extras": {"level": "INFO"},
            }
            data = json.dumps(body).encode()
            request = urllib.request.Request(
                f"{gateway}/logs", data, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request):
                pass

        log(101)
        if kind == "a":
            return  # never says that it has ended
        with openai.OpenAI(
            base_url=asked["model_base_url"], api_key=asked["api_key"], max_retries=0
        ) as client:
            messages = list(asked["messages"])
            for text in ("ab", ""):
                answer = client.chat.completions.create(messages=messages, **params)
                messages.append(answer.choices[0].message.to_dict())
                messages.append({"role": "user", "content": text})
        status = urllib.request.Request(
            f"{gateway}/v1/status?rollout_id={name}",
            headers={"Authorization": f"Bearer {asked['api_key']}"},
        )
        with urllib.request.urlopen(status) as answer:
            assert json.load(answer)["status"]["code"] == 101
        log(13 if kind == "b" else 100, "it broke" if kind == "b" else "")


class RemoteHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        refused = asked["messages"][0]["content"] == "c"
        self.send_response(400 if refused else 200)
        self.end_headers()
        self.wfile.write(b'{"error": "no such task"}' if refused else b'{"status": "accepted"}')
        if not refused:
            self.server.initialised.append(asked)
            thread = threading.Thread(target=self.server.work, args=(asked,))
            self.server.threads.append(thread)
            thread.start()

    def log_message(self, *_):
        pass


def test_a_server_that_speaks_the_managed_services_protocol_is_an_agent(led, monkeypatch):
    monkeypatch.setattr(agents_module, "INIT_WAIT_S", 0.01)
    remote = Remote()
    agents = RemoteAgents(remote.url, timeout_s=3.0)
    texts = ["abc", "a", "b", "c"]  # fine; never ends; says that it failed; refuses to begin
    try:
        tasks = [
            (draw, Task(f"task/{draw}", [{"role": "user", "content": text}], {"tools": TOOLS}))
            for draw, text in enumerate(texts)
        ]
        good, endless, failed, refused = led(agents)(tasks, 1, PARAMS)
    finally:
        remote.stop()
    (asked,) = [one for one in remote.initialised if one["messages"][0]["content"] == "abc"]
    assert asked["completion_params"] == {"model": "policy", "temperature": 1.8, "max_tokens": 10}
    assert asked["tools"] == TOOLS and asked["metadata"]["row_id"] == "task_0"
    assert set(asked["metadata"]) == {
        "invocation_id", "experiment_id", "rollout_id", "run_id", "row_id",
    }  # fmt: skip
    path = asked["model_base_url"].partition("://")[2].partition("/")[2]
    assert re.fullmatch(
        r"rollout_id/.+/invocation_id/.+/experiment_id/.+/run_id/.+/row_id/.+", path
    )
    assert good.finish_reason in ("stop", "length") and good.turns == 2
    assert len(good.sequences) == 1 and good.messages[2] == {"role": "user", "content": "ab"}
    assert "agents.timeout_s" in endless.error and endless.finish_reason == "error"
    assert "status 13: it broke" in failed.error and len(failed.sequences) == 1
    assert "status 400" in refused.error and "no such task" in refused.error
    lost = led(RemoteAgents(remote.url, timeout_s=3.0))(draws(""), 1, PARAMS)
    assert "cannot be asked" in lost[0].error


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def test_an_agent_trains_a_model(tiny_dir, agent_file, tmp_path):
    rows = [{"prompt": f"w{i} w{i + 7} w{i % 5}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configs.base_config()
    config.steps = 2
    config.model.path, config.tasks.train = str(tiny_dir), f"{tmp_path}/rows.jsonl"
    config.tasks.heldout_count = 2
    config.agent = f"{agent_file}:completes"
    config.agents.timeout_s = 60.0
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 2, 4, 128
    config.sampler.max_new_tokens, config.sampler.slots = 6, 8
    config.rollout.max_length, config.rollout.max_turns = 40, 2
    config.optim.lr, config.export = 1e-2, False
    workdir = tmp_path / "run"
    modes.run("train", config, {}, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["environment/error_share"] == line["evaluator/error_share"] == 0.0
        assert line["sampler/logprob_diff_max"] < 1e-4
        assert line["rollout/turns_mean"] == 2.0 and line["reward/std"] > 0
    assert any(line.get("eval/reward", -1) >= 0 for line in lines)
    kept = (workdir / "rollouts" / "step_000002.jsonl").read_text().splitlines()
    assert len(kept) == 8 and len(json.loads(kept[0])["sequences"]) == 1


def test_the_pages_agent_of_a_framework_calls_tools_in_one_sequence_a_run(led, tmp_path):
    pytest.importorskip("agents", reason="the extra `frameworks` is not installed")
    (source,) = [one for one in blocks(PAGE, "python") if "import Agent" in one]
    # The model of the tests knows one call by heart.
    known = source.replace("look_up(name: str)", "look(at: str)").replace("look_up", "look")
    (tmp_path / "of_page.py").write_text(known)
    framework = LocalAgents(f"{tmp_path}/of_page.py:run", workers=1, timeout_s=120.0, env=())
    try:
        found = led(framework)(draws("", "", "", ""), 6, PARAMS)
    finally:
        framework.close()
    assert [one.error for one in found if one.finish_reason == "error"] == []
    called = [one for one in found if any(m["role"] == "tool" for m in one.messages)]
    assert called and all(len(one.sequences) == 1 for one in found)
    for one in called:
        assert one.turns > 1 and "clerk, Kyiv" in [m["content"] for m in one.messages]


@pytest.mark.parametrize("turns, told", [(1, True), (2, False)])
def test_an_agent_that_gets_a_single_answer_is_warned_of(turns, told, caplog):
    config = configs.base_config()
    config.agent, config.rollout.max_turns = "the.agent:run", turns
    checks.check_agent(config)
    assert ("a second call of the agent is refused" in caplog.text) == told


def test_agents_and_environments_are_not_mixed_and_addresses_are_checked():
    config = configs.base_config()
    config.agent, config.environment = "the.agent:run", "an.environment:reply"
    config.agents.address = "nowhere"
    with pytest.raises(UserError) as told:
        configs.check(config)
    assert "takes the place of an environment" in str(told.value)
    assert "agents.address='nowhere'" in str(told.value)
    assert "evaluator=''" not in str(told.value)
    config.agent = "no colon"
    with pytest.raises(UserError, match="agent='no colon': must be 'module:name'"):
        configs.check(config)
