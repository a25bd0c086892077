"""Large allocations in huge pages, where a CPU computes: in small ones, an update takes a sixth more time.

A program's temporaries are a few GB, which glibc gives back to the system after each call. In pages of 4 KB every step
then pays half a million page faults, and products miss the table of pages that the processor remembers.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Mapping

TUNABLES = "GLIBC_TUNABLES"
ASKED = (
    "glibc.malloc.hugetlb=1"  # malloc asks the kernel for huge pages; glibc knows it from 2.35 on
)
SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


def start_again() -> None:
    """Starts this program again in the same process, with huge pages, where that helps and the user has not chosen: for
    programs of rftjax's own, at their beginning.

    glibc reads its tunables only when a program starts. Costs some 0.2 seconds where JAX is not yet imported. What
    GLIBC_TUNABLES has stays as it is.
    """
    if helps(os.environ, kernel_setting(), accelerator=_has_accelerator()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, TUNABLES: ASKED})


def helps(environ: Mapping[str, str], setting: str, *, accelerator: bool) -> bool:
    """Whether asking for huge pages changes anything: CPUs compute, and the kernel gives them to who asks.

    `setting` is the kernel's, with the choice in brackets.
    """
    platforms = environ.get("JAX_PLATFORMS", "")
    cpu = platforms == "cpu" or not (platforms or accelerator)
    return cpu and "[madvise]" in setting and TUNABLES not in environ


def kernel_setting() -> str:
    """Returns the kernel's setting of huge pages, or nothing where there is none."""
    try:
        with open(SETTING) as file:
            return file.read()
    except OSError:
        return ""


def _has_accelerator() -> bool:
    return any(glob.glob(pattern) for pattern in ACCELERATORS)
