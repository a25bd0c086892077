"""Compiles a job's update or decode for accelerators that are not there; prints one JSON line.

    python scripts/bench/compile_for.py --model=FOLDER --device=v5e --mesh=data:1,fsdp:8,tensor:1 --what=update

FOLDER holds a config.json; no weights are read. TPUs need the extra `tpu`, GPUs the extra `cuda`. `analysis` is XLA's
own count of bytes on one device, `planned` what `--mode=plan` says beforehand, `collectives` the bytes that each kind
moves into one device in a micro-batch or a decode step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from rftjax import config as configs
from rftjax.devices.accelerators import ACCELERATORS
from rftjax.models.remat import REMATS
from rftjax.run import compiled, plan, targets
from rftjax.run.build import complete_config


def main() -> None:
    """Compiles and prints."""
    flags = parse()
    sizes = {name: int(size) for name, size in (one.split(":") for one in flags.mesh.split(","))}
    config = settings(flags, sizes)
    model = plan.open_shape(config)
    planned = plan.plan(config, model, ACCELERATORS[flags.device], math.prod(sizes.values()))
    mesh = targets.target_mesh(flags.device, planned.mesh)
    found = compiled.compiled(config, model, mesh, flags.what)
    estimate = planned.programs[flags.what]
    half = planned.updating if flags.what == "update" else planned.sampling
    if flags.text:
        with open(flags.text, "w") as file:
            file.write(found.text)
    print(
        json.dumps(
            {
                "model": os.path.basename(flags.model.rstrip("/")),
                "device": flags.device,
                "mesh": planned.mesh,
                "what": flags.what,
                "attention": flags.attention,
                "lora": flags.lora,
                "offload": flags.offload,
                "rounding": flags.rounding,
                "remat": flags.remat,
                "length": flags.length,
                "traced_s": round(found.traced_s, 1),
                "compiled_s": round(found.compiled_s, 1),
                "cpu_s": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 1),
                "analysis": found.sizes,
                "peak": found.peak,
                "planned": round(estimate),
                "planned_over_peak": round(estimate / found.peak, 3),
                "parts": {name: round(size) for name, size in half.items()},
                "collectives": found.collectives,
                "jax": jax.__version__,
            }
        )
    )


def settings(flags: argparse.Namespace, sizes: dict[str, int]) -> Any:
    """Returns the spec that the flags describe."""
    config = configs.base_config()
    config.model.path, config.model.dtype = flags.model, "bfloat16"
    config.model.attention, config.model.remat = flags.attention, flags.remat
    config.lora.rank = flags.lora
    config.optim.offload, config.optim.rounding = flags.offload, flags.rounding
    config.rollout.max_length, config.sampler.max_new_tokens = flags.length, flags.length // 2
    config.batch.pack_tokens, config.sampler.slots = flags.length, flags.slots
    for axis, size in sizes.items():
        config.mesh[axis] = size
    devices = math.prod(sizes.values())
    return complete_config(config, devices=devices, needs=("model.path",))


def parse() -> argparse.Namespace:
    """Returns the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder with a config.json")
    parser.add_argument("--device", required=True, choices=(*targets.TPUS, *targets.GPUS))
    parser.add_argument("--mesh", required=True, help="data:1,fsdp:8,tensor:1")
    parser.add_argument("--what", choices=compiled.PROGRAMS, default="update")
    parser.add_argument("--attention", default="blocked")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a conversation")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--lora", type=int, default=0, help="rank; 0: all parameters are trained")
    parser.add_argument("--remat", default="", choices=REMATS)
    parser.add_argument("--offload", default="", choices=("", "moments", "all"))
    parser.add_argument("--rounding", default="", choices=("", "stochastic"))
    parser.add_argument("--text", default="", help="file for the compiled program's text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
