r"""Nets built to lose rank at a known time.

:math:`f(x) = (w \cdot x)^2` cannot go below zero. Towards a negative target the output of that sample follows its
straight line down to zero, where its row :math:`2 (w \cdot x) x` of D vanishes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class FoldNet(nn.Module):
    """One linear unit, squared.

    Args:
        inputs: (N, features), linearly independent rows.
        seed: of the outputs it starts from, between a half and two.
    """

    def __init__(self, inputs: Tensor, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        heights = 0.5 + 1.5 * torch.rand(len(inputs), generator=generator, dtype=torch.float64)
        self.unit = nn.Linear(inputs.shape[1], 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.unit.weight.copy_(torch.linalg.pinv(inputs.double()) @ heights.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """(N, features) to (N, 1)."""
        out: Tensor = self.unit(x)
        return out.square()


def fold_time(model: nn.Module, inputs: Tensor, targets: Tensor, c: float | None = None) -> float:
    r"""When the first output of a :class:`FoldNet` reaches zero on its line: :math:`e^{-2cs} = -y / (x(0) - y)`.

    Args:
        model: the net at its start.
        inputs: (N, features).
        targets: (N, 1), at least one negative.
        c: the constant of the cost; None for 1 / (2N).

    Returns:
        The earliest such time s; infinity if no target is negative.
    """
    with torch.no_grad():
        x, y = model(inputs)[:, 0], targets[:, 0]
    constant = 1 / (2 * len(y)) if c is None else c
    times = [math.log(float((a - b) / -b)) / (2 * constant) for a, b in zip(x, y, strict=True) if b < 0]
    return min(times, default=math.inf)
