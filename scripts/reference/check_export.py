"""Loads an export with transformers' own model and compares its logits with reference numbers.

    python scripts/reference/check_export.py DIR [--numbers tests/data/reference/smollm2.json]

With `--numbers` (for an export of the untrained model) they are the committed ones; without, rftjax
computes them for the tokens of a greedy answer. It needs `torch`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rftjax.models import decoder
from rftjax.text import tokenizer
from rftjax.weights import hf

MESSAGES = [{"role": "user", "content": "What is 12 + 30? Answer with a number."}]


def ours(directory: Path, tokens_T: list[int]) -> np.ndarray:
    """Returns rftjax's logits_TV for the export."""
    config, params, _ = hf.load(directory)
    tokens_1T = jnp.asarray([tokens_T])
    ones_1T = jnp.ones_like(tokens_1T)
    positions_1T = jnp.arange(len(tokens_T))[None]
    x_1TD = decoder.hidden(config, params, tokens_1T, positions_1T, ones_1T, 0 * ones_1T)
    return np.asarray(jax.jit(lambda p, x: decoder.logits(config, p, x))(params, x_1TD[0]))


def prompt_of(directory: Path, vocab: int) -> tuple[list[int], Any]:
    """Returns a prompt and transformers' tokenizer, or random ids where the export has none."""
    if not (directory / "tokenizer.json").exists():
        return np.random.default_rng(0).integers(0, vocab, 24).tolist(), None
    words = AutoTokenizer.from_pretrained(directory)
    text = words.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    prompt = words.encode(text, add_special_tokens=False)
    own = tokenizer.load(directory).encode(text, add_special_tokens=False)
    print("tokenizer equal to ours:", prompt == own)
    return prompt, words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--numbers", type=Path)
    flags = parser.parse_args()
    model, report = AutoModelForCausalLM.from_pretrained(
        flags.directory, dtype=torch.float32, output_loading_info=True
    )
    print("missing tensors:", sorted(report["missing_keys"]))
    print("unexpected tensors:", sorted(report["unexpected_keys"]))
    prompt, words = prompt_of(flags.directory, model.config.vocab_size)
    with torch.no_grad():
        if flags.numbers:
            numbers = json.loads(flags.numbers.read_text())
            tokens = numbers["prompt"] + numbers["continuation"]
            logits_TV = model(torch.tensor([tokens])).logits[0].numpy()
            found = logits_TV[np.ix_(numbers["positions"], numbers["ids"])]
            expected = np.asarray(numbers["logits"])
        else:
            whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0]
            if words:
                print("answer:", words.decode(whole[len(prompt) :]))
            found = model(whole[None]).logits[0].numpy()
            expected = ours(flags.directory, whole.tolist())
    difference = np.abs(found - expected)
    print(f"logits compared: {difference.size}, of size up to {np.abs(expected).max():.0f}")
    print(f"difference: largest {difference.max():.1e}, mean {difference.mean():.1e}")


if __name__ == "__main__":
    main()
