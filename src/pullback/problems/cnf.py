r"""Continuous normalizing flows (Chen et al. 2018; FFJORD, Grathwohl et al. 2019).

A point flows from the data to a standard normal, and the logarithm of its density changes by the divergence of the
field on the way:

.. math:: \dot z = f(t, z), \quad \dot\delta = \mathrm{tr}\, f_z, \qquad
   \log p(x) = \log N(z(1)) + \delta(1), \quad z(0) = x,\ \delta(0) = 0.

The divergence is made by the layers of the field alone, called on tangents: :math:`\mathrm{tr}\, f_z = \sum_i e_i^\top
f_z e_i`, or :math:`\epsilon^\top f_z \epsilon` with random signs (Hutchinson 1990), which has it as its mean. So a
layer's part in it is one more of its calls, and nothing is differentiated twice.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from pullback.metric import Gaussian
from pullback.metric.criteria import CRITERIA, Known
from pullback.ode import ODEBlock


class FlowNLL(nn.Module):
    r"""Negative log-likelihood of a flow, in nats per point, mean over the points.

    The metric of :math:`\tfrac12 |z|^2 - \delta` is the identity in z, by its Hessian, and 1 in delta. The Hessian in
    delta is zero, but delta is no free output: it is the logarithm of a volume, and where the flow in one dimension is
    z = a x, :math:`-\delta = -\log a` has the Hessian :math:`(da / a)^2 = d\delta^2` (derived here). In d dimensions,
    for z = A x and :math:`B = A^{-1} dA`, it is :math:`\mathrm{tr}\, B^2` while :math:`d\delta^2 = (\mathrm{tr}\,
    B)^2`: the metric takes volumes into account and leaves shapes to z.
    """

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss.

        Args:
            outputs: z and delta, shape (N, d + 1).
            targets: Not looked at: the data are the inputs.

        Returns:
            A scalar.
        """
        return likelihood(outputs).neg().mean()


def likelihood(outputs: Tensor) -> Tensor:
    """Logarithms of the density.

    Args:
        outputs: z and delta, shape (N, d + 1).

    Returns:
        Shape (N,).
    """
    z, delta = outputs[:, :-1], outputs[:, -1]
    return delta - 0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def nll(outputs: Tensor, _targets: Tensor) -> float:
    """The loss as a test metric.

    Args:
        outputs: As in `FlowNLL`.

    Returns:
        Nats per point.
    """
    return -float(likelihood(outputs).double().mean())


# Every point weighs one in a mean over the points.
CRITERIA[FlowNLL] = Known(lambda criterion: Gaussian(), lambda criterion, z, target: z.new_full((1, 1), 1 / z.shape[0]))


class FlowField(nn.Module):
    r"""A tanh network of time and place that carries tangents along: f and its products with them.

    Every layer is :math:`h \mapsto \tanh(W h + b(t))` with b linear in t, the last one without tanh.

    Args:
        size: d, numbers of a point.
        width: Hidden width.
        depth: Hidden layers.
    """

    def __init__(self, size: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [size, *[width] * depth, size]
        self.weights = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))
        self.shifts = nn.ModuleList(nn.Linear(1, b) for b in widths[1:])
        with torch.no_grad():
            for layer in (self.weights[-1], self.shifts[-1]):
                for parameter in layer.parameters():
                    parameter.mul_(0.1)

    def forward(self, t: Tensor, z: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """F and its derivative along tangents.

        Args:
            t: The time.
            z: Points, shape (N, d).
            tangents: Shape (N, k, d).

        Returns:
            Velocities (N, d) and f_z times the tangents (N, k, d).
        """
        times = t.expand(len(z), 1)
        for k, (weight, shift) in enumerate(zip(self.weights, self.shifts, strict=True)):
            # Two calls rather than one: what goes back from the velocity alone does not meet the tangents.
            z, tangents = weight(z) + shift(times), weight(tangents)
            if k + 1 < len(self.weights):
                z = z.tanh()
                tangents = tangents * (1 - z.square())[:, None]
        return z, tangents


class WithDivergence(nn.Module):
    """The field of a point and its delta; and of the random tangent between them, which stays as it is.

    Args:
        field: Of the points.
        size: d, numbers of a point.
    """

    def __init__(self, field: FlowField, size: int) -> None:
        super().__init__()
        self.field, self.size = field, size

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        """The velocity of the state.

        Args:
            t: The time.
            state: z, tangent, delta, shape (N, 2 d + 1), for Hutchinson's trace; z, delta, shape (N, d + 1), for the
                exact one.

        Returns:
            The shape of the state.
        """
        z, tangent = state[:, : self.size], state[:, self.size : -1]
        eye = torch.eye(self.size, dtype=z.dtype, device=z.device).expand(len(z), -1, -1)
        tangents = tangent[:, None] if tangent.shape[1] else eye
        velocity, moved = self.field(t, z, tangents)
        divergence = (moved * tangents).sum((1, 2))
        return torch.cat([velocity, torch.zeros_like(tangent), divergence[:, None]], 1)


class NormalizingFlow(nn.Module):
    """From points to z and delta, whose loss is `FlowNLL`.

    Args:
        block: The flow of a `WithDivergence`.
        random: Whether training takes Hutchinson's trace, with signs drawn for every point at every call; evaluation
            always takes the exact one.
    """

    def __init__(self, block: ODEBlock, random: bool) -> None:
        super().__init__()
        self.block, self.random = block, random

    def forward(self, x: Tensor) -> Tensor:
        """Z at the end and delta.

        Args:
            x: Points, shape (N, d).

        Returns:
            Shape (N, d + 1).
        """
        parts = [x, torch.zeros_like(x[:, :1])]
        if self.random and self.training:
            parts.insert(1, torch.randint_like(x, 2) * 2 - 1)
        out: Tensor = self.block(torch.cat(parts, 1))
        return torch.cat([out[:, : x.shape[1]], out[:, -1:]], 1)
