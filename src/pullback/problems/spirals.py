"""Spirals in the plane, fitted by the flow of a small network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pullback.problems.errors import SpecError
from pullback.problems.models import seeded
from pullback.problems.odes import Observed, OwnClock, ode_block, small_field
from pullback.problems.preparation import at_least, data_generator
from pullback.problems.problem import Problem, Split
from pullback.problems.registry import register
from pullback.problems.trajectories import Trajectories

#: x' = A x^3, entry by entry (Chen, Rubanova, Bettencourt & Duvenaud 2018, their code's first example).
_A = ((-0.1, 2.0), (-2.0, -0.1))
_STEP = 1e-3


@register("spirals")
def spirals(
    *,
    trajectories: int = 4,
    points: int = 25,
    horizon: float = 2.0,
    noise: float = 0.0,
    width: int = 32,
    solver: str = "dopri5",
    steps: int = 20,
    tolerance: float = 1e-5,
    adjoint: bool = True,
) -> Problem:
    """Spirals of a cubic field in the plane, fitted by the flow of a tanh field 2-32-2: squared error, float64.

    x' = A x^3 (entry by entry), A = ((-0.1, 2), (-2, -0.1)). A row is an initial state with a time; its target is the
    state at that time. The seed draws initial states, noise and weights; the test has fresh initial states.

    Args:
        trajectories: How many, from radii 1 to 1.6.
        points: Equally spaced times of each, the last one `horizon`.
        horizon: The last time; with 2 the outermost spiral goes round about one and a half times.
        noise: Standard deviation of the errors of the training targets.
        width: Hidden width of the field.
        solver: Method of torchdiffeq.
        steps: Steps of a solver of fixed ones over the longest time.
        tolerance: Relative tolerance of an adaptive solver.
        adjoint: Whether gradients are solved backwards in time.

    Returns:
        The problem: inputs (N, 3), targets (N, 2), N = trajectories * points.

    Raises:
        SpecError: If a number makes no sense.
    """
    for option, count in (("trajectories", trajectories), ("points", points), ("width", width)):
        at_least("spirals", option, count)
    if not (horizon > 0 and math.isfinite(horizon) and noise >= 0 and math.isfinite(noise)):
        raise SpecError(f"spirals has horizon {horizon} and noise {noise}; give a positive one and 0 or more.")

    def model() -> nn.Module:
        field = OwnClock(small_field(2, width, torch.float64))
        return Observed(nn.Identity(), ode_block("spirals", field, solver, tolerance, adjoint=adjoint, steps=steps))

    def drawn(seed: int) -> Problem:
        generator = data_generator(seed)
        x, y = _observed(trajectories, points, horizon, generator)
        errors = noise * torch.randn(y.shape, dtype=y.dtype, generator=generator)
        return Problem(
            name="spirals",
            make_model=seeded(model),
            train=(x, y + errors),
            test=_observed(trajectories, points, horizon, generator),
            criterion=nn.MSELoss(),
            dtype=torch.float64,
            test_metric="rmse",
            targets=(1e-2, 1e-3, 1e-4),
            description="spirals of a cubic field, flow of a tanh field, squared error",
            trajectories=Trajectories(
                times=x[:, 2],
                observed=y + errors,
                pieces=x[::points, :2],
                begins=torch.zeros(trajectories, dtype=x.dtype),
                lengths=torch.full((trajectories,), horizon, dtype=x.dtype),
                names=("x1", "x2"),
            ),
            redraw=drawn,
        )

    return drawn(0)


def true_velocity(x: Tensor) -> Tensor:
    """The field of the data.

    Args:
        x: States, shape (N, 2).

    Returns:
        Shape (N, 2).
    """
    return x**3 @ x.new_tensor(_A).T


def _observed(trajectories: int, points: int, horizon: float, generator: torch.Generator) -> Split:
    """Initial states beside times, and the states there; rows of a trajectory follow each other."""
    radius, angle = torch.rand(2, trajectories, dtype=torch.float64, generator=generator)
    radius, angle = 1 + 0.6 * radius, 2 * math.pi * angle
    x = first = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    steps = math.ceil(horizon / points / _STEP)
    h, seen = horizon / points / steps, []
    for _ in range(points):
        for _ in range(steps):  # Runge and Kutta's method of order 4, far more exact than what is fitted
            a = true_velocity(x)
            b = true_velocity(x + h / 2 * a)
            c = true_velocity(x + h / 2 * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + true_velocity(x + h * c))
        seen.append(x)
    times = torch.arange(1, points + 1, dtype=torch.float64) * horizon / points
    inputs = torch.cat([first.repeat_interleave(points, 0), times.repeat(trajectories)[:, None]], 1)
    return inputs, torch.stack(seen, 1).flatten(0, 1)
