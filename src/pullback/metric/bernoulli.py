"""The Fisher metric of independent binary outputs given by logits."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.metric.base import ElementwiseMetric


class Bernoulli(ElementwiseMetric):
    r"""Fisher metric of logits: :math:`G = \mathrm{diag}(p (1 - p))`, :math:`p = \sigma(z)`."""

    def variance(self, z: Tensor, target: Tensor | None = None) -> Tensor:
        r""":math:`\sigma(z)\sigma(-z)`, which keeps its relative accuracy where ``1 - p`` would cancel."""
        return torch.sigmoid(z) * torch.sigmoid(-z)
