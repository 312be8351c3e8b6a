"""The one list of criteria: a new loss is one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


def soft(z: Tensor) -> Tensor:
    return torch.softmax(torch.randn_like(z), 1)


def labels(z: Tensor) -> Tensor:
    return torch.randint(0, z.shape[1], (z.shape[0], *z.shape[2:]))


def ignoring(z: Tensor) -> Tensor:
    y = labels(z)
    y[0] = -100
    return y


def counts(z: Tensor) -> Tensor:
    return torch.randint(0, 5, z.shape).to(z.dtype)


def near(z: Tensor) -> Tensor:
    return z + torch.randn_like(z)


@dataclass(frozen=True)
class Loss:
    name: str
    criterion: Callable[[int], nn.Module]
    target: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] = field(default=lambda z: z)
    inside: float = float("inf")  # outputs farther than this from their targets have no curvature


def weights(k: int) -> Tensor:
    return torch.linspace(0.5, 2.0, k, dtype=torch.float64)


LOSSES = [
    Loss("mse", lambda k: nn.MSELoss(), torch.randn_like),
    Loss("mse sum", lambda k: nn.MSELoss(reduction="sum"), torch.randn_like),
    Loss("mse none", lambda k: nn.MSELoss(reduction="none"), torch.randn_like),
    Loss("cross entropy", lambda k: nn.CrossEntropyLoss(), labels),
    Loss("cross entropy sum", lambda k: nn.CrossEntropyLoss(reduction="sum"), labels),
    Loss("cross entropy none", lambda k: nn.CrossEntropyLoss(reduction="none"), labels),
    Loss("cross entropy weights", lambda k: nn.CrossEntropyLoss(weight=weights(k)), labels),
    Loss("cross entropy ignore", lambda k: nn.CrossEntropyLoss(weight=weights(k)), ignoring),
    Loss("cross entropy smooth", lambda k: nn.CrossEntropyLoss(weight=weights(k), label_smoothing=0.2), ignoring),
    Loss("cross entropy soft", lambda k: nn.CrossEntropyLoss(weight=weights(k), label_smoothing=0.1), soft),
    Loss("nll", lambda k: nn.NLLLoss(weight=weights(k)), labels, lambda z: torch.log_softmax(z, 1)),
    Loss("bce", lambda k: nn.BCEWithLogitsLoss(), torch.rand_like),
    Loss("poisson", lambda k: nn.PoissonNLLLoss(full=True), counts),
    Loss("poisson sum", lambda k: nn.PoissonNLLLoss(reduction="sum"), counts),
    Loss("poisson none", lambda k: nn.PoissonNLLLoss(reduction="none"), counts),
    Loss("huber", lambda k: nn.HuberLoss(delta=0.7), near, inside=0.7),
    Loss("huber sum", lambda k: nn.HuberLoss(reduction="sum"), near, inside=1.0),
    Loss("smooth l1", lambda k: nn.SmoothL1Loss(beta=0.4), near, inside=0.4),
    Loss("smooth l1 none", lambda k: nn.SmoothL1Loss(reduction="none"), near, inside=1.0),
    Loss("bce pos_weight", lambda k: nn.BCEWithLogitsLoss(weight=weights(k), pos_weight=3 * weights(k)),
         torch.rand_like),
]  # fmt: skip

loss_by_name = {loss.name: loss for loss in LOSSES}
