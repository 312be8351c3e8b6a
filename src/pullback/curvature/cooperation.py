r"""The joint step of cooperating players in Kronecker form.

Player u has a weight of shape (o_u, i_u). The metric that players u and v share is modelled as a Kronecker product of
:math:`A_{uv} = E[x_u x_v^\top]` and :math:`B_{uv} = E[h_u h_v^\top]`, x the inputs and h the pulled-back factors. Who
cooperates solves

.. math:: \sum_v B_{uv} D_v A_{uv}^\top = G_u

with factored damping on the diagonal blocks, as in K-FAC (Martens & Grosse, arXiv 1503.05671):

.. math:: A_{uu} + \pi_u \sqrt{\mu_u}\, I, \quad B_{uu} + \frac{\sqrt{\mu_u}}{\pi_u} I, \qquad
          \pi_u^2 = \frac{\operatorname{tr} A_{uu} / i_u}{\operatorname{tr} B_{uu} / o_u} .

All are whitened by the Cholesky factors of the damped diagonal blocks first. Then two players, and any number with one
common input (or output), are solved exactly; others by conjugate gradients. Derived in docs/theory 12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.curvature.coalition import Coalition, Common, Iterated, Pair
from pullback.curvature.joint import ROUND_OFF, Joint
from pullback.errors import StepError


class Cooperation:
    """Players who solve jointly: set up once, then solved for as many gradients as the factors are kept.

    Factors are damped and factorised in float64 whatever their dtype: this decides what is definite, and is amortised.

    Args:
        inputs: ``inputs[u][v]`` is A_uv, shape (i_u, i_v), for every ordered pair of players.
        outputs: ``outputs[u][v]`` is B_uv, shape (o_u, o_v).
        mu: damping, positive, in the units of A_uu times B_uu; one for all players, or one for each.
        tolerance: conjugate gradients stop at this residual, relative to the right side, both measured in the inverse
            of the block diagonal.
        iterations: most iterations of conjugate gradients per solve; a solve that runs out of them is kept and says so.
        cut: couplings between players below it are left out, of two players or several that have neither input nor
            output in common. This changes the whitened system by at most ``error`` in the spectral norm, leaves it
            positive definite, and makes a solve cheaper. 0 keeps all.

    Attributes:
        method: ``"pair"``, ``"common"`` or ``"cg"``.
        identical: pairs of players that cannot be told apart: the same inputs and the same outputs up to round-off.
            Without damping the system is singular along their difference. Damping makes that harmless (for equal
            gradients they get equal steps), so this is told and not refused, unless mu is lost in round-off.
        outcome: what the last solve came to: ``"exact"``, or a number of iterations, with ``" (stopped early)"`` if
            the tolerance was not reached.
        bound: iterations of conjugate gradients that suffice in exact arithmetic; 0 for the exact methods.
        error: bound on what ``cut`` changes: ``cut`` itself for two players, ``2 sqrt(2 m) cut`` for m, 0 where
            nothing is cut.
        solver: what is kept of the factors.
        flops: additions and multiplications of a solve; of one iteration, for conjugate gradients.
        layerwise_flops: the same for players who solve each for itself with two inverses (K-FAC).

    Raises:
        ValueError: if shapes or dtypes do not match, or an option is out of range.
        StepError: if factors are not finite, not symmetric or indefinite, or if players cannot be told apart and the
            damping is too small to decide between them.
    """

    def __init__(
        self,
        inputs: Sequence[Sequence[Tensor]],
        outputs: Sequence[Sequence[Tensor]],
        mu: float | Sequence[float],
        *,
        tolerance: float = 1e-6,
        iterations: int = 250,
        cut: float = 0.0,
    ) -> None:
        if not (0 < tolerance < 1 and iterations >= 1):
            raise ValueError(f"tolerance must be in (0, 1), iterations at least 1; got {tolerance} and {iterations}.")
        if not 0 <= cut < 1:
            raise ValueError(f"cut must be in [0, 1), got {cut}.")
        if len(inputs) != len(outputs) or not inputs:
            raise ValueError(
                f"Inputs of {len(inputs)} players but outputs of {len(outputs)}; give both for each of them, at least "
                "for one."
            )
        mus = _each(mu, len(inputs))
        self.dtype = inputs[0][0].dtype
        A, B = Joint(inputs, "inputs", self.dtype), Joint(outputs, "outputs", self.dtype)
        self.shapes = list(zip(B.sizes, A.sizes, strict=True))
        self.identical = sorted(A.identical() & B.identical())
        ratios = [math.sqrt(a / b) if a > 0 and b > 0 else 1.0 for a, b in zip(A.means(), B.means(), strict=True)]
        A.damp([pi * math.sqrt(own) for pi, own in zip(ratios, mus, strict=True)])
        B.damp([math.sqrt(own) / pi for pi, own in zip(ratios, mus, strict=True)])
        gap = min(map(_gap, A.norms, A.damping, B.norms, B.damping))
        m, self.bound, self.error = len(self.shapes), 0, 0.0
        self.solver: Coalition
        if m == 2:
            self.solver, gap = Pair.of(A, B, cut)
            self.error = cut
        elif A.common or B.common:
            self.solver = Common.of(A, B)
        else:
            self.solver = Iterated.of(A, B, cut, tolerance, iterations)
            self.error = 2 * math.sqrt(2 * m) * cut
            root = math.sqrt(m / gap)
            self.bound = math.ceil(0.5 * root * math.log(2 * root / tolerance))
        if not gap > ROUND_OFF * A.eps and (self.identical or m == 2):
            raise StepError(
                f"The players cannot be told apart: without damping their joint metric is singular, and mu = "
                f"{min(mus):.3g} is lost in the round-off of {self.dtype}. Raise mu, or let them move apart."
            )
        self.method = self.solver.kind
        self.outcome = ""
        self.flops = self.solver.flops()
        self.layerwise_flops = 2.0 * sum(o * i * (o + i) for o, i in self.shapes)

    @property
    def converged(self) -> bool:
        """Whether the last solve was exact or reached the tolerance."""
        return self.outcome != "" and not self.outcome.endswith("(stopped early)")

    def solve(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The D_u of the joint system; a descent step is their negative.

        Args:
            gradients: G_u, shape (o_u, i_u), one per player, in the dtype of the factors.

        Raises:
            ValueError: if shapes or dtypes do not match those of the factors.
            StepError: if a gradient is not finite.
        """
        given = [tuple(G.shape) for G in gradients]
        if given != self.shapes:
            raise ValueError(f"The gradients have shapes {given}, the factors are for {self.shapes}.")
        for u, G in enumerate(gradients):
            if G.dtype != self.dtype:
                raise ValueError(f"Gradient {u} is {G.dtype}, the factors are {self.dtype}; give both in one dtype.")
            if not torch.isfinite(G).all():
                raise StepError(f"Gradient {u} holds values that are not finite; leave this step out.")
        steps, self.outcome = self.solver.solve(gradients)
        return steps


def _each(mu: float | Sequence[float], players: int) -> list[float]:
    """One mu per player."""
    mus = [float(own) for own in mu] if isinstance(mu, Sequence) else [float(mu)] * players
    if len(mus) != players:
        raise ValueError(f"mu has {len(mus)} entries for {players} players; give one number, or one for each.")
    if not all(own > 0 and math.isfinite(own) for own in mus):
        raise ValueError(f"mu must be positive and finite, got {mu}.")
    return mus


def _gap(a: float, d: float, b: float, e: float) -> float:
    """1 - a b / ((a + d)(b + e)) without cancellation: no whitened eigenvalue is smaller (docs/theory 12)."""
    return (a * e + b * d + d * e) / ((a + d) * (b + e))
