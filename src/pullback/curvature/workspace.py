"""Memory that stays: large matrices are written where the last step's were.

A fresh matrix of some megabytes costs more in page faults than in arithmetic: on the digits MLP (R = 1152) a step
took 41 ms with fresh matrices and 29 ms without (benchmarks/floor.py, glibc's trimming switched off).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Workspace:
    """Square matrices by name, kept between steps."""

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def square(self, name: Any, n: int, like: Tensor) -> Tensor:
        """An n x n matrix, row-major, with whatever it held before.

        Args:
            name: who asks; another asker gets another matrix.
            n: size.
            like: gives dtype and device.
        """
        key = (name, like.dtype, like.device)
        found = self._kept.get(key)
        if found is None or found.shape[0] != n:
            found = self._kept[key] = like.new_empty(n, n)
        return found

    def clear(self) -> None:
        """Give the memory back."""
        self._kept.clear()
