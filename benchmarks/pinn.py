"""A Poisson problem solved by a network whose value and derivatives travel together, as jets.

u = sin(pi x) sin(pi y) on the unit square, from Laplace u = -2 pi^2 u inside and u = 0 on the boundary. Every module
is a Linear on (N, 4, d + 1): the channels are the value, both first derivatives and the Laplacian, and the last input
is 1 for the value and 0 for derivatives, so that its weight is the bias. Between the modules tanh takes the jets along
by the chain rule. So each sample is one row of one prediction and the modules are plain layers.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from pullback.problems import Problem

#: Weight of the boundary beside the interior.
BOUNDARY = 10.0


class JetNet(nn.Module):
    """A tanh network over jets; predicts the weighted Laplacian inside and the weighted value on the boundary.

    Args:
        hidden: Hidden widths.
        weights: Factors on the residuals of interior and boundary points.
    """

    def __init__(self, hidden: tuple[int, ...], weights: tuple[float, float]) -> None:
        super().__init__()
        sizes = pairwise((2, *hidden, 1))
        self.layers = nn.ModuleList(nn.Linear(a + 1, b, bias=False, dtype=torch.float64) for a, b in sizes)
        self.weights = weights

    def jets(self, points: Tensor) -> Tensor:
        """Value, first derivatives and Laplacian.

        Args:
            points: Shape (N, 2).

        Returns:
            Shape (N, 4).
        """
        h = points.new_zeros(len(points), 4, 3)
        h[:, 0, :2] = points
        h[:, 0, 2] = h[:, 1, 0] = h[:, 2, 1] = 1.0
        for layer in self.layers[:-1]:
            h = _with_one(_tanh(layer(h)))
        out: Tensor = self.layers[-1](h)
        return out[..., 0]

    def forward(self, x: Tensor) -> Tensor:
        """Predictions of points inside or on the boundary.

        Args:
            x: Shape (N, 3): the point and whether it is on the boundary.

        Returns:
            Shape (N, 1).
        """
        jets = self.jets(x[:, :2])
        inside, edge = self.weights
        return torch.where(x[:, 2] > 0, edge * jets[:, 0], inside * jets[:, 3]).unsqueeze(1)


def _tanh(z: Tensor) -> Tensor:
    value, slopes, laplacian = z[:, :1], z[:, 1:3], z[:, 3:]
    t = torch.tanh(value)
    first = 1 - t.square()
    second = -2 * t * first
    return torch.cat([t, first * slopes, first * laplacian + second * slopes.square().sum(1, keepdim=True)], 1)


def _with_one(h: Tensor) -> Tensor:
    one = h.new_zeros(h.shape[0], 4, 1)
    one[:, 0] = 1.0
    return torch.cat([h, one], 2)


def _solution(points: Tensor) -> Tensor:
    return torch.sin(math.pi * points).prod(1, keepdim=True)


def _drawn(generator: torch.Generator, inside: int, edge: int) -> Tensor:
    within = torch.rand(inside, 2, dtype=torch.float64, generator=generator)
    along = torch.rand(edge, dtype=torch.float64, generator=generator)
    side = torch.arange(edge) % 4
    around = torch.stack([along, (side % 2).double()], 1)
    around[side >= 2] = around[side >= 2].flip(1)
    return torch.cat([torch.cat([within, around]), (torch.arange(inside + edge) >= inside).double()[:, None]], 1)


def error(model: nn.Module) -> float:
    """Absolute L2 error on a grid.

    Args:
        model: A `JetNet`.

    Returns:
        The root of the mean squared error over 64 x 64 midpoints.
    """
    axis = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    grid = torch.cartesian_prod(axis, axis)
    assert isinstance(model, JetNet)
    with torch.no_grad():
        return float((model.jets(grid)[:, :1] - _solution(grid)).square().mean().sqrt())


def poisson(hidden: tuple[int, ...] = (24, 24, 24), inside: int = 200, edge: int = 60) -> Problem:
    """The problem: points and weights by seed, full batch, float64.

    The loss is 1/2 (mean over interior points + 10 times mean over boundary points) of the squared residuals.

    Args:
        hidden: Hidden widths.
        inside: Interior points.
        edge: Boundary points.

    Returns:
        The problem; its metric is the absolute L2 error.
    """
    total = inside + edge
    weights = (math.sqrt(total / inside), math.sqrt(BOUNDARY * total / edge))

    def drawn(seed: int) -> Problem:
        x = _drawn(torch.Generator().manual_seed(10_000 + seed), inside, edge)
        y = torch.where(x[:, 2:] > 0, 0.0, -2 * math.pi**2 * weights[0] * _solution(x[:, :2]))
        return Problem(
            name="poisson",
            make_model=lambda _seed: JetNet(hidden, weights),
            train=(x, y),
            criterion=nn.MSELoss(),
            loss_scale=0.5,
            dtype=torch.float64,
            model_metric=error,
            description="Laplace u = f on the unit square by a tanh network over jets",
            redraw=drawn,
        )

    return drawn(0)
