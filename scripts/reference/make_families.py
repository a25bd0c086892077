"""Writes what transformers' own models say of the tiny models in tests/seeded.py.

    python scripts/reference/make_families.py [NAME ...] [--exports=DIR]

`--exports` names a folder with one export of rftjax a model: transformers loads each and compares. Where adapters lie
beside them, peft loads these too.

It needs `torch` and `transformers`, which the test suite does not: see the README beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

TESTS = Path(__file__).parents[2] / "tests"
sys.path.insert(0, str(TESTS))
import seeded  # noqa: E402

GREEDY = 12  # tokens of a continuation


def config_of(fields: dict[str, Any]) -> Any:
    """Returns transformers' config; text and vision towers are read from their own sections."""
    rest = {name: value for name, value in fields.items() if name != "model_type"}
    kind = {"kimi_k2": "deepseek_v3"}.get(fields["model_type"], fields["model_type"])
    return AutoConfig.for_model(kind, **json.loads(json.dumps(rest)))


def numbers_of(name: str, fields: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns all logits and a greedy continuation with a cache, and the shapes of the tensors of a checkpoint."""
    kind = AutoModelForImageTextToText if "text_config" in fields else AutoModelForCausalLM
    model = kind.from_config(config_of(fields), dtype=torch.float32, attn_implementation="eager")
    shapes = {key: tuple(one.shape) for key, one in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    made = seeded.tensors(shapes, centred="gemma3" in name)
    missing, extra = model.load_state_dict(
        {key: torch.from_numpy(one) for key, one in made.items()}, strict=False
    )
    assert not extra and set(missing) <= {"lm_head.weight"}, (missing, extra)
    model.tie_weights()
    tokens = torch.from_numpy(seeded.tokens(name))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.numpy()
        answer = model.generate(
            input_ids=tokens[:1], do_sample=False, max_new_tokens=GREEDY, eos_token_id=None
        )
    found = {"logits": logits, "continuation": answer[0, tokens.shape[1] :].numpy()}
    return found, {key: list(shape) for key, shape in shapes.items()}


def compare(name: str, export: Path) -> None:
    """Prints how far transformers' model of an export is from the stored logits of the model it was made of."""
    model, report = AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(seeded.tokens(name))).logits.numpy()
    expected = np.load(TESTS / "data" / "families" / f"{name}.npz")["logits"]
    difference = np.abs(found - expected)
    print(
        f"| {name} | {type(model).__name__} | {len(report['missing_keys'])} | {len(report['unexpected_keys'])}"
        f" | {difference.max():.1e} | {difference.mean():.1e} |"
    )
    adapter = export.with_name(f"{name}.adapter")
    if adapter.exists():
        print(f"| {name} with its adapters | {adapters_difference(name, model, adapter):.1e} |")


def adapters_difference(name: str, model: torch.nn.Module, adapter: Path) -> float:
    """Returns the largest difference of logits with adapters, applied and merged by peft, to rftjax's."""
    from peft import PeftModel

    expected = np.load(adapter.with_name(f"{name}.npy"))
    tokens = torch.from_numpy(seeded.tokens(name))
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(model, adapter)
        found = [adapted(input_ids=tokens).logits.numpy()]
        found.append(adapted.merge_and_unload()(input_ids=tokens).logits.numpy())
    return max(float(np.abs(one - expected).max()) for one in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[*seeded.CONFIGS, *seeded.VISION])
    parser.add_argument("--exports", type=Path, help="compare exports of these models instead")
    flags = parser.parse_args()
    if flags.exports:
        for name in flags.names:
            compare(name, flags.exports / name)
        return
    folder = TESTS / "data" / "families"
    folder.mkdir(parents=True, exist_ok=True)
    for name in flags.names:
        numbers, shapes = numbers_of(name, (seeded.CONFIGS | seeded.VISION)[name])
        np.savez(folder / f"{name}.npz", **numbers)
        (folder / f"{name}.json").write_text(json.dumps(shapes) + "\n")
        print(name, len(shapes), "tensors, logits up to", abs(numbers["logits"]).max())


if __name__ == "__main__":
    main()
