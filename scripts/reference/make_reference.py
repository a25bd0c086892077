"""Writes the reference numbers of tests/data/reference with PyTorch and transformers' own models.

    python scripts/reference/make_reference.py --gguf=SmolLM2-135M-Instruct.Q4_1.gguf

It needs `torch`, which the project does not: see the README beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from rftjax.text import chat, tokenizer
from rftjax.weights import hf

DATA = Path(__file__).parents[2] / "tests" / "data"
SHAPE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 64,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
TINY = {
    "llama_llama3": LlamaConfig(**SHAPE, **BIASES, head_dim=12, rope_parameters=LLAMA3),
    "llama_linear": LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LINEAR),
    "llama_yarn": LlamaConfig(**SHAPE, rope_parameters=YARN),
    "qwen2_window": Qwen2Config(
        **SHAPE,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
}
PROMPT = [{"role": "user", "content": "Name three primary colours, then count from 1 to 20."}]
IDS = (0, 1, 2, 28, 216, 1000, 5000, 20000, 49151)


def logits_of(directory: Path, tokens_BT: np.ndarray) -> np.ndarray:
    """Returns logits_BTV in float32 of transformers' model of a directory."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT)).logits.float().numpy()


def make_tiny(name: str, config: Any, out: Path, seed: int) -> None:
    """Writes a random checkpoint, biases and norms included, and its logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.3 * noise if "norm" in key else 0.3 * noise)
    # bfloat16 halves the files; the logits are those of the rounded weights, computed in float32.
    model.to(torch.bfloat16).save_pretrained(out / name)
    (out / name / "generation_config.json").unlink(missing_ok=True)
    tokens_BT = np.random.default_rng(seed).integers(0, SHAPE["vocab_size"], (2, 24))
    np.savez(out / name / "logits.npz", tokens=tokens_BT, logits=logits_of(out / name, tokens_BT))


def make_smollm2(path: str, out: Path) -> None:
    """Writes a handful of logits and a greedy continuation of the dequantised 135M model."""
    config, params, fields = hf.load(path)
    words = tokenizer.load(path)
    prompt = chat.render(words, PROMPT, generation_prompt=True)
    with tempfile.TemporaryDirectory() as directory:
        hf.save(directory + "/export", config, params, fields, tokenizer=words)
        model = AutoModelForCausalLM.from_pretrained(
            directory + "/export", dtype=torch.float32, attn_implementation="eager"
        )
    with torch.no_grad():
        ids = torch.tensor([prompt])
        whole = model.generate(ids, do_sample=False, max_new_tokens=32, pad_token_id=2)
        logits_TV = model(whole).logits[0].float()
    positions = [0, 5, len(prompt) - 1, len(prompt) + 10, whole.shape[1] - 1]
    numbers = {
        "prompt": prompt,
        "continuation": whole[0, len(prompt) :].tolist(),
        "text": words.decode(whole[0, len(prompt) :].tolist()),
        "positions": positions,
        "ids": list(IDS),
        "logits": [[round(float(logits_TV[t, v]), 6) for v in IDS] for t in positions],
        "logsumexp": [round(float(logits_TV[t].logsumexp(0)), 6) for t in positions],
    }
    (out / "smollm2.json").write_text(json.dumps(numbers, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", default="", help="the 135M model; left out: only the tiny ones")
    parser.add_argument("--out", type=Path, default=DATA / "reference")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    for seed, (name, config) in enumerate(TINY.items()):
        make_tiny(name, config, flags.out, seed)
    tokens_BT = np.random.default_rng(9).integers(0, 64, (2, 24))
    logits_BTV = logits_of(DATA / "tiny", tokens_BT)
    np.savez(flags.out / "tiny.npz", tokens=tokens_BT, logits=logits_BTV)
    if flags.gguf:
        make_smollm2(flags.gguf, flags.out)


if __name__ == "__main__":
    main()
