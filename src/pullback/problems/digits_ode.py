"""The digits again, with a convolutional ODE block between a convolution and a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pullback.problems.models import seeded
from pullback.problems.odes import ode_block
from pullback.problems.preparation import at_least
from pullback.problems.problem import Problem
from pullback.problems.registry import register
from pullback.problems.sklearn_sets import digits


class ConvField(nn.Module):
    """Two convolutions of 3 x 3 that see the time as one more channel, tanh behind the first.

    Args:
        channels: Channels of the state.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels + 1, channels, 3, padding=1) for _ in range(2))

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        """The velocity.

        Args:
            t: The time.
            state: Shape (N, channels, height, width).

        Returns:
            The shape of the state.
        """
        times = t.expand_as(state[:, :1])
        h = torch.tanh(self.first(torch.cat([state, times], 1)))
        out: Tensor = self.second(torch.cat([h, times], 1))
        return out


@register("digits-ode")
def digits_ode(
    *,
    channels: int = 8,
    batch_size: int | None = 128,
    solver: str = "rk4",
    steps: int = 2,
    tolerance: float = 1e-3,
    adjoint: bool = False,
    learn_t1: bool = False,
    penalty: float = 0.1,
) -> Problem:
    """Handwritten digits of 8 x 8 pixels, 10 classes: convolution, ODE block of two convolutions, linear layer.

    A strided convolution to 8 channels of 4 x 4, the flow of a field of two 3 x 3 convolutions that see the time, a
    linear layer; cross-entropy, mini-batches. The small sister of the image nets of Chen et al. (2018) and SNOpt.

    Args:
        channels: Channels of the state.
        batch_size: Rows per step, or None for all.
        solver: Method of torchdiffeq.
        steps: Steps of a solver of fixed ones.
        tolerance: Relative tolerance of an adaptive solver.
        adjoint: Whether gradients are solved backwards in time; few steps are quicker without.
        learn_t1: Whether the time at which the flow ends is learned, from 1 on.
        penalty: c of its cost c/2 t1^2, which the reported losses leave out.

    Returns:
        The problem: the rows of ``digits`` as images (N, 1, 8, 8).

    Raises:
        SpecError: If an option makes no sense.
        MissingExtraError: If scikit-learn is not installed.
    """
    at_least("digits-ode", "channels", channels)
    flat = digits()
    assert flat.test is not None

    def model() -> nn.Module:
        block = ode_block(
            "digits-ode",
            ConvField(channels),
            solver,
            tolerance,
            adjoint=adjoint,
            steps=steps,
            learn_t1=learn_t1,
            penalty=penalty,
        )
        return nn.Sequential(
            nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.Tanh(), block, nn.Flatten(), nn.Linear(16 * channels, 10)
        )

    return Problem(
        name="digits-ode",
        make_model=seeded(model),
        train=(flat.train[0].view(-1, 1, 8, 8), flat.train[1]),
        test=(flat.test[0].view(-1, 1, 8, 8), flat.test[1]),
        criterion=nn.CrossEntropyLoss(),
        batch_size=batch_size,
        targets=(0.1, 0.03, 0.01),
        description="scikit-learn digits, convolutional ODE block, cross-entropy",
    )
