r"""What is known of a training system without a product with its Hessian: U, the mass, and solves with both.

In units of mass, :math:`y = D^{1/2} \theta`: U holds columns scaled by :math:`D^{-1/2}`, the mass is the identity, and
the metric is I or :math:`\mu I + U^\top U`. Solves are by Cholesky on the smaller side of U (theory 2).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pullback.curvature import Linearisation
from pullback.curvature.mass import check_mass, scales_of, weigh

#: A factor made for one shift serves as a preconditioner for shifts up to this factor from it.
_NEAR = 3.0


class Known:
    """Rows of the pulled-back metric and the masses, at one point.

    Args:
        linearisation: the model at the batch.
        model: for the names of its parameters.
        mass: D, as the optimizers take it.
        pulled: mu, or None for the metric D alone.

    Attributes:
        params: the parameters, in packing order.
        n: numbers of these.
        sizes: of each.
        columns: columns per sample that were pulled back.
        dtype: of the vectors.
    """

    def __init__(
        self,
        linearisation: Linearisation,
        model: nn.Module,
        mass: str | Mapping[str, float | Tensor],
        pulled: float | None,
    ) -> None:
        blocks = linearisation.blocks
        self.params = [p for block in blocks for p in block.params]
        self.dtype = self.params[0].dtype
        names = {id(p): name for name, p in model.named_parameters()}
        scales = scales_of(blocks, check_mass(mass), names, lambda _, diagonal: diagonal)
        self._scale: Tensor | None = None
        if scales is not None:
            self._scale = torch.cat(
                [torch.as_tensor(s, dtype=self.dtype).expand(block.n) for s, block in zip(scales, blocks, strict=True)]
            )
            blocks = [weigh(block, s) for s, block in zip(scales, blocks, strict=True)]
        self.blocks = blocks
        self.pulled = pulled
        self.n = sum(block.n for block in blocks)
        self.sizes = [p.numel() for p in self.params]
        self.columns = sum(term.r for term in linearisation.terms)
        self.dual = self.n > blocks[0].R
        self.side = self._side().double()
        self._made: dict[str, tuple[float, Tensor]] = {}
        self._root: tuple[Tensor, Tensor] | None = None

    def _side(self) -> Tensor:
        """U U^T or U^T U, whichever is smaller."""
        if self.dual:
            K = self.blocks[0].gram().clone()
            for block in self.blocks[1:]:
                K += block.gram()
            return K
        U = torch.cat([block.dense() for block in self.blocks], 1)
        H: Tensor = U.T @ U
        return H

    def weigh(self, v: Tensor) -> Tensor:
        """D^-1/2 v."""
        return v if self._scale is None else self._scale * v

    def matvec(self, v: Tensor) -> Tensor:
        """U v, (n,) to (R,)."""
        parts = v.split([block.n for block in self.blocks])
        out = self.blocks[0].matvec(parts[0])
        for block, part in zip(self.blocks[1:], parts[1:], strict=True):
            out = out + block.matvec(part)
        return out

    def rmatvec(self, w: Tensor) -> Tensor:
        """U^T w, (R,) to (n,)."""
        return torch.cat([block.rmatvec(w) for block in self.blocks])

    def metric(self, v: Tensor) -> Tensor:
        """M v."""
        return v if self.pulled is None else self.pulled * v + self.rmatvec(self.matvec(v))

    def solve_metric(self, v: Tensor) -> Tensor:
        """M^-1 v."""
        return v if self.pulled is None else self._solve("metric", self.pulled, 1.0, v)

    def precondition(self, rest: Tensor, theta: float, spread: float) -> Tensor:
        """Solve with U^T U - theta M + spread, up to a factor; theta above zero counts as zero.

        Args:
            rest: right-hand side, (n,).
            theta: the present Ritz value.
            spread: keeps the solve from chasing a vector that is not known that well yet.
        """
        low, mu, share = max(-theta, 0.0), 1.0 if self.pulled is None else self.pulled, float(self.pulled is not None)
        shift = (low * mu + spread) / (1 + share * low)
        floor = torch.finfo(self.dtype).eps * float(self.side.diagonal().amax())
        return self._solve("shifted", max(shift, floor, torch.finfo(self.dtype).tiny), _NEAR, rest)

    def _solve(self, name: str, shift: float, near: float, v: Tensor) -> Tensor:
        """Solve with U^T U + s I, s within a factor ``near`` of the shift."""
        made = self._made.get(name)
        if made is None or not shift / near <= made[0] <= shift * near:
            eye = torch.eye(len(self.side), dtype=self.side.dtype)
            made = self._made[name] = (shift, torch.linalg.cholesky(self.side + shift * eye))
        s, L = made
        if not self.dual:
            out: Tensor = torch.cholesky_solve(v.double()[:, None], L)[:, 0].to(v)
            return out
        inner = torch.cholesky_solve(self.matvec(v).double()[:, None], L)[:, 0].to(v)
        return (v - self.rmatvec(inner)) / s

    def half_solve(self, v: Tensor) -> Tensor:
        """M^-1/2 v, symmetric."""
        if self.pulled is None:
            return v
        values, vectors = self._eigen()
        out: Tensor
        if not self.dual:
            weight = (values + self.pulled).rsqrt()
            out = vectors @ (weight * (vectors.T @ v))
            return out
        # (mu + U^T U)^-1/2 = mu^-1/2 (I - U^T K^-1 U) + U^T K^-1 (mu + K)^-1/2 U, in one function of K.
        base = self.pulled**-0.5
        root = (values + self.pulled).sqrt()
        weight = -base / (root * (root + self.pulled**0.5))
        out = base * v + self.rmatvec(vectors @ (weight * (vectors.T @ self.matvec(v))))
        return out

    def _eigen(self) -> tuple[Tensor, Tensor]:
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.side)
            self._root = (values.clamp_min(0).to(self.dtype), vectors.to(self.dtype))
        return self._root

    def scale(self) -> float:
        """The largest eigenvalue of U^T U in the metric, a measure for what may be missing; by power iteration."""
        v = torch.ones(len(self.side), dtype=self.side.dtype)
        top = 0.0
        for _ in range(30):
            v = self.side @ v
            top = float(v.norm())
            if top == 0:
                return 0.0
            v = v / top
        return top if self.pulled is None else top / (top + self.pulled)
