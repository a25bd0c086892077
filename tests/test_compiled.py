"""What XLA's compilers say of programs; those of TPUs and GPUs are asked where the extras are installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from meshes import mesh_of

from rftjax import config as configs
from rftjax.devices.accelerators import ACCELERATORS
from rftjax.errors import UserError
from rftjax.models import head, linear
from rftjax.run import compiled, plan, targets
from rftjax.run.build import complete_config

ROOT = Path(__file__).parents[1]
TEXT = """
HloModule jit_update

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%layer (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]) parameter(0)
  %gather = ((bf16[4,8]{1,0}), bf16[32,8]{1,0}) all-gather-start(%p), dimensions={0}
  %summed = f32[4,8]{1,0} all-reduce(%x), to_apply=%add
  ROOT %out = (s32[], bf16[4,8]) tuple(%i, %y)
}

%fused (p: f32[8,8]) -> f32[1,8] {
  ROOT %scattered = f32[1,8]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%rows (p: (s32[])) -> (s32[]) {
  %loop = (s32[], bf16[4,8]) while(%t), condition=%c, body=%layer, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = (s32[]) tuple(%i)
}

ENTRY %main (p: f32[8,8]) -> f32[1,8] {
  %micro = (s32[]) while(%t), condition=%c, body=%rows
  ROOT %f = f32[1,8]{1,0} fusion(%p), kind=kCustom, calls=%fused
}
"""
WITHOUT = {
    kind: pytest.mark.skipif(bool(targets.missing(kind)), reason=targets.missing(kind))
    for kind in ("v5p", "H100")
}


def test_bytes_of_collectives_count_as_often_as_their_loops_run():
    gathered, summed, scattered = 32 * 8 * 2, 4 * 8 * 4, 8 * 4
    assert compiled.moved(TEXT) == {
        "all-gather": 3 * gathered,
        "all-reduce": 3 * summed,
        "reduce-scatter": scattered,
    }


@pytest.mark.parametrize(
    ("kind", "devices", "name"),
    [("v5e", 8, "2x4"), ("v5e", 256, "16x16"), ("v5p", 4, "2x2x1"), ("v5p", 32, "2x4x4"), ("v7x", 8, "2x2x1"),
     ("H100", 8, "1x1x8"), ("H200", 64, "1x8x8")],
)  # fmt: skip
def test_devices_stand_as_their_makers_arrange_them(kind, devices, name):
    assert targets.arrangement(kind, devices) == name


def test_a_number_of_tpus_that_none_is_built_of_is_refused():
    with pytest.raises(UserError, match="--devices=12: TPUs of kind v5p stand in powers of two"):
        targets.arrangement("v5p", 12)


@pytest.fixture
def config(tiny_dir):
    config = configs.base_config()
    config.model.path, config.mesh.data, config.mesh.tensor = str(tiny_dir), -1, 2
    config.rollout.max_length, config.sampler.max_new_tokens = 32, 8
    config.batch.pack_tokens, config.sampler.slots = 64, 8
    return complete_config(config, devices=8, needs=("model.path",))


@pytest.fixture
def mesh():
    return mesh_of(4, 1, 2)


def test_an_update_compiles_for_a_mesh_without_weights(config, mesh):
    first, *moved = compiled.report(config, plan.open_shape(config), mesh, {"update": 1e9})
    assert "GiB a device  update by XLA's count, 0.93 by the lines above" in first
    # Two sums over `tensor` a layer, and the gradients' over `data`.
    assert any("all-reduce, update, a micro-batch" in line for line in moved)


def test_the_compiler_counts_the_weights_and_the_cache_that_the_plan_does(config, mesh):
    config.sampler.top_k = 5
    model = plan.open_shape(config)
    found = compiled.compiled(config, model, mesh, "decode")
    assert " sort(" in found.text  # with the filter of the job
    weights, cache, *_ = plan.plan(config, model, ACCELERATORS["v5e"], 8).sampling.values()
    assert weights + cache <= found.sizes["argument"] <= 1.1 * (weights + cache)
    assert found.peak >= found.sizes["argument"] and found.collectives["all-reduce"] > 0


@pytest.mark.parametrize(
    ("sizes", "positions", "own"),
    [({"data": 4}, 64, 88), ({"context": 4}, 64, 22), ({"fsdp": 4}, 256, 22)],
)
def test_the_logits_of_an_update_lie_over_the_axes_of_the_head(
    config, tmp_path, sizes, positions, own, monkeypatch
):
    monkeypatch.setattr(head, "POSITIONS", 0)  # few enough beside this small vocabulary
    fields = json.loads(Path(config.model.path, "config.json").read_text())
    fields |= {"vocab_size": 176, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config.model.path = str(tmp_path)
    mesh = mesh_of(tensor=2, **sizes)
    text = compiled.compiled(config, plan.open_shape(config), mesh, "update").text
    for shape in (f"{positions},{own}", f"32,{own}"):  # of logits, and of the head or its gradient
        assert f"f32[{shape}]" in text
    assert not re.search(r"f32\[\d+,176\]", text)


@pytest.mark.parametrize(("rank", "top_k"), [(0, 0), (2, 5)])
def test_all_chunks_of_logits_gather_a_head_and_sum_its_gradient_once(
    config, tmp_path, rank, top_k, monkeypatch
):
    # The form of accelerators: that of CPUs makes matrices of rows and tokens, which the compiler gathers for it.
    monkeypatch.setattr(
        linear, "by_rows", lambda x, dy, inputs, outputs: linear.plain(x, dy, inputs=inputs)
    )
    fields = json.loads(Path(config.model.path, "config.json").read_text())
    fields |= {"vocab_size": 176, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config.model.path, config.model.remat, config.lora.rank = str(tmp_path), "layer", rank
    config.sampler.top_k = top_k
    model = plan.open_shape(config)
    text = compiled.compiled(config, model, mesh_of(fsdp=8), "update").text
    whole = rf"f32\[{model.config.width},{model.config.vocab}\]"
    # Not in the loop over chunks, whose passes would each have one.
    assert len(re.findall(rf"= {whole}\S* all-gather\(", text)) == 1
    summed = re.findall(rf"= .*?{whole}.*? (?:all-reduce|reduce-scatter)\(", text)
    assert len(summed) == (0 if rank else 1)
    assert (" sort(" in text) == (top_k > 0)  # with the filter of the job


def test_what_does_not_compile_is_told_and_passed_by(config, mesh):
    config.model.attention = "splash"  # a kernel of TPUs: not for the devices here
    [line] = compiled.report(config, plan.open_shape(config), mesh, {"update": 1e9})
    assert line.startswith("compiler    update DOES NOT COMPILE: ")


def compile_for(tmp_path, kind, what, *flags, **fields):
    """Runs the benchmark's command on a model of two layers; returns its JSON line and the program's text."""
    shape = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape | fields))
    text = tmp_path / "program.txt"
    program = ROOT / "scripts" / "bench" / "compile_for.py"
    command = [sys.executable, str(program), f"--model={tmp_path}", f"--text={text}"]
    # The tests' own settings would have the compiler leave its optimizations out.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    said = subprocess.run(
        [*command, f"--device={kind}", f"--what={what}", *flags],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-2000:]
    return json.loads(said.stdout.splitlines()[-1]), text.read_text()


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=WITHOUT[kind]) for kind in WITHOUT])
def test_decoding_copies_no_leaf_of_the_cache_and_gathers_no_weights(tmp_path, kind):
    flags = ("--mesh=data:1,fsdp:2,tensor:4", "--length=2048")
    channels = 128 if kind == "v5p" else 64  # XLA for TPUs fills up what is narrower than a tile
    said, text = compile_for(tmp_path, kind, "decode", *flags, head_dim=channels)
    leaf = re.escape(f"bf16[32,2,2048,{channels}]")
    assert re.search(leaf, text), "no leaf of the cache is in the text"
    assert not re.findall(rf"= {leaf}\S* (?:copy|transpose)\(", text)
    assert said["collectives"].get("all-gather", 0) < 32 * 32000 * 4  # the logits of its rows
    assert said["planned_over_peak"] == pytest.approx(1.0, abs=0.1)
