"""What accelerators have and reach, by their makers' own tables."""

from __future__ import annotations

from typing import NamedTuple

from rftjax.errors import UserError

GIB = 2**30


class Accelerator(NamedTuple):
    """One device, as JAX counts them: bytes of memory, operations a second (dense bfloat16 products), bytes a second
    that its memory gives and that it sends over all of its links together. `source` says where the numbers stand."""

    name: str
    memory: float
    operations: float
    bandwidth: float
    link: float
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether XLA's compiler for GPUs writes its programs, which keeps other arrays than that for TPUs."""
        return self.source.startswith(_NVIDIA)


_NVIDIA = "NVIDIA's data sheet of"
_GOOGLE = "Google Cloud's page of"

ACCELERATORS = {
    one.name: one
    for one in (
        Accelerator("H100", 80e9, 989e12, 3.35e12, 450e9, f"{_NVIDIA} H100 SXM"),
        Accelerator("H200", 141e9, 989e12, 4.8e12, 450e9, f"{_NVIDIA} H200 SXM"),
        Accelerator("B200", 180e9, 2250e12, 8.0e12, 900e9, f"{_NVIDIA} HGX B200"),
        Accelerator("v5e", 16 * GIB, 197e12, 819e9, 200e9, f"{_GOOGLE} TPU v5e"),
        Accelerator("v5p", 95 * GIB, 459e12, 2765e9, 600e9, f"{_GOOGLE} TPU v5p"),
        Accelerator("v6e", 32 * GIB, 918e12, 1638e9, 448e9, f"{_GOOGLE} TPU v6e"),
        Accelerator(
            "v7x",
            96 * GIB,
            1153.5e12,
            3690e9,
            600e9,
            f"{_GOOGLE} TPU7x, for one of a chip's two devices",
        ),
    )
}


def accelerator(name: str) -> Accelerator:
    """Returns the row of the table; raises UserError for a name that it does not have."""
    if name not in ACCELERATORS:
        raise UserError(f"--device={name}: must be one of {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]
