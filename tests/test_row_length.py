import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rftjax.config as configs
from rftjax.learning.row_length import Group, choose, row_tokens, token_bytes
from rftjax.models import decoder
from rftjax.models.decoder import Config, Rope
from rftjax.models.remat import REMATS
from rftjax.run import build as job
from rftjax.run.training import batch_shape

CONFIG = Config(
    family="qwen2", vocab=64, width=192, layers=12, heads=6, kv_heads=2, channels=32, ffn=512,
    max_positions=4096, norm_eps=1e-6, rope=Rope(), tied=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "own", "tokens"),
    [
        (64, 64, 576),  # a group
        (64, 1024, 1088),  # one completion: its prompt is small beside it
        (64, 256, 1088),
        (2048, 64, 2560),  # a group: nothing is worse than its prompt once more
        (2048, 1024, 10240),
    ],
)
def test_a_row_is_the_shortest_that_computes_few_tokens_twice(prompt, own, tokens):
    assert row_tokens(Group(prompt, own, 8), 8) == tokens


def test_a_row_is_no_longer_than_memory_allows_or_a_completion_needs():
    group = Group(512, 1024, 8)
    assert row_tokens(group, 8) == 4608
    assert row_tokens(group, 8, most=4000) == 2560
    assert row_tokens(group, 8, most=100) == 1536


def test_a_row_is_no_longer_than_all_tokens_of_a_small_job():
    assert row_tokens(Group(10, 10, 2), 2) == 64


def test_activations_are_computed_again_only_where_prompts_would_cost_more():
    def chosen(group: Group, tokens: float, least: str = ""):
        memory = tokens * token_bytes(CONFIG, "")
        return tuple(choose(CONFIG, group, 8, memory=memory, least=least))

    long, short = Group(2048, 1024, 8), Group(64, 1024, 8)
    assert chosen(long, 20000) == (10240, "")
    assert chosen(long, 4096) == (6144, "products")  # else four rows with the prompt in each
    assert chosen(long, 4096, least="layer") == (10240, "layer")
    assert chosen(short, 1100) == (1088, "")
    assert chosen(short, 1100, least="layer") == (1088, "layer")


def test_activations_are_computed_again_where_a_completion_fits_no_other_way():
    def chosen(tokens: float, again: str):
        memory = tokens * token_bytes(CONFIG, again)
        return tuple(choose(CONFIG, Group(64, 1024, 8), 8, memory=memory, least=""))

    assert chosen(1088, "") == (1088, "")
    assert chosen(1088, "products") == (1088, "products")
    assert chosen(1088, "layer") == chosen(64, "layer") == (1088, "layer")


@pytest.mark.parametrize("remat", REMATS)
def test_the_bytes_of_a_token_are_what_the_compiler_counts(remat):
    params = jax.eval_shape(lambda key: decoder.init(CONFIG, key), jax.random.key(0))

    def temporary(tokens: int) -> int:
        row = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

        def total(params, *arrays):
            return jnp.sum(decoder.hidden(CONFIG, params, *arrays, remat=remat).astype("float32"))

        program = jax.jit(jax.grad(total)).lower(params, row, row, row, row).compile()
        found = program.memory_analysis()
        assert found
        return found.temp_size_in_bytes

    grown = (temporary(1024) - temporary(512)) / 512
    np.testing.assert_allclose(grown, token_bytes(CONFIG, remat), rtol=0.25)


def test_a_job_chooses_its_rows_by_its_lengths_and_its_memory(tiny_dir, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "w1 w2 w3 w4"}) + "\n")
    config = configs.base_config()
    config.model.path, config.tasks.train = str(tiny_dir), str(tmp_path / "train.jsonl")
    config.evaluator = "rftjax.evaluators.random_reward:evaluate"
    config.scoring.workers, config.eval.every = 1, 0
    config.sampler.max_new_tokens, config.rollout.max_length = 40, 64
    found = {}
    for memory in (0.0, 1e-6):
        config.batch.memory = memory
        with job.build(job.complete_config(config), tmp_path / "run", read_ahead=False) as parts:
            found[memory] = batch_shape(parts)["pack_tokens"]
            assert parts.prompt_tokens == [4]
    assert found == {0.0: 384, 1e-6: 64}  # a group on each of eight devices, one completion
