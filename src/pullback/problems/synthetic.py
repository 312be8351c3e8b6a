"""Regressions whose data are a formula: function-2d, sinc, residual."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from pullback.problems.models import mlp, seeded
from pullback.problems.preparation import at_least, data_generator, dtype_of, standardise
from pullback.problems.problem import Problem, Split
from pullback.problems.registry import register


@register("function-2d")
def function_2d(*, depth: int = 9, width: int = 20, points: int = 256) -> Problem:
    """A wavy function of two variables, fitted by deep thin tanh MLPs: half squared error, full batch, float64.

    y = sin(4 pi x1) cos(3 pi x2) + x1^2 / 2. The seed draws the points and the weights.

    Args:
        depth: Linear layers; 1 is a linear model.
        width: Hidden width.
        points: Training points, uniform in the square [-1, 1]^2.

    Returns:
        The problem: weights from N(0, 1 / fan-in), biases zero; as many fresh points for the test.

    Raises:
        SpecError: If a size makes no sense.
    """
    widths = [2, *[at_least("function-2d", "width", width)] * (at_least("function-2d", "depth", depth) - 1), 1]
    at_least("function-2d", "points", points)

    def drawn(seed: int) -> Problem:
        generator = data_generator(seed)
        return Problem(
            name="function-2d",
            make_model=seeded(lambda: _normal_mlp(widths)),
            train=_waves(points, generator),
            test=_waves(points, generator),
            criterion=nn.MSELoss(),
            loss_scale=0.5,
            dtype=torch.float64,
            test_metric="rmse",
            targets=(1e-6, 1e-10),
            description=f"sin(4 pi x1) cos(3 pi x2) + x1^2 / 2, tanh MLP of {depth} layers, half squared error",
            redraw=drawn,
        )

    return drawn(0)


def _waves(points: int, generator: torch.Generator) -> Split:
    x = 2 * torch.rand(points, 2, dtype=torch.float64, generator=generator) - 1
    y = torch.sin(4 * math.pi * x[:, :1]) * torch.cos(3 * math.pi * x[:, 1:]) + x[:, :1].square() / 2
    return x, y


def _normal_mlp(widths: list[int]) -> nn.Sequential:
    model = mlp(widths, nn.Tanh, torch.float64)
    layers = (module for module in model if isinstance(module, nn.Linear))
    with torch.no_grad():
        for layer, (fan_in, _) in zip(layers, pairwise(widths), strict=True):
            layer.weight.normal_(0.0, fan_in**-0.5)
            layer.bias.zero_()
    return model


@register("sinc")
def sinc(
    *,
    points: int = 20_000,
    width: int = 20,
    batch_size: int | None = 1000,
    normalised: bool = False,
    dtype: str = "float64",
) -> Problem:
    """The curve sin(10 x) / (10 x), 61 parameters: tanh MLP 1-20-1, squared error, batches of 1000, float64.

    Args:
        points: Equally spaced points in [-1, 1].
        width: Hidden width.
        batch_size: Rows per step, or None for all.
        normalised: Whether the curve is sin(10 pi x) / (10 pi x), ten times ``torch.sinc``'s argument.
        dtype: "float32" or "float64".

    Returns:
        The problem, without test data.

    Raises:
        SpecError: If the dtype or a size makes no sense.
    """
    kind = dtype_of("sinc", dtype)
    widths = [1, at_least("sinc", "width", width), 1]
    x = torch.linspace(-1, 1, at_least("sinc", "points", points), dtype=torch.float64).unsqueeze(1)
    y = torch.sinc(x * (10.0 if normalised else 10.0 / math.pi))
    return Problem(
        name="sinc",
        make_model=seeded(lambda: mlp(widths, nn.Tanh, kind)),
        train=(x.to(kind), y.to(kind)),
        criterion=nn.MSELoss(),
        batch_size=batch_size,
        dtype=kind,
        targets=(1e-3, 1e-4, 3e-6),
        description="sin(10 x) / (10 x), tanh MLP of one hidden layer, squared error",
    )


class ResidualBlock(nn.Module):
    """x + up(tanh(down(x))), its second layer scaled down so that a deep stack begins near the identity.

    Args:
        width: Columns of x.
        scale: Factor on the initial weights of the second layer.
        dtype: Floating dtype of the parameters.
    """

    def __init__(self, width: int, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(width, width, dtype=dtype)
        self.up = nn.Linear(width, width, dtype=dtype)
        with torch.no_grad():
            self.up.weight.mul_(scale)
            self.up.bias.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Adds the branch to its input.

        Args:
            x: Shape (N, width).

        Returns:
            Shape (N, width).
        """
        residual: Tensor = self.up(torch.tanh(self.down(x)))
        return x + residual


@register("residual")
def residual(
    *, blocks: int = 6, width: int = 16, points: int = 400, noise: float = 0.0, dtype: str = "float64"
) -> Problem:
    """Friedman's function of five variables, fitted by a residual net: squared error, full batch, float64.

    y = 10 sin(pi x1 x2) + 20 (x3 - 1/2)^2 + 10 x4 + 5 x5 (Friedman 1991). The seed draws the points and the
    weights.

    Args:
        blocks: Residual blocks of two linear layers.
        width: Width of the stream.
        points: Training points, uniform in the cube [0, 1]^5; as many for the test.
        noise: Standard deviation of the noise on the training targets, in the unit of y.
        dtype: "float32" or "float64".

    Returns:
        The problem; inputs and targets are standardised by the training rows, so the test metric is in standard
        deviations of the target.

    Raises:
        SpecError: If the dtype or a size makes no sense.
    """
    kind = dtype_of("residual", dtype)
    sizes = (("blocks", blocks), ("width", width), ("points", points))
    for (option, value), least in zip(sizes, (1, 1, 2), strict=True):
        at_least("residual", option, value, least)

    def drawn(seed: int) -> Problem:
        generator = data_generator(seed)
        x, x_test = (torch.rand(points, 5, dtype=torch.float64, generator=generator) for _ in range(2))
        error = noise * torch.randn(points, 1, dtype=torch.float64, generator=generator)
        inputs, outputs = standardise(x, x_test), standardise(_friedman(x) + error, _friedman(x_test))
        return Problem(
            name="residual",
            make_model=seeded(lambda: _residual_net(blocks, width, kind)),
            train=(inputs[0].to(kind), outputs[0].to(kind)),
            test=(inputs[1].to(kind), outputs[1].to(kind)),
            criterion=nn.MSELoss(),
            dtype=kind,
            test_metric="rmse",
            targets=(1e-3, 1e-6, 1e-10) if kind == torch.float64 else (1e-2, 1e-3, 1e-4),
            description=f"Friedman's function, residual net of {blocks} blocks, squared error",
            redraw=drawn,
        )

    return drawn(0)


def _friedman(x: Tensor) -> Tensor:
    a, b, c, d, e = x.split(1, dim=1)
    y: Tensor = 10 * torch.sin(math.pi * a * b) + 20 * (c - 0.5).square() + 10 * d + 5 * e
    return y


def _residual_net(blocks: int, width: int, dtype: torch.dtype) -> nn.Sequential:
    stream = [ResidualBlock(width, blocks**-0.5, dtype) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(5, width, dtype=dtype), *stream, nn.Linear(width, 1, dtype=dtype))
