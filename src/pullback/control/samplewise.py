r"""Feedback policies of single samples: differential dynamic programming with a host's curvature for everybody.

For sample n and stage l, with :math:`Q_{uu}` the same for all samples and :math:`V'` the value function behind the
stage (Liu, Chen & Theodorou, arXiv 2002.08809 and 2510.14168):

.. math:: k = -Q_{uu}^{-1} Q_u, \quad K = -Q_{uu}^{-1} Q_{ux}, \quad
          V_x = Q_x - Q_{ux}^\top Q_{uu}^{-1} Q_u, \quad V_{xx} = Q_{xx} - Q_{ux}^\top Q_{uu}^{-1} Q_{ux}

and the stage moves by the mean over the samples of :math:`k + K (x^{new} - x)`.

Value functions go back through the same Jacobians as costates :math:`p` and factors :math:`S` of the output metric,
so that nothing needs a sweep of its own (derived here): behind every stage

.. math:: V'_{xx} = S\, W S^\top, \qquad V'_x = p - S \gamma

with W (r, r) and :math:`\gamma` (r) of each sample. With its rows :math:`U = S^\top f_u` and its gradient g,

.. math:: h = U Q_{uu}^{-1} U^\top, \quad b = U Q_{uu}^{-1} g, \qquad
          \gamma \leftarrow \gamma + W (b - h \gamma), \quad W \leftarrow W - W h W

from :math:`W = I, \gamma = 0` behind the last stage, and with the deviation :math:`e = S^\top (x^{new} - x)` in front
of the stage

.. math:: k + K (x^{new} - x) = -Q_{uu}^{-1} \bigl(g + U^\top (W e - \gamma)\bigr) .

The mean of :math:`-Q_{uu}^{-1} g` is the host's step; the rest is what a policy adds. A sample whose :math:`Q_{uu}` is
too small for it (:math:`C h C^\top > I`, :math:`W = C^\top C`) would get a negative curvature: those eigenvalues of
:math:`I - C h C^\top` are clamped at 0 and counted.

With ``positive`` the curvature of a sample is the host's and its own, :math:`Q_{uu} + U^\top W U`. Then (Woodbury)
W becomes :math:`(W^{-1} + h)^{-1}`, never negative, :math:`\gamma` is updated with the new W, and the stage answers
with the new W and :math:`\gamma` in place of those behind it. For a single sample on SGD that is the exact feedback of
:mod:`pullback.control.feedback` with :math:`\mu = 1/\eta`.

Units. The formulas are of samples that each have the whole loss to themselves: N times their share of it, so that the
mean of their gradients is the gradient. Rows on the tape are of the shares: :math:`S = \sqrt N S_{tape}`,
:math:`g = N g_{tape}`. In taped rows, with :math:`\hat\gamma = \gamma / \sqrt N`,

.. math:: \hat\gamma \leftarrow \hat\gamma + N W (\hat b - \hat h \hat\gamma), \quad W \leftarrow W - N W \hat h W,
          \qquad \text{added:}\; -Q_{uu}^{-1} \sum_n \hat U_n^\top (W_n \hat e_n - \hat\gamma_n) .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.control.forms import Forms


@dataclass
class Policy:
    """What a stage answers to a deviation, in one term.

    Attributes:
        W: shape (N, r, r); with one column (N,); None for the identity, behind the last stage.
        gamma: shape (N, r); with one column (N,); None for zero.
    """

    W: Tensor | None
    gamma: Tensor | None

    def answer(self, e: Tensor | None) -> Tensor | None:
        """W e - gamma, shape (r N,): columns first, as rows of U are.

        Args:
            e: the deviation, shape (r N,); None for none.
        """
        out = e
        if e is not None and self.W is not None:
            if self.W.ndim == 1:
                out = self.W * e
            else:
                columns = e.view(self.W.shape[1], self.W.shape[0])
                out = columns_first(torch.einsum("nab,bn->na", self.W, columns))
        if self.gamma is None:
            return out
        gamma = self.gamma if self.gamma.ndim == 1 else columns_first(self.gamma)
        return -gamma if out is None else out - gamma


def columns_first(t: Tensor) -> Tensor:
    """(N, r) as (r N,)."""
    return t.T.reshape(-1)


def shrunk(W: Tensor | None, h: Tensor) -> Tensor:
    """(W^{-1} + h)^{-1}: what a stage with curvature of its own leaves of W.

    Args:
        W: shape (N, r, r), or (N,) of one column; None for the identity.
        h: the same.
    """
    if h.ndim == 1:
        return (1 + h).reciprocal_() if W is None else W / (1 + h * W)
    eye = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    W = eye.expand_as(h) if W is None else W
    W = torch.linalg.solve(eye + W @ h, W)
    return (W + W.mT) / 2


class Recursion:
    """The value functions of the samples of one term, from the last stage to the first.

    Args:
        scale: the number of samples N, by which shares of the loss become losses.
        positive: whether a sample's curvature holds its own factor too.

    Attributes:
        W, gamma: behind the stage that is next (see :class:`Policy`).
        clamped: numbers of eigenvalues clamped so far, as tensors.
    """

    def __init__(self, scale: float, positive: bool = False) -> None:
        self.scale = scale
        self.positive = positive
        self.W: Tensor | None = None
        self.gamma: Tensor | None = None
        self.clamped: list[Tensor] = []

    def behind(self) -> Policy:
        """The value function behind the stage that is next."""
        return Policy(self.W, self.gamma)

    def stage(self, forms: Forms | None) -> Policy:
        """Go through a stage.

        Args:
            forms: the stage's; None if it takes no part in this term.

        Returns:
            What the stage answers with.
        """
        policy = self.behind()
        if forms is None:
            return policy
        step = self._column if forms.b.ndim == 1 else self._columns
        step(self.scale * forms.h, self.scale * forms.b)
        return self.behind() if self.positive else policy

    def _column(self, h: Tensor, b: Tensor) -> None:
        """One column: all of it numbers, shape (N,)."""
        W, gamma = self.W, self.gamma
        error = b if gamma is None else torch.addcmul(b, h, gamma, value=-1)
        if self.positive:
            W = shrunk(W, h)
            step = W * error
        else:
            step = error if W is None else W * error
            left = 1 - (h if W is None else h * W)
            self.clamped.append(left < 0)
            left.clamp_min_(0)
            W = left if W is None else left.mul_(W)
        self.W, self.gamma = W, step if gamma is None else gamma + step

    def _columns(self, h: Tensor, b: Tensor) -> None:
        """Several columns: matrices (N, r, r) and vectors (N, r)."""
        error = b if self.gamma is None else b - times(h, self.gamma)
        if self.positive:
            W = shrunk(self.W, h)
            step = times(W, error)
        else:
            eye = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
            W = eye.expand_as(h) if self.W is None else self.W
            step = times(W, error)
            W = self._reduced(W, h, eye)
        self.W, self.gamma = W, step if self.gamma is None else self.gamma + step

    def _reduced(self, W: Tensor, h: Tensor, eye: Tensor) -> Tensor:
        """W - W h W with the clamp."""
        # With h = F F^T the eigenvalues of I - C h C^T that are not 1 are those of I - F^T W F: no root of W is needed.
        F, flawed = torch.linalg.cholesky_ex(h)
        left = eye - F.mT @ W @ F
        flawed = flawed + torch.linalg.cholesky_ex(left)[1]
        plain = W - W @ h @ W
        bad = flawed > 0
        if not bool(bad.any()):
            self.clamped.append(bad)
            return (plain + plain.mT) / 2
        # Rank deficient or too large: by the root of W of those samples.
        values, vectors = torch.linalg.eigh(W[bad])
        C = values.clamp_min(0).sqrt()[:, :, None] * vectors.mT
        values, vectors = torch.linalg.eigh(eye - C @ h[bad] @ C.mT)
        negative = values < 0
        self.clamped.append(negative)
        root = values.clamp_min(0).sqrt()[:, :, None] * (vectors.mT @ C)
        plain[bad] = root.mT @ root
        return (plain + plain.mT) / 2


def times(A: Tensor, v: Tensor) -> Tensor:
    """Matrices (N, r, r) times vectors (N, r)."""
    return (A @ v[:, :, None])[:, :, 0]


def recursion(
    stages: Sequence[Sequence[Forms | None]], samples: Sequence[int], positive: bool = False
) -> tuple[list[list[Policy]], int]:
    """Policies of all stages, and how many eigenvalues were clamped.

    Args:
        stages: forms by stage, in the order of the route, and term. Those of the first are not read unless
            ``positive``.
        samples: number of samples of every term.
        positive: whether a sample's curvature holds its own factor too.

    Returns:
        Policies by stage and term, and the number clamped.
    """
    runs = [Recursion(float(sum(samples)), positive) for _ in samples]
    out: list[list[Policy]] = []
    for k in range(len(stages) - 1, -1, -1):
        if k == 0 and not positive:
            out.append([run.behind() for run in runs])
        else:
            out.append([run.stage(forms) for run, forms in zip(runs, stages[k], strict=True)])
    flags = [flag.sum() for run in runs for flag in run.clamped]
    return out[::-1], int(torch.stack(flags).sum()) if flags else 0
