r"""Tail systems: for every stage of a chain of decisions, the metric of that stage and all after it.

.. math:: T_l = \mu I + \sum_{j \ge l} U_j U_j^\top, \qquad
          \delta_l = -U_l^\top T_l^{-1} (\alpha e_0 + e_l) - \text{(what } e_0 \text{ does not generate)}

(docs/theory 9). In the dual every tail is an R x R matrix with a Cholesky factor of its own. In the primal one factor
of :math:`\mu I + U^\top U` with the parameters of the last stage first holds every tail as a leading block. The last
stages often have few parameters and the first ones many, so the chain is split where the operations are fewest: dual
in front of the split, primal behind it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.curvature.block import Block
from pullback.curvature.cholesky import Factorised, border_of, factorise
from pullback.curvature.primal import Primal
from pullback.curvature.scalars import cast
from pullback.curvature.workspace import Workspace
from pullback.errors import StepError
from pullback.tape.memory import memory_budget, shown, width
from pullback.tape.rules.linear import LinearRows


class Tails:
    """Solves for every stage with the tail that begins there.

    Args:
        stages: blocks of every stage, in the order in which they are decided.
        space: ``"dual"``, ``"primal"`` or ``"auto"``.
        budget: bytes the matrices may take; None for half of the machine's.
        workspace: where large matrices live between steps.

    Attributes:
        split: number of stages solved in the dual; the others are solved in the primal.
        dtype: dtype of the solve.

    Raises:
        StepError: if the matrices do not fit, before anything is allocated.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Block]],
        space: str = "auto",
        budget: float | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self.stages = [list(blocks) for blocks in stages]
        self.R = self.stages[0][0].R
        self.sizes = [sum(block.n for block in blocks) for blocks in self.stages]
        self.dtype = self.stages[0][0].params[0].dtype
        self.workspace = Workspace() if workspace is None else workspace
        self.split = self._choose(space, memory_budget() if budget is None else budget)
        self._sums: list[Tensor] = []
        self._primal: Primal | None = None
        self._factors: dict[int, Factorised] = {}
        self._mu = 0.0

    # -- dual or primal ----------------------------------------------------------------------------------

    def _choose(self, space: str, budget: float) -> int:
        L, R = len(self.stages), self.R
        grams = sum(block.gram_flops() for blocks in self.stages for block in blocks)
        behind = [*itertools.accumulate(reversed(self.sizes), initial=0)][::-1]

        def cost(split: int) -> float:
            n = behind[split]
            return (grams + split * R**3 / 3 if split else 0.0) + (R * n**2 + n**3 / 3 if n else 0.0)

        def numbers(split: int) -> float:
            # Beside tails and factors: the sum of what lies behind the split, and one block's share.
            return (2.0 * split + 1.0 + (0 < split < L)) * R**2 + 3.0 * behind[split] ** 2

        every = {"dual": [L], "primal": [0]}.get(space, range(L + 1))
        each = width(self.dtype)
        fits = [split for split in every if each * numbers(split) <= budget]
        if not fits:
            need = min(each * numbers(split) for split in every)
            stages = "a single stage" if L == 1 else f"{L} stages"
            fewer = "" if L == 1 else "fewer stages (partition= with coalitions), "
            raise StepError(
                f"The systems of {stages} at R = {R} need {shown(need)}, over the {shown(max(0.0, budget))} left for "
                f"them; use a smaller batch, metric=Sampled(m=1), {fewer}GaussNewton(solver='cg'), or raise memory=."
            )
        return min(fits, key=cost)

    @property
    def spaces(self) -> tuple[str, ...]:
        """How each stage was solved."""
        out = []
        for k in range(len(self.stages)):
            found = self._factors.get(k if k < self.split else -1)
            out.append(f"{'dual' if k < self.split else 'primal'} {'ready' if found is None else found.outcome}")
        return tuple(out)

    def sharpen(self) -> None:
        """Go on in float64: small eigenvalues have drowned in float32."""
        if self.dtype == torch.float32:
            self.stages = [[block.to(torch.float64) for block in blocks] for blocks in self.stages]
            self.dtype = torch.float64
            self._sums, self._primal = [], None

    # -- matrices ----------------------------------------------------------------------------------------

    def form(self) -> None:
        """Form the matrices, once."""
        if self.split < len(self.stages) and self._primal is None:
            behind = [
                block for blocks in self.stages[: self.split - 1 if self.split else None : -1] for block in blocks
            ]
            self._primal = Primal(behind, self.workspace, -1)
        if self.split and not self._sums:
            self._sums = self._cumulated()

    def _cumulated(self) -> list[Tensor]:
        """Grams of the tails on and above the diagonal, the last first summed."""
        like = torch.empty(0, dtype=self.dtype, device=self.stages[0][0].params[0].device)
        part = self.workspace.square("part", self.R, like)
        sums: list[Tensor] = []
        tail: Tensor | None = None
        for k in range(len(self.stages) - 1, -1, -1):
            # Behind the split only the sum is needed.
            C = self.workspace.square(("tail", k) if k < self.split else "tail sum", self.R, like)
            for b, block in enumerate(self.stages[k]):
                if b or tail is C:
                    C += block.gram(part, half=True)
                else:
                    C = _onto(block, tail, C, part)
            tail = C
            if k < self.split:
                sums.append(C)
        return sums[::-1]

    def trace(self) -> float:
        """Trace of U^T U over all stages."""
        self.form()
        if self.split:
            return float(self._sums[0].diagonal().sum())
        assert self._primal is not None
        return float(self._primal.matrix.diagonal().sum())

    def factorise(self, mu: float) -> None:
        """Get ready to solve at a damping; factors are made when they are asked for.

        Args:
            mu: damping, positive.
        """
        self.form()
        self._mu = mu
        self._factors = {}

    def ready(self) -> None:
        """Make every factor that is still missing: between the small calls of a run it would clear the caches."""
        for k in range(self.split):
            self._dual(k)
        if self._primal is not None:
            self._leading(self._primal.matrix.shape[0])

    def _dual(self, k: int) -> Factorised:
        if k not in self._factors:
            A = self._sums[k]
            self._factors[k] = factorise(A, self._mu, self._memory(("tail factor", k), A))
        return self._factors[k]

    def _memory(self, name: object, A: Tensor) -> Tensor:
        return self.workspace.square(name, A.shape[0], A, border_of(A.shape[0], A.device))

    # -- solving -----------------------------------------------------------------------------------------

    def step(self, k: int, v: Tensor, rest: Sequence[Sequence[Tensor]] | None = None) -> list[Tensor]:
        r"""The step of stage k, :math:`-U_k^\top T_k^{-1} v` where e0 generates the gradient.

        Args:
            k: number of the stage.
            v: :math:`\alpha e_0 + e_k`, shape (R,).
            rest: :math:`\alpha h` of all stages, packed per block: what of the gradient e0 does not generate.

        Returns:
            Packed steps of its blocks.
        """
        out = v.dtype
        v = cast(v, self.dtype)
        if k >= self.split:
            return [cast(part, out) for part in self._primal_step(k, v, rest)[-1]]
        w = self._weights(k, v, rest).neg_()
        steps = [block.rmatvec(w) for block in self.stages[k]]
        if rest is not None:
            steps = [s - h.to(self.dtype) / self._mu for s, h in zip(steps, rest[k], strict=True)]
        return steps if out == self.dtype else [part.to(out) for part in steps]

    def joint(self, v: Tensor, rest: Sequence[Sequence[Tensor]] | None = None) -> list[list[Tensor]]:
        """The steps of all stages when they move jointly: Gauss-Newton for v = e0.

        Args:
            v: shape (R,).
            rest: as for :meth:`step`.
        """
        out = v.dtype
        v = v.to(self.dtype)
        if self.split == 0:
            return [[part.to(out) for part in parts] for parts in self._primal_step(0, v, rest)[::-1]]
        w = -self._weights(0, v, rest)
        steps = [[block.rmatvec(w) for block in blocks] for blocks in self.stages]
        if rest is not None:
            steps = [
                [s - h.to(self.dtype) / self._mu for s, h in zip(own, hs, strict=True)]
                for own, hs in zip(steps, rest, strict=True)
            ]
        return [[part.to(out) for part in parts] for parts in steps]

    def _weights(self, k: int, v: Tensor, rest: Sequence[Sequence[Tensor]] | None) -> Tensor:
        """T_k^{-1} (v - sum over the tail of U h / mu)."""
        if rest is not None:
            for blocks, hs in zip(self.stages[k:], rest[k:], strict=True):
                for block, h in zip(blocks, hs, strict=True):
                    v = v - block.matvec(h.to(self.dtype)) / self._mu
        return self._dual(k).solve(v)

    def _primal_step(self, k: int, v: Tensor, rest: Sequence[Sequence[Tensor]] | None) -> list[list[Tensor]]:
        """Steps in the primal: of stage k, after those behind it if it is the first of all."""
        assert self._primal is not None
        rhs = []
        for j in range(len(self.stages) - 1, k - 1, -1):
            for i, block in enumerate(self.stages[j]):
                own = block.rmatvec(v)
                rhs.append(own if rest is None else own + rest[j][i].to(self.dtype))
        b = -torch.cat(rhs)
        m = b.shape[0]
        if k == 0:
            whole = self._leading(m).solve(b)
            return self._unpack(whole, 0)
        found = self._leading(m)
        start = m - self.sizes[k]
        if found.L is None:
            return self._unpack(found.solve(b)[start:], k, k + 1)
        y = torch.linalg.solve_triangular(found.L[:m, :m], b[:, None], upper=False)
        corner = found.L[start:m, start:m]
        return self._unpack(torch.linalg.solve_triangular(corner.mT, y[start:], upper=True)[:, 0], k, k + 1)

    def _leading(self, m: int) -> Factorised:
        """The factor of all primal stages; of the leading block alone if the Cholesky factorisation failed."""
        assert self._primal is not None
        H = self._primal.matrix
        if -1 not in self._factors:
            self._factors[-1] = factorise(H, self._mu, self._memory("tails", H))
        found = self._factors[-1]
        return found if found.L is not None or m == H.shape[0] else factorise(H[:m, :m].contiguous(), self._mu)

    def _unpack(self, vector: Tensor, start: int, stop: int | None = None) -> list[list[Tensor]]:
        """Packed steps per stage, the last stage first, from one vector in the primal's order."""
        stages = self.stages[start:stop][::-1]
        pieces = iter(vector.split([block.n for blocks in stages for block in blocks]))
        return [[next(pieces) for _ in blocks] for blocks in stages]


def _onto(block: Block, tail: Tensor | None, out: Tensor, scratch: Tensor) -> Tensor:
    """A block's Gram and the tail behind it, on and above the diagonal; in one pass where that can be had."""
    rows = block.rows[0] if len(block.sizes) == 1 else None
    if isinstance(rows, LinearRows) and rows.stripped:
        return rows.gram_onto(tail, out, scratch)
    found = block.gram(out, half=True)
    return found if tail is None else torch.add(found, tail, out=out)
