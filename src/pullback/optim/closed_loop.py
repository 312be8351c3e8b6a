r"""Attempts in closed loop: a sweep with anticipation, and shorter ones from the same factors if the loss rises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.control import Course, Loop, Packed, Route, Sweep
from pullback.curvature import Block, Tails
from pullback.errors import SolverError, StepError
from pullback.optim.attempt import Attempt, decrease
from pullback.optim.options import Momentum
from pullback.optim.search import Clock, restore
from pullback.optim.system import Groups
from pullback.tape import Passage

#: How far along the joint direction the remainder is measured.
LOOK = 0.1

#: The anticipated part of a joint step may be this large beside the rest of it (geodesic acceleration's bound, halved
#: for the halved second derivative).
BOUND = 0.375

#: How far along the arc, one after the other, until the loss falls.
ARC = (1.0, 0.5, 0.25, 0.125)


@dataclass
class ClosedLoop:
    """Every stage moves as the model reaches it, in a run of the model.

    Attributes:
        groups: blocks, masses and gradients, by stage.
        route: the order of the stages and the cuts.
        tails: the tail systems, in the order of the route.
        unit: mean diagonal of the Gram.
        anticipate: whether the downstream remainder is anticipated.
        momentum: how the previous step enters.
        previous: the previous step by parameter.
        rates: learning rate by parameter.
        roots: the calls of the model in a run.
        run: runs model and loss again under a passage.
        whole: whether the loss that is tried holds everything that ``backward`` was called on.
        loss: loss before the step.
        tried: whether sweeps are judged by their loss.
        arc: says whether a sweep that raises it is followed by others from the same factors.
        clock: counts the phases.
    """

    groups: Groups
    route: Route
    tails: Tails
    unit: float
    anticipate: bool
    momentum: Momentum | None
    previous: dict[int, Tensor]
    rates: dict[int, float]
    roots: Sequence[int] | int
    run: Callable[[Passage], float]
    whole: bool
    loss: float
    tried: bool
    arc: Callable[[], bool]
    clock: Clock

    @property
    def params(self) -> list[Tensor]:
        """All parameters that move."""
        return self.groups.params

    @property
    def coarse(self) -> bool:
        """Whether predictions are half precision, the rounding of which drowns a second difference."""
        return any(term.use.z.dtype in (torch.float16, torch.bfloat16) for term in self.groups.lin.terms)

    @property
    def e0(self) -> Tensor:
        """The residual."""
        return self.groups.lin.e0

    def attempt(self, mu: float) -> Attempt:
        """See :class:`pullback.optim.attempt.Policy`."""
        whole = mu + self.groups.ridge
        if self.groups.drowned(whole, self.unit):
            self.tails.sharpen()
        self.tails.factorise(whole)
        loop = self._loop(mu / whole)
        joint = loop.joint()
        self.clock.mark("solve")
        products = loop.products(joint)
        slope, predicted = self._promise(loop, joint, products, mu)
        rho = self._remainder(loop, joint, products)
        self.clock.mark("look")
        kept, note, alpha, runs = self._search(loop, rho)
        self.clock.mark("trial")
        step: dict[int, Tensor] = {}
        for blocks, steps in zip(loop.course.stages, kept.steps, strict=True):
            for block, packed in zip(blocks, steps, strict=True):
                step.update(zip(map(id, block.params), block.unpack(packed), strict=True))
        if not self.tried and not math.isfinite(_norm(kept.steps)):
            predicted = math.nan  # no trial tells that the modules threw each other out on the way
        # The gain ratio of a step from further down the arc says nothing of mu; that it was needed says a little.
        grow = None if alpha == 1 else alpha**-0.5
        runs += self.anticipate and not self.coarse
        return Attempt(step, mu, alpha, slope, predicted, kept.loss, self.tails.spaces, runs, note, grow)

    def _remainder(self, loop: Loop, joint: Packed, products: Sequence[Tensor]) -> list[Tensor] | None:
        """What will arise behind each cut; None if it is not wanted or not to be trusted."""
        if not self.anticipate or self.coarse:
            return None
        try:
            rho = loop.anticipate(joint, LOOK, products)
        except SolverError:
            return None
        if not all(bool(torch.isfinite(r).all()) for r in rho):
            return None
        if len(rho) == 1 and _norm(loop.tails.joint(rho[0])) > BOUND * loop.rates[0] * _norm(joint):
            return None
        return rho

    def _search(self, loop: Loop, rho: list[Tensor] | None) -> tuple[Sweep, str, float, int]:
        """Sweep, and again from the same factors while the loss does not fall; the weights end moved.

        Returns:
            The sweep, its name, how far along the arc it went, and how many there were.
        """
        alone = len(loop.course.stages) == 1
        plain = "plain" if alone else "feedback"
        named = plain if rho is None else "acceleration" if alone else "anticipation"
        plans = [(named, rho, alpha) for alpha in ARC]
        if rho is not None and not alone:
            plans.insert(1, (plain, None, 1.0))
        before = [p.detach().clone() for p in self.params]
        first: tuple[Sweep, str] | None = None
        if not (self.tried and self.arc()):
            plans = plans[:1]
        failed: SolverError | None = None
        for runs, (name, remainder, alpha) in enumerate(plans, 1):
            if runs > 1:
                restore(self.params, before)
            try:
                sweep = loop.sweep(remainder, alpha)
            except SolverError as error:  # so far off that an ODE in the model has no solution: too far
                failed = error
                continue
            first = first or (sweep, name)
            if not self.tried or sweep.loss < self.loss:
                return sweep, name, alpha, runs
        if first is None:
            assert failed is not None
            if not self.tried:
                raise failed
            restore(self.params, before)
            still = [[self.e0.new_zeros(block.n) for block in blocks] for blocks in loop.course.stages]
            return Sweep(still, math.inf), str(failed), 1.0, len(plans)
        # None lowered the loss. The first is judged, so the weights must be its own.
        restore(self.params, before)
        loop.replace(first[0])
        return *first, 1.0, runs

    def verify(self) -> None:
        """Run the model once at the same weights: everything must come out as recorded.

        Raises:
            StepError: if it does not.
        """
        course = self._loop().course
        passage = Passage(course.terms, course.moments, lambda k: None, self.roots)
        loss = self.run(passage)
        passage.check()
        # The loss too: its targets may be others. (Another order of the same sums is no difference.)
        coarse = torch.finfo(self.e0.dtype).eps ** 0.5
        if not passage.still() or abs(loss - self.loss) > coarse * abs(self.loss):
            raise StepError(
                "Run again at the same weights, the model gave other numbers, so feedback has nothing to answer to; "
                "draw no random numbers in the closure and do not change its data (or use GaussNewton)."
            )

    def _loop(self, share: float = 1.0) -> Loop:
        """The sweeps; ``share`` of all damping is towards the previous step."""
        order = self.route.order
        groups = self.groups
        rest = None
        if any(groups.gradients[k].rest is not None for k in order):
            rest = [groups.gradients[k].rest or [] for k in order]
        scales = [groups.scales[k] for k in order]
        shift = None
        if self.momentum is not None and self.previous:
            decay = share * self.momentum.decay
            packed = groups.packed(self.previous)
            shift = [[decay * part for part in packed[k]] for k in order]
        course = Course(self.route, groups.lin.terms, [groups.plain[k] for k in order])
        e0 = groups.gradients[0].e0 if groups.lin.exact else torch.zeros_like(self.e0)
        return Loop(
            course,
            self.tails,
            e0,
            rest,
            scales=None if scales[0] is None else [s for s in scales if s is not None],
            rates=[self._rate(blocks) for blocks in course.stages],
            roots=self.roots,
            run=self.run,
            shift=shift,
            held=groups.lin.held,
        )

    def _rate(self, blocks: Sequence[Block]) -> float:
        rates = {self.rates[id(p)] for block in blocks for p in block.params}
        if len(rates) > 1:
            raise ValueError(
                f"The parameters of one stage have different learning rates ({', '.join(map(str, sorted(rates)))}); "
                "with feedback a stage answers as one, give its parameters one rate."
            )
        return rates.pop()

    def _promise(self, loop: Loop, joint: Packed, products: Sequence[Tensor], mu: float) -> tuple[float, float]:
        """Slope along, and decrease promised for, the joint step; a sweep keeps it to first order (docs/theory 11)."""
        Us = torch.zeros_like(self.e0)
        slope = norm2 = pulled = 0.0
        for k, number in enumerate(self.route.order):
            rate = loop.rates[k]
            Us += rate * products[k]
            if self.groups.ridge:
                pulled += rate * self._pulled(loop.course.stages[k], joint[k])
            for g, d in zip(self.groups.gradients[number].g, joint[k], strict=True):
                slope += rate * float(g @ d)
                norm2 += rate**2 * float(d @ d)
        predicted = decrease(self.e0, Us, slope - pulled, mu * norm2, self.groups.lin.exact, self.whole)
        return slope, predicted - pulled - 0.5 * self.groups.ridge * norm2

    def _pulled(self, blocks: Sequence[Block], steps: Sequence[Tensor]) -> float:
        """Slope of the ridge along steps that are not made yet."""
        pairs = zip(blocks, steps, strict=True)
        return self.groups.ridge * sum(float(block.pack([p.detach() for p in block.params]) @ d) for block, d in pairs)


def _norm(packed: Packed) -> float:
    return math.sqrt(sum(float(d @ d) for own in packed for d in own))
