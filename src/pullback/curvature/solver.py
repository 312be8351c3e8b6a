"""What every solver of a group of blocks has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pullback.curvature.block import Block
from pullback.curvature.scalars import cast
from pullback.curvature.workspace import Workspace
from pullback.tape.memory import width


class Solver(ABC):
    r"""Solves in the metric :math:`M = \mu I + U^\top U` of blocks that move jointly.

    Args:
        blocks: the blocks, all with the same R.
        workspace: where large matrices live.
        slot: a name of this group in the workspace.

    Attributes:
        R: rows of U.
        n: parameters of the blocks.
        outcome: how the last solve went, for the record.
        dtype: dtype of the products with U, the model's until :meth:`sharpen`.
    """

    name: ClassVar[str]

    def __init__(self, blocks: Sequence[Block], workspace: Workspace | None = None, slot: int = 0) -> None:
        self.workspace = Workspace() if workspace is None else workspace
        self.slot = slot
        self.blocks = list(blocks)
        self.R = self.blocks[0].R
        self.n = sum(block.n for block in self.blocks)
        self.outcome = "ready"
        self.dtype = self.blocks[0].params[0].dtype

    @classmethod
    @abstractmethod
    def flops(cls, blocks: Sequence[Block]) -> float:
        """Multiply-adds of one factorisation and what precedes it."""

    @classmethod
    @abstractmethod
    def numbers(cls, blocks: Sequence[Block]) -> float:
        """Numbers held at the same time at the most."""

    @classmethod
    def bytes(cls, blocks: Sequence[Block]) -> float:
        """Bytes to allow for: a solve in float32 may have to go on in float64."""
        return width(blocks[0].params[0].dtype) * cls.numbers(blocks)

    @abstractmethod
    def trace(self) -> Tensor:
        """Trace of U^T U."""

    @abstractmethod
    def factorise(self, mu: float) -> None:
        """Get ready to solve at a damping.

        Args:
            mu: damping, positive.
        """

    @abstractmethod
    def direction(
        self, e0: Tensor, g: Sequence[Tensor], rest: Sequence[Tensor] | None, mu: float
    ) -> tuple[list[Tensor], Tensor]:
        r"""The minimiser of :math:`g \cdot d + \tfrac12 |U d|^2 + \tfrac{\mu}{2} |d|^2`, :math:`g = U^\top e_0 + h`.

        Args:
            e0: R-space residual, shape (R,).
            g: gradient of every block, packed.
            rest: h, what of the gradient ``U^T e0`` does not explain, per block; None if nothing.
            mu: the damping of the last :meth:`factorise`.

        Returns:
            Packed directions per block, and ``U d`` of shape (R,), in the dtype of ``e0``.
        """

    def sharpen(self) -> None:
        """Go on in float64: small eigenvalues have drowned in float32."""
        if self.dtype == torch.float32:
            self.blocks = [block.to(torch.float64) for block in self.blocks]
            self.dtype = torch.float64

    def matvec(self, delta: Sequence[Tensor]) -> Tensor:
        """U delta, from packed vectors of the blocks to (R,)."""
        delta = [cast(part, self.dtype) for part in delta]
        out = self.blocks[0].matvec(delta[0])
        for block, part in zip(self.blocks[1:], delta[1:], strict=True):
            out = out + block.matvec(part)
        return out

    def rmatvec(self, v: Tensor) -> list[Tensor]:
        """U^T v, from (R,) to packed vectors of the blocks."""
        v = cast(v, self.dtype)
        return [block.rmatvec(v) for block in self.blocks]

    def split(self, joint: Tensor) -> list[Tensor]:
        """Packed vectors of the blocks from one vector (n,)."""
        return list(joint.split([block.n for block in self.blocks]))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One vector (n,) from packed vectors of blocks."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
