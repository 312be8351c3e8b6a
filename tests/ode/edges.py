"""Fields with weights beyond which their ODE has no solution."""

from __future__ import annotations

import torch
from torch import nn


class Cubic(nn.Module):
    """x' = tanh(A x) + s x^3: blows up within the interval as soon as s x^2 is beyond 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.s = nn.Linear(1, 1, bias=False)

    def forward(self, t, x):
        rate = self.s(x.new_ones(len(x), 1))
        return torch.tanh(self.layer(x)) + rate * x.pow(3)


class Rooted(nn.Module):
    """x' = A x times the root of a weight: no number as soon as that is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.w = nn.Linear(2, 2), nn.Linear(1, 1, bias=False)

    def forward(self, t, x):
        return self.layer(torch.tanh(x)) * self.w(x.new_ones(len(x), 1)).sqrt()


class Bounded(nn.Module):
    """No number as soon as a weight leaves the unit interval, to whichever side."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.w = nn.Linear(2, 2), nn.Linear(1, 1, bias=False)

    def forward(self, t, x):
        return self.layer(torch.tanh(x)) * (1 - self.w(x.new_ones(len(x), 1)).square()).sqrt()
