"""Trajectories worth drawing: what was observed, and where to ask a model for what it says between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Times of a fitted piece, behind its start.
_FINE = 200


def same(states: Tensor) -> Tensor:
    """The states themselves, for `Trajectories.view`."""
    return states


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Observations, and pieces of fitted trajectories beside them.

    Attributes:
        times: Of the observations, shape (K,).
        observed: Shape (K, d), as the model sees them.
        pieces: Inputs of every start but the last column, shape (P, k).
        begins: The time of each start, shape (P,).
        lengths: How long each piece is, shape (P,).
        names: Of the d numbers.
        unit: Of the numbers, as they are drawn; empty for none.
        time: What the times are called.
        view: From states to the numbers drawn.
    """

    times: Tensor
    observed: Tensor
    pieces: Tensor
    begins: Tensor
    lengths: Tensor
    names: Sequence[str]
    unit: str = ""
    time: str = "time"
    view: Callable[[Tensor], Tensor] = same

    @property
    def fine(self) -> Tensor:
        """The times of the pieces, one after the other, each with a NaN behind it; shape (P * 202,)."""
        times = self.begins[:, None] + self._shares() * self.lengths[:, None]
        return torch.cat([times, torch.full_like(times[:, :1], torch.nan)], 1).flatten()

    def fitted(self, model: nn.Module) -> Tensor:
        """What a model says at these times.

        Args:
            model: From rows of a piece's inputs and the time since it began, shape (N, k + 1), to states; asked in eval
                mode, and left as it was.

        Returns:
            Shape (P * 202, d), as they are drawn.

        Raises:
            SolverError: If the model's ODE cannot be solved there.
        """
        ages = self._shares() * self.lengths[:, None]
        rows = torch.cat([self.pieces[:, None].expand(-1, ages.shape[1], -1), ages[:, :, None]], 2)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            states = self.view(model(rows.flatten(0, 1))).unflatten(0, ages.shape)
        model.train(was_training)
        return torch.cat([states, torch.full_like(states[:, :1], torch.nan)], 1).flatten(0, 1)

    def _shares(self) -> Tensor:
        return torch.linspace(0, 1, _FINE + 1, dtype=self.begins.dtype)
