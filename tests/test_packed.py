"""Experts fused into one tensor, and weights in 8 bits with a scale a block, against the plain tensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seeded

from rftjax.errors import UserError
from rftjax.models import decoder
from rftjax.weights import hf
from rftjax.weights.packed import block_of
from rftjax.weights.shards import write_safetensors

FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 8],
}  # fmt: skip
NAME = "deepseek_v3"


@pytest.fixture(scope="module")
def fused() -> dict[str, np.ndarray]:
    """The tensors of a checkpoint as transformers has them in memory."""
    stored = json.loads((seeded.DATA / f"{NAME}.json").read_text())
    return seeded.tensors({key: tuple(shape) for key, shape in stored.items()}, centred=False)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hf.load(seeded.checkpoint(tmp_path_factory.mktemp("plain") / NAME, NAME))[1]


def write(folder: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    """Writes a checkpoint; tensors of a type that NumPy does not name are written byte by byte."""
    header, data = {}, b""
    for name, one in tensors.items():
        kind = {"float8_e4m3fn": "F8_E4M3", "float32": "F32"}[one.dtype.name]
        span = [len(data), len(data) + one.nbytes]
        header[name] = {"dtype": kind, "shape": list(one.shape), "data_offsets": span}
        data += np.ascontiguousarray(one).tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps(seeded.CONFIGS[NAME] | fields))
    return folder


def quantised(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The matrices in 8 bits with their scales, and what they stand for."""
    stored, meant = {}, {}
    for name, one in tensors.items():
        stored[name] = meant[name] = one
        if one.ndim < 2 or "embed" in name or name.endswith("gate.weight"):
            continue
        rows, columns = one.shape[-2:]
        shape = (*one.shape[:-2], -(-rows // 16), -(-columns // 8))
        scale = np.random.default_rng(len(stored)).uniform(0.5, 2.0, shape).astype(np.float32)
        each = np.repeat(np.repeat(scale, 16, -2), 8, -1)[..., :rows, :columns]
        stored[name] = (one / each).astype(jnp.float8_e4m3fn)
        stored[name + "_scale_inv"] = scale
        meant[name] = stored[name].astype(np.float32) * each
    return stored, meant


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("turned", [False, True])
def test_fused_experts_load_as_those_that_are_stored_one_by_one(
    fused: dict[str, np.ndarray], expected: Any, tmp_path: Path, turned: bool
):
    tensors = {
        name: np.ascontiguousarray(one.swapaxes(1, 2)) if turned and one.ndim == 3 else one
        for name, one in fused.items()
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(seeded.CONFIGS[NAME]))
    assert_same(hf.load(tmp_path)[1], expected)


def test_a_fused_tensor_of_another_shape_is_refused(fused: dict[str, np.ndarray], tmp_path: Path):
    name = "model.layers.1.mlp.experts.down_proj"
    write(tmp_path, fused | {name: fused[name][:, :, 1:]})
    with pytest.raises(UserError, match=rf"{name} has shape \(12, 32, 19\).*\(12, 32, 20\)"):
        hf.load(tmp_path)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_weights_in_8_bits_load_as_what_they_stand_for(
    fused: dict[str, np.ndarray], tmp_path: Path, one_by_one: bool
):
    tensors = seeded.one_by_one(fused) if one_by_one else fused
    stored, meant = quantised(tensors)
    (tmp_path / "meant").mkdir()
    write(tmp_path, stored, quantization_config=FP8)
    write(tmp_path / "meant", meant)
    _, params, fields = hf.load(tmp_path)
    assert_same(params, hf.load(tmp_path / "meant")[1])
    config = hf.read_config(fields)
    out = hf.save(tmp_path / "out", config, params, fields)
    assert "quantization_config" not in hf.read_fields(out)
    assert_same(hf.load(out)[1], params)


def test_weights_in_8_bits_without_their_scales_are_refused(
    fused: dict[str, np.ndarray], tmp_path: Path
):
    stored, _ = quantised(fused)
    name = "model.layers.0.mlp.up_proj.weight"
    scale = stored.pop(name + "_scale_inv")
    write(tmp_path, stored, quantization_config=FP8)
    with pytest.raises(UserError, match=rf"{name} is stored as F8_E4M3, .*{name}_scale_inv"):
        hf.load(tmp_path)
    write(tmp_path, stored | {name + "_scale_inv": scale[1:]}, quantization_config=FP8)
    with pytest.raises(UserError, match=rf"{name}_scale_inv has shape \(2, 4\)"):
        hf.load(tmp_path)


def test_experts_in_4_bits_load_as_what_they_stand_for(tmp_path: Path):
    fields = seeded.CONFIGS["gpt_oss"] | {"hidden_size": 64, "intermediate_size": 64}
    config = hf.read_config(fields)
    fresh = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))
    out = hf.save(tmp_path / "plain", config, fresh, fields)
    tensors = hf.read_safetensors(out / "model.safetensors")
    rng, stored = np.random.default_rng(0), dict(tensors)
    magnitudes = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        E, D, F = tensors[name].shape
        codes = rng.integers(0, 16, (E, F, D))
        scales = rng.integers(120, 131, (E, F, D // 32))
        each = np.repeat(2.0 ** (scales - 127), 32, -1)
        values = magnitudes[codes % 8] * np.where(codes < 8, 1, -1) * each
        tensors[name] = np.asarray(values.swapaxes(1, 2), np.float32)
        del stored[name]
        packed = codes[..., ::2] + 16 * codes[..., 1::2]
        stored[name + "_blocks"] = packed.astype(np.uint8).reshape(E, F, D // 32, 16)
        stored[name + "_scales"] = scales.astype(np.uint8)
    write_safetensors(
        out / "model.safetensors", {n: np.ascontiguousarray(t) for n, t in tensors.items()}
    )
    (tmp_path / "packed").mkdir()
    write_safetensors(tmp_path / "packed" / "model.safetensors", stored)
    given = fields | {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}
    }
    (tmp_path / "packed" / "config.json").write_text(json.dumps(given))
    _, params, found = hf.load(tmp_path / "packed")
    assert_same(params, hf.load(out)[1])
    again = hf.save(tmp_path / "again", config, params, found, dtype="bfloat16")
    kept = hf.read_safetensors(again / "model.safetensors")
    name = "model.layers.2.mlp.experts.gate_up_proj"
    assert kept[name].dtype == jnp.bfloat16 and np.array_equal(kept[name], tensors[name])
    assert "quantization_config" not in hf.read_fields(again)
    stored.pop(name + "_scales")
    write_safetensors(tmp_path / "packed" / "model.safetensors", stored)
    with pytest.raises(UserError, match=f"{name}_blocks has no {name}_scales"):
        hf.load(tmp_path / "packed")
    (tmp_path / "packed" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="is stored as U8"):
        hf.load(tmp_path / "packed")


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "mxfp4"},
        {"fmt": "e5m2"},
        {"activation_scheme": "static"},
        {"weight_block_size": None},
        {"weight_block_size": [128, 0]},
        {"weight_bits": 4},
    ],
)
def test_other_kinds_of_quantisation_are_refused(change: dict[str, Any]):
    assert block_of({"quantization_config": FP8}) == (16, 8) and block_of({}) == (0, 0)
    with pytest.raises(UserError, match="quantization_config=.*unquantised checkpoint"):
        block_of({"quantization_config": FP8 | change})


def test_layers_that_predict_further_tokens_are_left_out(
    fused: dict[str, np.ndarray], expected: Any, tmp_path: Path
):
    more = {"model.layers.2.eh_proj.weight": np.zeros((2, 2), np.float32)}
    write(tmp_path, fused | more, num_nextn_predict_layers=1)
    assert_same(hf.load(tmp_path)[1], expected)
    write(tmp_path, fused | more, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="unknown: model.layers.2.eh_proj.weight"):
        hf.load(tmp_path)
