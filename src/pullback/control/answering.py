"""The second forward pass: every stage answers with the policies of the samples, just before it is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pullback.control.host import Raised
from pullback.control.realised import Course
from pullback.control.samplewise import Policy
from pullback.curvature import Block
from pullback.errors import StepError
from pullback.tape import Passage


class Round:
    """A run of the model in which every stage answers as it is reached.

    Args:
        course: measures what reaches each stage.
        run: runs the model again.
        roots: the calls of the model in a run.
    """

    def __init__(self, course: Course, run: Callable[[Passage], None], roots: Sequence[int] | int) -> None:
        self.course = course
        self._run = run
        self._roots = roots
        plans = [plan for cut in course.route.plans for plan in cut]
        # Only then does a deviation take products with what the stages before have done.
        self._products = any(plan.broken is not None or plan.later for plan in plans)

    def verify(self) -> None:
        """Run the model once at the same weights: everything must come out as recorded.

        Raises:
            StepError: if it does not.
        """
        passage = self._watch(lambda k: None)
        if not passage.still():
            raise StepError(
                "Run again at the same weights, the model gave other numbers, so feedback has nothing to answer to; "
                "draw no random numbers in the closure and do not change its data (or use feedback=False)."
            )

    def sweep(
        self,
        policies: Sequence[Sequence[Policy]],
        curvature: Raised,
        before: Mapping[int, Tensor],
        share: float = math.inf,
    ) -> None:
        """Add to each stage what its policy answers, as the model reaches it.

        The host has moved all weights already: what lies behind a stage has no part in what reaches it.

        Args:
            policies: by stage and term.
            curvature: Q_uu^{-1}.
            before: the weights before the host's step, by id.
            share: by how much of its norm a stage's weights may change in all.
        """
        moved: dict[int, list[Tensor]] = {}
        sizes = [term.R for term in self.course.terms]

        def arrived(k: int) -> None:
            e = list(self.course.deviation(passages[0], k, moved).split(sizes)) if k else [None] * len(sizes)
            parts = [policy.answer(own) for policy, own in zip(policies[k], e, strict=True)]
            if any(part is not None for part in parts):
                like = self.course.terms[0].e0
                v = [like.new_zeros(size) if p is None else p for p, size in zip(parts, sizes, strict=True)]
                for block in self.course.stages[k]:
                    _add(block, v[0] if len(v) == 1 else torch.cat(v), curvature)
            if math.isfinite(share):
                for block in self.course.stages[k]:
                    _shorten(block, before, share)
            if self._products:
                moved[k] = [block.pack([p - before[id(p)] for p in block.params]) for block in self.course.stages[k]]

        passages: list[Passage] = []
        self._watch(arrived, passages)

    def _watch(self, arrived: Callable[[int], None], passages: list[Passage] | None = None) -> Passage:
        passage = Passage(self.course.terms, self.course.moments, arrived, self._roots)
        if passages is not None:
            passages.append(passage)
        for k, moment in enumerate(passage.moments):
            if moment is None:
                arrived(k)
        self._run(passage)
        passage.check()
        return passage


def _shorten(block: Block, before: Mapping[int, Tensor], share: float) -> None:
    """Move a block by at most a share of its norm, or of the norm that torch's own initialisation gives it."""
    old = [before[id(p)] for p in block.params]
    moves = torch._foreach_sub(list(block.params), old)
    length, norm = (torch.stack(torch._foreach_norm(own)).square().sum() for own in (moves, old))
    usual = sum(p.shape[0] if p.ndim else 1 for p in block.params) / 3
    kept = (share * (norm.clamp_min(usual) / length).sqrt()).clamp_max(1.0)
    for p, before_it, move in zip(block.params, old, moves, strict=True):
        # A step that is not shortened stays as it is, to the last bit.
        p.copy_(torch.where(kept < 1, torch.addcmul(before_it, move, kept), p))


def _add(block: Block, v: Tensor, curvature: Raised) -> None:
    """Move a block by -Q_uu^{-1} U^T v."""
    pieces = block.unpack(block.rmatvec(v))
    inverse = curvature.diagonal(block.params)
    if inverse is None:
        torch._foreach_sub_(list(block.params), curvature.solve(block.params, pieces))
        return
    for p, piece, d in zip(block.params, pieces, inverse, strict=True):
        if isinstance(d, Tensor):
            p.addcmul_(piece, d, value=-1)
        else:
            p.add_(piece, alpha=-d)
