r"""Policies of single samples that count on what the mean over the batch really does.

In :mod:`pullback.control.samplewise` each sample believes that the stages behind will do for it what it would do by
itself; what happens is the mean over N samples. Taken together (derived here) the samples of a batch have the value
:math:`-\gamma^\top e + \tfrac12 e^\top W e` behind a stage, with all of their deviations e in one vector, and the
stage's moves cost :math:`\tfrac12 (\delta - s)^\top Q_{uu} (\delta - s)` around the step s that the host really takes:
momentum, decay and a clipped gradient included. In taped rows, of all samples one below the other, the best answer is

.. math:: \delta = s - Q_{uu}^{-1} U^\top (W_+ e - \gamma_+), \qquad
   \gamma_+ = \gamma - W_+ U m, \quad m = s + Q_{uu}^{-1} U^\top \gamma, \quad
   W_+ = (W^{-1} + U Q_{uu}^{-1} U^\top)^{-1}

and :math:`W_+, \gamma_+` are the value in front of it. Um is what the mean move does to each sample: two products with
U, so it is taken as it is. Only :math:`G = U Q_{uu}^{-1} U^\top` would make W a matrix over pairs of samples. Of G
the blocks h on its diagonal are kept, times a c: :math:`c = 1` is G itself where the samples' rows are orthogonal,
:math:`c = N` bounds it (:math:`G \preceq N\, \mathrm{diag}(h)`, with equality along a vector where all samples are
alike). :math:`c = \sqrt N` is taken, the geometric mean. With one sample all three are exact: the feedback of
:mod:`pullback.control.feedback` with :math:`\mu = 1/\eta` on SGD. :math:`c = N` in W and the sample's own
:math:`b - h \gamma` in place of :math:`-Um` is the ``"positive"`` form.

Linear in s are :math:`\gamma`, U m and so the whole answer to no deviation. :math:`\|\sum_l U_l m_l\|^2` is the squared
change of the predictions in the metric; where it is too large, s and :math:`\gamma` are shortened together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.control.forms import Curvature, own_form
from pullback.control.samplewise import Policy, columns_first, shrunk, times
from pullback.curvature import Block
from pullback.tape import Term


@dataclass
class Plan:
    """What all stages will answer.

    Attributes:
        policies: by stage, in the order of the route, and term.
        length: squared change of the predictions by the mean moves, in the metric; a scalar.
    """

    policies: list[list[Policy]]
    length: Tensor

    def share(self, allowed: float) -> float:
        """How much of the step is taken so that the squared change of the predictions is at most ``allowed``.

        Args:
            allowed: the bound, at least 0; infinite for none.

        Returns:
            A number from 0 to 1; nan if the change is not finite.
        """
        length = float(self.length)
        if not math.isfinite(length):
            return math.nan
        return 1.0 if length <= allowed else math.sqrt(allowed / length)

    def shorten(self, share: float) -> None:
        """Be the plan of a host's step that is shortened."""
        for policy in (policy for own in self.policies for policy in own):
            if policy.gamma is not None:
                policy.gamma = policy.gamma * share


def plan(
    stages: Sequence[Sequence[Block]], terms: Sequence[Term], curvature: Curvature, before: Mapping[int, Tensor]
) -> Plan:
    """From the last stage to the first.

    Args:
        stages: blocks of every stage, in the order of the route, in the weights of which the host has moved already.
        terms: the terms of the step.
        curvature: Q_uu^{-1}.
        before: the weights before the host's step, by id.
    """
    c = math.sqrt(samples(terms))
    W: list[Tensor | None] = [None for _ in terms]
    gamma: list[Tensor | None] = [None for _ in terms]
    change = [torch.zeros_like(term.e0) for term in terms]
    out: list[list[Policy]] = []
    for blocks in reversed(stages):
        moves = [_mean_move(block, gamma, terms, curvature, before) for block in blocks]
        for t, term in enumerate(terms):
            own = [(block.rows[t], m) for block, m in zip(blocks, moves, strict=True) if t in block.rows]
            if not own:
                continue
            h, done = own_form(own[0][0], curvature), own[0][0].matvec(own[0][1])
            for rows, m in own[1:]:
                h, done = h + own_form(rows, curvature), done + rows.matvec(m)
            W[t] = after = shrunk(W[t], c * h)
            step = after * done if term.r == 1 else columns_first(times(after, done.view(term.r, term.N).T))
            known = gamma[t]
            gamma[t] = -step if known is None else known - step
            change[t] += done
        out.append([_policy(*own) for own in zip(W, gamma, terms, strict=True)])
    return Plan(out[::-1], torch.stack([own.square().sum() for own in change]).sum())


def samples(terms: Sequence[Term]) -> int:
    """How many samples there are in all; those of several losses on the same calls of the model count once."""
    found: dict[tuple[int, ...], int] = {}
    for term in terms:
        key = tuple(sorted({root.serial for root in term.roots}))
        found[key] = max(term.N, found.get(key, 0))
    return sum(found.values())


def _mean_move(
    block: Block,
    gamma: Sequence[Tensor | None],
    terms: Sequence[Term],
    curvature: Curvature,
    before: Mapping[int, Tensor],
) -> Tensor:
    """The mean move m of a block, packed."""
    moves = [p - before[id(p)] for p in block.params]
    if any(gamma[t] is not None for t in block.rows):
        v = [torch.zeros_like(term.e0) if g is None else g for g, term in zip(gamma, terms, strict=True)]
        pieces = block.unpack(block.rmatvec(v[0] if len(v) == 1 else torch.cat(v)))
        inverse = curvature.diagonal(block.params)
        if inverse is None:
            torch._foreach_add_(moves, curvature.solve(block.params, pieces))
        else:
            for m, piece, d in zip(moves, pieces, inverse, strict=True):
                m.addcmul_(piece, d) if isinstance(d, Tensor) else m.add_(piece, alpha=d)
    return block.pack(moves)


def _policy(W: Tensor | None, gamma: Tensor | None, term: Term) -> Policy:
    if gamma is None or term.r == 1:
        return Policy(W, gamma)
    return Policy(W, gamma.view(term.r, term.N).T)
