"""Loads the tiny models of tests/seeded.py with rftjax and exports each, for `make_families.py --exports`.

python scripts/reference/export_families.py OUT [NAME ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import rftjax

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import seeded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=[*seeded.CONFIGS, *seeded.VISION])
    flags = parser.parse_args()
    for name in flags.names:
        with tempfile.TemporaryDirectory() as made:
            path = seeded.checkpoint(Path(made) / name, name)
            print(rftjax.load(str(path)).export(flags.out / name))


if __name__ == "__main__":
    main()
