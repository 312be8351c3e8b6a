r"""Neural ODEs that read a series while they run, for classes of series.

.. math:: z(0) = A\, X(0) + a, \qquad \text{scores} = C z(1) + c, \qquad \dot z = \kappa\, G(z)\, X'(t)
   \quad\text{or}\quad \dot z = \kappa \tanh(W \tanh(V (z, X(t)) + v) + w)

The first is a neural controlled differential equation (Kidger, Morrill, Foster & Lyons 2020): a matrix made of the
state, times the slope of the path. The second is driven by the value of the path. The path is a short cosine series,
:math:`X(t) = \sum_k c_k \cos(\pi k t)`: smooth, of one length whatever the length of the series, with its slope in
closed form, and known to the field through the state, which carries the coefficients along, so that a row is a sample
of its own. The time is one of its channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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


def standardise_paths(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Zero mean and unit variance per channel, over the training rows and the time.

    The mean of a path over the time is its first coefficient, the square of every other cosine is one half in the mean.

    Args:
        train: Coefficients of the training rows, shape (N, channels, count).
        others: Other rows, to be moved and scaled likewise.

    Returns:
        All of them, scaled; a channel that is constant in `train` is moved alone.
    """
    mean = train[:, :, 0].mean(0)
    variance = (train[:, :, 0] - mean).square().mean(0) + 0.5 * train[:, :, 1:].square().sum(2).mean(0)
    scale = torch.where(variance > 1e-24 * mean.square(), variance.sqrt(), torch.ones_like(variance))

    def scaled(rows: Tensor) -> Tensor:
        moved = rows.clone()
        moved[:, :, 0] -= mean
        return moved / scale[:, None]

    return tuple(scaled(rows) for rows in (train, *others))


class PathField(nn.Module):
    """z beside the coefficients of its path, which stay as they are; subclasses say where z goes.

    Args:
        hidden: Numbers of z.
        channels: Of the path.
        pace: kappa, a factor on the velocity.
    """

    def __init__(self, hidden: int, channels: int, pace: float) -> None:
        super().__init__()
        self.hidden, self.channels, self.pace = hidden, channels, pace

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
        rates = math.pi * torch.arange(coefficients.shape[2], dtype=state.dtype, device=state.device)
        return torch.cat([self.pace * self.velocity(z, coefficients, rates, t), torch.zeros_like(flat)], 1)

    def velocity(self, z: Tensor, coefficients: Tensor, rates: Tensor, t: Tensor) -> Tensor:
        """The velocity of z but for its pace.

        Args:
            z: Shape (N, hidden).
            coefficients: Of the path, shape (N, channels, count).
            rates: pi k, shape (count,).
            t: The time.

        Returns:
            Shape (N, hidden).
        """
        raise NotImplementedError


class DrivenField(PathField):
    """Driven by the value of the path.

    Args:
        hidden: Numbers of z.
        channels: Of the path.
        width: Hidden width.
        pace: kappa: how far a number of z can go.
    """

    def __init__(self, hidden: int, channels: int, width: int, pace: float) -> None:
        super().__init__(hidden, channels, pace)
        self.inner, self.outer = nn.Linear(hidden + channels, width), nn.Linear(width, hidden)

    def velocity(self, z: Tensor, coefficients: Tensor, rates: Tensor, t: Tensor) -> Tensor:
        """See the base class."""
        path = coefficients @ (rates * t).cos()
        return torch.tanh(self.outer(torch.tanh(self.inner(torch.cat([z, path], 1)))))


class ControlledField(PathField):
    r"""Controlled by the slope of the path, :math:`G(z) = \tanh(W_2 \tanh(W_1 z + w_1) + w_2)` as a matrix.

    Args:
        hidden: Numbers of z, rows of G.
        channels: Of the path, columns of G.
        width: Hidden width.
        pace: kappa: how far a number of z can go while a channel goes by one.
    """

    def __init__(self, hidden: int, channels: int, width: int, pace: float) -> None:
        super().__init__(hidden, channels, pace)
        self.inner, self.outer = nn.Linear(hidden, width), nn.Linear(width, hidden * channels)

    def velocity(self, z: Tensor, coefficients: Tensor, rates: Tensor, t: Tensor) -> Tensor:
        """See the base class."""
        slope = coefficients @ (-rates * (rates * t).sin())
        G = torch.tanh(self.outer(torch.tanh(self.inner(z)))).unflatten(1, (self.hidden, self.channels))
        return torch.einsum("nhc,nc->nh", G, slope)


FIELDS: dict[str, Callable[[int, int, int, float], PathField]] = {"driven": DrivenField, "cde": ControlledField}


class Driven(nn.Module):
    """From cosine series to scores of classes.

    Args:
        start: From X(0), shape (N, channels), to z(0).
        block: The flow of a `PathField`.
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
