"""The experts that the sampler chose, on their way from the cache to the host."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


class Chosen:
    """The experts of a conversation's first `count` tokens, (count, L, U) to `np.asarray`, which waits for the device.

    A copy or a pickle of it is that array.
    """

    def __init__(self, experts_SLU: jax.Array, count: int) -> None:
        experts_SLU.copy_to_host_async()
        self._here: Any = experts_SLU
        self._count = count

    def take(self) -> np.ndarray:
        """Returns the array; the device keeps nothing of it then."""
        if not isinstance(self._here, np.ndarray):
            self._here = jax.device_get(self._here)[: self._count].copy()
        return self._here

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.take(), dtype, copy=copy)

    def __reduce__(self) -> tuple:
        return np.asarray, (self.take(),)
