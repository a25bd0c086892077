"""The device mesh and the logical axis rules: which array axis lies on which mesh axis, in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rftjax.types import Batch, Params

AXES = ("data", "fsdp", "tensor")

# Logical axes by the end of a parameter's path; a leading "layers" axis is put in front where the tree is stacked.
LOGICAL: dict[tuple[str, ...], tuple[str, ...]] = {
    ("embed", "embedding"): ("vocab", "width"),
    ("head", "kernel"): ("width", "vocab"),
    ("query", "kernel"): ("width", "heads", "channels"),
    ("query", "bias"): ("heads", "channels"),
    ("key", "kernel"): ("width", "kv_heads", "channels"),
    ("key", "bias"): ("kv_heads", "channels"),
    ("value", "kernel"): ("width", "kv_heads", "channels"),
    ("value", "bias"): ("kv_heads", "channels"),
    ("output", "kernel"): ("heads", "channels", "width"),
    ("output", "bias"): ("width",),
    ("gate", "kernel"): ("width", "ffn"),
    ("gate", "bias"): ("ffn",),
    ("up", "kernel"): ("width", "ffn"),
    ("up", "bias"): ("ffn",),
    ("down", "kernel"): ("ffn", "width"),
    ("down", "bias"): ("width",),
}

RULES = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "width": "fsdp",
}


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Returns a mesh of all devices; one axis may be -1 and takes what the others leave."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    count = jax.device_count()
    rest = [name for name, size in sizes.items() if size == -1]
    wrong = [name for name, size in sizes.items() if size != -1 and size < 1]
    if wrong or len(rest) > 1:
        raise ValueError(
            f"mesh.{(wrong or rest)[0]}={sizes[(wrong or rest)[0]]}: sizes are positive, and one of them may be -1"
            " (the rest)"
        )
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if rest and count % known == 0:
        sizes[rest[0]] = count // known
    if int(np.prod(list(sizes.values()))) != count:
        raise ValueError(
            f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor}: their product must be the number of devices,"
            f" {count}; set one axis to -1 to let it take the rest"
        )
    return Mesh(np.asarray(jax.devices()).reshape(tuple(sizes.values())), AXES)


def partition(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the partition of one parameter; an axis that the mesh does not divide is replicated."""
    return PartitionSpec(*(axis for axis, _ in _axes(path, shape, mesh)))


def replicated_axes(mesh: Mesh, params: Params) -> list[str]:
    """Returns, in words, every axis of the parameters that the mesh should divide and cannot."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(key.key for key in path)
        problems = [problem for _, problem in _axes(names, leaf.shape, mesh) if problem]
        found += [f"{'/'.join(names)}: {problem}" for problem in problems]
    return found


def _axes(
    path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh
) -> list[tuple[str | None, str]]:
    """Returns for each axis of a parameter the mesh axis that divides it, and why there is none against the rules."""
    logical = LOGICAL.get(path[-2:], ())
    logical = ("",) * (len(shape) - len(logical)) + logical
    axes: list[tuple[str | None, str]] = []
    for name, size in zip(logical, shape, strict=True):
        axis = RULES.get(name)
        devices = mesh.shape[axis] if axis else 1
        problem = ""
        if size % devices:
            problem = f"{size} {name} do not divide over mesh.{axis}={devices}; replicated"
        axes.append((axis if devices > 1 and not problem else None, problem))
    return axes


def placer(mesh: Mesh) -> Callable[..., jax.Array]:
    """Returns `place(path, array)`, which puts one parameter on the mesh by the rules."""

    def place(path: tuple[str, ...], array: Any) -> jax.Array:
        spec = partition(path, array.shape, mesh)
        return jax.device_put(array, NamedSharding(mesh, spec))

    return place


def shard_tree(mesh: Mesh, tree: Params) -> Params:
    """Returns the tree with every leaf on the mesh; optimizer state follows the parameters that it mirrors."""
    place = placer(mesh)

    def put(path: tuple, leaf: Any) -> jax.Array:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return place(names, leaf)

    return jax.tree_util.tree_map_with_path(put, tree)


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Returns the batch on the mesh: packed rows over data and fsdp, the small arrays of the loss everywhere."""
    rows = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    everywhere = NamedSharding(mesh, PartitionSpec())
    pack = jax.tree.map(lambda leaf: jax.device_put(leaf, rows), batch.pack)
    rest = batch._replace(pack=None)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, everywhere), rest)._replace(pack=pack)


def row_multiple(mesh: Mesh) -> int:
    """Returns the number of devices that a micro-batch's packed rows are divided over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
