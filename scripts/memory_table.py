"""Prints README's table of models and the memory that a step needs on one device, as `--mode=check` estimates it.

    python scripts/memory_table.py [NAME ...] [--layers 2 4]

Makes abstract arrays alone: no weights are made or read. A model is the numbers of its published config.json with the
test model's tokenizer. The update is compiled with 2 and with 4 layers of the model's width: the estimate is linear in
the number of layers, so the line through the two gives the whole model. `--layers 30` compiles 30 layers instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rftjax import config as configs
from rftjax.run import memory
from rftjax.run.build import build, complete_config

ROOT = Path(__file__).parents[1]
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1e6}
QWEN |= {"use_sliding_window": False, "sliding_window": None}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 5e5}
# Layers, width, feed-forward width, query heads, key/value heads, vocabulary, whether the embedding is the head too.
MODELS = {
    "SmolLM2-135M": (LLAMA, 30, 576, 1536, 9, 3, 49152, True),
    "Qwen2.5-0.5B": (QWEN, 24, 896, 4864, 14, 2, 151936, True),
    "Llama-3.2-1B": (LLAMA, 16, 2048, 8192, 32, 8, 128256, True),
    "Qwen2.5-1.5B": (QWEN, 28, 1536, 8960, 12, 2, 151936, True),
    "Llama-3.2-3B": (LLAMA, 28, 3072, 8192, 24, 8, 128256, True),
    "Qwen2.5-7B": (QWEN, 28, 3584, 18944, 28, 4, 152064, False),
    "Llama-3.1-8B": (LLAMA, 32, 4096, 14336, 32, 8, 128256, False),
}
RANKS = {"full": 0, "LoRA, rank 8": 8}  # columns of the table, and their `lora.rank`


def estimate(name: str, layers: int, rank: int) -> tuple[float, float]:
    """Returns the most bytes held while a model of so many layers samples and in its update: the general spec,
    bfloat16, `model.remat=layer`."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "tests" / "data" / "tiny" / file, folder)
        (folder / "config.json").write_text(
            json.dumps(fields(name) | {"num_hidden_layers": layers})
        )
        (folder / "rows.jsonl").write_text('{"prompt": "w1 w2", "answer": "w3"}\n')
        config = configs.base_config()
        config.model.path, config.model.init = made, "random"
        config.model.dtype, config.model.remat = "bfloat16", "layer"
        config.tasks.train = str(folder / "rows.jsonl")
        config.evaluator = "rftjax.evaluators.contains:evaluate"
        config.scoring.workers, config.lora.rank = 1, rank
        with build(complete_config(config), folder / "run", read_ahead=False) as parts:
            found = memory.estimate(parts)
    return found[memory.SAMPLING], found[memory.UPDATE]


def fields(name: str) -> dict[str, object]:
    """Returns the config.json of a model."""
    family, layers, width, ffn, heads, kv_heads, vocab, tied = MODELS[name]
    return family | {
        "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": ffn,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "tie_word_embeddings": tied, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "eos_token_id": 1,
    }  # fmt: skip


def whole(name: str, layers: list[int], rank: int) -> float:
    """Returns the larger half of a step for the model with all its layers, on the line through those compiled."""
    few, many = min(layers), max(layers)
    less, more = estimate(name, few, rank), estimate(name, many, rank)
    share = (MODELS[name][1] - few) / (many - few) if many > few else 0.0
    return max(low + share * (high - low) for low, high in zip(less, more, strict=True))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(MODELS), help="models of the table")
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 4], help="layers compiled")
    flags = parser.parse_args()
    print(f"| model | {' | '.join(RANKS)} |")
    print("|---" * (1 + len(RANKS)) + "|")
    for name in flags.names:
        sizes = [whole(name, flags.layers, rank) / 2**30 for rank in RANKS.values()]
        print(f"| {name} | {' | '.join(f'{size:.1f} GiB' for size in sizes)} |", flush=True)


if __name__ == "__main__":
    main()
