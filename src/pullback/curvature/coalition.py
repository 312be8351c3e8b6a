"""How players who move jointly are solved for: what is kept of their factors, and a solve with it.

Each kind keeps tensors only, so that a training that is resumed goes on with the very same numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from pullback.curvature.joint import ROUND_OFF, Joint
from pullback.curvature.scalars import cast

#: Inverses of the damped outputs and inputs of one player: its own K-FAC step is one from the left, one from the right.
Own = tuple[Tensor, Tensor]


class Coalition(ABC):
    """A joint solve that is set up."""

    kind: ClassVar[str]

    @abstractmethod
    def solve(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], str]:
        """Steps D_u of shape (o_u, i_u) for gradients of that shape, and what the solve came to."""

    @abstractmethod
    def flops(self) -> float:
        """Additions and multiplications of a solve; of one iteration, where it iterates."""

    def state(self) -> dict[str, Any]:
        """Tensors and numbers to restore it from."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}  # type: ignore[arg-type]


@dataclass(eq=False)
class Alone(Coalition):
    """One player: K-FAC."""

    own: Own

    kind: ClassVar[str] = "alone"

    def solve(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], str]:
        """See the base class."""
        return [self.own[0] @ gradients[0] @ self.own[1]], "exact"

    def flops(self) -> float:
        """See the base class."""
        return _own_flops(self.own)


@dataclass(eq=False)
class Pair(Coalition):
    r"""Two players in canonical bases, where the system falls into pairs of equations with one coupling c each.

    With :math:`H_u = P_{B,u}^\top G_u P_{A,u}` and :math:`c_{ij} = t_i s_j` the products of canonical correlations,
    :math:`X_u = (H_u - c H_v) / (1 - c^2)`, whose denominator is the Schur complement's :math:`1 - \alpha_j \beta_i`. A
    player with complete bases steps by :math:`P_{B,u} X_u P_{A,u}^\top`. A player with more directions than are kept
    is alone in the rest of them: its K-FAC step, and :math:`P_{B,u} (X_u - H_u) P_{A,u}^\top` on top.

    Attributes:
        P, R: bases of the inputs and of the outputs, one per player, a column per direction.
        coupling: c.
        scale: 1 / (1 - c^2).
        inverses: per player its own inverses, or None where its bases are complete.
    """

    P: list[Tensor]
    R: list[Tensor]
    coupling: Tensor
    scale: Tensor
    inverses: list[Own | None]

    kind: ClassVar[str] = "pair"

    @classmethod
    def of(cls, A: Joint, B: Joint, cut: float) -> tuple[Pair, float]:
        """Set up, and the smallest eigenvalue of the whitened system.

        Args:
            A: damped inputs.
            B: damped outputs.
            cut: couplings below it are left out.
        """
        (s, P), (t, R) = A.correlations(), B.correlations()
        gap = 1 - float(t[0] * s[0])
        # At least one direction, so that shapes stay what they are: it costs nothing.
        q = max(1, int((s.abs() * t[0] >= cut).sum()))
        p = max(1, int((t.abs() * s[0] >= cut).sum()))
        s, t, P, R = s[:q], t[:p], [Q[:, :q] for Q in P], [Q[:, :p] for Q in R]
        c = torch.outer(t, s)
        inverses: list[Own | None] = []
        for u in range(2):
            complete = B.sizes[u] == len(t) and A.sizes[u] == len(s)
            inverses.append(None if complete else (B.inverse(u), A.inverse(u)))
        # Contiguous, for what is saved and loaded must multiply in the same order as what was made.
        P, R = [cast(Q, A.dtype).contiguous() for Q in P], [cast(Q, A.dtype).contiguous() for Q in R]
        return cls(P, R, cast(c, A.dtype), cast(1 / (1 - c.square()), A.dtype), inverses), gap

    def solve(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], str]:
        """See the base class."""
        H = [R.mT @ G @ P for R, G, P in zip(self.R, gradients, self.P, strict=True)]
        steps = []
        for u, inverses in enumerate(self.inverses):
            X = (H[u] - self.coupling * H[1 - u]) * self.scale
            if inverses is None:
                steps.append(self.R[u] @ X @ self.P[u].mT)
            else:
                own = inverses[0] @ gradients[u] @ inverses[1]
                steps.append(own + self.R[u] @ (X - H[u]) @ self.P[u].mT)
        return steps, "exact"

    def flops(self) -> float:
        """See the base class."""
        total = 0.0
        for R, P, inverses in zip(self.R, self.P, self.inverses, strict=True):
            (o, p), (i, q) = R.shape, P.shape
            total += 2.0 * (o * p * i + p * i * q) + 2.0 * (o * p * q + o * q * i)
            total += 0.0 if inverses is None else _own_flops(inverses)
        return total


@dataclass(eq=False)
class Common(Coalition):
    r"""Players with one common input, or by transposition one common output: two eigenbases for any number of them.

    In the eigenbasis of the common A every eigenvalue :math:`\lambda` has a system of its own,
    :math:`\lambda B + \operatorname{diag}(d_u B_{uu})` with B damped, and all of them are diagonal in the generalised
    eigenbasis of B and :math:`\operatorname{diag}(d_u B_{uu})`.

    Attributes:
        Q: eigenbasis of what is common.
        R: the generalised eigenbasis of the other side.
        divisor: 1 + theta_i lambda_j.
        sizes: of the players on the other side.
        transposed: whether the outputs are common.
    """

    Q: Tensor
    R: Tensor
    divisor: Tensor
    sizes: list[int]
    transposed: bool

    kind: ClassVar[str] = "common"

    @classmethod
    def of(cls, A: Joint, B: Joint) -> Common:
        """Set up.

        Raises:
            StepError: if what is common is indefinite.
        """
        transposed = not A.common
        same, other = (B, A) if transposed else (A, B)
        values, Q = torch.linalg.eigh(same.blocks[0][0])
        roots = [d**-0.5 * torch.ones(n, dtype=values.dtype) for d, n in zip(same.damping, other.sizes, strict=True)]
        scale = torch.cat(roots).to(values.device)
        theta, V = torch.linalg.eigh(scale[:, None] * other.joint() * scale)
        parts = (scale[:, None] * V).split(other.sizes)
        R = torch.cat([other.unwhiten(u, part) for u, part in enumerate(parts)])
        divisor = cast(1 + torch.outer(theta, values), same.dtype)
        if not float(divisor.min()) > ROUND_OFF * same.eps:
            raise same.indefinite(f"it has the eigenvalue {float(values[0]):.3g}, which the damping does not cover")
        Q, R = cast(Q, same.dtype).contiguous(), cast(R, same.dtype).contiguous()
        return cls(Q, R, divisor, list(other.sizes), transposed)

    def solve(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], str]:
        """See the base class."""
        G = torch.cat([own.mT if self.transposed else own for own in gradients])
        steps = (self.R @ ((self.R.mT @ G @ self.Q) / self.divisor) @ self.Q.mT).split(self.sizes)
        return [step.mT.contiguous() if self.transposed else step.clone() for step in steps], "exact"

    def flops(self) -> float:
        """See the base class."""
        n, k = self.R.shape[0], self.Q.shape[0]
        return 4.0 * n * k * (n + k)


@dataclass(eq=False)
class Iterated(Coalition):
    """Conjugate gradients on the whitened system, hence preconditioned by every player's own K-FAC inverse.

    Where directions are cut, the iterations run in those that are left (bases as in :class:`Pair`), and the rest of
    every player is its own K-FAC step.

    Attributes:
        A, B: whitened joint factors in the bases, identities on their diagonals.
        P, R: bases of inputs and of outputs, one per player, float64.
        inverses: as in :class:`Pair`.
        tolerance, iterations: when to stop.
    """

    A: Tensor
    B: Tensor
    P: list[Tensor]
    R: list[Tensor]
    inverses: list[Own | None]
    tolerance: float
    iterations: int

    kind: ClassVar[str] = "cg"

    @classmethod
    def of(cls, A: Joint, B: Joint, cut: float, tolerance: float, iterations: int) -> Iterated:
        """Set up.

        Raises:
            StepError: if a joint factor is indefinite.
        """
        m = len(A.sizes)
        whole = [A.joint(), B.joint()]
        bases = [[F.white[u][u] for u in range(m)] for F in (A, B)]
        if cut > 0:
            found = [[F.shared(u) for u in range(m)] for F in (A, B)]
            for k in range(2):
                for u in range(m):
                    sigma, Q = found[k][u]
                    kept = int((sigma * found[1 - k][u][0][0] >= cut).sum())
                    bases[k][u] = Q[:, : max(1, kept)]
            whole = [Q.mT @ F @ Q for F, Q in zip(whole, (torch.block_diag(*own) for own in bases), strict=True)]
        P = [A.unwhiten(u, Q).contiguous() for u, Q in enumerate(bases[0])]
        R = [B.unwhiten(u, Q).contiguous() for u, Q in enumerate(bases[1])]
        full = [p.shape[0] == p.shape[1] and r.shape[0] == r.shape[1] for p, r in zip(P, R, strict=True)]
        inverses = [None if full[u] else (B.inverse(u), A.inverse(u)) for u in range(m)]
        joint = [cast(F, A.dtype).contiguous() for F in whole]
        return cls(joint[0], joint[1], P, R, inverses, tolerance, iterations)

    def solve(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], str]:
        """See the base class."""
        # The recursion runs in float64, as in free.py, the products in the dtype of the factors.
        wide = [G.double() for G in gradients]
        H = torch.cat([(R.mT @ G @ P).reshape(-1) for R, G, P in zip(self.R, wide, self.P, strict=True)])
        r = H
        x, p, count = torch.zeros_like(r), r, 0
        rr = float(r @ r)
        target = self.tolerance**2 * rr
        while count < self.iterations and rr > target:
            Mp = self._apply(cast(p, self.A.dtype)).double()
            step = rr / float(p @ Mp)
            x, r = x + step * p, r - step * Mp
            before, rr = rr, float(r @ r)
            p = r + (rr / before) * p
            count += 1
        both = zip(self._unpack(x), self._unpack(H), strict=True)
        steps = []
        for (X, own), R, P, G, inverses in zip(both, self.R, self.P, gradients, self.inverses, strict=True):
            if inverses is None:
                steps.append(cast(R @ X @ P.mT, self.A.dtype))
            else:
                steps.append(inverses[0] @ G @ inverses[1] + cast(R @ (X - own) @ P.mT, self.A.dtype))
        return steps, f"{count} iterations{'' if rr <= target else ' (stopped early)'}"

    def _sizes(self) -> list[tuple[int, int]]:
        return [(R.shape[1], P.shape[1]) for R, P in zip(self.R, self.P, strict=True)]

    def _apply(self, x: Tensor) -> Tensor:
        """The whitened system, on steps packed into one vector: two products a player, since A and B lie joint."""
        (o, i), parts = zip(*self._sizes(), strict=True), self._unpack(x)
        right = torch.cat([X @ rows for X, rows in zip(parts, self.A.split(i), strict=True)])
        pairs = zip(self.B.split(o), right.split(i, 1), strict=True)
        return torch.cat([(rows @ own).reshape(-1) for rows, own in pairs])

    def _unpack(self, x: Tensor) -> list[Tensor]:
        parts = x.split([o * i for o, i in self._sizes()])
        return [part.view(size) for part, size in zip(parts, self._sizes(), strict=True)]

    def flops(self) -> float:
        """See the base class."""
        sizes = self._sizes()
        return 2.0 * sum(o * i for o, i in sizes) * sum(o + i for o, i in sizes)


def restored(state: dict[str, Any]) -> Coalition:
    """A coalition from its :meth:`Coalition.state`."""
    state = dict(state)
    kinds: dict[str, Any] = {kind.kind: kind for kind in (Alone, Pair, Common, Iterated)}
    made: Coalition = kinds[state.pop("kind")](**state)
    return made


def _own_flops(own: Own) -> float:
    o, i = len(own[0]), len(own[1])
    return 2.0 * o * i * (o + i)
