import gc
import json
import shutil

import jax
import pytest

from rftjax import config as configs
from rftjax.run import build as job
from rftjax.run import memory


def size(tree):
    """Bytes on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def small_spec(tiny_dir, folder):
    """A small job on the test model."""
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    config = configs.base_config()
    config.model.path, config.model.dtype = str(tiny_dir), "bfloat16"
    config.tasks.train = str(folder / "train.jsonl")
    config.evaluator = "rftjax.evaluators.random_reward:evaluate"
    config.batch.pack_tokens, config.sampler.slots, config.scoring.workers = 64, 8, 1
    config.sampler.max_new_tokens, config.rollout.max_length = 32, 64
    config.eval.every = 0
    return config


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_an_estimate_needs_no_weights(tiny_dir, tmp_path, init):
    config = small_spec(tiny_dir, tmp_path)
    config.model.init = init
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    with job.build(job.complete_config(config), tmp_path / "run", read_ahead=False) as parts:
        table = memory.estimate(parts)
        made = [one for one in jax.live_arrays() if id(one) not in before]
        assert sum(one.nbytes for one in made) < table["trained parameters"] / 10


def test_the_estimate_is_linear_in_the_number_of_layers(tiny_dir, tmp_path):
    """`scripts/memory_table.py` compiles a few layers of a large model and draws the line through them."""
    found = []
    for layers in (2, 4, 8):
        folder = tmp_path / str(layers)
        folder.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_dir / file, folder)
        fields = json.loads((tiny_dir / "config.json").read_text())
        fields |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
        (folder / "config.json").write_text(json.dumps(fields))
        config = small_spec(folder, folder)
        config.model.init, config.model.remat = "random", "layer"
        with job.build(job.complete_config(config), folder / "run", read_ahead=False) as parts:
            found.append(memory.estimate(parts))
    for half in (memory.SAMPLING, memory.UPDATE):
        two, four, eight = (table[half] for table in found)
        assert two + 3 * (four - two) == pytest.approx(eight, rel=0.05)


def test_the_table_counts_what_a_device_holds(tiny_dir, tmp_path):
    """With adapters on a bfloat16 base, over four devices of fsdp and two of data."""
    config = small_spec(tiny_dir, tmp_path)
    config.lora.rank, config.grpo.kl_weight, config.grpo.kl_refresh_steps = 4, 0.1, 5
    config.mesh.fsdp, config.mesh.data = 4, 2
    with job.build(job.complete_config(config), tmp_path / "run") as parts:
        table = memory.estimate(parts)
        state = parts.state_builder.initial_state()
        assert table["trained parameters"] == size(state.trainable)
        assert table["optimizer"] == size(state.opt_state)
        assert table["frozen base"] == size(state.frozen)
        assert table["reference of the KL"] == size(state.reference)
        parts.sampler_weights.load(state)
        engine = parts.rollout.engine
        assert table["sampler's weights"] == size(engine._params)
        engine._pool.reserve(config.rollout.max_length)
        (cache,) = (table[name] for name in table if name.startswith("cache of 1 rows"))
        assert cache == size(engine._pool.cache)
    held = size(state) - state.step.nbytes
    beside = [value for name, value in table.items() if name.startswith("gradient")]
    assert beside[0] > size(state.trainable)
    assert held < table[memory.UPDATE] and held + cache < table[memory.SAMPLING]
    rest = list(table.values())[:-2]
    assert table[memory.SAMPLING] + table[memory.UPDATE] == pytest.approx(sum(rest) + held)
