r"""Neural ODEs that read a series while they run, for classes of series.

.. math:: z(0) = A\, X(0) + a, \qquad \dot z = \kappa \tanh(W \tanh(V (z, X(t)) + v) + w), \qquad
   \text{scores} = C z(1) + c

The state is driven by the value of the path X, where a neural controlled differential equation (Kidger, Morrill, Foster
& Lyons 2020) takes its slope. The path is a short cosine series, :math:`X(t) = \sum_k c_k \cos(\pi k t)`: smooth, of
one length whatever the length of the series, and known to the field through the state, which carries the coefficients
along, so that a row is a sample of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pullback.ode import ODEBlock


def cosines(series: Tensor, count: int, grid: int = 64) -> Tensor:
    """Coefficients of a series as a path over the time 0 to 1, with the time as one more channel.

    The series, equally spaced over its own length, is read at the midpoints of a grid between its values, and the
    discrete cosine transform is cut off.

    Args:
        series: One series, shape (channels, length).
        count: How many cosines.
        grid: Midpoints, at least `count`.

    Returns:
        Shape (channels + 1, count).
    """
    t = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    place = t * (series.shape[1] - 1)
    left = place.floor().long().clamp(max=max(0, series.shape[1] - 2))
    values = torch.lerp(
        series[:, left].double(), series[:, (left + 1).clamp(max=series.shape[1] - 1)].double(), place - left
    )
    both = torch.cat([values, t[None]])
    basis = (math.pi * torch.arange(count, dtype=torch.float64)[:, None] * t).cos()
    basis[1:] *= 2
    return both @ basis.T / grid


class DrivenField(nn.Module):
    """z beside the coefficients of its path, which stay as they are.

    Args:
        hidden: Numbers of z.
        channels: Of the path.
        width: Hidden width.
        pace: kappa: how far a number of z can go.
    """

    def __init__(self, hidden: int, channels: int, width: int, pace: float) -> None:
        super().__init__()
        self.hidden, self.channels, self.pace = hidden, channels, pace
        self.inner, self.outer = nn.Linear(hidden + channels, width), nn.Linear(width, hidden)

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        """The velocity.

        Args:
            t: The time.
            state: z and the flat coefficients, shape (N, hidden + channels * count).

        Returns:
            The shape of the state.
        """
        z, flat = state[:, : self.hidden], state[:, self.hidden :]
        coefficients = flat.unflatten(1, (self.channels, -1))
        waves = torch.arange(coefficients.shape[2], dtype=state.dtype, device=state.device)
        path = coefficients @ (math.pi * t * waves).cos()
        h = torch.tanh(self.inner(torch.cat([z, path], 1)))
        return torch.cat([self.pace * torch.tanh(self.outer(h)), torch.zeros_like(flat)], 1)


class Driven(nn.Module):
    """From cosine series to scores of classes.

    Args:
        start: From X(0), shape (N, channels), to z(0).
        block: The flow of a `DrivenField`.
        scores: From z(1) to scores.
    """

    def __init__(self, start: nn.Linear, block: ODEBlock, scores: nn.Linear) -> None:
        super().__init__()
        self.start, self.block, self.scores = start, block, scores

    def forward(self, coefficients: Tensor) -> Tensor:
        """The scores.

        Args:
            coefficients: Shape (N, channels, count).

        Returns:
            Shape (N, classes).
        """
        z = self.start(coefficients.sum(2))
        end = self.block(torch.cat([z, coefficients.flatten(1)], 1))
        out: Tensor = self.scores(end[:, : self.start.out_features])
        return out
