"""Solvers that form one symmetric matrix and factorise it, whichever space it lives in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.curvature.block import Block
from pullback.curvature.cholesky import Factorised, border_of, factorise
from pullback.curvature.solver import Solver
from pullback.curvature.workspace import Workspace


class Factored(Solver):
    """A solver with a matrix; a subclass says which."""

    def __init__(self, blocks: Sequence[Block], workspace: Workspace | None = None, slot: int = 0) -> None:
        super().__init__(blocks, workspace, slot)
        self._matrix: Tensor | None = None
        self._factor: Factorised | None = None

    @abstractmethod
    def form(self) -> Tensor:
        """The matrix, from the blocks; nobody reads it below the diagonal."""

    @property
    def matrix(self) -> Tensor:
        """The matrix, formed at first use."""
        if self._matrix is None:
            self._matrix = self.form()
        return self._matrix

    def trace(self) -> Tensor:
        """See the base class."""
        return self.matrix.diagonal().sum()

    def sharpen(self) -> None:
        """See the base class."""
        if self.dtype == torch.float32:
            super().sharpen()
            self._matrix = None

    def factorise(self, mu: float) -> None:
        """See the base class."""
        A = self.matrix
        n = A.shape[0]
        memory = self.workspace.square(("factor", self.slot), n, A, border_of(n, A.device))
        self._factor = factorise(A, mu, memory)
        self.outcome = self._factor.outcome

    def solve(self, b: Tensor) -> Tensor:
        """(matrix + mu I)^{-1} b with the damping of the last :meth:`factorise`."""
        assert self._factor is not None
        return self._factor.solve(b)
