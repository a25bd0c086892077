import json
import re
import textwrap

import jax
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from rftjax.environments import Environments
from rftjax.models import decoder
from rftjax.models.decoder import Config, Rope
from rftjax.rollout import Rollout
from rftjax.sampler import device
from rftjax.sampler.engine import Engine
from rftjax.text import chat, template
from rftjax.text import tokenizer as tokenizers_of_models
from rftjax.types import SamplingParams, Task

SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>"]
LETTERS = ["a", "b", "c", "ab", "bc", "abc"]
END = 1
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Only the last answer stays as it was.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and not loop.last %}c{% else %}{{ m.content }}{% endif %}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONFIG = Config(
    family="llama",
    vocab=len(SPECIAL) + len(LETTERS),
    width=16,
    layers=1,
    heads=2,
    kv_heads=1,
    channels=8,
    ffn=16,
    max_positions=256,
    norm_eps=1e-6,
    rope=Rope(),
    tied=True,
    init_std=0.2,
)


@pytest.fixture(scope="module")
def weights():
    params = decoder.init(CONFIG, jax.random.key(0))
    return device.sampler_params(CONFIG, params)


def ambiguous_tokenizer(directory, template=TEMPLATE):
    """A byte-pair tokenizer that writes "ab" as one token, while the model may sample "a" and "b"."""
    directory.mkdir(exist_ok=True)
    vocab = {token: index for index, token in enumerate([*SPECIAL, *LETTERS])}
    model = models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "c"), ("ab", "c")])
    built = Tokenizer(model)
    built.decoder = decoders.Fuse()
    built.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    built.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<end>", "pad_token": "<pad>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text("{}")
    return tokenizers_of_models.load(directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ambiguous_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Listener(Engine):
    """An engine that keeps the turns it gave out, and the order in which conversations get slots."""

    def _admit(self):
        before = set(self._in_slots.values())
        copies = super()._admit()
        admitted = [c.key for c in self._in_slots.values() if c not in before]
        self.admitted = getattr(self, "admitted", []) + admitted
        return copies

    def step(self):
        turns = super().step()
        self.heard = getattr(self, "heard", []) + turns
        return turns

    def turns_of(self, trajectory):
        return [t for t in self.heard if t.key == (trajectory.draw, trajectory.sample)]


@pytest.fixture
def rollout(tmp_path, weights, tokenizer):
    """Builds a rollout with the environment that the given source defines."""
    opened = []

    def build(source="", name="reply", *, tokenizer=tokenizer, slots=6, max_length=120):
        if source:
            (tmp_path / "environment.py").write_text(textwrap.dedent(source))
        environments = Environments(
            f"{tmp_path / 'environment.py'}:{name}" if source else "", workers=1, timeout_s=60.0
        )
        opened.append(environments)
        engine = Listener(
            CONFIG, slots=slots, parked=slots, max_length=max_length, stops=[END], prefill_chunk=16
        )
        engine.set_params(weights)
        return Rollout(engine, tokenizer, environments, seed=5)

    yield build
    for environments in opened:
        environments.close()


def tasks(count):
    return [
        (draw, Task(f"task {draw}", [{"role": "user", "content": "abc"[: 1 + draw % 3] * 3}]))
        for draw in range(count)
    ]


CHATTY = """
def reply(task, messages):
    answers = sum(message["role"] == "assistant" for message in messages)
    if answers == 3:
        return None
    return [{"role": "user", "content": "ab" * answers}]
"""
PARAMS = SamplingParams(max_new_tokens=24, max_turns=8)


def test_training_ids_are_prompt_sampled_and_environment_ids_token_for_token(rollout, tokenizer):
    run = rollout(CHATTY)
    run.policy_version = 7
    trajectories = run(tasks(3), 3, PARAMS)
    assert [(t.draw, t.sample) for t in trajectories] == [
        (d, s) for d in range(3) for s in range(3)
    ]
    drifted = finished = 0
    for trajectory in trajectories:
        prompt = trajectory.task.messages[0]["content"]
        tokens = tokenizer.encode(f"<user>{prompt}<end><assistant>", add_special_tokens=False)
        sampled, logprobs = [False] * len(tokens), [0.0] * len(tokens)
        turns = run.engine.turns_of(trajectory)
        for index, turn in enumerate(turns):
            tokens += turn.tokens
            sampled += [True] * len(turn.tokens)
            logprobs += turn.logprobs
            if index < len(turns) - 1:
                # A turn that was cut gets the end that it lacks.
                end = "" if turn.stopped else "<end>"
                answer = tokenizer.encode(
                    end + "<user>" + "ab" * (index + 1) + "<end><assistant>",
                    add_special_tokens=False,
                )
                tokens += answer
                sampled += [False] * len(answer)
                logprobs += [0.0] * len(answer)
        (sequence,) = trajectory.sequences
        assert sequence.tokens == tokens
        assert sequence.sampled == sampled
        assert sequence.logprobs == logprobs
        assert sequence.policy_version == [7 if flag else -1 for flag in sampled]
        assert trajectory.turns == len(turns) <= 3
        whole = turns[-1].stopped and len(turns) == 3
        assert trajectory.finish_reason == ("stop" if whole else "length")
        cut = [
            trajectory.messages[at].get("truncated", False) for at in range(1, 2 * len(turns), 2)
        ]
        assert cut == [not turn.stopped for turn in turns]
        finished += trajectory.finish_reason == "stop"
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        drifted += tokenizer.encode(text, add_special_tokens=False) != tokens
    assert drifted and finished  # the tokenizer is ambiguous, and some conversations had all turns


def test_each_given_token_is_computed_once_and_the_prompt_of_a_group_once_for_all(rollout):
    # A row for each conversation: with fewer, a prompt's rows may all be given away before its last sample starts.
    run = rollout(CHATTY, slots=9)
    trajectories = run(tasks(3), 3, PARAMS)
    given = sum(t.sequences[0].sampled.count(False) for t in trajectories)
    prompts = [t.sequences[0].sampled.index(True) for t in trajectories if t.sample == 0]
    # All but a prompt's last token is shared: that one is the first decode step's input.
    assert run.engine.counters.prefilled_tokens == given - 2 * sum(prompts) - len(prompts)


def test_messages_hold_the_text_without_the_stop_token(rollout):
    trajectories = rollout(CHATTY)(tasks(2), 3, PARAMS)
    for trajectory in trajectories:
        roles = [message["role"] for message in trajectory.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert not any("<end>" in message["content"] for message in trajectory.messages)


def test_without_an_environment_a_conversation_has_one_turn(rollout):
    trajectories = rollout()(tasks(2), 3, PARAMS)
    assert {t.turns for t in trajectories} == {1}
    assert {t.finish_reason for t in trajectories} <= {"stop", "length"}


def test_the_turn_limit_ends_a_conversation(rollout):
    trajectories = rollout(CHATTY)(tasks(3), 3, SamplingParams(24, max_turns=2))
    assert max(t.turns for t in trajectories) == 2
    for trajectory in trajectories:
        if trajectory.finish_reason == "turns":
            assert trajectory.turns == 2 and trajectory.messages[-1]["role"] == "user"
            assert trajectory.sequences[0].sampled[-1]
    assert any(t.finish_reason == "turns" for t in trajectories)


def test_every_turn_has_the_limit_of_a_turn(rollout):
    run = rollout(CHATTY)
    trajectories = run(tasks(3), 2, SamplingParams(3, max_turns=3))
    assert max(one.turns for one in trajectories) > 1
    turns = [turn for one in trajectories for turn in run.engine.turns_of(one)]
    assert max(len(turn.tokens) for turn in turns) == 3


def test_the_length_limit_ends_a_conversation(rollout):
    trajectories = rollout(CHATTY, max_length=20)(tasks(3), 3, PARAMS)
    assert all(len(t.sequences[0].tokens) <= 20 for t in trajectories)
    assert any(t.finish_reason == "length" for t in trajectories)


def test_a_prompt_without_room_ends_at_once(rollout):
    long = Task("long", [{"role": "user", "content": "c" * 40}])
    short = tasks(1)[0][1]
    trajectories = rollout(max_length=30)([(0, long), (1, short)], 2, PARAMS)
    assert [t.finish_reason for t in trajectories[:2]] == ["length", "length"]
    assert not any(any(t.sequences[0].sampled) for t in trajectories[:2])
    assert all(any(t.sequences[0].sampled) for t in trajectories[2:])


SLOW = """
import asyncio, os

async def reply(task, messages):
    if task.data.get("flag"):
        for _ in range(4000):
            if os.path.exists(task.data["flag"]):
                return None
            await asyncio.sleep(0.01)
        raise RuntimeError("the others never finished")
    return CHAT(task, messages)
""" + CHATTY.replace("def reply", "def CHAT")


@pytest.mark.parametrize("slots", [6, 1])
def test_a_slow_environment_does_not_hold_up_the_others(rollout, tmp_path, slots):
    run = rollout(SLOW, slots=slots)
    flag = tmp_path / "others are done"
    drawn = tasks(4)
    drawn[0][1].data["flag"] = str(flag)
    order = []

    def on_finish(trajectory):
        order.append(trajectory.draw)
        if len(order) == 3:
            flag.touch()

    # The slow one answers only once all the others have finished.
    trajectories = run(drawn, 1, SamplingParams(60, max_turns=8), on_finish=on_finish)
    assert order[-1] == 0
    assert trajectories[0].finish_reason == "stop", trajectories[0].error


def test_an_environments_fault_ends_its_own_conversation_only(rollout):
    run = rollout(
        """
        def reply(task, messages):
            if task.id == "task 1":
                raise KeyError("lost")
            return None
        """
    )
    trajectories = run(tasks(3), 2, SamplingParams(60))
    failed = [t for t in trajectories if t.finish_reason == "error"]
    assert failed and {t.draw for t in failed} == {1}
    assert all("KeyError" in t.error and "lost" in t.error for t in failed)
    assert {t.draw for t in trajectories if t.finish_reason == "stop"} == {0, 2}
    again = run(tasks(3), 2, SamplingParams(60))  # no failed episode is left open
    assert [t.finish_reason for t in again] == [t.finish_reason for t in trajectories]


EPISODES = """
from rftjax.types import Turn

class Environment:
    def __init__(self, task, seed):
        self.seed, self.turns = seed, 0

    def reset(self):
        return [{"role": "user", "content": "bc"}]

    def step(self, message):
        self.turns += 1
        answer = [{"role": "user", "content": "c"}]
        return Turn(answer, done=self.turns == 2, reward=0.5 * self.turns, info={"seed": self.seed})

    def state(self):
        return {"turns": self.turns}
"""


def test_a_stateful_environment_opens_answers_and_rewards(rollout, tokenizer):
    run = rollout(EPISODES, "Environment")
    trajectories = run(tasks(3), 2, PARAMS)
    assert any(t.finish_reason == "stop" for t in trajectories)
    for trajectory in trajectories:
        assert trajectory.messages[1] == {"role": "user", "content": "bc"}
        prompt = trajectory.task.messages[0]["content"]
        start = tokenizer.encode(f"<user>{prompt}<end><user>bc<end><assistant>")
        assert trajectory.sequences[0].tokens[: len(start)] == start
        if trajectory.finish_reason == "stop":
            assert trajectory.turn_rewards == [0.5, 1.0]
            assert len(trajectory.infos) == 2 and trajectory.infos[0].keys() == {"seed"}
            assert trajectory.state == {"turns": 2}
            assert trajectory.messages[-1]["role"] == "user"  # the last answer is kept


def test_an_environments_seed_is_its_groups_and_no_other_draws_streams_or_runs(rollout):
    run, seeds = rollout(EPISODES, "Environment"), {}
    for seed, stream in ((5, 0), (5, 1), (6, 0)):
        run.seed = seed
        for one in run(tasks(2), 2, SamplingParams(2), stream=stream):
            seeds.setdefault((seed, stream, one.draw), set()).add(one.infos[0]["seed"])
    assert all(len(found) == 1 for found in seeds.values())
    assert len(set().union(*seeds.values())) == len(seeds) == 6


def test_each_sample_sees_its_own_opening_where_a_groups_openings_differ(
    rollout, tokenizer, tmp_path
):
    run = rollout(
        """
        class Environment:
            def __init__(self, task, seed):
                self.log = task.data["log"]
            def reset(self):
                with open(self.log, "a+") as file:
                    file.write("c")
                    file.seek(0)
                    return [{"role": "user", "content": file.read()}]
            def step(self, message):
                return None
        """,
        "Environment",
    )
    task = Task("counted", [{"role": "user", "content": "a"}], {"log": str(tmp_path / "log")})
    trajectories = run([(0, task)], 3, SamplingParams(4))
    assert sorted(one.messages[1]["content"] for one in trajectories) == ["c", "cc", "ccc"]
    for one in trajectories:
        start = tokenizer.encode(f"<user>a<end><user>{one.messages[1]['content']}<end><assistant>")
        assert one.sequences[0].tokens[: len(start)] == start
        assert one.sequences[0].sampled.index(True) == len(start)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_every_setting_of_sampling_reaches_the_turns(rollout, settings):
    found = rollout()(tasks(2), 4, SamplingParams(8, **settings))
    assert [len({one.completion for one in found if one.draw == d}) for d in (0, 1)] == [1, 1]


def test_a_template_that_rewrites_history_gives_a_sequence_a_turn(rollout, tmp_path):
    forgetful = ambiguous_tokenizer(tmp_path / "forgetful", FORGETFUL)
    run = rollout(CHATTY, tokenizer=forgetful)
    trajectories = run(tasks(3), 3, PARAMS)
    assert max(t.turns for t in trajectories) > 1
    for trajectory in trajectories:
        turns = run.engine.turns_of(trajectory)
        assert len(trajectory.sequences) == len(turns)
        for index, (sequence, turn) in enumerate(zip(trajectory.sequences, turns, strict=True)):
            count = len(turn.tokens)
            history = trajectory.messages[: 2 * index + 1]
            text = forgetful.apply_chat_template(
                history, tokenize=False, add_generation_prompt=True
            )
            assert sequence.tokens == forgetful.encode(text, add_special_tokens=False) + turn.tokens
            assert sequence.sampled == [False] * (len(sequence.tokens) - count) + [True] * count


def test_a_history_that_is_kept_gives_one_sequence_of_what_was_sampled(rollout, tmp_path):
    text = FORGETFUL.replace("%}c{%", "%}{{ m.content | replace('b', '') }}{%")
    forgetful = ambiguous_tokenizer(tmp_path / "forgetful", text)
    run = rollout(CHATTY, tokenizer=template.settle(forgetful, history="kept"))
    trajectories = run(tasks(3), 3, PARAMS)
    assert max(t.turns for t in trajectories) > 1
    for trajectory in trajectories:
        (sequence,) = trajectory.sequences
        sampled = [id for turn in run.engine.turns_of(trajectory) for id in turn.tokens]
        kept = zip(sequence.tokens, sequence.sampled, strict=True)
        assert [token for token, own in kept if own] == sampled


def test_plain_prompts_go_on_as_plain_text(rollout, tokenizer):
    run = rollout(CHATTY.replace('"ab" * answers', '"c"'))
    task = Task("plain", [{"role": "user", "content": "abc"}], prompt="abc")
    trajectories = run([(0, task)], 4, PARAMS)
    for trajectory in trajectories:
        assert trajectory.sequences[0].tokens[0] == tokenizer.encode("abc")[0]
    assert max(t.turns for t in trajectories) > 1


@pytest.mark.parametrize("plain", [False, True])
def test_a_turn_whose_thinking_the_prompt_began_is_no_answer_before_it_ends(
    rollout, tmp_path, plain
):
    template = TEMPLATE.replace("<assistant>", "<assistant><think>\n")
    tokenizer = ambiguous_tokenizer(tmp_path / "thinking", template)
    messages = [{"role": "user", "content": "abc"}]
    task = Task("t", messages, prompt="abc <think>\n" if plain else None)
    run = rollout(CHATTY, tokenizer=tokenizer)
    for one in run([(0, task)], 2, PARAMS):
        said = [message for message in one.messages if message["role"] == "assistant"]
        began = [message.get("begins_thinking", False) for message in said]
        assert began == [index == 0 or not plain for index in range(len(said))]
        assert one.completion and one.answer == ("" if began[-1] else one.completion)
        said[-1]["content"] += "</think> 4"
        assert one.answer == " 4"


def test_samples_depend_on_the_draw_and_not_on_the_order(rollout):
    def ids(trajectories):
        return {(t.draw, t.sample): t.sequences[0].tokens for t in trajectories}

    run = rollout(CHATTY, slots=3)
    drawn = tasks(5)
    wanted = ids(run(drawn, 2, PARAMS))
    assert ids(run(list(reversed(drawn)), 2, PARAMS)) == wanted
    assert ids(run([drawn[3]], 2, PARAMS)).items() <= wanted.items()
    again = [(draw + 5, task) for draw, task in drawn]
    assert not {map(tuple, ids(run(again, 2, PARAMS)).values())} & {map(tuple, wanted.values())}
    assert ids(run(drawn, 2, PARAMS, stream=1)) != wanted


def test_every_trajectory_is_handed_over_as_it_finishes(rollout):
    handed = []
    trajectories = rollout(CHATTY)(tasks(4), 2, PARAMS, on_finish=handed.append)
    assert sorted(map(id, handed)) == sorted(map(id, trajectories))
    assert all(t.finish_reason for t in handed)


def test_a_task_s_own_temperature_is_that_of_its_training_samples(rollout):
    cold = Task("cold", [{"role": "user", "content": "abc"}], temperature=1e-4)
    warm = Task("warm", cold.messages)
    run = rollout()

    def texts(stream):
        found = run([(0, cold), (1, warm)], 4, SamplingParams(8), stream=stream)
        return [{t.completion for t in found if t.draw == draw} for draw in (0, 1)]

    (cold_texts, warm_texts), (heldout_texts, _) = texts(0), texts(1)
    assert len(cold_texts) == 1 and len(warm_texts) > 1
    assert len(heldout_texts) > 1  # a held-out set has the settings of section eval


def test_environments_open_as_rows_become_free(rollout, tmp_path):
    run = rollout(
        """
        import os
        class Environment:
            def __init__(self, task, seed):
                self.task = task
                self.note("+1")
            def note(self, text):
                with open(self.task.data["log"], "a") as file:
                    file.write(text + "\\n")
            def step(self, message):
                return None
            def close(self):
                self.note("-1")
        """,
        "Environment",
        slots=2,
    )
    log = tmp_path / "log"
    drawn = tasks(9)
    for _, task in drawn:
        task.data["log"] = str(log)
    trajectories = run(drawn, 2, SamplingParams(4))
    assert len(trajectories) == 18
    most = opened = 0
    for line in log.read_text().split():
        opened += int(line)
        most = max(most, opened)
    assert 0 < most <= run.engine.rows == 4


ODD = """
from rftjax.types import Turn
class Environment:
    def __init__(self, task, seed):
        self.odd = task.id == "task 1"
    def reset(self):
        return RESET if self.odd else None
    def step(self, message):
        return STEP if self.odd else None
"""
ENDS = SamplingParams(60, max_turns=3)


def test_an_opening_or_answer_that_does_not_fit_ends_its_sample_with_length(rollout):
    for said in (
        "STEP = 'c' * 119",
        "STEP = 'c' * 20_000",
        "RESET = 'c' * 200",
        "RESET = 'c' * 20_000",
    ):
        run = rollout(ODD + "RESET = 'c'\nSTEP = 'c'\n" + said, "Environment")
        trajectories = run(tasks(3), 2, ENDS)
        assert {t.finish_reason for t in trajectories if t.draw == 1} == {"length"}, said
        assert all(len(s.tokens) <= 120 for t in trajectories for s in t.sequences)
        assert all(t.unanswered == ("RESET" in said and t.draw == 1) for t in trajectories)
        assert all(len(m["content"]) < 64 * 120 + 40 for t in trajectories for m in t.messages)


def test_a_history_that_outgrows_the_room_once_rewritten_keeps_what_was_sampled(rollout, tmp_path):
    forgetful = ambiguous_tokenizer(tmp_path / "forgetful", FORGETFUL)
    run = rollout("def reply(task, messages):\n    return 'c' * 40", tokenizer=forgetful)
    trajectories = run(tasks(3), 2, SamplingParams(8, max_turns=9))
    assert {t.finish_reason for t in trajectories} == {"length"}
    for trajectory in trajectories:
        assert len(trajectory.sequences) == trajectory.turns > 1
        assert all(any(s.sampled) and len(s.tokens) <= 120 for s in trajectory.sequences)


STRICT = TEMPLATE.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}",
)


@pytest.mark.parametrize(
    "said",
    [
        "STEP = 'a \\ud83d b'",
        "RESET = 'a \\ud83d b'",
        "STEP = [{'role': 'tool', 'content': '7'}]",
        "RESET = [{'role': 'tool', 'content': '7'}]",
    ],
)
def test_what_the_model_cannot_be_shown_is_an_error_of_its_sample(rollout, tmp_path, said):
    strict = ambiguous_tokenizer(tmp_path / "strict", STRICT)
    run = rollout(ODD + "RESET = 'c'\nSTEP = 'c'\n" + said, "Environment", tokenizer=strict)
    trajectories = run(tasks(3), 2, ENDS)
    for trajectory in trajectories:
        assert (trajectory.finish_reason == "error") == (trajectory.draw == 1)
        if trajectory.draw == 1:
            wanted = "half of a character" if "ud83d" in said else "cannot be shown.*no tools"
            assert re.search(wanted, trajectory.error)


def test_a_completion_is_sampled_and_never_an_assistants_message_of_the_row(rollout):
    shot = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    long = [*shot[:2], {"role": "user", "content": "c" * 200}]
    drawn = [(0, Task("short", shot)), (1, Task("long", long))]
    answered, unanswered = rollout()(drawn, 1, SamplingParams(4))
    assert answered.messages[:3] == shot and not answered.unanswered
    assert answered.completion == answered.messages[3]["content"] != "b"
    assert unanswered.unanswered and unanswered.completion == ""


CUTS = """
from rftjax.types import Turn
class Environment:
    def __init__(self, task, seed):
        pass
    def step(self, message):
        cut = message.get("truncated", False)
        return Turn([{"role": "user", "content": "c"}], done=False, reward=-1.0 if cut else 1.0)
"""


def test_a_cut_turn_goes_to_the_environment_unless_a_field_ends_it(rollout):
    run = rollout(CUTS, "Environment")
    trajectories = run(tasks(3), 3, SamplingParams(3, max_turns=3))
    rewards = [reward for t in trajectories for reward in t.turn_rewards]
    assert -1.0 in rewards
    for trajectory in trajectories:
        assert trajectory.turns == 3
        cut = trajectory.turn_rewards[-1] < 0
        assert trajectory.finish_reason == ("length" if cut else "turns")
        assert trajectory.truncated == (-1.0 in trajectory.turn_rewards)
        (sequence,) = trajectory.sequences
        text = run.tokenizer.decode(sequence.tokens[: sequence.sampled.index(True)])
        assert run.tokenizer.decode(sequence.tokens).startswith(text)
    for choice in ("end", "mask"):
        ended = run(tasks(3), 3, SamplingParams(3, max_turns=3, truncated_turns=choice))
        assert any(t.finish_reason == "length" and t.turns == 1 for t in ended)
        assert all(reward >= 0 for t in ended for reward in t.turn_rewards)


def test_a_message_longer_than_its_limit_is_cut_and_the_model_is_told(rollout):
    run = rollout(CHATTY)
    run.environments.max_message_tokens = 1
    trajectories = run(tasks(2), 1, PARAMS)
    said = [m["content"] for t in trajectories for m in t.messages[1:] if m["role"] == "user"]
    assert "ab" in said and "ab... [cut: 2 more characters]" in said
    assert all(text.startswith("ab") and "abab" not in text for text in said)


def test_a_conversation_that_starts_over_draws_fresh_noise(rollout, tmp_path):
    # Every turn is sampled from the same prompt: the template shows nothing but the first message.
    blind = "<{{ messages[0].role }}>{{ messages[0].content }}<end>{% if add_generation_prompt %}<assistant>{% endif %}"
    run = rollout(CUTS, "Environment", tokenizer=ambiguous_tokenizer(tmp_path / "blind", blind))
    trajectories = run(tasks(2), 2, SamplingParams(20, max_turns=4))
    for trajectory in trajectories:
        sampled = [tuple(turn.tokens) for turn in run.engine.turns_of(trajectory)]
        assert len(trajectory.sequences) == len(sampled) == 4
        assert len(set(sampled)) > 1


def test_a_groups_prompt_is_rendered_and_encoded_once(rollout, tmp_path):
    counting = ambiguous_tokenizer(tmp_path / "counting")
    calls = []
    encode = counting.encode
    counting.encode = lambda *args, **kwargs: calls.append(args) or encode(*args, **kwargs)
    rollout(tokenizer=counting)(tasks(3), 6, SamplingParams(4))
    assert len(calls) == 3


def test_plain_prompts_show_what_the_environment_opens_with(rollout, tokenizer):
    run = rollout(EPISODES, "Environment")
    task = Task("plain", [{"role": "user", "content": "abc"}], prompt="abc")
    (trajectory,) = run([(0, task)], 1, PARAMS)
    (sequence,) = trajectory.sequences
    given = sequence.tokens[: sequence.sampled.index(True)]
    assert given == tokenizer.encode("abc\nbc\n")


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_stop_strings_end_turns_whatever_a_dispatch_takes(weights, tokenizer, steps):
    found = chat.StopStrings(tokenizer, ("ca", "bb"))
    engine = Listener(
        CONFIG,
        slots=3,
        parked=3,
        max_length=120,
        stops=[END],
        find_stop=found,
        dispatch_steps=steps,
        prefill_chunk=16,
    )
    engine.set_params(weights)
    run = Rollout(engine, tokenizer, Environments(""), seed=5, stop_strings=found.texts)
    stopped = run(tasks(4), 3, SamplingParams(30))
    engine.find_stop = None
    run.stop_strings = ()
    whole = run(tasks(4), 3, SamplingParams(30))
    ended = 0
    for one, full in zip(stopped, whole, strict=True):
        text = full.completion
        at = min([i for stop in found.texts if (i := text.find(stop)) >= 0], default=-1)
        sequence, longer = one.sequences[0], full.sequences[0]
        count = len(sequence.tokens)
        assert sequence.tokens == longer.tokens[:count]
        assert sequence.logprobs == longer.logprobs[:count]
        if at < 0:
            assert one.completion == text and count == len(longer.tokens)
            continue
        ended += 1
        assert one.completion == text[:at] and one.finish_reason == "stop"
        first = sequence.sampled.index(True)
        said = tokenizer.decode(sequence.tokens[first:], skip_special_tokens=False)
        before = tokenizer.decode(sequence.tokens[first:-1], skip_special_tokens=False)
        assert any(stop in said for stop in found.texts)
        assert not any(stop in before for stop in found.texts)
    assert ended > 2


def test_a_turn_that_a_stop_string_ended_gets_the_end_that_it_lacks(rollout, tokenizer):
    run = rollout(CHATTY, slots=2)
    run.engine.find_stop = chat.StopStrings(tokenizer, ("c",))
    run.stop_strings = ("c",)
    trajectories = run(tasks(3), 2, PARAMS)
    assert max(t.turns for t in trajectories) == 3
    for trajectory in trajectories:
        turns = run.engine.turns_of(trajectory)
        wanted = chat.prompt(tokenizer, trajectory.task) + turns[0].tokens
        for index in range(1, len(turns)):
            end = "" if turns[index - 1].stop_token == END else "<end>"
            answer = f"{end}<user>{'ab' * index}<end><assistant>"
            wanted += tokenizer.encode(answer, add_special_tokens=False) + turns[index].tokens
        assert trajectory.sequences[0].tokens == wanted


def test_tasks_whose_answers_were_long_start_first_and_change_no_token(rollout):
    run, params = rollout(slots=2), SamplingParams(40)
    first = run(tasks(8), 2, params)
    means = {
        draw: sum(sum(one.sequences[0].sampled) for one in first if one.draw == draw) / 2
        for draw in range(8)
    }
    assert run.engine.admitted == [(draw, sample) for draw in range(8) for sample in range(2)]
    run.engine.admitted = []
    assert run(tasks(8), 2, params) == first
    lengths = [round(means[draw]) for draw, _ in run.engine.admitted]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2
    run.engine.admitted = []
    run(tasks(8), 2, params, stream=1)  # answers of another stream say nothing
    assert run.engine.admitted == [(draw, sample) for draw in range(8) for sample in range(2)]
