"""Muon for the weight matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW:
    """Two optimizers that step together: Muon accepts matrices alone.

    Args:
        model: The model; its 2-D parameters go to `torch.optim.Muon`, the others to `torch.optim.AdamW`.
        adamw_lr: Learning rate of AdamW.
        adamw_weight_decay: Weight decay of AdamW.
        options: Options of Muon.

    Raises:
        ValueError: If the model has no 2-D parameter, or an option is refused.
    """

    def __init__(
        self, model: nn.Module, *, adamw_lr: float = 1e-3, adamw_weight_decay: float = 1e-2, **options: Any
    ) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        others = [parameter for parameter in parameters if parameter.ndim != 2]
        if not matrices:
            raise ValueError("the model has no weight matrix for Muon; use adamw.")
        self.parts: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, **options)]
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=adamw_lr, weight_decay=adamw_weight_decay))

    def zero_grad(self) -> None:
        """Forgets the gradients of both parts."""
        for part in self.parts:
            part.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step with each part.

        Args:
            closure: Computes the loss and the gradients, once for both parts.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
