r"""SNOpt's update rule for neural ODEs (Liu, Chen & Theodorou, NeurIPS 2021), as the paper describes it.

Each layer of a field has two Kronecker factors, integrals over time of second moments of what it is given and of the
loss's costate pulled back to its output,

.. math:: A = \int \bar x x^\top dt, \qquad B = \int \bar h h^\top dt,

mean over the samples, from one column: the costate itself. Every `every` steps their eigenbases are taken; in them each
entry of the gradient is divided by its running second moment (EKFAC, George et al. 2018):

.. math:: m \leftarrow \alpha m + (1 - \alpha) N g^2, \qquad
   w \leftarrow w - \eta\, \mathrm{back}\, \frac{g}{m + \epsilon}

with N the rows of the batch and m begun with the products of the eigenvalues. The released code reads the adjoint at a
wrong time on the steps that renew the bases, so that its gradient there is a hundredth of the true one; here the
gradient is that of the loss on every step. Layers outside of fields are treated alike (the code's ``full_precond``),
and what is not a weight with two sides has no basis but m alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pullback.curvature import Averaged, Averages
from pullback.curvature.eigen import EigenBlock
from pullback.curvature.moments import MatrixMoment
from pullback.metric import Empirical, Gaussian
from pullback.optim.taped import Taped
from pullback.tape import Term


class _Costate(Empirical):
    """The loss's costate of each sample, as it is: every sample weighs one in the mean."""

    own_weights = True


class SNOpt(Taped):
    """SNOpt's rule for any model whose layers the library can read.

    Args:
        model: The model.
        criterion: The loss module of the loop, a mean over samples.
        lr: Learning rate eta.
        eps: Added to the second moments.
        alpha: Share of the second moments that is kept.
        every: Steps from one eigenbasis to the next.
        momentum: On the preconditioned gradient, as of SGD.
        weight_decay: Decoupled, times lr.

    Raises:
        ValueError: If an option makes no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        *,
        lr: float = 1e-2,
        eps: float = 0.05,
        alpha: float = 0.75,
        every: int = 100,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        if not (lr > 0 and eps > 0 and every >= 1 and 0 <= alpha < 1 and 0 <= momentum < 1 and weight_decay >= 0):
            raise ValueError(
                f"lr={lr}, eps={eps}, every={every}, alpha={alpha}, momentum={momentum}, weight_decay={weight_decay}; "
                "give positive lr and eps, every from 1, alpha and momentum from 0 to below 1, weight_decay from 0."
            )
        super().__init__(
            model,
            criterion,
            metric=_Costate(Gaussian()),
            memory=None,
            lr=lr,
            weight_decay=weight_decay,
            sweep="loop",
            batch_norm="refuse",
            fallback=None,
            grad_scaler=None,
            params=None,
        )
        self.eps, self.alpha, self.every, self.momentum = eps, alpha, every, momentum
        self._count, self._rows = 0, 1
        self._averages: Averages | None = None
        self._moments: list[Tensor] = []
        self._velocities: list[Tensor] = []

    @property
    def blocks(self) -> list[Averaged]:
        """What is known of every layer; empty before the first step."""
        return [] if self._averages is None else self._averages.blocks

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """Takes one step; see :meth:`pullback.optim.taped.Taped.step`."""
        loss = super().step(closure)
        self._tape.recorder.enabled = not self._idle()
        return loss

    def _idle(self) -> bool:
        return self._count % self.every > 0

    def _advance(self, terms: list[Term], loss: float, finite: bool, closure: Callable[[], Any] | None) -> None:
        if terms:
            self._renew(terms)
        velocities = []
        for k, block in enumerate(self.blocks):
            G = block.gathered([torch.zeros_like(p) if p.grad is None else p.grad for p in block.params])
            inside, m = rotated(block, G), self._moments[k]
            m.mul_(self.alpha).addcmul_(inside, inside, value=(1 - self.alpha) * self._rows)
            velocities.append(rotated(block, inside / (m + self.eps), back=True))
        if not self._velocities:
            self._velocities = [torch.zeros_like(v) for v in velocities]
        group = self.param_groups[0]
        for block, kept, new in zip(self.blocks, self._velocities, velocities, strict=True):
            kept.mul_(self.momentum).add_(new)
            for p, move in zip(block.params, block.parted(kept), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(move, alpha=group["lr"])
        self._count += 1

    def _renew(self, terms: list[Term]) -> None:
        """New factors, bases and second moments; nothing of the old ones is kept."""
        self._rows = sum(term.N for term in terms)
        # Averages keep the order in which layers are met, which is that of the model.
        self._averages = Averages("ekfac", "expand", damping=1.0, decay=0.0, basis=1)
        self._averages.follow(terms)
        self._moments = [begun(block) for block in self.blocks]
        self._strays({id(p) for block in self.blocks for p in block.params})

    def _state(self) -> dict[str, Any]:
        """Nothing: a run of a race is not resumed."""
        return {}

    def _load(self, own: dict[str, Any]) -> None:
        """Nothing to take up."""


def rotated(block: Averaged, G: Tensor, back: bool = False) -> Tensor:
    """A gradient in the eigenbasis of its layer, or back from it; as it is where there are no two sides.

    Args:
        block: What is known of the layer.
        G: In the block's own layout, shape (groups, left, right) with two sides.
        back: Which way.

    Returns:
        The shape of G.
    """
    if not isinstance(block, EigenBlock) or block.bases is None:
        return G
    P, Q = block.bases
    return P @ G @ Q.mT if back else P.mT @ G @ Q


def begun(block: Averaged) -> Tensor:
    """The second moments to begin with: products of eigenvalues, or none where there are no two sides.

    Args:
        block: What is known of the layer.

    Returns:
        In the block's own layout.
    """
    if not isinstance(block, EigenBlock) or block.bases is None:
        return torch.zeros_like(block.gathered([torch.zeros_like(p) for p in block.params]))
    assert isinstance(block.left, MatrixMoment)
    assert isinstance(block.right, MatrixMoment)
    left, right = (
        (Q.mT @ C @ Q).diagonal(dim1=1, dim2=2).clamp(min=0)
        for Q, C in zip(block.bases, (block.left.C, block.right.C), strict=True)
    )
    return left[:, :, None] * right[:, None]
