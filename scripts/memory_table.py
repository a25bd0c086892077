"""Prints README's table of models and the memory that they need, as `--mode=check` estimates it, for one device.

    python scripts/memory_table.py

Shapes alone are made and the update is compiled, without weights: each model is its published config.json's numbers
with the tokenizer of the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rftjax import config as configs
from rftjax.run import memory
from rftjax.run.build import Job, complete_config

ROOT = Path(__file__).parents[1]
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1e6}
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
FORMS = {"full": {"lora.rank": 0}, "LoRA, rank 8": {"lora.rank": 8}}


def gibibytes(folder: Path, form: dict[str, int]) -> float:
    """Returns the check's estimate of the larger half of a step: the general spec, bfloat16, `model.remat`."""
    config = configs.base_config()
    config.model.path, config.model.init = str(folder), "random"
    config.model.dtype, config.model.remat = "bfloat16", True
    config.tasks.train = str(folder / "rows.jsonl")
    config.evaluator = "rftjax.evaluators.contains:evaluate"
    config.scoring.workers = 1
    for field, value in form.items():
        section, name = field.split(".")
        config[section][name] = value
    with Job.build(complete_config(config), folder) as parts:
        found = memory.estimate(parts)
        return max(found[memory.SAMPLING], found[memory.UPDATE]) / 2**30


def main() -> None:
    """Prints the table."""
    print(f"| model | {' | '.join(FORMS)} |")
    print("|---" * (1 + len(FORMS)) + "|")
    for name, (family, layers, width, ffn, heads, kv_heads, vocab, tied) in MODELS.items():
        fields = family | {
            "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": ffn,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "tie_word_embeddings": tied, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "eos_token_id": 1, "use_sliding_window": False, "sliding_window": None,
        }  # fmt: skip
        if family is LLAMA:
            fields = {key: value for key, value in fields.items() if "sliding" not in key}
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(ROOT / "tests" / "data" / "tiny" / file, folder)
            (folder / "config.json").write_text(json.dumps(fields))
            (folder / "rows.jsonl").write_text('{"prompt": "w1 w2", "answer": "w3"}\n')
            cells = [f"{gibibytes(folder, form):.0f} GiB" for form in FORMS.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
