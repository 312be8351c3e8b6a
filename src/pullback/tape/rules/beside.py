"""Rows of several independent sets of parameters of one module, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.tape.rules.base import Rows


class BesideRows(Rows):
    """Columns of several rows next to each other: U = [U_1, U_2, ...].

    Args:
        parts: rows of the same samples and columns for parameters of their own.
        rule: name for the coverage report.
    """

    def __init__(self, parts: Sequence[Rows], rule: str) -> None:
        super().__init__([p for part in parts for p in part.params], parts[0].r, parts[0].N)
        self._parts = list(parts)
        self.rule = rule

    def parts(self) -> Sequence[Rows]:
        """See the base class."""
        return self._parts

    def gram(self) -> Tensor:
        """See the base class."""
        return self._added(self._parts[0].gram())

    def gram_into(self, out: Tensor, half: bool = False) -> Tensor:
        """See the base class."""
        return self._added(self._parts[0].gram_into(out, half))

    def _added(self, K: Tensor) -> Tensor:
        for part in self._parts[1:]:
            K += part.gram()
        return K

    def matvec(self, delta: Tensor) -> Tensor:
        """See the base class."""
        pieces = delta.split([part.n for part in self._parts])
        return torch.stack([part.matvec(d) for part, d in zip(self._parts, pieces, strict=True)]).sum(0)

    def rmatvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        return torch.cat([part.rmatvec(v) for part in self._parts])

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """See the base class."""
        return torch.cat([part.dense(start, stop) for part in self._parts], 2)

    def cross(self, other: Rows) -> Tensor:
        """See the base class."""
        if not isinstance(other, BesideRows):
            return super().cross(other)
        return torch.stack([a.cross(b) for a, b in zip(self._parts, other._parts, strict=True)]).sum(0)

    def diagonal(self) -> Tensor:
        """See the base class."""
        return torch.cat([part.diagonal() for part in self._parts])

    def gram_flops(self) -> float:
        """See the base class."""
        return sum(part.gram_flops() for part in self._parts)

    def matvec_flops(self) -> float:
        """See the base class."""
        return sum(part.matvec_flops() for part in self._parts)

    def to(self, dtype: torch.dtype) -> BesideRows:
        """See the base class."""
        return BesideRows([part.to(dtype) for part in self._parts], self.rule)
