"""Writes the names and shapes of adapters that the peft package makes for tests/data/tiny, and one as a sample.

    python scripts/reference/make_peft.py

It needs `torch` and `peft` (0.21.2), which the project does not: see the README beside it. `tests/data/peft` then holds
`names.json`, a rank 2 adapter of random numbers on query and down as peft saved it, and `logits.npz`: what peft's model
says of 16 tokens with that adapter.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

DATA = Path(__file__).parents[2] / "tests" / "data"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(
    targets: list[str], rank: int, out: Path
) -> tuple[torch.nn.Module, dict[str, list[int]]]:
    """Returns a model with a random adapter, which is saved in `out`, and the names and shapes of its tensors."""
    base = AutoModelForCausalLM.from_pretrained(DATA / "tiny", dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, leaf in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(leaf, std=0.2)
    model.save_pretrained(out)
    tensors = load_file(out / "adapter_model.safetensors")
    return model, {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}


def main() -> None:
    torch.manual_seed(0)
    out = DATA / "peft"
    _, names = adapted(ALL, 4, out)
    (out / "names.json").write_text(json.dumps(names, indent=0) + "\n")
    model, _ = adapted(["q_proj", "down_proj"], 2, out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "tiny"
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "README.md").unlink(missing_ok=True)
    tokens = np.random.default_rng(0).integers(3, 60, (2, 8))
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()
    np.savez(out / "logits.npz", tokens=tokens, logits=logits)


if __name__ == "__main__":
    main()
