r"""Feedback: every stage answers to what the stages before it really did.

.. math:: \delta_l = -U_l^\top T_l^{-1} (\alpha e_0 + e_l + \alpha^2 \rho_l), \qquad
          T_l = \mu I + \sum_{j \ge l} U_j U_j^\top

:math:`e_l` is measured in a run of the model in which each stage is moved as it is reached: differential dynamic
programming on the stacked batch (docs/theory 9; Liu, Chen & Theodorou, arXiv 2510.14168, for the per-sample form).
:math:`\rho_l` anticipates the second-order remainder that will arise behind the cut (derived in docs/theory 11): with d
the joint direction and h a small number, one run at :math:`w + h d` gives

.. math:: n_l = \frac{e_l(h) - h \sum_{j<l} U_j d_j}{h^2}, \qquad \rho_l = n_{\text{end}} - n_l .

With a single stage that is geodesic acceleration. :math:`\alpha` is the learning rate, and less than that on the way
back along the arc after a sweep that went too far: other values of it need no new factorisation. Where stages have
different rates, e_l counts for a slower one by its rate over the largest before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.control.realised import Course
from pullback.curvature import Tails, displace
from pullback.manifolds import Manifold
from pullback.tape import Passage

#: Runs the model (and the loss) again at the present weights under a passage; returns the loss, nan if it has none.
Run = Callable[[Passage], float]

Packed = list[list[Tensor]]


@dataclass
class Sweep:
    """One run in which every stage was moved as it was reached.

    Attributes:
        steps: packed steps of the blocks, by stage, in the model's own units.
        loss: the loss after it.
    """

    steps: Packed
    loss: float


class Loop:
    """Closed-loop sweeps over one linearisation.

    Args:
        course: measures what reaches each stage.
        tails: the tail systems, in units of the mass.
        e0: residual, shape (R,).
        rest: what of the gradient e0 does not generate, by stage and block in units of the mass; None if nothing.
        scales: :math:`D^{-1/2}` by stage and block; None for the identity.
        rates: alpha by stage, the learning rates.
        roots: the calls of the model in a run, for :class:`Passage`.
        run: runs the model again.
        shift: p by stage and block in units of the mass: steps are damped towards p instead of towards zero.
        held: manifolds by id of the parameter, of those that live on one.
    """

    def __init__(
        self,
        course: Course,
        tails: Tails,
        e0: Tensor,
        rest: Sequence[Sequence[Tensor]] | None,
        *,
        scales: Sequence[Sequence[float | Tensor]] | None,
        rates: Sequence[float],
        roots: Sequence[int] | int,
        run: Run,
        shift: Packed | None = None,
        held: Mapping[int, Manifold] | None = None,
    ) -> None:
        self.course = course
        self.tails = tails
        self.e0 = e0
        self.rest = rest
        self.scales = scales
        self.rates = list(rates)
        # A stage slower than those before it must not undo what they did: it answers by its share.
        before = [0.0, *itertools.accumulate(self.rates[:-1], max)]
        self._shares = [min(1.0, rate / most) if most else 1.0 for rate, most in zip(self.rates, before, strict=True)]
        self._largest = max(self.rates) or 1.0
        self.roots = roots
        self._run = run
        self.shift = shift
        self.held = held or {}
        self.params: list[Tensor] = [p for blocks in course.stages for block in blocks for p in block.params]
        # sum over the tail of U p: what a stage finds of the shift beside what has been realised
        self._shifted = None if shift is None else self._tail_sums(shift)

    # -- sweeps ------------------------------------------------------------------------------------------

    def sweep(self, rho: Sequence[Tensor] | None = None, alpha: float = 1.0) -> Sweep:
        """Run the model, moving every stage as it is reached; the weights end moved.

        Args:
            rho: anticipated remainder per stage, shape (R,) each; None for none.
            alpha: how far along the arc, times the learning rate.
        """
        moved: dict[int, list[Tensor]] = {}

        def arrived(k: int) -> None:
            far = alpha * self.rates[k]
            v = self.e0 if far == 1 else self.e0 * far
            if k:
                v = torch.add(v, self.course.deviation(passage, k, moved), alpha=self._shares[k])
            if rho is not None:
                v = v + alpha**2 * self.rates[k] / self._largest * rho[k]
            if self._shifted is not None:
                v = v + far * self._shifted[k]
            steps = self.tails.step(k, v, self._rest(far))
            if self.shift is not None:
                steps = [s + far * p for s, p in zip(steps, self.shift[k], strict=True)]
            moved[k] = steps = self._real(k, steps)
            self._move(k, steps)

        self.tails.ready()
        passage = Passage(self.course.terms, self.course.moments, arrived, self.roots)
        loss = self._watch(passage, arrived)
        return Sweep([moved[k] for k in range(len(self.course.stages))], loss)

    def replace(self, sweep: Sweep) -> None:
        """Move the weights by the steps of an earlier sweep, without a run.

        Args:
            sweep: the sweep.
        """
        for k, steps in enumerate(sweep.steps):
            self._move(k, steps)

    def joint(self) -> Packed:
        """The joint direction d at alpha = 1, in units of the mass."""
        if self.shift is None or self._shifted is None:
            return self.tails.joint(self.e0, self.rest)
        steps = self.tails.joint(self.e0 + self._shifted[0], self.rest)
        return [[s + p for s, p in zip(own, ps, strict=True)] for own, ps in zip(steps, self.shift, strict=True)]

    def products(self, direction: Packed) -> list[Tensor]:
        """U d of every stage, shape (R,) each.

        Args:
            direction: d by stage and block, in units of the mass, before learning rates.
        """
        out = []
        for k, steps in enumerate(direction):
            pairs = zip(self.course.stages[k], self._real(k, steps), strict=True)
            out.append(torch.stack([block.matvec(d) for block, d in pairs]).sum(0))
        return out

    def anticipate(self, direction: Packed, h: float, products: Sequence[Tensor]) -> list[Tensor]:
        """The remainder behind each cut for steps along a direction; weights end as they were.

        Args:
            direction: d by stage and block, in units of the mass, before learning rates.
            h: how far to look along it.
            products: its :meth:`products`.

        Returns:
            rho_l per stage, shape (R,) each.
        """
        # Along the steps that will be taken: a stage of learning rate 0 does not curve the way.
        moved = {k: [h * self.rates[k] * d for d in self._real(k, steps)] for k, steps in enumerate(direction)}
        found: dict[int, Tensor] = {}

        def arrived(k: int) -> None:
            done = {j: steps for j, steps in moved.items() if j < k}
            found[k] = self.course.deviation(passage, k, done) if k else torch.zeros_like(self.e0)

        before = [p.detach().clone() for p in self.params]
        try:
            for k, steps in moved.items():
                self._move(k, steps)
            passage = Passage(self.course.terms, self.course.moments, arrived, self.roots)
            self._watch(passage, arrived)
        finally:
            torch._foreach_copy_(self.params, before)
        end = len(self.course.stages)
        seen = torch.zeros_like(self.e0)
        remainders = []
        for k in range(end):
            remainders.append((found[k] - seen) / h**2)
            seen = seen + h * self.rates[k] * products[k]
        last = (self.course.deviation(passage, end, moved) - seen) / h**2
        return [last - own for own in remainders]

    # -- parts -------------------------------------------------------------------------------------------

    def _watch(self, passage: Passage, arrived: Callable[[int], None]) -> float:
        for k, moment in enumerate(passage.moments):
            if moment is None:
                arrived(k)
        loss = self._run(passage)
        passage.check()
        return loss

    def _rest(self, far: float) -> Sequence[Sequence[Tensor]] | None:
        if self.rest is None or far == 1:
            return self.rest
        return [[h * far for h in own] for own in self.rest]

    def _real(self, k: int, steps: Sequence[Tensor]) -> list[Tensor]:
        if self.scales is None:
            return list(steps)
        return [s * scale for s, scale in zip(steps, self.scales[k], strict=True)]

    def _move(self, k: int, steps: Sequence[Tensor]) -> None:
        for block, step in zip(self.course.stages[k], steps, strict=True):
            if block.curved:
                displace(block.params, block.unpack(step), self.held)
                continue
            start = 0
            for p in block.params:
                stop = start + p.numel()
                p.add_(step[start:stop].view(p.shape))
                start = stop

    def _tail_sums(self, shift: Packed) -> list[Tensor]:
        sums: list[Tensor] = []
        total = torch.zeros_like(self.e0)
        for blocks, own in zip(self.tails.stages[::-1], shift[::-1], strict=True):
            for block, p in zip(blocks, own, strict=True):
                total = total + block.matvec(p.to(self.tails.dtype)).to(total.dtype)
            sums.append(total)
        return sums[::-1]
