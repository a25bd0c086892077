import concurrent.futures
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rftjax
from rftjax.devices import sharding
from rftjax.errors import UserError
from rftjax.policy import Policy
from rftjax.weights import hf


@pytest.fixture(scope="module")
def model(tiny_dir):
    """The tiny model with louder weights, so that its distribution is far from uniform."""
    found = rftjax.load(str(tiny_dir))
    found.params["embed"]["embedding"] = found.params["embed"]["embedding"] * 5.0
    return found


@pytest.fixture(scope="module")
def weights_only(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_dir / name, folder / name)
    return folder


TOKENS = np.random.default_rng(0).integers(3, 64, (3, 10))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_logits_before_each_token(model, temperature):
    logits_BTV = model.logits(TOKENS)
    assert logits_BTV.shape == (3, 10, 64) and logits_BTV.dtype == jnp.float32
    wanted_BTV = jax.nn.log_softmax(logits_BTV / temperature, axis=-1)
    wanted_BT = np.take_along_axis(np.asarray(wanted_BTV)[:, :-1], TOKENS[:, 1:, None], axis=2)[
        ..., 0
    ]
    found_BT = np.asarray(model.logprobs(TOKENS, temperature=temperature))
    assert not found_BT[:, 0].any()
    np.testing.assert_allclose(found_BT[:, 1:], wanted_BT, atol=1e-5)


def test_a_lazy_model_reads_its_parameters_once_they_are_asked_for(tiny_dir, monkeypatch):
    read = []
    read_leaf = hf._read_leaf
    monkeypatch.setattr(hf, "_read_leaf", lambda *a: read.append(a[2].path) or read_leaf(*a))
    opened = rftjax.load(str(tiny_dir), mesh=sharding.make_mesh(fsdp=2, data=4), lazy=True)
    shapes = opened.abstract_params
    assert not read
    opened.read_ahead()
    params = opened.params
    assert len(read) == len(jax.tree.leaves(params)) and opened.params is params
    jax.tree.map(assert_described, shapes, params)
    one = rftjax.load(str(tiny_dir)).params
    jax.tree.map(np.testing.assert_array_equal, params, one)


def test_a_model_that_is_closed_gives_up_reading(tiny_dir, monkeypatch):
    read, reached, go_on = [], threading.Event(), threading.Event()

    def read_leaf(*arguments):
        reached.set()
        assert go_on.wait(60)
        read.append(arguments)
        return np.zeros(3)

    monkeypatch.setattr(hf, "_read_leaf", read_leaf)
    opened = rftjax.load(str(tiny_dir), lazy=True)
    opened.read_ahead()
    assert reached.wait(60)
    opened.close()
    go_on.set()
    with pytest.raises(concurrent.futures.CancelledError):
        jax.block_until_ready(opened.params)
    assert len(read) <= 2  # of eleven: the one under way and the one behind it


def assert_described(shape, leaf):
    assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
    assert shape.sharding == leaf.sharding


def test_one_token_alone_has_nothing_to_score(model):
    assert model.logprobs([[5]]).tolist() == [[0.0]]


def test_logits_do_not_depend_on_what_follows_or_on_companions(model):
    whole_BTV = model.logits(TOKENS)
    np.testing.assert_allclose(model.logits(TOKENS[:, :6]), whole_BTV[:, :6], atol=1e-5)
    np.testing.assert_allclose(model.logits(TOKENS[1:2]), whole_BTV[1:2], atol=1e-5)


def test_samples_carry_the_log_probabilities_of_the_policy(model):
    found = model.sample(
        TOKENS.tolist(), max_new_tokens=20, samples=2, temperature=0.7, stop=[1, 2]
    )
    assert [(one.draw, one.sample) for one in found] == [(i, j) for i in range(3) for j in range(2)]
    for one in found:
        (sequence,) = one.sequences
        assert sequence.tokens[:10] == TOKENS[one.draw].tolist()
        assert one.finish_reason == ("stop" if sequence.tokens[-1] in (1, 2) else "length")
        scored_BT = np.asarray(model.logprobs([sequence.tokens], temperature=0.7))
        gap_T = np.abs(scored_BT[0] - sequence.logprobs)[sequence.sampled]
        assert len(gap_T) == len(sequence.tokens) - 10
        assert gap_T.mean() < 1e-5 and gap_T.max() < 1e-4


def test_a_sample_depends_on_its_seed_and_place_only(model):
    def ids(**settings):
        found = model.sample(TOKENS.tolist(), max_new_tokens=8, stop=[], slots=4, **settings)
        return [one.sequences[0].tokens for one in found]

    assert ids(samples=2) == ids(samples=2)
    assert ids(samples=2)[::2] == ids()
    assert ids(seed=1) != ids()


def test_new_parameters_are_used_at_once(model):
    before = model.sample([[5, 6]], max_new_tokens=8, stop=[])[0].sequences[0].logprobs
    changed = jax.tree.map(lambda leaf: leaf * 1.1, model.params)
    after = Policy(model.path, model.config, changed, model.fields).sample(
        [[5, 6]], max_new_tokens=8, stop=[]
    )
    assert after[0].sequences[0].logprobs != before


def test_stops_are_ids_of_the_vocabulary_and_texts_that_the_tokenizer_can_write(model):
    assert model.stop_tokens() == (1,)
    assert model.stop_tokens(("w5", 9, 1, "w5 w6")) == (1, 8, 9)
    assert model.stop_strings(("w5", 9, "w5 w6")) == ("w5", "w5 w6")
    for wrong in (64, -1):
        with pytest.raises(ValueError, match="sampler.stop: .* none of the 64 tokens"):
            model.stop_tokens([wrong])
    for wrong in ("elephant", "w5 elephant"):
        with pytest.raises(ValueError, match="sampler.stop: the tokenizer does not know all of"):
            model.stop_strings([wrong])


def test_a_text_of_several_tokens_ends_a_turn(model):
    whole = model.sample([[5, 6]], max_new_tokens=12, samples=4, seed=3)
    words = whole[0].completion.split()
    stop = " ".join(words[2:4])
    ended = model.sample([[5, 6]], max_new_tokens=12, samples=4, seed=3, stop=stop)
    first = whole[0].sequences[0].tokens
    assert ended[0].completion.split() == words[:2] and ended[0].finish_reason == "stop"
    assert ended[0].sequences[0].tokens == first[: len(ended[0].sequences[0].tokens)]
    assert sum(ended[0].sequences[0].sampled) == 4


def test_a_text_a_conversation_and_ids_alone_are_prompts_too(model):
    limits = {"max_new_tokens": 4, "stop": []}
    ids = [4, 8, 63]
    (by_ids,) = model.sample([ids], **limits)
    for prompts in (ids, np.asarray(ids), [np.asarray(ids)], "w1 w5 w60", ["w1 w5 w60"]):
        (found,) = model.sample(prompts, **limits)
        assert found.sequences[0].tokens == by_ids.sequences[0].tokens
        assert found.completion == model.tokenizer.decode(by_ids.sequences[0].tokens[3:])
        assert found.completion
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    chatty = Policy(model.path, model.config, model.params, model.fields)
    chatty.tokenizer.chat_template = template
    conversation = [{"role": "user", "content": "w1 w5"}, {"role": "user", "content": "w60"}]
    for prompts in (conversation, [conversation]):
        (found,) = chatty.sample(prompts, **limits)
        assert found.sequences[0].tokens == by_ids.sequences[0].tokens
        assert found.messages[:2] == conversation
    assert found.answer == found.completion
    chatty.tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    (found,) = chatty.sample(conversation, **limits)
    assert found.completion and found.answer == ""  # cut in the thinking that its prompt began
    for wrong in ([[1, "w1"]], [[conversation]], [5.0]):
        with pytest.raises(UserError, match="prompt 0: must be a text, a list of messages"):
            model.sample(wrong, **limits)


def test_log_probabilities_of_other_parameters_have_a_gradient(model):
    louder = jax.tree.map(lambda leaf: leaf * 1.1, model.params)
    other = Policy(model.path, model.config, louder, model.fields)
    found_BT = model.logprobs(TOKENS, params=louder)
    np.testing.assert_allclose(found_BT, other.logprobs(TOKENS), atol=1e-6)
    grads = jax.jit(jax.grad(lambda params: model.logprobs(TOKENS, params=params).mean()))(louder)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0.0"),
        ({"temperature": float("nan")}, "temperature=nan: must be finite"),
        ({"top_p": 1.5}, "top_p=1.5: must be above 0.0 and at most 1.0"),
        ({"top_k": 2.5}, "top_k=2.5: must be a whole number"),
        ({"samples": 0}, "samples=0: must be at least 1"),
        ({"slots": -1}, "slots=-1: must be at least 1"),  # it would sample for ever
        ({"seed": -1}, "seed=-1: must be between 0 and"),
        ({"stop": [1.5]}, r"stop=\[1.5\]: must hold texts and token ids only"),
        ({"prompts": None}, "prompts=None: each must be a text, "),
    ],
)
def test_an_argument_that_cannot_be_is_refused_by_name(model, wrong, rule):
    with pytest.raises(UserError, match=rule):
        model.sample(**{"prompts": [[5]], "max_new_tokens": 2, "stop": []} | wrong)


def test_scores_are_of_a_temperature_above_0_and_of_some_token(model):
    for temperature in (0.0, -1.0):
        with pytest.raises(UserError, match="temperature=.*: must be above 0.0"):
            model.logprobs(TOKENS, temperature=temperature)
    with pytest.raises(UserError, match=r"found shape \(0, 3\)"):
        model.logits(np.zeros((0, 3), int))
    np.testing.assert_array_equal(
        model.logprobs(TOKENS, temperature=jnp.float32(0.5)), model.logprobs(TOKENS, 0.5)
    )


def test_a_form_that_does_not_exist_is_refused_before_anything_is_read():
    wrongs = {"dtype": "float16"}, {"attention": "flash"}, {"chat_settings": {"thinking": "yes"}}
    for wrong in wrongs:
        with pytest.raises(UserError, match="must be one of"):
            rftjax.load("no model", **wrong)
    with pytest.raises(UserError, match="model.attention='triton': needs an NVIDIA GPU"):
        rftjax.load("no model", attention="triton")


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model.sample([[5], []], stop=[])


def test_a_model_without_tokenizer_works_with_ids(weights_only, tmp_path, model):
    bare = rftjax.load(str(weights_only))
    found = bare.sample([[5, 6, 7]], max_new_tokens=4, stop=[])
    assert len(found[0].sequences[0].tokens) == 7
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        bare.sample([[{"role": "user", "content": "w1"}]], stop=[])
    exported = rftjax.load(str(bare.export(tmp_path / "out")))
    for one, two in zip(*map(jax.tree.leaves, (exported.params, bare.params)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_an_export_is_the_same_policy(model, tmp_path):
    exported = rftjax.load(str(model.export(tmp_path / "out")))
    np.testing.assert_array_equal(exported.logits(TOKENS), model.logits(TOKENS))
    assert exported.stop_tokens() == (1,)
    assert exported.tokenizer.encode("w1 w9") == model.tokenizer.encode("w1 w9")
    assert (tmp_path / "out" / "generation_config.json").read_text().count('"eos_token_id": 1')
