"""The model at a batch as linear algebra: blocks, R-space residual, and the gradient split along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.curvature.block import Block, blocks_of
from pullback.curvature.tangent import tangential
from pullback.errors import StepError
from pullback.manifolds import Manifold
from pullback.tape import Term


@dataclass
class Gradient:
    """A gradient, split into what the R-space residual generates and what is left.

    Attributes:
        g: gradient of every block, packed.
        e0: residual with ``g = U^T e0 + rest``, shape (R,).
        rest: the remainder per block, or None if it is round-off.
    """

    g: list[Tensor]
    e0: Tensor
    rest: list[Tensor] | None


class Linearisation:
    """Blocks and residual of the terms of one step.

    Args:
        terms: swept terms, at least one.
        held: manifolds by id of the parameter, of those that live on one.

    Attributes:
        blocks: the blocks, in the order of the model's calls; in tangent coordinates where parameters have them.
        e0: residual of the loss as it is, shape (R,).
        exact: whether e0 generates the gradient of the terms (False under a sketch).
        held: see above.
    """

    def __init__(self, terms: Sequence[Term], held: Mapping[int, Manifold] | None = None) -> None:
        self.terms = list(terms)
        self.held = held or {}
        self.blocks = blocks_of(terms)
        if self.held:
            self.blocks = tangential(self.blocks, self.held)
        self.e0 = terms[0].e0 if len(terms) == 1 else torch.cat([term.e0 for term in terms])
        self.exact = all(term.exact for term in terms)

    @property
    def R(self) -> int:
        """Rows over all terms."""
        return self.e0.shape[0]

    def gradient(self, blocks: Sequence[Block], ridge: float = 0.0) -> Gradient:
        """The gradient in ``p.grad``, split (theory 2).

        A gradient that was clipped is a multiple of ``U^T e0``, which keeps the short form; one that holds
        other things (a penalty, weight decay, a sample whose prediction has no curvature left) has a
        remainder, which takes the general form.

        Args:
            blocks: the blocks to gather it for.
            ridge: c of a cost c/2 |w|^2, whose gradient is added; it is a remainder too.
        """
        found = self._loss_gradient(blocks)
        if not ridge:
            return found
        pull = [ridge * block.pack([p.detach() for p in block.params]) for block in blocks]
        g = [a + b for a, b in zip(found.g, pull, strict=True)]
        rest = pull if found.rest is None else [a + b for a, b in zip(found.rest, pull, strict=True)]
        return Gradient(g, found.e0, rest)

    def _loss_gradient(self, blocks: Sequence[Block]) -> Gradient:
        g = [block.pack([_grad_of(p) for p in block.params]) for block in blocks]
        if not self.exact:
            return Gradient(g, self.e0, g)
        own = [block.rmatvec(self.e0) for block in blocks]
        rest = [a - b for a, b in zip(g, own, strict=True)]
        norm = _square(g)
        # Two orders above what summing in another order may leave.
        tolerance = norm * (1e2 * torch.finfo(self.e0.dtype).eps ** 0.75) ** 2
        if _square(rest) <= tolerance:
            return Gradient(g, self.e0, None)
        overlap = sum(float(a @ b) for a, b in zip(g, own, strict=True))
        factor = overlap / max(_square(own), torch.finfo(self.e0.dtype).tiny)
        scaled = [a - factor * b for a, b in zip(g, own, strict=True)]
        if _square(scaled) <= tolerance:
            return Gradient(g, self.e0 * factor, None)
        return Gradient(g, self.e0, rest)


def _grad_of(p: Tensor) -> Tensor:
    if p.grad is None:
        raise StepError("A parameter on the tape has no gradient; call backward() on the loss before step().")
    if p.grad.is_sparse:
        raise StepError("Sparse gradients are not supported; build the Embedding with sparse=False.")
    return p.grad


def _square(parts: Sequence[Tensor]) -> float:
    return float(sum((part @ part for part in parts), start=parts[0].new_zeros(())))
