import json
import math
from pathlib import Path

import pytest

from rftjax import config as configs
from rftjax import modes
from rftjax.config.flags import load_spec
from rftjax.devices.accelerators import ACCELERATORS
from rftjax.errors import UserError
from rftjax.run import arithmetic, memory, plan
from rftjax.run.build import build, complete_config
from rftjax.weights.model_config import read_config

ROOT = Path(__file__).parents[1]
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1024,
    "norm_topk_prob": True,
}
LAYER = 1024 * 1024 * 2 + 1024 * 512 * 2 + 3 * 1024 * 4096
ENTRIES = 2 * 32000 * 1024 + 8 * (LAYER + 2 * 1024) + 1024


@pytest.fixture
def config(tmp_path):
    """A spec whose model is a config.json and whose rows and evaluator do not exist."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    config = configs.base_config()
    config.model.path, config.model.dtype, config.steps = str(tmp_path), "bfloat16", 10
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.rollout.max_length, config.sampler.max_new_tokens = 1024, 256
    return config


def planned(config, devices, name="H100"):
    complete = complete_config(config, devices=devices, needs=("model.path",))
    return plan.plan(complete, plan.open_shape(complete), ACCELERATORS[name], devices)


def test_bytes_are_those_of_parameters_optimizer_gradient_and_cache(config):
    one, four = planned(config, 1), planned(config, 4)
    assert arithmetic.entries(plan.open_shape(config).config) == ENTRIES
    assert one.held["trained parameters"] == 4 * ENTRIES
    assert one.updating["gradient, and that of a micro-batch"] == 8 * ENTRIES
    assert one.held["optimizer"] == pytest.approx(8 * ENTRIES, rel=1e-6)
    gains = 4 * (8 * 2 + 1) * 1024  # norms are not divided
    assert four.held["trained parameters"] == 4 * ENTRIES // 4 - gains // 4 + gains
    assert four.sampling["sampler's weights"] == one.sampling["sampler's weights"]
    slots = config.sampler.slots
    assert one.sampling[f"cache of {slots} rows of 1024 tokens"] == slots * 1024 * 8 * 2 * 512 * 2
    assert (
        four.sampling[f"cache of {slots // 4} rows of 1024 tokens"]
        == slots // 4 * 1024 * 8 * 2 * 512 * 2
    )


@pytest.mark.parametrize("field", ["environment", "agent"])
def test_conversations_that_wait_have_rows_of_the_cache(config, field):
    config[field] = "module:name"
    found = planned(config, 1).sampling
    assert f"cache of {2 * config.sampler.slots} rows of 1024 tokens" in found


def test_the_plan_of_the_devices_at_hand_is_what_the_check_says_of_them(config, tiny_dir, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2"}\n')
    (tmp_path / "own.py").write_text("def evaluate(task, trajectory):\n    return 1.0\n")
    config.model.path, config.tasks.train = str(tiny_dir), str(tmp_path / "rows.jsonl")
    config.evaluator = f"{tmp_path / 'own.py'}:evaluate"
    config.rollout.max_length, config.sampler.max_new_tokens = 32, 8
    config.batch.pack_tokens, config.sampler.slots = 64, 8
    with build(complete_config(config), tmp_path / "run", read_ahead=False) as parts:
        told = memory.estimate(parts)
    found = planned(config, 8)
    for name in ("trained parameters", "optimizer"):
        assert found.held[name] == told[name]
    assert found.sampling["sampler's weights"] == told["sampler's weights"]


def test_operations_and_bytes_make_the_seconds(config):
    found, slow = planned(config, 1), planned(config, 1, "v5e")
    chip = ACCELERATORS["H100"]
    prompts, group, prompt, new = config.batch.prompts, config.batch.group_size, 768, 256
    tokens, sampled = prompts * (prompt + group * new), prompts * group * new
    pairs = prompts * (prompt**2 / 2 + group * (1024**2 - prompt**2) / 2)
    forward = 2 * 8 * LAYER * tokens + 2 * 32000 * 1024 * sampled + 4 * pairs * 8 * 1024
    assert found.seconds["update"] == pytest.approx(3 * forward / (0.4 * chip.operations))
    assert found.tokens == sampled
    [decode] = [title for title in found.seconds if title.startswith("decode")]
    slots = min(config.sampler.slots, prompts * group)
    assert f"{-(-sampled // slots):,} steps" in decode
    used = (768 + 128) / 1024
    weights, cache = list(found.sampling.values())[:2]
    read = (weights + used * cache) / (0.6 * chip.bandwidth)
    assert found.seconds[decode] == pytest.approx(-(-sampled // slots) * read)
    ratio = chip.operations / ACCELERATORS["v5e"].operations
    assert slow.seconds["update"] == pytest.approx(ratio * found.seconds["update"])


def test_recomputing_activations_costs_a_pass_and_saves_layers(config):
    kept = planned(config, 1)
    config.model.remat = "layer"
    again = planned(config, 1)
    assert again.seconds["update"] == pytest.approx(4 / 3 * kept.seconds["update"])
    title = next(title for title in kept.updating if title.startswith("activations"))
    assert again.updating[title] < 0.5 * kept.updating[title]


def test_weights_that_are_divided_cross_the_links(config):
    assert "links between devices" not in planned(config, 1).seconds
    config.batch.pack_tokens = config.rollout.max_length
    full = planned(config, 2)
    moved = full.seconds["links between devices"] * 0.7 * ACCELERATORS["H100"].link
    tokens = config.batch.prompts * (768 + config.batch.group_size * 256)
    assert moved == pytest.approx(3 * -(-tokens // 2048) * ENTRIES * 2 / 2)


def test_devices_of_a_context_keep_and_move_their_part_of_the_tokens(config):
    config.rollout.max_length = config.batch.pack_tokens = 4096
    config.model.remat = "layer"
    one = planned(config, 1, "v5e")
    config.mesh.fsdp, config.mesh.context = 1, 4
    four = planned(config, 4, "v5e")
    of_layers = "activations of {} tokens"
    assert four.updating[of_layers.format(1024)] == one.updating[of_layers.format(4096)] / 4
    keys = 4 * 4096 * 2 * 2 * 512
    assert four.updating["keys and values of whole rows"] == keys
    cache = f"cache of {config.sampler.slots} rows of 4096 tokens"
    assert four.sampling[cache] == one.sampling[cache] / 4
    assert four.held["trained parameters"] < 1.01 * one.held["trained parameters"] / 4
    moved = four.seconds["links between devices"] * 0.7 * ACCELERATORS["v5e"].link
    tokens = config.batch.prompts * (4096 - 256 + config.batch.group_size * 256)
    weights = 3 * -(-tokens // 4096) * ENTRIES * 2 * 3 / 4
    # Each of them gets what the three others have.
    assert moved == pytest.approx(weights + 3 * 8 * 2 * 512 * 2 * tokens * 3 / 4)


def test_the_fewest_devices_that_hold_the_job_are_found(config):
    lines = plan.report(config, "v5e", 0, 0.0)
    assert (
        "mesh        data=1, fsdp=1, expert=1, context=1, tensor=1: 1 v5e (the fewest that hold it)"
        in lines[1]
    )
    config.rollout.max_length, config.sampler.slots = 4096, 512
    lines = plan.report(config, "v5e", 0, 2.0)
    count = int(lines[1].partition(": ")[2].split()[0])
    assert count > 1 and any("GiB of 14.7 that can be used: fits" in line for line in lines)
    assert planned(config, count // 2, "v5e").peak > 16 * 2**30 * plan.USABLE
    cost = next(line for line in lines if line.startswith("cost"))
    assert f"at {2 * count:,.2f} an hour" in cost


@pytest.mark.parametrize(("slots", "together"), [(512, False), (1024, True)])
def test_what_does_not_fit_is_told_with_fields_that_help_when_followed(config, slots, together):
    config.rollout.max_length, config.sampler.slots = 4096, slots
    lines = plan.report(config, "v5e", 1, 0.0)
    assert any(line.endswith("DOES NOT FIT") for line in lines)
    helps = [line.removeprefix("helps       ") for line in lines if line.endswith("GiB, enough")]
    assert helps and helps[0].startswith("together ") == together
    words, _, peak = helps[0].removeprefix("together ").partition(": ")
    fields, _, devices = words.partition(" on ")
    for word in fields.split(", "):
        field, _, value = word.partition("=")
        part, name = field.split(".")
        kind = type(config[part][name])
        config[part][name] = value == "True" if kind is bool else kind(value)
    found = planned(config, int(devices.split()[0]) if devices else 1, "v5e")
    assert f"{found.peak / 2**30:.2f} GiB, enough" == peak
    assert found.peak <= 16 * 2**30 * plan.USABLE


@pytest.mark.parametrize(
    "mesh", [{"data": -1, "expert": 4}, {"data": 1, "expert": -1}, {"data": 2, "expert": 2}]
)
def test_what_helps_keeps_the_experts_of_the_mesh(config, tmp_path, mesh):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | MOE))
    config.mesh.fsdp, config.rollout.max_length, config.sampler.slots = 1, 4096, 4096
    config.mesh.update(mesh)
    lines = plan.report(config, "v5e", 4, 0.0)
    assert any(line.endswith("DOES NOT FIT") for line in lines)
    helps = [line.removeprefix("helps       ") for line in lines if line.startswith("helps")]
    assert any(line.startswith("mesh.tensor=8 on ") for line in helps)
    found = {line.partition("=")[0] for line in helps}
    assert ("mesh.fsdp" in found) == (mesh["data"] == 2)


def test_each_device_counts_its_own_experts_and_the_rows_that_it_exchanges(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | MOE))
    config.mesh.fsdp, config.mesh.data, config.mesh.expert = 1, 1, 4
    experts = 8 * 32 * 3 * 1024 * 1024
    dense = arithmetic.entries(plan.open_shape(config).config) - experts
    config.batch.pack_tokens = config.rollout.max_length
    tokens = config.batch.prompts * (768 + config.batch.group_size * 256)
    found = planned(config, 4).seconds["links between devices"]
    # Gathered twice and scattered; each device has its experts and their gradient alone.
    shared = 3 * -(-tokens // 4096) * dense * 2 * 3 / 4
    rows = 4 * 8 * 4 * 1024 * 2 * 3 / 4 * tokens / 4
    assert found * 0.7 * ACCELERATORS["H100"].link == pytest.approx(shared + rows)
    config.mesh.expert = 2
    for fsdp, again in ((2, 0), (32, experts * 4 / 64)):  # 32 experts are not divided over 64
        config.mesh.fsdp = fsdp
        found = planned(config, 2 * fsdp).updating["experts, as they are gathered"]
        assert found == again
    title, of = "experts, filled up to whole tiles", {}
    for shards in (1, 4):  # 1,024 over 16 devices: half a tile
        config.mesh.fsdp, config.mesh.expert, config.mesh.tensor = 1, shards, 16
        of[shards] = planned(config, 16 * shards, "v5e").sampling[title]
    assert of[4] == of[1] / 4


def test_devices_without_an_arrangement_cost_only_the_compiler_s_lines(config, monkeypatch):
    monkeypatch.setattr(plan.targets, "missing", lambda kind: "")
    lines = plan.report(config, "v5e", 24, 0.0, compiles=True)
    assert any(line.startswith("peak") for line in lines)
    assert lines[-1].startswith("compiler    not asked: --devices=24: TPUs of kind v5e stand in")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "A9000"}, "--device=A9000: must be one of H100, H200"),
        ({"devices": 3, "fsdp": 2}, "mesh"),
        ({"devices": -2}, "--devices=-2: must be a number of devices, or 0"),
        ({"price": -1.0}, "--price=-1.0: must be the price of a device hour"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(config, change, message):
    config.mesh.fsdp = change.get("fsdp", -1)
    with pytest.raises(UserError, match=message):
        name, devices = change.get("name", "H100"), change.get("devices", 0)
        plan.report(config, name, devices, change.get("price", 0.0))


def test_the_arithmetic_is_within_a_tenth_of_what_xla_counts(tmp_path):
    """Dense, MoE and latent models, update and decode, TPU and GPU: compiled by scripts/bench/compile_for.py."""
    made = json.loads((ROOT / "tests" / "data" / "compiled.json").read_text())
    for name, fields in made["models"].items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    far = []
    for case in made["cases"]:
        config = configs.base_config()
        config.model.path, config.model.dtype = str(tmp_path / case["model"]), "bfloat16"
        config.model.remat, config.lora.rank = case["remat"], case["lora"]
        config.rollout.max_length = config.batch.pack_tokens = case["length"]
        config.sampler.max_new_tokens = case["length"] // 2
        config.sampler.slots = case["slots"]
        for axis, size in case["mesh"].items():
            config.mesh[axis] = size
        found = planned(config, math.prod(case["mesh"].values()), case["device"])
        ratio = found.programs[case["program"]] / case["bytes"]
        far += (
            [] if 0.9 < ratio < 1.1 else [(case["model"], case["device"], case["program"], ratio)]
        )
    assert not far and len(made["cases"]) >= 16


def test_the_mode_needs_no_workdir_no_rows_and_no_weights(config, capsys):
    modes.run("plan", config, {}, None, device="H100", devices=2, price=1.5)
    out = capsys.readouterr().out
    assert "2 H100; the numbers of NVIDIA's data sheet" in out and "\ncost" in out


@pytest.mark.parametrize(
    ("name", "billions", "used"), [("deepseek_v3", 671.03, 36.62), ("kimi_k2", 1026.41, 31.69)]
)
def test_frontier_models_are_planned_from_their_published_configs(name, billions, used):
    config = load_spec(f"{ROOT}/experiments/{name}.py")
    lines = plan.report(config, "H200", 0, 0.0)
    assert f"{billions} billion parameters, {used} billion used by a token" in lines[0]
    assert any(line.startswith("peak") and line.endswith("fits") for line in lines)
    debug = load_spec(f"{ROOT}/experiments/{name}.py:full,debug")
    assert not debug.lora.rank and arithmetic.entries(plan.open_shape(debug).config) < 1e6


def test_a_token_uses_its_own_experts_and_decoding_reads_those_of_its_rows(tmp_path):
    """DeepSeek V3 by its published config: 671 billion parameters, 37 billion of them used by a token."""
    fields = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1,
        "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
        "norm_topk_prob": True, "tie_word_embeddings": False, "max_position_embeddings": 4096,
    }  # fmt: skip
    model = read_config(fields, "bfloat16")
    assert (
        round(arithmetic.entries(model) / 1e9) == 671
        and round(arithmetic.active_entries(model) / 1e9) == 37
    )
    one, many = arithmetic.read_share(model, 1), arithmetic.read_share(model, 4096)
    active = (
        arithmetic.active_entries(model) + model.vocab * model.width
    )  # and the embedding's table
    assert one == pytest.approx(active / arithmetic.entries(model), rel=1e-3)
    assert many == pytest.approx(1.0)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = configs.base_config()
    config.model.path, config.model.dtype = str(tmp_path), "bfloat16"
    config.mesh.data, config.mesh.tensor, config.lora.rank = -1, 32, 8
    lines = plan.report(config, "v5p", 32, 0.0)
    assert "35,136 cached numbers a token" in lines[0]  # 61 layers of 512 and 64


def test_what_lies_in_the_hosts_memory_is_told_apart(config):
    plain = planned(config, 4)
    for offload, rounding, weights, read in (
        ("moments", "", 0, 0),
        ("all", "", 4, 2),
        ("all", "stochastic", 2, 2),
    ):
        config.optim.offload, config.optim.rounding = offload, rounding
        found = planned(config, 4)
        gains = (8 * 2 + 1) * 1024
        matrices = (ENTRIES - gains) // 4  # on a device
        assert found.offloaded["optimizer"] == 8 * matrices
        assert found.offloaded["trained parameters"] == weights * matrices
        assert found.held["optimizer"] == plain.held["optimizer"] - 8 * matrices
        own = 0 if weights else 4 * matrices
        assert found.held["trained parameters"] == own + 4 * gains
        fetched = found.updating["weights from the host's memory, as they are read"]
        assert fetched == read * matrices
        same = "gradient, and that of a micro-batch"
        assert found.updating[same] == plain.updating[same]
        assert found.peak < plain.peak
    lines = plan.report(config, "H100", 4, 0.0)
    assert any("host " in line and f"optimizer, {memory.HOST}" in line for line in lines)
