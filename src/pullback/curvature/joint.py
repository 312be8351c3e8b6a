"""One joint factor of cooperating players: its blocks, damped and whitened by the damped diagonal blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from pullback.curvature.scalars import cast
from pullback.errors import StepError

#: Differences below this many machine epsilons, relative to the larger number, are round-off.
ROUND_OFF = 100.0


class Joint:
    """One of the two joint factors: its blocks in float64, and the same whitened by the damped diagonal blocks.

    Args:
        blocks: ``blocks[u][v]`` is what players u and v share, shape (n_u, n_v).
        what: for messages.
        dtype: that all blocks must have.

    Attributes:
        sizes: n_u.
        common: whether all blocks are the same up to round-off.
        norms: Frobenius norms of the diagonal blocks.
        damping: what :meth:`damp` added to them.
        roots: Cholesky factors L_u of the damped diagonal blocks.

    Raises:
        ValueError: if shapes or dtypes do not match.
        StepError: if a block is not finite or not the transpose of its twin.
    """

    def __init__(self, blocks: Sequence[Sequence[Tensor]], what: str, dtype: torch.dtype) -> None:
        m = len(blocks)
        if any(len(row) != m for row in blocks):
            raise ValueError(f"{what} has {m} rows, of {[len(row) for row in blocks]} blocks; give one for every pair.")
        self.what, self.dtype, self.eps = what, dtype, torch.finfo(dtype).eps
        self.sizes = [int(row[u].shape[0]) if row[u].ndim else 0 for u, row in enumerate(blocks)]
        for u, v in itertools.product(range(m), repeat=2):
            block, shape = blocks[u][v], (self.sizes[u], self.sizes[v])
            name = f"{what}[{u}][{v}]"
            if tuple(block.shape) != shape or 0 in shape:
                raise ValueError(f"{name} has shape {tuple(block.shape)}, the diagonal blocks ask for {shape}.")
            if block.dtype != dtype:
                raise ValueError(f"{name} is {block.dtype}, the first factor {dtype}; give all in one dtype.")
            if not torch.isfinite(block).all():
                raise StepError(f"{name} holds values that are not finite; look for overflow in the model.")
            if v <= u and not self._same(block, blocks[v][u].mT):
                raise StepError(f"{name} is not the transpose of {what}[{v}][{u}]; average both over the same samples.")
        self.blocks = [[block.double() for block in row] for row in blocks]
        first = self.blocks[0][0]
        self.common = all(b.shape == first.shape and self._same(b, first) for row in self.blocks for b in row)
        self.norms = [float(row[u].norm()) for u, row in enumerate(self.blocks)]
        self.damping: list[float] = []
        self.roots: list[Tensor] = []

    def _same(self, a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) <= ROUND_OFF * self.eps * float(a.abs().max())

    def means(self) -> list[float]:
        """Mean diagonal of every player."""
        return [float(row[u].diagonal().mean()) for u, row in enumerate(self.blocks)]

    def identical(self) -> set[tuple[int, int]]:
        """Pairs with A_uu = A_uv = A_vv, that is E|x_u - x_v|^2 = 0."""
        A = self.blocks
        every = itertools.combinations(range(len(A)), 2)
        pairs = [(u, v) for u, v in every if self.sizes[u] == self.sizes[v]]
        return {(u, v) for u, v in pairs if self._same(A[u][u], A[u][v]) and self._same(A[v][v], A[u][v])}

    def damp(self, damping: Sequence[float]) -> None:
        """The Cholesky factors L_u of the damped diagonal blocks A_uu + d_u I."""
        self.damping = list(damping)
        for u, d in enumerate(damping):
            L, info = torch.linalg.cholesky_ex(self.blocks[u][u] + d * self._eye(u))
            if int(info):
                raise self.indefinite(f"the block of player {u} has an eigenvalue below -{d:.3g}, its damping")
            self.roots.append(L)

    def _eye(self, u: int) -> Tensor:
        return torch.eye(self.sizes[u], dtype=torch.float64, device=self.blocks[u][u].device)

    @cached_property
    def white(self) -> list[list[Tensor]]:
        """L_u^{-1} A_uv L_v^{-T}, the identity on the diagonal."""
        m = len(self.sizes)
        white = [[self._eye(u) for _ in range(m)] for u in range(m)]
        for v, u in itertools.combinations(range(m), 2):
            half = torch.linalg.solve_triangular(self.roots[u], self.blocks[u][v], upper=False)
            white[v][u] = torch.linalg.solve_triangular(self.roots[v], half.mT, upper=False)
            white[u][v] = white[v][u].mT
        return white

    def joint(self) -> Tensor:
        """The whitened factor in one piece, shape (sum of n_u, sum of n_u); refused if it is not definite."""
        whole = torch.cat([torch.cat(row, 1) for row in self.white])
        if int(torch.linalg.cholesky_ex(whole)[1]):
            raise self.indefinite("it has a negative eigenvalue that the damping does not cover")
        return whole

    def correlations(self) -> tuple[Tensor, list[Tensor]]:
        """Canonical correlations s of two players and bases P_u, shape (n_u, len(s)), with P_0^T A_01 P_1 = diag(s).

        P_u is orthonormal in the damped A_uu; the generalised eigenvalues of (a, A_uu) are s^2 and zeros.
        """
        if self.common:
            # The eigenbasis of A serves both, scaled: half the time of what follows.
            values, Q = torch.linalg.eigh(self.blocks[0][0])
            if not float(values[0]) + min(self.damping) > 0:
                raise self.indefinite(f"it has the eigenvalue {float(values[0]):.3g}, which the damping does not cover")
            scales = [(values + d).rsqrt() for d in self.damping]
            return (values * scales[0] * scales[1]).flip(0), [(Q * scale).flip(1) for scale in scales]
        # Whitened, everything is of order one: here the dtype of the factors will do.
        U, s, Vh = torch.linalg.svd(cast(self.white[0][1], self.dtype), full_matrices=False)
        if float(s[0]) ** 2 > 1 + ROUND_OFF * self.eps:
            raise self.indefinite(f"the two players have a canonical correlation of {float(s[0]):.6g}, above 1")
        return s.double(), [self.unwhiten(0, U.double()), self.unwhiten(1, Vh.mT.double())]

    def shared(self, u: int) -> tuple[Tensor, Tensor]:
        """How far directions of player u are correlated with all others together, and these directions, whitened.

        Returns:
            Singular values of the row of blocks (u, v), v other than u, descending, and its left singular vectors.
        """
        row = torch.cat([block for v, block in enumerate(self.white[u]) if v != u], 1)
        squares, Q = torch.linalg.eigh(row @ row.mT)
        return squares.clamp_min(0).sqrt().flip(0), Q.flip(1)

    def inverse(self, u: int) -> Tensor:
        """Inverse of a damped diagonal block, in the dtype of the factors."""
        return cast(torch.cholesky_inverse(self.roots[u]), self.dtype)

    def unwhiten(self, u: int, Q: Tensor) -> Tensor:
        """L_u^{-T} Q."""
        out: Tensor = torch.linalg.solve_triangular(self.roots[u].mT, Q, upper=True)
        return out

    def indefinite(self, why: str) -> StepError:
        """The error, ready to be raised."""
        return StepError(
            f"The joint factor of the {self.what} is indefinite: {why}. Average all its blocks over the same samples "
            "with the same weights."
        )
