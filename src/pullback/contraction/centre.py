r"""The analytic centre of all metrics with a given rate, by Newton's method.

The metrics with :math:`S_k(M) = -(J_k^\top M + M J_k) - 2 \lambda M > 0` for all k and :math:`M > \delta I` form a
convex set; its centre minimises the sum of their negative log-determinants plus the trace of M, which fixes the scale.
A rate below that of a known metric has that metric inside; at the centre every :math:`S_k` has room, so that the
centre's own rate is higher.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Centre:
    """The barrier of one rate.

    Args:
        jacobians: (K, n, n).
        rate: the rate, below that of the metric to start from.
        condition: about the largest condition of M; it gives delta.
    """

    def __init__(self, jacobians: Tensor, rate: float, condition: float) -> None:
        n = jacobians.shape[-1]
        self.J, self.rate = jacobians, rate
        # The trace at the centre: the derivative along M itself vanishes there.
        self.trace = float((len(jacobians) + 1) * n)
        i, j = torch.triu_indices(n, n)
        basis = jacobians.new_zeros(len(i), n, n)
        basis[torch.arange(len(i)), i, j] = 1
        basis[torch.arange(len(i)), j, i] = 1
        self.basis = basis
        self.floor = self.trace / condition * torch.eye(n, dtype=jacobians.dtype)
        self.images = torch.stack([-(J.T @ basis + basis @ J) - 2 * rate * basis for J in jacobians])

    def parts(self, M: Tensor) -> Tensor:
        """All that must be positive definite at M, (K + 1, n, n)."""
        G = self.J.mT @ M
        return torch.cat([-(G + G.mT) - 2 * self.rate * M, (M - self.floor)[None]])

    def value(self, M: Tensor) -> float:
        """The barrier; inf outside."""
        L, info = torch.linalg.cholesky_ex(self.parts(M))
        if bool(info.any()):
            return float("inf")
        return float(M.trace() - 2 * L.diagonal(dim1=-2, dim2=-1).log().sum())

    def find(self, M: Tensor, steps: int = 50) -> Tensor:
        """The centre, from a metric inside once it is scaled.

        Args:
            M: a metric whose rate is above this one, (n, n).
            steps: most Newton steps.
        """
        # Any multiple has the same rate.
        M = M * self.trace / float(M.trace())
        value = self.value(M)
        for _ in range(steps):
            inverses = torch.linalg.inv(self.parts(M))
            images = torch.cat([self.images, self.basis[None]])
            turned = inverses[:, None] @ images
            g = self.basis.diagonal(dim1=-2, dim2=-1).sum(1) - turned.diagonal(dim1=-2, dim2=-1).sum((0, 2))
            # Entries tr(S^-1 E_a S^-1 E_b), summed over the parts.
            flat = turned.flatten(2)
            H = torch.einsum("kai,kbi->ab", flat, turned.mT.flatten(2))
            L, info = torch.linalg.cholesky_ex((H + H.T) / 2)
            if int(info) != 0:
                return M
            step = -torch.cholesky_solve(g[:, None], L)[:, 0]
            decrement = -float(g @ step)
            if decrement < 1e-6:
                return M
            move = torch.tensordot(step, self.basis, 1)
            length = 1.0 / (1 + decrement**0.5) if decrement > 0.25 else 1.0
            while length > 1e-8 and self.value(M + length * move) >= value:
                length /= 2
            if length <= 1e-8:
                return M
            M = M + length * move
            value = self.value(M)
        return M
