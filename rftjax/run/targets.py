"""Descriptions of accelerators that are not here: XLA's compilers for them run anywhere (extras `tpu` and `cuda`)."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from rftjax.errors import UserError

HOST = 8  # GPUs that one host has
# By the name of an accelerator: libtpu's, that of the variable TPU_ACCELERATOR_TYPE, and the dimensions of its torus.
TPUS = {
    "v5e": ("v5e", "v5litepod", 2),
    "v5p": ("v5p", "v5p", 3),
    "v6e": ("v6e", "v6e", 2),
    "v7x": ("tpu7x", "tpu7x", 3),
}
# Of each GPU: multiprocessors, bytes of its L2 cache, GHz, bytes and bytes a second of its memory, compute capability,
# the name that its driver reports.
GPUS = {
    "H100": (132, 52428800, 1.98, 84942979072, 3352320000000, 9, "NVIDIA H100 80GB HBM3"),
    "H200": (132, 52428800, 1.98, 151397597184, 4800000000000, 9, "NVIDIA H200 141GB HBM3e"),
    "B200": (148, 132644864, 1.965, 191514411008, 7672320000000, 10, "NVIDIA B200"),
}
# The fields of XLA's GpuTargetConfigProto that its compiler asks for, as CUDA's device query gives them.
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {cores} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory} memory_bandwidth: {bandwidth}
  cuda_compute_capability {{ major: {capability} feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""


def missing(kind: str) -> str:
    """Returns how to get the compiler for a kind of device, "" where it is installed."""
    extra = "tpu" if kind in TPUS else "cuda"
    modules = ("libtpu",) if extra == "tpu" else ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if any(importlib.util.find_spec(module) for module in modules):
        return ""
    return f"pip install 'rftjax[{extra}]', or ./scripts/setup.sh {extra}; no device is needed"


def target_mesh(kind: str, sizes: dict[str, int]) -> Mesh:
    """Returns a mesh of described devices of a kind with axes of these sizes, in the order of a run's own mesh.

    Raises UserError where the compiler is not installed or has no such arrangement of devices.
    """
    if words := missing(kind):
        raise UserError(f"--device={kind}: its compiler is not installed; {words}")
    name = arrangement(kind, math.prod(sizes.values()))
    described = _tpus(kind, name) if kind in TPUS else _gpus(kind, name)
    places = np.asarray(described.devices)
    if places.size != math.prod(sizes.values()):
        raise UserError(
            f"--device={kind}: {name} has {places.size} devices, the mesh {sizes} {math.prod(sizes.values())};"
            " take a power of two"
        )
    return Mesh(places.reshape(tuple(sizes.values())), tuple(sizes))


def arrangement(kind: str, devices: int) -> str:
    """Returns the arrangement of so many devices as a torus of TPU chips, or as slices x hosts x GPUs.

    A chip of v7x is two devices. Raises UserError for a number of TPUs that is no power of two.
    """
    if kind not in TPUS:
        hosts = -(-devices // HOST)
        return f"1x{hosts}x{devices // hosts}"
    chips = devices // 2 if kind == "v7x" else devices
    if chips < 1 or chips & (chips - 1):
        least = "2, 4, 8" if kind == "v7x" else "1, 2, 4"
        raise UserError(
            f"--devices={devices}: TPUs of kind {kind} stand in powers of two; take {least}, ..."
        )
    sides = [1] * TPUS[kind][2]
    for _ in range(chips.bit_length() - 1):
        # The shortest side grows, the first one first: 2x2x1, then 2x2x2; in two dimensions 2x4, not 4x2.
        at = sides.index(min(sides))
        sides[at] *= 2
    return "x".join(map(str, sorted(sides, reverse=len(sides) == 3 and chips < 8)))


def _tpus(kind: str, name: str) -> Any:
    library, accelerator, _ = TPUS[kind]
    chips = math.prod(map(int, name.split("x")))
    cores = 2 * chips if kind in ("v5p", "v7x") else chips
    # libtpu would ask the metadata server of a cloud machine, and take a lock for devices that it does not open.
    given = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": f"{accelerator}-{cores}",
    }
    for variable, value in given.items():
        os.environ.setdefault(variable, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{library}:{name}")


def _gpus(kind: str, name: str) -> Any:
    fields = ("cores", "cache", "clock", "memory", "bandwidth", "capability", "name")
    text = DESCRIPTION.format(**dict(zip(fields, GPUS[kind], strict=True)))
    return topologies.get_topology_desc(kind, "cuda", target_config=text, topology=name)
