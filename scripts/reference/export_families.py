"""Loads the tiny models of tests/seeded.py with rftjax and exports each, for `make_families.py --exports`.

python scripts/reference/export_families.py OUT [NAME ...] [--adapters]

With `--adapters` also NAME.adapter for peft, random ones of all linear layers, and NAME.npy, the logits with them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

import rftjax
from rftjax.sampler import device
from rftjax.weights import lora

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import seeded


def write_adapters(name: str, model: rftjax.Policy, out: Path) -> None:
    """Writes random adapters of all linear layers, and the logits of the model with them."""
    rng = np.random.default_rng(0)
    pairs = jax.tree.map(
        lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype("float32"),
        lora.init(model.config, rank=2),
    )
    lora.save_peft(out / f"{name}.adapter", model.config, pairs, alpha=2.0)
    adapted = rftjax.Policy(
        model.path, model.config, device.merge(model.params, pairs), model.fields
    )
    np.save(out / f"{name}.npy", np.asarray(adapted.logits(seeded.tokens(name))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=[*seeded.CONFIGS, *seeded.VISION])
    parser.add_argument("--adapters", action="store_true")
    flags = parser.parse_args()
    for name in flags.names:
        with tempfile.TemporaryDirectory() as made:
            path = seeded.checkpoint(Path(made) / name, name)
            model = rftjax.load(str(path))
            print(model.export(flags.out / name))
            if flags.adapters:
                write_adapters(name, model, flags.out)


if __name__ == "__main__":
    main()
