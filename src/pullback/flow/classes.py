r"""Cross entropy modulo the fibre of the logits: their constant direction changes no prediction.

Of C logits per sample the flow uses the C - 1 coordinates :math:`x_n = B^\top z_n`, B an orthonormal basis of the
complement of the constants (C, on the fibre; the basis is a Householder reflection). D then is
:math:`B^\top \partial z / \partial \theta`, and its rank is to be N(C - 1), not NC.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pullback.flow.aims import Aim
from pullback.flow.errors import FlowError
from pullback.metric import OutputMetric


def quotient_basis(classes: int, like: Tensor) -> Tensor:
    """Orthonormal basis of the complement of the constants, (classes, classes - 1)."""
    root = like.new_full((classes,), classes**-0.5)
    v = root.clone()
    v[0] += 1
    # I - v v^T / v_0 maps e_0 to -root; its other columns span the complement.
    return (torch.eye(classes, dtype=like.dtype, device=like.device) - torch.outer(v, v) / v[0])[:, 1:]


class Quotient(OutputMetric):
    """The Euclidean metric of logits (N, C) modulo constants: B as the factor, C - 1 columns."""

    def cells(self, z: Tensor) -> tuple[int, ...]:
        """One per sample. See the base class."""
        return (len(z),)

    def columns(self, z: Tensor, samples: int) -> int:
        """C - 1. See the base class."""
        return z.shape[1] - 1

    def factor(self, z: Tensor, weight: Tensor, samples: int, target: Tensor | None = None) -> Tensor:
        """B for every sample. See the base class."""
        B = quotient_basis(z.shape[1], z)
        return B.T[:, None, :].expand(-1, len(z), -1).contiguous()

    def coordinates(
        self, z: Tensor, weight: Tensor, costate: Tensor, samples: int, target: Tensor | None = None
    ) -> Tensor:
        """B^T of the costate. See the base class."""
        return (costate @ quotient_basis(z.shape[1], z)).T


class CrossEntropy(Aim):
    """Mean cross entropy of logits (N, C), moved modulo the constant direction.

    The flow in output space falls apart into samples, ``z' = (onehot(y) - p) / N``. It has no closed form and no
    exponential law (the cost falls as 1/s): its time to eps is found by integrating that small system.

    Args:
        labels: classes, (N,), int64.

    Raises:
        FlowError: if the labels are none.
    """

    exact = False
    label = "cross entropy"

    def __init__(self, labels: Tensor) -> None:
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise FlowError(f"Labels must be int64 of shape (N,), got {labels.dtype} of shape {tuple(labels.shape)}.")
        self.labels = labels
        self.unit = float(len(labels))
        self._B: Tensor | None = None

    def metric(self) -> OutputMetric:
        """See the base class."""
        return Quotient()

    def check(self, z: Tensor) -> None:
        """See the base class."""
        if z.ndim != 2 or len(z) != len(self.labels):
            raise FlowError(
                f"Cross entropy needs logits of shape (N, C) for {len(self.labels)} labels, got {tuple(z.shape)}."
            )
        if z.shape[1] < 2:
            raise FlowError(f"Logits of shape {tuple(z.shape)} have one class; cross entropy needs two or more.")
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= z.shape[1]:
            raise FlowError(f"A label is outside of the {z.shape[1]} classes of the logits.")
        self._B = quotient_basis(z.shape[1], z)

    def coordinates(self, z: Tensor) -> Tensor:
        """B^T z. See the base class."""
        return (z @ self._basis()).T.reshape(-1)

    def spread(self, v: Tensor, z: Tensor) -> Tensor:
        """See the base class."""
        return self._logits(v)

    def _basis(self) -> Tensor:
        assert self._B is not None
        return self._B

    def _logits(self, x: Tensor) -> Tensor:
        """Logits without constant part, (N, C)."""
        return x.view(-1, len(self.labels)).T @ self._basis().T

    def cost(self, s: float, x: Tensor) -> float:
        """See the base class."""
        return float(torch.nn.functional.cross_entropy(self._logits(x), self.labels))

    def velocity(self, s: float, x: Tensor) -> Tensor:
        """See the base class."""
        p = torch.softmax(self._logits(x), 1)
        p[torch.arange(len(p)), self.labels] -= 1
        return self.coordinates(p) / -len(p)

    def advance(self, s: float, x: Tensor, h: float) -> Tensor:
        """Fourth-order steps, their lengths growing with the time. See the base class."""
        time, first = 0.0, 0.05 * self.unit
        while time < h:
            # Velocities fall as 1/s: steps may grow with s.
            step = min(first + 0.05 * time, h - time)
            x = self._step(x, step)
            time = time + step if time + step < h * (1 - 1e-14) else h
        return x

    def _step(self, x: Tensor, h: float) -> Tensor:
        a = self.velocity(0.0, x)
        b = self.velocity(0.0, x + 0.5 * h * a)
        c = self.velocity(0.0, x + 0.5 * h * b)
        d = self.velocity(0.0, x + h * c)
        return x + h / 6 * (a + 2 * b + 2 * c + d)

    def stopping_time(self, x: Tensor, eps: float) -> float:
        """By integrating the flow in output space, then bisection. See the base class."""
        time = 0.0
        while self.cost(time, x) > eps:
            step = 0.05 * (self.unit + time)
            ahead = self._step(x, step)
            if self.cost(time, ahead) <= eps:
                break
            x, time = ahead, time + step
            if time > 1e12 * self.unit:
                raise FlowError(f"A cross entropy of {eps:g} is out of reach for these logits; ask for a larger eps.")
        low, high = 0.0, 0.05 * (self.unit + time)
        while high - low > 1e-12 * (self.unit + time):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(0.0, self._step(x, middle)) > eps else (low, middle)
        return time + high

    def size(self, s: float, x: Tensor) -> float:
        """What the logits move in one unit of time. See the base class."""
        return float(self.velocity(s, x).norm()) * self.unit

    def resolution(self, x: Tensor) -> float:
        """Round-off of a logarithm of one. See the base class."""
        return 10 * torch.finfo(x.dtype).eps * math.sqrt(1 / len(self.labels))
