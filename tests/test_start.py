import gc
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jobs import tiny_job

import rftjax
from rftjax import modes
from rftjax.run import build as job
from rftjax.run.checkpoint import Checkpoints
from rftjax.run.prefetch import make_prefetch
from rftjax.run.workdir import open_checkpoints
from rftjax.sampler import device
from rftjax.tasks import TaskStream
from rftjax.weights import lora


@pytest.fixture(scope="module")
def spec(tiny_dir, tmp_path_factory):
    config = tiny_job(tiny_dir, tmp_path_factory.mktemp("job"))
    config.export, config.mesh.data = False, 8
    return config


def variant(spec, **fields):
    config = spec.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


class Live:
    """The device arrays that came to be since it was made."""

    def __init__(self):
        gc.collect()
        self.before = [id(one) for one in jax.live_arrays()]
        self.kept = jax.live_arrays()  # so that no id is given away again

    def bytes(self):
        gc.collect()
        before = set(self.before)
        return sum(one.nbytes for one in jax.live_arrays() if id(one) not in before)


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


SMALL = 20_000  # bytes: stop ids, seeds, steps; the tiny model has 0.4 MB


@pytest.mark.parametrize(
    "fields",
    [
        {"lora__rank": 4, "model__dtype": "bfloat16"},
        {"model__dtype": "bfloat16", "grpo__kl_weight": 0.1},
        {},
    ],
    ids=str,
)
def test_a_start_holds_its_state_and_nothing_beside_it(spec, tmp_path, fields):
    live = Live()
    with job.build(job.complete_config(variant(spec, **fields)), tmp_path) as parts:
        state = parts.state_builder.initial_state()
        assert size(state) <= live.bytes() <= size(state) + SMALL
        if "lora__rank" in fields:
            assert state.frozen["embed"]["embedding"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "fields",
    [
        {"lora__rank": 4, "model__dtype": "bfloat16"},
        {"model__dtype": "bfloat16", "grpo__kl_weight": 0.1},
        {"grpo__kl_weight": 0.1},
    ],
    ids=str,
)
def test_a_resume_makes_nothing_of_step_0_but_what_never_changes(spec, tmp_path, fields):
    found = []

    class Watched(Checkpoints):
        def restore(self, step, example):
            found.append(live.bytes())
            return super().restore(step, example)

    config = job.complete_config(variant(spec, **fields))
    with job.build(config, tmp_path) as parts:
        state = parts.state_builder.initial_state()
        checkpoints = open_checkpoints(parts)
        checkpoints.save(1, state)
        checkpoints.close()
        fixed = size(state.frozen) + size(state.reference)
    wanted = jax.device_get(state)
    del state, parts
    live = Live()
    with job.build(config, tmp_path) as parts:
        checkpoints = Watched(tmp_path / "checkpoints", fixed=open_checkpoints(parts).fixed)
        state = parts.state_builder.state(checkpoints, 1)
        checkpoints.close()
        assert fixed <= found[0] <= fixed + SMALL
        assert live.bytes() <= size(state) + SMALL
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), wanted)


def test_the_samplers_weights_go_before_the_update_and_before_new_ones_are_made(
    spec, tmp_path, monkeypatch
):
    with job.build(job.complete_config(variant(spec, model__dtype="bfloat16")), tmp_path) as parts:
        state = parts.state_builder.initial_state()
        engine = parts.rollout.engine
        sampling = make_prefetch(parts, TaskStream(parts.train_tasks, seed=0))

        def current():
            gc.collect()
            return weakref.ref(engine._params["layers"][0]["mlp"]["up"]["kernel"])

        parts.sampler_weights.load(state)
        first = current()
        seen = []
        make = parts.sampler_weights.program
        monkeypatch.setattr(
            parts.sampler_weights,
            "program",
            lambda *rest: (gc.collect(), seen.append(first()), make(*rest))[-1],
        )
        parts.sampler_weights.load(state)
        assert seen == [None]
        second = current()
        assert second() is not None
        sampling.begin(state, last=True)
        gc.collect()
        assert second() is None
        sampling.close()


def test_norm_gains_stay_float32_in_a_bfloat16_sampler(tiny_dir):
    model = rftjax.load(str(tiny_dir), dtype="bfloat16")
    weights = device.sampler_params(model.config, model.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        assert leaf.dtype == ("float32" if path[-1].key == "scale" else "bfloat16"), path


def test_a_policy_gives_its_parameters_away_and_reads_them_again(tiny_dir):
    model = rftjax.load(str(tiny_dir), dtype="bfloat16", lazy=True)
    model.read_ahead()
    taken = model.take(masters=True)
    kernel = weakref.ref(taken["layers"]["mlp"]["up"]["kernel"])
    assert kernel().dtype == jnp.float32
    del taken
    gc.collect()
    assert kernel() is None
    again = model.take(masters=False)
    assert again["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert again["final_norm"]["scale"].dtype == jnp.float32
    assert model.params["layers"]["mlp"]["up"]["kernel"].dtype == jnp.float32


def test_a_kl_of_loaded_adapters_is_measured_against_them(spec, tiny_dir, tmp_path):
    model = rftjax.load(str(tiny_dir))
    adapters = lora.init(model.config, rank=2)
    adapters = jax.tree.map(lambda leaf: leaf + 0.3, adapters)
    lora.save_peft(tmp_path / "adapters", model.config, adapters, alpha=16.0)
    path = str(tmp_path / "adapters")
    config = variant(spec, lora__rank=2, lora__path=path, grpo__kl_weight=0.1, checkpoint__every=1)
    modes.run("train", config, {}, tmp_path / "whole", 0)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["kl/mean"] for line in lines)
    assert abs(first) < 1e-6 < 1e-5 < second
    # A resume has the same reference, whatever lies at lora.path by then.
    modes.run("train", config, {}, tmp_path / "parts", 1)
    (tmp_path / "adapters" / "adapter_model.safetensors").unlink()
    modes.run("train", config, {}, tmp_path / "parts", 0, accepted=("lora.path",))
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["kl/mean"] == second
