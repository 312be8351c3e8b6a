r"""The realised deviation in front of every stage: measured where it can be, by products with U elsewhere.

.. math:: e_l = \sum_{\text{edges across the cut}} \langle S, x^{\text{new}} - x \rangle
          + \sum_{j \text{ decided}} U_j^{\text{(calls behind the cut)}} \delta_j

(docs/theory 10). Where the cut cannot be had, :math:`e_l = \sum_{j<l} U_j \delta_j`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pullback.control.route import Later, Route
from pullback.curvature import Block
from pullback.curvature.scalars import cast
from pullback.tape import Passage, Rows, Term

#: packed steps of the blocks of the stages decided so far, by number of the stage
Moved = Mapping[int, Sequence[Tensor]]


class Course:
    """A route in one step: measures what reaches each stage.

    Args:
        route: the order and the cuts.
        terms: terms of the step.
        stages: blocks of every stage, in the order of the route, in the model's own units.
    """

    def __init__(self, route: Route, terms: Sequence[Term], stages: Sequence[Sequence[Block]]) -> None:
        self.route = route
        self.terms = list(terms)
        self.stages = [list(blocks) for blocks in stages]
        self.moments = route.moments(terms)
        # Formed here, before anything moves: rows of some modules are made by running them at the present weights.
        wanted = {
            (t, u, calls)
            for plans in route.plans
            for t, plan in enumerate(plans)
            for later in plan.later
            for u, calls in later.calls
        }
        self._rows = {key: self._some_calls(*key) for key in wanted}

    def deviation(self, passage: Passage, cut: int, moved: Moved) -> Tensor:
        """e_l, shape (R,).

        Args:
            passage: the run of the model so far.
            cut: number of the stage; their number for the cut in front of the loss.
            moved: steps of the stages decided so far.
        """
        parts = []
        for t, plan in enumerate(self.route.plans[cut]):
            if plan.broken is not None or self.terms[t].ports is None:
                parts.append(self.linear(t, moved))
                continue
            e = cast(passage.measured(t, plan.rank), self.terms[t].e0.dtype)
            for later in plan.later:
                if later.stage in moved:
                    e = e + self._behind(t, later, moved[later.stage][later.block])
            parts.append(e)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def linear(self, t: int, moved: Moved) -> Tensor:
        """Sum of U_j delta_j in one term."""
        out = torch.zeros_like(self.terms[t].e0)
        for k, steps in moved.items():
            for block, step in zip(self.stages[k], steps, strict=True):
                if t in block.rows:
                    out += block.rows[t].matvec(step)
        return out

    def _behind(self, t: int, later: Later, step: Tensor) -> Tensor:
        block = self.stages[later.stage][later.block]
        pieces = block.unpack(step)
        if later.params is not None:
            only = [d if k in later.params else torch.zeros_like(d) for k, d in enumerate(pieces)]
            return block.rows[t].matvec(block.coordinates(only))
        by_id = {id(p): d for p, d in zip(block.params, pieces, strict=True)}
        out = torch.zeros_like(self.terms[t].e0)
        for u, numbers in later.calls:
            rows = self._rows[t, u, numbers]
            out += rows.matvec(torch.cat([by_id[id(p)].reshape(-1) for p in rows.params]))
        return out

    def _some_calls(self, t: int, u: int, numbers: tuple[int, ...]) -> Rows:
        """Rows of a unit from some of its calls."""
        term = self.terms[t]
        unit = term.plan.units[u]
        calls = term.factors[id(unit.module)]
        return unit.rows([calls[c] for c in numbers], term.N)
