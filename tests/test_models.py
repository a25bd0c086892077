"""The Llama and Qwen2 ports against numbers that transformers' own models gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seeded

from rftjax.config import embedded_model
from rftjax.models import FAMILIES, decoder
from rftjax.models.rope import read_rope, rope_fields
from rftjax.weights import hf

DATA = Path(__file__).parent / "data"
TINY = ("llama_llama3", "llama_linear", "llama_yarn", "qwen2_window")


def logits_BTV(config: decoder.Config, params: Any, tokens_BT: np.ndarray) -> np.ndarray:
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    ones_BT = jnp.ones((B, T), jnp.int32)

    @jax.jit
    def forward(params: Any, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = decoder.hidden(config, params, tokens_BT, positions_BT, ones_BT, 0 * ones_BT)
        return decoder.logits(config, params, x_BTD.reshape(B * T, config.width))

    return np.asarray(forward(params, jnp.asarray(tokens_BT))).reshape(B, T, -1)


@pytest.mark.parametrize("name", TINY)
def test_all_logits_of_a_tiny_checkpoint_equal_those_of_transformers(name: str):
    config, params, _ = hf.load(DATA / "reference" / name)
    expected = np.load(DATA / "reference" / name / "logits.npz")
    found_BTV = logits_BTV(config, params, expected["tokens"])
    np.testing.assert_allclose(found_BTV, expected["logits"], atol=1e-4)


def test_all_logits_of_the_two_layer_qwen2_checkpoint_equal_those_of_transformers():
    config, params, _ = hf.load(DATA / "tiny")
    expected = np.load(DATA / "reference" / "tiny.npz")
    found_BTV = logits_BTV(config, params, expected["tokens"])
    np.testing.assert_allclose(found_BTV, expected["logits"], atol=1e-4)


@pytest.mark.skipif(
    not Path(embedded_model()).exists(), reason="scripts/fetch_model.py has not fetched the model"
)
def test_logits_and_greedy_continuation_of_the_135m_model_equal_those_of_transformers():
    expected = json.loads((DATA / "reference" / "smollm2.json").read_text())
    config, params, _ = hf.load(embedded_model())
    prompt, continuation = expected["prompt"], expected["continuation"]
    found_TV = logits_BTV(config, params, np.asarray([prompt + continuation]))[0]
    picked = found_TV[np.ix_(expected["positions"], expected["ids"])]
    np.testing.assert_allclose(picked, expected["logits"], atol=1e-4)
    logsumexps = jax.nn.logsumexp(found_TV[expected["positions"]], axis=-1)
    np.testing.assert_allclose(logsumexps, expected["logsumexp"], atol=1e-4)
    greedy = found_TV[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert greedy == continuation


@pytest.mark.parametrize("name", ["llama_llama3", "llama_yarn", "llama_linear"])
def test_rope_scaling_changes_the_logits(name: str):
    fields = hf.read_fields(DATA / "reference" / name)
    config, params, _ = hf.load(DATA / "reference" / name)
    expected = np.load(DATA / "reference" / name / "logits.npz")
    plain = fields | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    found_BTV = logits_BTV(hf.read_config(plain), params, expected["tokens"])
    assert np.abs(found_BTV - expected["logits"]).max() > 1e-2, config.rope


def test_old_and_new_rope_fields_say_the_same():
    settings = {"factor": 4.0, "original_max_position_embeddings": 16}
    old = {"rope_theta": 500.0, "rope_scaling": settings | {"type": "yarn"}}
    new = {"rope_parameters": settings | {"rope_theta": 500.0, "rope_type": "yarn"}}
    assert read_rope(old) == read_rope(new)


def test_rope_settings_that_a_family_takes_by_default_are_written_whole():
    fields = seeded.CONFIGS["gpt_oss"] | {"rope_theta": 500.0}
    fields = {
        name: one for name, one in fields.items() if name not in ("rope_parameters", "rope_scaling")
    }
    config = hf.read_config(fields)
    assert config.rope.kind == "yarn"
    written = rope_fields(fields, config)
    for name in ("rope_parameters", "rope_scaling"):
        assert read_rope({name: written[name], "rope_theta": 500.0}) == config.rope


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not implemented"),
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope' is not implemented"),
        (
            {"rope_type": "yarn", "factor": 2.0, "short_factor": 0.7},
            r"\['short_factor'\].*not implemented",
        ),
        ({"rope_type": "linear"}, "need a factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
)
def test_rope_settings_that_are_not_implemented_are_refused(settings: dict[str, Any], rule: str):
    with pytest.raises(ValueError, match=rule):
        read_rope({"rope_scaling": settings})


def test_sliding_windows_follow_transformers_defaults():
    windows = FAMILIES["qwen2"].windows
    fields = {"num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 2}
    assert windows(fields) == (decoder.FULL, decoder.FULL, 4096)
    assert (
        windows(fields | {"use_sliding_window": False, "sliding_window": 8}) == (decoder.FULL,) * 3
    )
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(fields | {"sliding_window": 8, "layer_types": kinds})[0] == 8


def test_fresh_parameters_have_the_names_and_shapes_of_the_table():
    for name in TINY:
        config = hf.read_config(hf.read_fields(DATA / "reference" / name))
        fresh = jax.eval_shape(lambda key, c=config: decoder.init(c, key), jax.random.key(0))
        shapes = {
            tuple(part.key for part in path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)
        }
        table = {
            name.path: (config.layers, *name.shape) if "{layer}" in name.hf else name.shape
            for name in FAMILIES[config.family].names(config)
        }
        assert shapes == table
