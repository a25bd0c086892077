"""Meshes of the first fake devices."""

import math

import jax

from rftjax.devices import sharding


def mesh_of(
    data: int = 1, fsdp: int = 1, tensor: int = 1, *, expert: int = 1, context: int = 1
) -> jax.sharding.Mesh:
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    return sharding.make_mesh(jax.devices()[: math.prod(sizes.values())], **sizes)
