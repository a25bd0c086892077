import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jobs import tiny_job

import rftjax
from rftjax import modes, policy
from rftjax.learning import update
from rftjax.models import decoder
from rftjax.run import build as job
from rftjax.run import start
from rftjax.sampler import device
from rftjax.weights import hf, lora

ROOT = Path(__file__).parent.parent
TOKENS_BT = np.random.default_rng(1).integers(3, 60, (3, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tiny_dir):
    return rftjax.load(str(tiny_dir))


@pytest.fixture(scope="module")
def peft_dir(data_dir):
    return data_dir / "peft"


@pytest.fixture
def adapters(model):
    """Adapters of all linear layers that change what the model says."""
    fresh = lora.init(model.config, rank=4)
    key = jax.random.key(2)

    def fill(leaf):
        return 0.2 * jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape)

    return jax.tree.map(fill, fresh)


def logits(config, params, adapters, tokens_BT=TOKENS_BT):
    """Logits with the adapters beside the kernels, as training applies them."""
    pack = policy._rows(tokens_BT)
    x_BTD = decoder.hidden(
        config,
        params,
        tokens_BT,
        pack.positions_RX,
        pack.groups_RX,
        pack.segments_RX,
        lora=adapters,
    )
    flat = decoder.logits(config, params, x_BTD.reshape(-1, config.width))
    return np.asarray(flat).reshape(*tokens_BT.shape, -1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_start_the_adapted_model_is_the_base_exactly(tiny_dir, dtype):
    model = rftjax.load(str(tiny_dir), dtype=dtype)
    frozen = decoder.cast(model.params, model.config.dtype)
    fresh = update.scale_adapters(lora.init(model.config, rank=4), 4.0)
    without = logits(model.config, model.params, None)
    np.testing.assert_array_equal(logits(model.config, frozen, fresh), without)
    merged = device.sampler_params(model.config, frozen, fresh)
    plain = device.sampler_params(model.config, model.params)
    jax.tree.map(np.testing.assert_array_equal, merged, plain)


def test_the_base_is_kept_in_its_compute_dtype_and_norms_in_float32(tiny_dir):
    model = rftjax.load(str(tiny_dir), dtype="bfloat16")
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        decoder.cast(model.params, model.config.dtype)
    ):
        assert leaf.dtype == ("float32" if path[-1].key == "scale" else "bfloat16")


def test_a_merged_export_says_what_the_adapted_model_says(model, adapters, tmp_path):
    scaled = update.scale_adapters(adapters, 2.0)
    merged = model.params | {"layers": device.merge(model.params["layers"], scaled["layers"])}
    policy.Policy(model.path, model.config, merged, model.fields).export(tmp_path / "merged")
    beside = logits(model.config, model.params, scaled)
    assert np.abs(beside - np.asarray(model.logits(TOKENS_BT))).max() > 0.1
    found = np.asarray(rftjax.load(str(tmp_path / "merged")).logits(TOKENS_BT))
    np.testing.assert_allclose(found, beside, atol=1e-5, rtol=0)


def test_tensors_have_the_names_and_shapes_that_peft_writes(model, adapters, peft_dir, tmp_path):
    lora.save_peft(tmp_path, model.config, adapters, alpha=8.0, base="tiny")
    tensors = hf.read_safetensors(tmp_path / "adapter_model.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == json.loads((peft_dir / "names.json").read_text())
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = json.loads((peft_dir / "adapter_config.json").read_text())
    assert set(ours) - {"lora_bias"} <= set(theirs)
    for name in ("peft_type", "task_type", "bias", "fan_in_fan_out", "use_dora", "use_rslora"):
        assert ours[name] == theirs[name]
    assert (ours["r"], ours["lora_alpha"], ours["base_model_name_or_path"]) == (4, 8.0, "tiny")
    assert set(ours["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


def test_an_adapter_that_peft_wrote_gives_the_logits_that_peft_got(model, peft_dir):
    numbers = np.load(peft_dir / "logits.npz")
    for alpha in (8.0, 3.0):  # whatever the run's alpha, the product is peft's
        read = lora.load_peft(peft_dir, model.config, alpha=alpha)
        scaled = update.scale_adapters(read, lora.scale(2, alpha))
        tokens_BT = numbers["tokens"].astype(np.int32)
        found = logits(model.config, model.params, scaled, tokens_BT)
        np.testing.assert_allclose(found, numbers["logits"], atol=2e-5, rtol=0)


def test_a_peft_directory_comes_back_bit_for_bit(model, adapters, tmp_path):
    lora.save_peft(tmp_path, model.config, adapters, alpha=8.0)
    read = lora.load_peft(tmp_path, model.config, alpha=8.0)
    jax.tree.map(np.testing.assert_array_equal, read, adapters)


REFUSED = {
    "alora_invocation_tokens": [1],
    "alpha_pattern": {"q_proj": 3},
    "arrow_config": {"top_k": 2},
    "bias": "all",
    "corda_config": {"corda_method": "ipm"},
    "fan_in_fan_out": True,
    "field_of_a_later_version": 1,
    "init_lora_weights": "pissa",
    "kasa_config": {"a": 1},
    "layer_replication": [[0, 1]],
    "layers_to_transform": 0,
    "lora_alpha": "8",
    "lora_bias": True,
    "megatron_config": {"a": 1},
    "modules_to_save": ["lm_head"],
    "peft_type": "LOHA",
    "r": 0,
    "rank_pattern": {"q_proj": 3},
    "target_parameters": ["x"],
    "task_type": "SEQ_CLS",
    "trainable_token_indices": [3],
    "use_bdlora": True,
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {"a": 1},
}


def edit(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(("field", "value"), REFUSED.items())
def test_settings_of_peft_that_are_not_implemented_are_refused(
    model, adapters, tmp_path, field, value
):
    lora.save_peft(tmp_path / "a", model.config, adapters, alpha=8.0)
    edit(tmp_path / "a", **{field: value})
    with pytest.raises(ValueError, match=f"lora.path=.*adapter_config.json: {field}="):
        lora.load_peft(tmp_path / "a", model.config, alpha=8.0)


@pytest.mark.parametrize("start", ["pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica"])
def test_an_adapter_whose_start_changed_the_base_is_refused_with_the_way_out(
    model, adapters, tmp_path, start
):
    lora.save_peft(tmp_path / "a", model.config, adapters, alpha=8.0)
    edit(tmp_path / "a", init_lora_weights=start)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        lora.load_peft(tmp_path / "a", model.config, alpha=8.0)


@pytest.mark.parametrize(
    "fields",
    [
        *({"init_lora_weights": start} for start in (False, "gaussian", "eva", "orthogonal")),
        {"lora_dropout": 0.1, "revision": "main", "peft_version": "9.9", "loftq_config": {"a": 1}},
        {"exclude_modules": ["lm_head"], "runtime_config": {"ephemeral_gpu_offload": False}},
        {"field_of_a_later_version": None, "another": False, "third": {}},
    ],
)
def test_settings_that_change_nothing_once_an_adapter_is_trained_are_accepted(
    model, adapters, tmp_path, fields
):
    lora.save_peft(tmp_path / "a", model.config, adapters, alpha=8.0)
    edit(tmp_path / "a", **fields)
    read = lora.load_peft(tmp_path / "a", model.config, alpha=8.0)
    jax.tree.map(np.testing.assert_array_equal, read, adapters)


def test_messages_about_an_adapters_files_name_lora_path(model, adapters, tiny_dir, tmp_path):
    folder = lora.save_peft(tmp_path / "a", model.config, adapters, alpha=8.0)
    file = folder / "adapter_model.safetensors"
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"^lora\.path=.*not adapter_model\.bin"):
        lora.load_peft(folder, model.config, alpha=8.0)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match=r"^lora\.path=.*adapter_model\.safetensors is missing"):
        lora.load_peft(folder, model.config, alpha=8.0)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"^lora\.path=.*Git LFS pointer"):
        lora.load_peft(folder, model.config, alpha=8.0)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^lora\.path=.*not readable as JSON"):
        lora.load_peft(folder, model.config, alpha=8.0)
    for path, words in (
        (tiny_dir, "a whole model and no adapter, which model.path takes"),
        (tiny_dir / "config.json", "is a file"),
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path, "neither adapter_config.json nor"),
    ):
        with pytest.raises(ValueError, match=f"^lora.path=.*{words}.*give a directory that peft"):
            start.load_adapters(str(path), model.config, 8.0)


def test_adapters_scaled_by_the_root_of_the_rank_keep_their_product(model, adapters, tmp_path):
    lora.save_peft(tmp_path, model.config, adapters, alpha=8.0)
    fields = json.loads((tmp_path / "adapter_config.json").read_text()) | {"use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    read = lora.load_peft(tmp_path, model.config, alpha=8.0)["layers"]["mlp"]["down"]
    np.testing.assert_allclose(read["b"] * (8.0 / 4), adapters["layers"]["mlp"]["down"]["b"] * 4.0)


def test_the_factor_is_alpha_over_the_rank_and_nothing_in_full_fine_tuning(adapters):
    assert (lora.scale(8, 16.0), lora.scale(0, 16.0)) == (2.0, 0.0)
    scaled = update.scale_adapters(adapters, lora.scale(8, 16.0))["layers"]["mlp"]["down"]
    plain = adapters["layers"]["mlp"]["down"]
    np.testing.assert_allclose(scaled["a"] @ scaled["b"], 2 * (plain["a"] @ plain["b"]), rtol=1e-5)


def test_new_adapters_are_noise_of_its_own_a_layer_within_the_bound_that_peft_takes(model):
    fresh = lora.init(model.config, rank=4, seed=1)
    first = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(fresh) if path[-1].key == "a"
    ]
    for noise in first:
        bound = noise.shape[1] ** -0.5
        assert 0.9 * bound < np.abs(noise).max() <= bound
        assert noise.dtype == "float32"
    layers = [
        np.asarray(layer).ravel()[:16] / noise.shape[1] ** -0.5
        for noise in first
        for layer in noise
    ]
    assert len({tuple(np.round(layer, 4)) for layer in layers}) == len(layers)
    other = lora.init(model.config, rank=4, seed=2)
    assert np.any(other["layers"]["mlp"]["up"]["a"] != fresh["layers"]["mlp"]["up"]["a"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(sorted(tensors)[1]), "is missing, the model asks for"),
        (lambda tensors: tensors.update({sorted(tensors)[0]: np.zeros((3, 5), np.float32)}), "has shape"),
        (lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": np.zeros((4, 4), np.float32)}),
         "lm_head.* does not belong .*merge_and_unload"),
        (lambda tensors: tensors.clear(), "no adapter of a linear layer"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_model_are_refused(model, adapters, tmp_path, change, words):
    lora.save_peft(tmp_path, model.config, adapters, alpha=8.0)
    tensors = hf.read_safetensors(tmp_path / "adapter_model.safetensors")
    change(tensors)
    hf.write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(ValueError, match=words):
        lora.load_peft(tmp_path, model.config, alpha=8.0)


def test_targets_are_all_linear_layers_or_the_named_ones(model):
    assert lora.parse_targets("all") == lora.TARGETS
    tree = lora.init(model.config, rank=2, targets="query, down")
    assert {part: set(pair) for part, pair in tree["layers"].items()} == {
        "attention": {"query"},
        "mlp": {"down"},
    }
    with pytest.raises(ValueError, match="lora.targets='query,head': 'head' is no linear layer"):
        lora.parse_targets("query,head")


def test_adapters_of_another_rank_are_refused(model, peft_dir):
    read = lora.load_peft(peft_dir, model.config, alpha=8.0)
    wanted = lora.init(model.config, rank=4, targets="query,down")
    with pytest.raises(ValueError, match="query/a is .* give the ones that it was made with"):
        lora.check_like(str(peft_dir), read, wanted)


# ---- Whole runs


@pytest.fixture(scope="module")
def spec(tiny_dir, tmp_path_factory):
    config = tiny_job(tiny_dir, tmp_path_factory.mktemp("job"), rows=10)
    config.batch.prompts, config.batch.group_size = 2, 4
    config.checkpoint.every, config.lora.rank = 1, 2
    return config


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    modes.run("train", spec, {}, workdir, 0)
    return workdir


def metrics_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: x
            for name, x in line.items()
            if not name.startswith(("time/", "compile/", "throughput/"))
        }
        for line in lines
    ]


def test_a_run_trains_adapters_alone_and_its_checkpoints_hold_no_base(whole, spec, model):
    newest = whole / "checkpoints" / "2"
    assert {path.name for path in newest.iterdir()} >= {"trainable", "optimizer"}
    assert not (newest / "frozen").exists()
    assert all(line["sampler/logprob_diff_max"] < 1e-4 for line in metrics_of(whole))
    found = lora.load_peft(whole / "adapter", model.config, alpha=spec.lora.alpha)
    assert np.abs(found["layers"]["mlp"]["down"]["b"]).max() > 0
    scaled = update.scale_adapters(found, spec.lora.alpha / 2)
    exported = rftjax.load(str(whole / "export"))
    np.testing.assert_allclose(
        exported.logits(TOKENS_BT), logits(model.config, model.params, scaled), atol=1e-5
    )


def test_two_halves_of_a_run_with_adapters_are_the_whole(spec, whole, tmp_path):
    modes.run("train", spec, {}, tmp_path, 1)
    modes.run("train", spec, {}, tmp_path, 0)
    assert metrics_of(tmp_path) == metrics_of(whole)
    for name in ("export/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("source", ["", "adapter"])
def test_a_run_starts_from_an_earlier_run_or_its_peft_directory(spec, whole, model, source):
    config = spec.copy_and_resolve_references()
    config.lora.path, config.lora.alpha = str(whole / source), 5.0
    with job.build(job.complete_config(config), whole) as parts:
        started = parts.state_builder.adapters
        state = parts.state_builder.initial_state()
        assert state.reference == ()  # the base is one, and nothing is measured against it here
        moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
        adapted = [leaf.shape for leaf in jax.tree.leaves(started)]
        assert sorted(moments) == sorted(adapted * 2)
        scaled = update.scale_adapters(started, job.lora_scale(parts.config))
    exported = rftjax.load(str(whole / "export"))
    np.testing.assert_allclose(
        exported.logits(TOKENS_BT), logits(model.config, model.params, scaled), atol=1e-5
    )


def test_a_checkpoint_is_exported_merged_and_as_an_adapter(whole, tmp_path):
    script = ROOT / "scripts" / "export_hf.py"
    for flags, name, wanted in (
        ([], "model.safetensors", whole / "export"),
        (["--adapter"], "adapter_model.safetensors", whole / "adapter"),
    ):
        command = [sys.executable, str(script), f"--workdir={whole}", f"--out={tmp_path}", *flags]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        found, expected = (hf.read_safetensors(at / name) for at in (tmp_path, wanted))
        assert found.keys() == expected.keys()
        for key in found:
            np.testing.assert_allclose(found[key], expected[key], atol=1e-7)
