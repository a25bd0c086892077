"""Every family against numbers that transformers' own models gave, and what their configs may say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seeded
import snippets
from meshes import mesh_of

from rftjax import grpo, policy
from rftjax.devices import sharding
from rftjax.errors import UserError
from rftjax.learning import update
from rftjax.learning.batching import make_batch
from rftjax.models import FAMILIES, decoder, logical_axes
from rftjax.models.config import FULL, Config, Routing
from rftjax.policy import Policy
from rftjax.sampler import device
from rftjax.sampler.engine import Engine, noise_key
from rftjax.types import SamplingParams, Score, Sequence, TrainState
from rftjax.weights import hf, lora, packed
from rftjax.weights.model_config import exported_fields

DATA = seeded.DATA
EVERY = [*seeded.CONFIGS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """Every family's model."""
    folder = tmp_path_factory.mktemp("families")
    found = {}
    for name in EVERY:
        path = seeded.checkpoint(folder / name, name)
        found[name] = Policy(str(path), *hf.load(path))
    return found


@pytest.mark.parametrize("name", EVERY)
def test_all_logits_equal_those_of_transformers(models: dict[str, Policy], name: str):
    expected = np.load(DATA / f"{name}.npz")["logits"]
    found = np.asarray(models[name].logits(seeded.tokens(name)))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def conversation(model: Policy, prompt: list[int], heat: float, budget: int) -> Sequence:
    """Samples three turns over one cache, between which an environment says five tokens."""
    engine = Engine(model.config, slots=2, max_length=100, prefill_chunk=8)
    engine.set_params(device.sampler_params(model.config, model.params))
    settings = SamplingParams(budget, temperature=heat)
    engine.open((0, 0), prompt, budget, noise_key(0, 0, 0), settings)
    sequence = Sequence()
    sequence.extend(prompt)
    for turn in range(3):
        done = []
        while not done:
            done = engine.step()
        sequence.extend(done[0].tokens, done[0].logprobs, 0)
        if turn < 2:
            sequence.extend([7, 8, 9, 10, 11 + turn])
            engine.extend((0, 0), [7, 8, 9, 10, 11 + turn], budget)
    return sequence


@pytest.mark.parametrize("name", EVERY)
def test_three_turns_over_the_cache_agree_with_one_forward_pass_and_go_on_as_transformers(
    models: dict[str, Policy], name: str
):
    model, prompt = models[name], seeded.tokens(name)[0].tolist()
    expected = np.load(DATA / f"{name}.npz")["continuation"]
    greedy = conversation(model, prompt, 0.0, len(expected))
    assert greedy.tokens[len(prompt) : len(prompt) + len(expected)] == expected.tolist()
    drawn = conversation(model, prompt, 0.8, 12)
    sampled, found = np.asarray(drawn.sampled), np.asarray(drawn.logprobs)
    logprobs_BT = np.asarray(model.logprobs([drawn.tokens], temperature=0.8))
    assert sampled.sum() == 36
    np.testing.assert_allclose(logprobs_BT[0, sampled], found[sampled], atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_an_export_has_the_names_and_values_of_the_checkpoint(
    models: dict[str, Policy], name: str, tmp_path: Path
):
    model = models[name]
    model.export(tmp_path / "out")
    found = hf.read_safetensors(tmp_path / "out" / "model.safetensors")
    before = hf.read_safetensors(Path(model.path) / "model.safetensors")
    assert found.keys() == before.keys()
    assert all(np.array_equal(found[key], before[key]) for key in found)
    config, _, fields = hf.load(tmp_path / "out")
    kind = "deepseek_v3" if name == "kimi_k2" else model.config.family  # as transformers has it
    assert config == dataclasses.replace(model.config, family=kind)
    assert {name: fields[name] for name in model.fields} == model.fields | {
        "model_type": model.fields["model_type"] if name != "kimi_k2" else kind
    }


@pytest.mark.parametrize("name", EVERY)
def test_an_export_in_shards_of_bfloat16_is_read_and_written_again_byte_by_byte(
    models: dict[str, Policy], name: str, tmp_path: Path
):
    model, written = models[name], []
    params, fields = model.params, model.fields
    for turn in ("one", "two"):
        out = hf.save(
            tmp_path / turn, model.config, params, fields, dtype="bfloat16", max_shard_bytes=2e4
        )
        written.append({path.name: path.read_bytes() for path in out.glob("model*")})
        _, params, fields = hf.load(out)
    assert written[0] == written[1]
    index = json.loads(written[0]["model.safetensors.index.json"])["weight_map"]
    assert {*index.values()} == {name for name in written[0] if name.endswith("safetensors")}
    assert len(written[0]) > 3
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), model.params)
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_layers_one_by_one_and_in_a_scan_have_one_gradient(models: dict[str, Policy], name: str):
    config, params = models[name].config, models[name].params
    tokens_BT = jnp.asarray(seeded.tokens(name))
    ones_BT = jnp.ones_like(tokens_BT)
    steps_BT = jnp.broadcast_to(jnp.arange(24), (2, 24))

    def loss(tree: Any) -> jax.Array:
        x = decoder.hidden(config, tree, tokens_BT, steps_BT, ones_BT, 0 * ones_BT)
        return jnp.mean(decoder.logits(config, tree, x.reshape(-1, config.width)) ** 2)

    expected = jax.jit(jax.grad(loss))(params)
    lists = jax.jit(lambda tree: jax.grad(loss)(decoder.unroll(config, tree)))(params)
    found = decoder.roll(config, lists)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), two in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        if path[-1].key != "correction":  # which takes part in a choice alone
            assert np.abs(two).max() > 1e-6, path  # every weight is in use
        np.testing.assert_allclose(one, two, atol=1e-5, err_msg=str(path))


def test_an_update_is_told_how_experts_share_tokens_and_nothing_of_dense_models(
    models: dict[str, Policy],
):
    pack = policy._rows(jnp.asarray(seeded.tokens("deepseek_v3")))
    model = models["deepseek_v3"]
    scores = jax.jit(update.scores, static_argnums=0)
    told = scores(model.config, model.params, None, pack)[2]
    lists = decoder.unroll(model.config, model.params)
    one_by_one = scores(model.config, lists, None, pack)[2]
    for name, most in (("experts/load_max", 12), ("experts/entropy", np.log(12))):
        assert 0 < told[name] <= most
        np.testing.assert_allclose(one_by_one[name], told[name], rtol=1e-5)
    assert told["experts/load_max"] >= 1
    dense = models["qwen3"]
    shapes = jax.eval_shape(
        lambda tree: update.scores(dense.config, tree, None, pack)[2], dense.params
    )
    assert shapes == {}


def test_adapters_of_latent_attention_and_experts_are_merged_and_written_for_peft(
    models: dict[str, Policy], tmp_path: Path
):
    model = models["deepseek_v3"]
    config, params, rng = model.config, model.params, np.random.default_rng(0)
    tokens_BT = jnp.asarray(seeded.tokens("deepseek_v3"))
    ones_BT = jnp.ones_like(tokens_BT)
    steps_BT = jnp.broadcast_to(jnp.arange(24), (2, 24))
    pairs = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32),
        lora.init(config, rank=2),
    )
    assert {name for part in pairs["experts_1"].values() for name in part} == set(lora.TARGETS) - {
        "query",
        "key",
        "value",
    }

    @jax.jit
    def run(params: Any, adapters: Any = None) -> jax.Array:
        tail = (tokens_BT, steps_BT, ones_BT, 0 * ones_BT)
        return decoder.hidden(config, params, *tail, lora=adapters)

    added = run(params, pairs)
    assert np.abs(added - run(params)).max() > 0.1
    np.testing.assert_allclose(added, run(device.merge(params, pairs)), atol=1e-4)
    lora.save_peft(tmp_path / "peft", config, pairs, alpha=2.0)
    names = hf.read_safetensors(tmp_path / "peft" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.experts.7.down_proj.lora_A.weight"
    np.testing.assert_array_equal(
        names[stem], pairs["experts_1"]["mlp"]["experts_down"]["a"][0, 7].T
    )
    again = lora.load_peft(tmp_path / "peft", config, alpha=2.0)
    assert jax.tree.structure(again) == jax.tree.structure(pairs)
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(pairs), strict=True):
        np.testing.assert_array_equal(one, two)


def test_adapters_in_a_model_with_experts_are_named_so_that_peft_finds_each(
    models: dict[str, Policy], tmp_path: Path
):
    config = models["deepseek_v3"].config
    pairs = lora.init(config, rank=2, targets="output,gate,experts_gate")
    lora.save_peft(tmp_path / "peft", config, pairs, alpha=2.0)
    fields = hf.read_json(tmp_path / "peft" / "adapter_config.json")
    experts = {f"experts.{at}.{part}_proj" for at in range(12) for part in ("gate", "up", "down")}
    assert {*fields["target_modules"]} == {"o_proj", *experts}
    assert fields["target_parameters"] == [
        "mlp.gate_proj.weight",
        "mlp.shared_experts.gate_proj.weight",
    ]
    names = hf.read_safetensors(tmp_path / "peft" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.experts.7.down_proj.lora_"
    assert (names[f"{stem}A.weight"].shape, names[f"{stem}B.weight"].shape) == ((2, 20), (32, 2))
    assert not names[f"{stem}A.weight"].any()
    again = lora.load_peft(tmp_path / "peft", config, alpha=2.0)
    assert jax.tree.structure(again) == jax.tree.structure(pairs)


def test_adapters_of_experts_that_are_stored_fused_are_those_of_peft(
    models: dict[str, Policy], tmp_path: Path
):
    config, params = models["gpt_oss"].config, models["gpt_oss"].params
    rng, out = np.random.default_rng(0), tmp_path / "peft"
    pairs = lora.init(config, rank=2, targets="query,experts_up,experts_down")
    pairs = jax.tree.map(lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype("float32"), pairs)
    lora.save_peft(out, config, pairs, alpha=2.0)
    before, after = (
        dict(packed.fused(config, tree)) for tree in (params, device.merge(params, pairs))
    )
    found = hf.read_safetensors(out / "adapter_model.safetensors")
    stem = "model.layers.2.mlp.experts."
    for part, place in (("gate_up_proj", "base_layer."), ("down_proj", "")):
        a, b = (found[f"base_model.model.{stem}{place}lora_{one}.weight"] for one in "AB")
        factors = a.reshape(7, -1, a.shape[1]), b.reshape(b.shape[0], -1, 7)
        added = np.einsum("eri,ore->eio", *factors)  # as peft adds them
        np.testing.assert_allclose(added, after[stem + part] - before[stem + part], atol=1e-6)
    again = lora.load_peft(out, config, alpha=2.0)
    assert jax.tree.structure(again) == jax.tree.structure(pairs)
    jax.tree.map(np.testing.assert_array_equal, again, pairs)
    fields = hf.read_json(out / "adapter_config.json")
    key = "mlp.experts.gate_up_proj"
    assert fields["target_parameters"] == [key, "mlp.experts.down_proj"]
    assert (fields["rank_pattern"], fields["alpha_pattern"]) == ({key: 4}, {key: 4.0})
    hf.write_json(out / "adapter_config.json", fields | {"alpha_pattern": {}})
    with pytest.raises(UserError, match="alpha_pattern={} is not implemented"):
        lora.load_peft(out, config, alpha=2.0)
    hf.write_json(out / "adapter_config.json", fields)
    found[f"base_model.model.{stem}base_layer.lora_B.weight"][:] = 1.0
    hf.write_safetensors(out / "adapter_model.safetensors", found)
    with pytest.raises(UserError, match="lora_B.weight mixes gate and up of experts"):
        lora.load_peft(out, config, alpha=2.0)


@pytest.mark.parametrize("name", EVERY)
def test_fresh_parameters_have_the_names_and_shapes_of_the_table(
    models: dict[str, Policy], name: str
):
    config = models[name].config
    fresh = jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))
    stored = jax.tree.map(lambda leaf: leaf.shape, models[name].params)
    assert jax.tree.map(lambda leaf: leaf.shape, fresh) == stored
    axes = FAMILIES[config.family].LOGICAL_AXES
    stacks = {stack.name for stack in config.stacks}
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
        names = tuple(key.key for key in path)
        assert len(axes[names[-2:]]) == leaf.ndim - (names[0] in stacks), names


def as_published(name: str) -> str:
    """The name of a tensor as hub checkpoints of models that see have it: before transformers 4.52."""
    for now, then in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(now):
            return then + name.removeprefix(now)
    return name.removeprefix("model.")


@pytest.mark.parametrize("renamed", [str, as_published])
@pytest.mark.parametrize("name", [*seeded.VISION])
def test_the_text_model_of_a_model_that_sees_is_loaded_and_exported_alone(
    name: str, renamed: Any, tmp_path: Path
):
    path = seeded.checkpoint(tmp_path / "whole", name, renamed)
    expected = np.load(DATA / f"{name}.npz")["logits"]
    model = Policy(str(path), *hf.load(path))
    np.testing.assert_allclose(model.logits(seeded.tokens(name)), expected, atol=1e-4)
    model.export(tmp_path / "out")
    alone, fields = hf.load(tmp_path / "out")[0], hf.read_fields(tmp_path / "out")
    assert alone == model.config and "text_config" not in fields
    assert fields["architectures"][0].endswith("ForCausalLM")


@pytest.mark.parametrize("name", ["olmo2", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_the_logits_on_a_mesh_are_those_of_one_device(models: dict[str, Policy], name: str):
    mesh = mesh_of(2, 2, 2)
    model = models[name]
    placed = sharding.shard_tree(mesh, logical_axes(model.config), model.params)
    shared = Policy(model.path, model.config, placed, model.fields, mesh)
    tokens = seeded.tokens(name)
    np.testing.assert_allclose(shared.logits(tokens), model.logits(tokens), atol=3e-5)


def two_steps(model: Policy, mesh: jax.sharding.Mesh) -> tuple[list[list[int]], Any, list[float]]:
    """Samples two groups, and updates on them twice; returns the tokens, the new weights and the losses."""
    config = model.config
    axes = logical_axes(config)
    placed = sharding.shard_tree(mesh, axes, jax.tree.map(jnp.array, model.params))
    prompts = [row[:9].tolist() for row in seeded.tokens("prompts")]
    shared = Policy(model.path, config, placed, model.fields, mesh)
    sampled = shared.sample(prompts, samples=4, max_new_tokens=8, stop=[], seed=3)
    for index, one in enumerate(sampled):
        one.score, one.advantage = Score(0.0), float(index % 4) - 1.5
    batch = make_batch(sampled, rows=8, max_length=32, pack_tokens=64, pack_rows=8)
    optimizer = optax.sgd(0.3)  # Adam would make noise of gradients that are 0 on paper
    step = sharding.shard_tree(mesh, axes, jnp.zeros((), jnp.int32))
    opt_state = sharding.shard_tree(mesh, axes, optimizer.init(placed))
    state = TrainState(step, placed, {}, opt_state)
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    loss = grpo.LossSettings.of(grpo.preset_fields("grpo"))
    apply = update.make_update(config, optimizer, loss, shardings=where, mesh=mesh)
    losses = []
    for _ in range(2):
        state, metrics = apply(state, sharding.put_batch(mesh, batch))
        losses.append(float(metrics["loss"]))
    return [one.sequences[0].tokens for one in sampled], jax.device_get(state.trainable), losses


CONTEXTS = [
    {"context": 2},
    {"context": 4},
    {"context": 8},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"expert": 2, "context": 2, "tensor": 2},
    {"data": 2, "expert": 2, "context": 2},
]


EXPERTS_DIVIDED = [
    {"expert": 2},
    {"expert": 4},
    {"expert": 8},
    {"data": 2, "expert": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"fsdp": 2, "expert": 4},
]


DIVIDED = [
    *((name, CONTEXTS) for name in ("qwen3", "gemma3", "gpt_oss", "qwen3_moe", "deepseek_v3")),
    *((name, EXPERTS_DIVIDED) for name in ("smollm3", "gpt_oss", "qwen3_moe", "deepseek_v3")),
]


@pytest.mark.skipif(not snippets.SLOW, reason=snippets.WHY)
@pytest.mark.parametrize(("name", "meshes"), DIVIDED)
def test_two_steps_with_divided_rows_or_experts_are_those_of_one_device(
    models: dict[str, Policy], name: str, meshes: list[dict[str, int]]
):
    alone = two_steps(models[name], mesh_of())
    for sizes in meshes:
        shared = two_steps(models[name], mesh_of(**sizes))
        assert alone[0] == shared[0], sizes
        np.testing.assert_allclose(alone[2], shared[2], atol=1e-5, err_msg=str(sizes))
        for one, two in zip(jax.tree.leaves(alone[1]), jax.tree.leaves(shared[1]), strict=True):
            np.testing.assert_allclose(one, two, atol=2e-5, err_msg=str(sizes))


@pytest.mark.skipif(not snippets.SLOW, reason=snippets.WHY)
@pytest.mark.parametrize("name", EVERY)
def test_two_steps_on_a_mesh_of_eight_are_those_of_one_device(models: dict[str, Policy], name: str):
    alone, shared = (two_steps(models[name], mesh_of(*shape)) for shape in ((1, 1, 1), (2, 2, 2)))
    assert alone[0] == shared[0]
    np.testing.assert_allclose(alone[2], shared[2], atol=1e-5)
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone[1], models[name].params)
    assert np.median(jax.tree.leaves(changed)) > 1e-3
    for one, two in zip(jax.tree.leaves(alone[1]), jax.tree.leaves(shared[1]), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


# As they are published: old fields, and what has a default left out.
PUBLISHED = {
    "Qwen3-30B-A3B": """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
    "gpt-oss-20b": """{"architectures": ["GptOssForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
        "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880, "layer_types":
        ["sliding_attention", "full_attention"], "max_position_embeddings": 131072, "model_type": "gpt_oss",
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 2, "num_key_value_heads": 8,
        "num_local_experts": 32, "output_router_logits": false, "pad_token_id": 199999, "quantization_config":
        {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
        "lm_head"], "quant_method": "mxfp4"}, "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0,
        "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": false}, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
        "swiglu_limit": 7.0, "tie_word_embeddings": false, "transformers_version": "4.55.0.dev0",
        "use_cache": true, "vocab_size": 201088}""",
    "DeepSeek-V3": """{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
        "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1,
        "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
        "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280}""",
    "Kimi-K2-Instruct": """{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "aux_loss_alpha": 0.001,
        "bos_token_id": 163584, "eos_token_id": 163585, "ep_size": 1, "first_k_dense_replace": 1,
        "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 131072, "model_type": "kimi_k2",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384,
        "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "pretraining_tp": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config":
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": true, "tie_word_embeddings": false,
        "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.48.3",
        "use_cache": true, "v_head_dim": 128, "vocab_size": 163840}""",
    "Qwen3-0.6B": """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
    "Mistral-7B-v0.1": """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
        "vocab_size": 32000}""",
    "SmolLM3-3B": """{"architectures": ["SmolLM3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": false,
        "model_type": "smollm3", "no_rope_layer_interval": 4, "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 5000000.0, "sliding_window": null, "torch_dtype": "bfloat16",
        "use_cache": false, "use_sliding_window": false, "vocab_size": 128256}""",
    "OLMo-2-0425-1B": """{"architectures": ["Olmo2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "olmo2",
        "num_attention_heads": 16, "num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 100277,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 500000, "tie_word_embeddings": false,
        "torch_dtype": "float32", "use_cache": false, "vocab_size": 100352}""",
    "gemma-3-1b-it": """{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 262144}""",
    "gemma-3-4b-it": """{"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02,
        "mm_tokens_per_image": 256, "model_type": "gemma3", "text_config": {"hidden_size": 2560,
        "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
        "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"}}""",
}


@pytest.mark.parametrize("name", [*PUBLISHED])
def test_published_configs_are_read(name: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(PUBLISHED[name])
    fields = hf.read_fields(tmp_path)
    config = hf.read_config(fields)
    assert (config.width, config.layers) == (fields["hidden_size"], fields["num_hidden_layers"])
    again = hf.read_config(exported_fields(fields, config, "float32"))
    assert dataclasses.replace(again, family=config.family) == config
    if name == "gemma-3-4b-it":
        assert (config.vocab, config.heads, config.channels, config.tied) == (262208, 8, 256, True)
        assert (config.rope.theta, config.rope.factor, config.rope.kind) == (1e6, 8.0, "linear")
        assert config.ropes[0].theta == 1e4 and config.ropes[5] == config.rope
        assert config.windows[:6] == (1024,) * 5 + (FULL,)
    if name == "gpt-oss-20b":
        bare = {
            key: one for key, one in fields.items() if "rope" not in key and key != "layer_types"
        }
        assert hf.read_config(bare) == config and config.windows == (128, FULL)
    if name == "DeepSeek-V3":
        assert [(stack.first, stack.count, stack.sparse) for stack in config.stacks] == [
            (0, 3, False), (3, 58, True),
        ]  # fmt: skip
        # 0.1 ln(40) + 1, twice, on 1 / sqrt(128 + 64), as DeepSeek's own code.
        assert abs(config.query_scale - 1.3688879454**2 * 192**-0.5) < 1e-8
    if name == "SmolLM3-3B":
        assert [rope.kind for rope in config.ropes[:4]] == ["default"] * 3 + ["none"]


@pytest.mark.parametrize(
    ("name", "fields", "rule"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types="),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("ministral", {"layer_types": ["full_attention"] * 3}, "for each of the 4 layers"),
        ("ministral", {"layer_types": ["linear_attention"] * 4}, "must name one of"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers=.*each of the 4 layers"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"hidden_activation": "quick_gelu"}, "hidden_activation='quick_gelu'"),
        ("qwen3", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ("qwen3", {"num_experts": 8}, "num_experts=8"),
        ("qwen3_moe", {"num_experts_per_tok": 13}, "num_experts_per_tok=13: must be from 1 to 12"),
        ("qwen3_moe", {"num_local_experts": 8}, "num_experts=12 and num_local_experts=8"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "swiglu_limit=0.0: must be above 0"),
        ("gpt_oss", {"experts_per_token": 2}, "num_experts_per_tok=3 and experts_per_token=2"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("deepseek_v3", {"n_group": 5}, "12 experts in n_group=5"),
        ("deepseek_v3", {"num_experts_per_tok": 7}, "num_experts_per_tok=7: must be from 1 to 6"),
        ("deepseek_v3", {"n_group": 12}, "n_group=12: a group needs two experts"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2: must be 4"),
        ("deepseek_v3", {"head_dim": 16}, "head_dim=16: must be 8"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek_v3", {"auto_map": {"AutoModel": "code.Mine"}}, "auto_map=.*never run"),
        ("kimi_k2", {"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
        ("qwen3", {"head_dim": 7}, "head_dim=7: must be even"),
        (
            "qwen3",
            {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 4},
            "layer_types=.*use_sliding_window=False",
        ),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0: must be above 0"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0: must be above 0"),
        ("olmo2", {"rms_norm_eps": None}, "rms_norm_eps=None: must be a number"),
        (
            "gemma3",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "rope_parameters=.*a section for each of full_attention, sliding_attention",
        ),
        ("deepseek_v3", {"qk_rope_head_dim": 5}, "qk_rope_head_dim=5: must be even"),
        ("deepseek_v3", {"n_group": None}, "n_group=None: must be a number"),
    ],
)
def test_what_a_family_does_not_implement_is_refused_by_name(
    name: str, fields: dict[str, Any], rule: str
):
    with pytest.raises(UserError, match=rf"config\.json: .*{rule}"):
        hf.read_config(seeded.CONFIGS[name] | fields)


def test_what_is_absent_or_without_effect_is_read_as_by_transformers():
    def read(name: str, **fields: Any) -> Config:
        given = {key: one for key, one in (seeded.CONFIGS[name] | fields).items() if one != ""}
        return hf.read_config(given)

    moe = read("qwen3_moe", num_key_value_heads="", num_experts=0)
    assert (moe.kv_heads, moe.stacks, moe.routing) == (4, (("dense_0", 0, 4, False),), Routing())
    assert read("qwen3", num_key_value_heads="", num_attention_heads=64).kv_heads == 32
    chosen = read("gpt_oss", num_experts_per_tok="", experts_per_token=4).routing.chosen
    with pytest.raises(UserError, match="num_experts_per_tok=4 and experts_per_token=2"):
        read("gpt_oss", num_experts_per_tok="", experts_per_token=2)
    plain, idle = {"rope_type": "default", "rope_theta": 9.0}, {"factor": 8.0, "mscale_all_dim": 1}
    one, two = (read("deepseek_v3", rope_parameters=rope) for rope in (plain, plain | idle))
    assert chosen == 4 and one == two and one.query_scale == 17**-0.5


def test_an_export_says_what_transformers_4_does_not_take_from_other_fields():
    def exported(name: str, **fields: Any) -> dict[str, Any]:
        given = seeded.CONFIGS[name] | fields
        found = exported_fields(given, hf.read_config(given), "float32")
        assert hf.read_config(found) == hf.read_config(given)
        return found

    moe = exported("qwen3_moe", num_experts=None, num_local_experts=12)
    oss = exported("gpt_oss", num_local_experts=None, num_experts=7)
    assert (moe["num_experts"], oss["num_local_experts"]) == (12, 7)
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 9.0}
    mistral = exported(
        "mistral", head_dim=None, num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope
    )
    assert mistral["head_dim"] == 8
    assert mistral["rope_scaling"]["original_max_position_embeddings"] == 64
    assert "head_dim" not in exported("deepseek_v3")


def test_a_model_that_sees_around_an_unknown_text_model_is_refused(tmp_path: Path):
    fields = {"model_type": "llava", "text_config": {"model_type": "mamba"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="'llava' with a text_config of model_type='mamba'"):
        hf.read_fields(tmp_path)


def test_a_model_that_sees_whose_config_has_no_section_for_text_is_read(tmp_path: Path):
    fields = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 2048, "image_token_id": 151655,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 128000,
        "max_window_layers": 70, "model_type": "qwen2_5_vl", "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"}, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "video_token_id": 151656,
        "vision_config": {"depth": 32}, "vision_end_token_id": 151653, "vision_start_token_id": 151652,
        "vision_token_id": 151654, "vocab_size": 151936,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = hf.read_config(hf.read_fields(tmp_path))
    assert (config.family, config.rope.theta, config.rope.kind) == ("qwen2", 1e6, "default")
    assert config.tied and not config.windowed


def test_the_tensors_of_a_model_that_sees_may_have_the_names_of_a_text_model(tmp_path: Path):
    def bare(name: str) -> str:
        """As Qwen2-VL and Qwen2.5-VL are published."""
        name = name.replace("model.language_model.", "model.")
        return name.replace("model.visual.", "visual.")

    paths = [seeded.checkpoint(tmp_path / how.__name__, "qwen2_5_vl", how) for how in (str, bare)]
    names = hf.read_safetensors(paths[1] / "model.safetensors")
    assert {name.partition(".")[0] for name in names} == {"model", "visual", "lm_head"}
    one, two = (hf.load(path)[1] for path in paths)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_the_text_model_of_qwen3_vl_moe_is_qwen3_moe_whose_weights_sum_to_1(tmp_path: Path):
    inner = {**seeded.CONFIGS["qwen3_moe"], "norm_topk_prob": False, "use_sliding_window": False}
    rope = {"rope_theta": 9.0, "rope_type": "default", "mrope_section": [2, 2, 2]}
    seeing = inner | {"model_type": "qwen3_vl_moe_text", "rope_parameters": rope}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_vl_moe", "text_config": seeing})
    )
    alone = inner | {"norm_topk_prob": True, "rope_parameters": {"rope_theta": 9.0}}
    expected = hf.read_config(alone | {"tie_word_embeddings": True})
    assert hf.read_config(hf.read_fields(tmp_path)) == expected and expected.routing.normalised


def test_how_a_model_that_sees_is_quantised_counts_for_its_text_model(tmp_path: Path):
    fields = seeded.VISION["mistral3"] | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="quantization_config="):
        hf.read_config(hf.read_fields(tmp_path))
