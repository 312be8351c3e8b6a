r"""Quadratic costs of a module's own parameters, :math:`\tfrac c2 |w|^2`, as terms beside those of the loss.

Its rows are :math:`\sqrt c\,I` and its residual is :math:`\sqrt c\,w`: to whoever solves it is one more use of a loss.
The gradient c w is the module's own affair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pullback.tape.call import CallFactor
from pullback.tape.graph import Path
from pullback.tape.memory import Sizes
from pullback.tape.plan import Plan, Unit
from pullback.tape.rules import DenseRows, Rows
from pullback.tape.term import LossUse, Term


class Penalised:
    """A module whose own parameters have a cost.

    Attributes:
        penalty: c; 0 for none.
    """

    penalty: float = 0.0


class Quadratic(nn.Module):
    """c/2 |w|^2.

    Args:
        weight: c.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, w: Tensor) -> Tensor:
        """The cost, a scalar."""
        return 0.5 * self.weight * w.square().sum()


@dataclass
class PriorUnit(Unit):
    """Parameters with the rows of their cost."""

    weight: float = 0.0

    def rows(self, calls: Sequence[CallFactor], N: int) -> Rows:
        """See the base class; there is one row per number."""
        like = self.parameters()[0]
        U = math.sqrt(self.weight) * torch.eye(N, dtype=like.dtype, device=like.device)[None]
        return DenseRows([self.module.get_parameter(name) for name in self.wanted], U, "penalty")


def priors_of(term: Term, taken: Iterable[Term], plans: dict[tuple[int, int], Plan]) -> list[Term]:
    """Terms of the costs of the modules that one term of the loss goes through, each call counted once.

    Args:
        term: the term.
        taken: terms of the step so far.
        plans: plans made for costs so far, by the ids of the term's plan and of the module.
    """
    seen = {id(own.call) for prior in taken if prior.use.criterion.__class__ is Quadratic
            for calls in prior.factors.values() for own in calls}  # fmt: skip
    out = []
    for unit in term.plan.units:
        module = unit.module
        if not isinstance(module, Penalised) or not module.penalty or term.use.path is None:
            continue
        for factor in term.factors[id(module)]:
            if id(factor.call) in seen:
                continue
            key = id(term.plan), id(module)
            if key not in plans:
                own = PriorUnit(module, unit.name, unit.wanted, module.penalty)
                plans[key] = Plan([own], Sizes(0.0, 0.0, 0.0, 0.0))
            out.append(_term(term, factor, plans[key], unit.parameters(), module.penalty))
    return out


def _term(term: Term, factor: CallFactor, plan: Plan, params: Sequence[Tensor], weight: float) -> Term:
    def now() -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in params])

    w, cost = now(), Quadratic(weight)
    assert term.use.path is not None
    path = Path(term.use.path.root, term.use.path.index, [lambda z: now()])
    use = LossUse(term.use.edge, w, cost, value=cost(w), path=path)
    e0 = math.sqrt(weight) * w if term.exact else torch.zeros_like(w)
    calls = {id(plan.units[0].module): [CallFactor(factor.call, 1)]}
    return Term(use, term.exact, len(w), 1, e0, calls, plan, term.roots, 0.0)
