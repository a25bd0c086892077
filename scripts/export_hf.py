"""Writes a Hugging Face directory from a checkpoint of a run.

    python scripts/export_hf.py --workdir=DIR [--step=N] [--adapter] --out=DIR

Without `--step` the checkpoint with the highest held-out reward is taken, or the newest where none has one; `--step`
takes a step, best or last. LoRA adapters are merged into the weights, or written alone, as the peft package stores
them, with --adapter. `--out` may be a new or empty folder, or an earlier export, which is replaced.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rftjax.errors import UserError
from rftjax.run import binding, results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=lambda text: Path(text).expanduser(), required=True)
    parser.add_argument("--step", default="", help="a step, best or last; left out: best, if any")
    parser.add_argument("--out", type=lambda text: Path(text).expanduser(), required=True)
    parser.add_argument("--adapter", action="store_true", help="the adapters alone, unmerged")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags = parser.parse_args()
    workdir, out = flags.workdir.expanduser().absolute(), flags.out.expanduser()
    try:
        config: Any = binding.stored_config(workdir)
        if config is None:
            raise UserError(
                f"--workdir={workdir}: holds no checkpoint to export; give that of a run that has finished a step"
            )
        given = {"wanted": flags.step, "dtype": flags.dtype, "adapter": flags.adapter}
        step = results.export(config, workdir, out, **given)
    except (UserError, OSError) as error:
        sys.exit(f"export_hf: {error}")
    print(f"step {step} of {flags.workdir} is in {flags.out}")


if __name__ == "__main__":
    main()
