"""Compiles a job's update or decode for accelerators that are not there; prints one JSON line.

    python scripts/bench/compile_for.py --model=FOLDER --topology=v5e:2x4 --mesh=data:1,fsdp:8,tensor:1 --what=update

FOLDER holds a config.json; no weights are read. TPUs (v5e:2x4, v5p:2x2x1, v6e:4x4, tpu7x:2x2x1) need the extra `tpu`,
H100 (H100:1x1x8) the extra `cuda`. `analysis` is XLA's own count of bytes on one device, `planned` what `--mode=plan`
says beforehand, `collectives` the bytes that each kind moves into one device each time the program runs.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import re
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rftjax import config as configs
from rftjax import grpo
from rftjax.devices import sharding
from rftjax.devices.accelerators import ACCELERATORS
from rftjax.learning import update
from rftjax.learning.batching import make_batch
from rftjax.run import plan
from rftjax.run.build import complete_config, lora_scale
from rftjax.run.start import StateBuilder
from rftjax.sampler import device

TPU_TYPES = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e", "tpu7x": "tpu7x"}
# The fields of xla.GpuTargetConfigProto that the compiler asks for; from NVIDIA's data sheet and CUDA's device query.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85024112640 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def topology(name: str) -> Any:
    """Returns a description of devices such as v5e:2x4 or H100:1x1x8."""
    kind, _, shape = name.partition(":")
    if kind in TPU_TYPES:
        count = math.prod(map(int, shape.split("x")))
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{TPU_TYPES[kind]}-{count}")
        return topologies.get_topology_desc(platform="tpu", topology_name=name)
    return topologies.get_topology_desc(kind, "cuda", target_config=H100, topology=shape)


def collectives(text: str) -> dict[str, int]:
    """Returns the bytes of the results of each kind of collective in a compiled program's text, loops counted once."""
    found: dict[str, int] = collections.Counter()
    for shapes, kind in re.findall(
        rf"= (\(?[a-z0-9\[\],{{}}:()_ TSE*]+?\)?) ({KINDS})(?:-start)?\(", text
    ):
        for dtype, sizes in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
            size = math.prod(int(one) for one in sizes.split(",") if one)
            found[kind] += size * SIZES.get(dtype, 4)
    return dict(found)


def main() -> None:
    """Compiles and prints."""
    flags = parse()
    described = topology(flags.topology)
    sizes = {name: int(size) for name, size in (one.split(":") for one in flags.mesh.split(","))}
    places = np.asarray(described.devices).reshape([sizes[axis] for axis in sharding.AXES])
    mesh = Mesh(places, sharding.AXES)
    config = settings(flags, sizes)
    model = plan._model(config)
    state = StateBuilder(config, model, mesh).abstract_state
    begun = time.perf_counter()
    lowered = (lower_update if flags.what == "update" else lower_decode)(
        config, model.config, state, mesh
    )
    traced_s = time.perf_counter() - begun
    compiled = lowered.compile()
    compiled_s = time.perf_counter() - begun - traced_s
    analysis = compiled.memory_analysis()
    kind = flags.topology.partition(":")[0].replace("tpu7x", "v7x")
    planned = plan.plan(config, model, ACCELERATORS[kind], mesh.size)
    half = planned.updating if flags.what == "update" else planned.sampling
    held = sum(planned.held.values()) if flags.what == "update" else 0.0
    names = ("argument", "output", "temp", "alias")
    counted = {name: getattr(analysis, f"{name}_size_in_bytes") for name in names}
    peak = counted["argument"] + counted["temp"] + counted["output"] - counted["alias"]
    estimate = held + sum(half.values())
    print(
        json.dumps(
            {
                "model": os.path.basename(flags.model.rstrip("/")),
                "topology": flags.topology,
                "mesh": sizes,
                "what": flags.what,
                "attention": flags.attention,
                "lora": flags.lora,
                "remat": flags.remat,
                "length": flags.length,
                "traced_s": round(traced_s, 1),
                "compiled_s": round(compiled_s, 1),
                "analysis": counted,
                "peak": peak,
                "planned": round(estimate),
                "planned_over_peak": round(estimate / peak, 3),
                "parts": {name: round(size) for name, size in half.items()},
                "collectives": collectives(compiled.as_text()),
                "jax": jax.__version__,
            }
        )
    )
    if flags.text:
        with open(flags.text, "w") as file:
            file.write(compiled.as_text())


def settings(flags: argparse.Namespace, sizes: dict[str, int]) -> Any:
    """Returns the spec that the flags describe."""
    config = configs.base_config()
    config.model.path, config.model.dtype = flags.model, "bfloat16"
    config.model.attention, config.model.remat = flags.attention, flags.remat
    config.lora.rank = flags.lora
    config.rollout.max_length, config.sampler.max_new_tokens = flags.length, flags.length // 2
    config.batch.pack_tokens, config.sampler.slots = flags.length, flags.slots
    for axis, size in sizes.items():
        config.mesh[axis] = size
    devices = math.prod(sizes.values())
    return complete_config(config, devices=devices, needs=("model.path",))


def lower_update(config: Any, model: Any, state: Any, mesh: Mesh) -> Any:
    """Returns the lowered update of one micro-batch a row of devices, and more."""
    section = config.batch
    rows = sharding.row_multiple(mesh)
    batch = make_batch(
        [],
        rows=section.prompts * section.group_size,
        max_length=config.rollout.max_length,
        pack_tokens=section.pack_tokens,
        pack_rows=section.pack_rows * rows,
    )

    def abstract(place: NamedSharding, tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                np.shape(leaf), np.asarray(leaf).dtype, sharding=place
            ),
            tree,
        )

    packed = abstract(NamedSharding(mesh, PartitionSpec(None, sharding.ROWS)), batch.pack)
    rest = abstract(NamedSharding(mesh, PartitionSpec()), batch._replace(pack=None))
    step = update.make_update(
        model,
        StateBuilder(config, plan._model(config), mesh).optimizer,
        grpo.LossSettings.of(config.grpo),
        remat=config.model.remat,
        lora_scale=lora_scale(config),
        mesh=mesh,
        limit=model.vocab,
        shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    return step.lower(state, rest._replace(pack=packed))


def lower_decode(config: Any, model: Any, state: Any, mesh: Mesh) -> Any:
    """Returns the lowered decode call over a cache of full length."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), update.weights(state)
    )
    made = jax.eval_shape(lambda given: device.sampler_params(model, *given, mesh=None), shapes)
    where = sharding.decode_shardings(mesh, plan.logical_axes(model), made)
    params = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), made, where
    )
    slots = config.sampler.slots
    cache = device.abstract_cache(model, slots, config.rollout.max_length, mesh)
    by_row, same = sharding.row_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    idle = jax.eval_shape(lambda: device.idle_rows(slots))

    def at(place: NamedSharding, leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    rows = jax.tree.map(lambda leaf: at(by_row, leaf), idle)
    given = at(by_row, np.zeros((slots, 9), np.int32))
    stops, seed, bounds = (at(same, np.zeros(shape, np.int32)) for shape in ((1,), (), (2,)))
    return device.decode.lower(
        model, params, cache, rows, given, stops, seed, bounds,
        steps=config.sampler.dispatch_steps, filtered=False, limit=model.vocab, mesh=mesh,
    )  # fmt: skip


def parse() -> argparse.Namespace:
    """Returns the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder with a config.json")
    parser.add_argument("--topology", required=True, help="v5e:2x4, v5p:2x2x1, H100:1x1x8, ...")
    parser.add_argument("--mesh", required=True, help="data:1,fsdp:8,tensor:1")
    parser.add_argument("--what", choices=("update", "decode"), default="update")
    parser.add_argument("--attention", default="blocked")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a conversation")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--lora", type=int, default=0, help="rank; 0: all parameters are trained")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--text", default="", help="file for the compiled program's text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
