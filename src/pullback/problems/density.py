"""Densities fitted by continuous normalizing flows: circles and moons in the plane, an excerpt of MiniBooNE."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pullback.problems.cnf import FlowField, FlowNLL, NormalizingFlow, WithDivergence, nll
from pullback.problems.data import data_folder
from pullback.problems.errors import DataError, SpecError, missing_extra
from pullback.problems.models import seeded
from pullback.problems.odes import ode_block
from pullback.problems.preparation import at_least, data_generator, standardise
from pullback.problems.problem import Problem
from pullback.problems.registry import register

Trace = Literal["exact", "hutchinson"]

_FILE = Path("density") / "miniboone_excerpt.npz"
_REMEDY = (
    "put the rows of MINIBOONE (Papamakarios et al. 2017) as array X, shape (N, 43), in DATA/density/" + _FILE.name
)
_TESTED = 1024


_OPTIONS = """
    Args:
        points: Training points; the test has 1024 others.
        noise: Standard deviation of their distance from the curves.
        width: Hidden width of the field.
        depth: Hidden layers of the field.
        batch_size: Rows per step, or None for all.
        trace: "exact", or "hutchinson" for a random estimate in training.
        solver: Method of torchdiffeq.
        steps: Steps of a solver of fixed ones over the time 1.
        tolerance: Relative tolerance of an adaptive solver; flows contract, and their way back multiplies errors.
        adjoint: Whether gradients are solved backwards in time.
        learn_t1: Whether the time at which the flow ends is learned, from 1 on.
        penalty: c of its cost c/2 t1^2, which the reported losses leave out.

    Returns:
        The problem: inputs (N, 2); the targets are the inputs again, which the loss does not look at.

    Raises:
        SpecError: If an option makes no sense.
    """


def _planar(
    name: str, about: str, curves: Callable[[int, torch.Generator], Tensor], targets: tuple[float, ...]
) -> Callable[..., Problem]:
    """Registers the density of points near some curves in the plane."""

    @register(name)
    def problem(
        *,
        points: int = 512,
        noise: float = 0.08,
        width: int = 24,
        depth: int = 2,
        batch_size: int | None = None,
        trace: Trace = "exact",
        solver: str = "dopri5",
        steps: int = 8,
        tolerance: float = 1e-5,
        adjoint: bool = True,
        learn_t1: bool = False,
        penalty: float = 0.03,
    ) -> Problem:
        at_least(name, "points", points)
        if not (noise > 0 and math.isfinite(noise)):
            raise SpecError(f"noise of {name} is {noise}; give a positive number.")
        block = {"steps": steps, "adjoint": adjoint, "learn_t1": learn_t1, "penalty": penalty}
        model = _flow(name, 2, width, depth, trace, solver, tolerance, **block)

        def draw(count: int, generator: torch.Generator) -> Tensor:
            exact = curves(count, generator)
            return exact + noise * torch.randn(exact.shape, dtype=exact.dtype, generator=generator)

        def drawn(seed: int) -> Problem:
            generator = data_generator(seed)
            train, test = standardise(draw(points, generator), draw(_TESTED, generator))
            return Problem(
                name=name,
                make_model=seeded(model),
                train=(train, train),
                test=(test, test),
                criterion=FlowNLL(),
                batch_size=batch_size,
                dtype=torch.float64,
                test_metric=nll,
                targets=targets,
                description=f"two {name} in the plane, continuous normalizing flow, negative log-likelihood",
                redraw=drawn,
            )

        return drawn(0)

    problem.__doc__ = f"""Density of two {name} in the plane: normalizing flow, tanh field 2-24-24-2, all rows, float64.

    {about}, standardised. The loss is the negative log-likelihood in nats per point. The seed draws the points.
{_OPTIONS}"""
    return problem


def _turn(count: int, generator: torch.Generator) -> Tensor:
    return 2 * math.pi * torch.rand(count, dtype=torch.float64, generator=generator)


def _ring(angle: Tensor, radius: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def _circles(count: int, generator: torch.Generator) -> Tensor:
    return _ring(_turn(count, generator), 1.0 + (torch.arange(count) % 2))


def _moons(count: int, generator: torch.Generator) -> Tensor:
    angle, lower = _turn(count, generator) / 2, (torch.arange(count) % 2).to(torch.float64)
    upper = _ring(angle, torch.ones_like(angle))
    return torch.lerp(upper, upper.new_tensor([1.0, 0.5]) - upper, lower[:, None])


circles = _planar("circles", "Radii 1 and 2", _circles, (2.0, 1.6))
moons = _planar("moons", "Half circles of radius 1 that reach into each other", _moons, (2.0, 1.5))


@register("miniboone")
def miniboone(
    *,
    width: int = 64,
    depth: int = 1,
    batch_size: int | None = 128,
    trace: Trace = "hutchinson",
    solver: str = "rk4",
    steps: int = 4,
    tolerance: float = 1e-3,
    adjoint: bool = True,
    data: Path | None = None,
) -> Problem:
    """MiniBooNE, the first 1523 rows of 43 columns: continuous normalizing flow with Hutchinson's trace, mini-batches.

    An excerpt, standardised by the rows trained on: for racing optimizers, not to compare with published likelihoods.

    Args:
        width: Hidden width of the field.
        depth: Hidden layers of the field.
        batch_size: Rows per step, or None for all.
        trace: "hutchinson" for a random estimate in training, or "exact".
        solver: Method of torchdiffeq.
        steps: Steps of a solver of fixed ones.
        tolerance: Relative tolerance of an adaptive solver.
        adjoint: Whether gradients are solved backwards in time.
        data: Folder that contains ``density/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem: inputs (N, 43) float32, the last fifth of the rows for the test; targets as in ``circles``.

    Raises:
        DataError: If the data folder or the file is missing or damaged.
        SpecError: If an option makes no sense.
        MissingExtraError: If numpy is not installed.
    """
    rows = _read(data_folder("miniboone", data, _REMEDY) / _FILE)
    split = len(rows) * 4 // 5
    train, test = (part.float() for part in standardise(rows[:split], rows[split:]))
    model = _flow("miniboone", rows.shape[1], width, depth, trace, solver, tolerance, adjoint=adjoint, steps=steps)
    return Problem(
        name="miniboone",
        make_model=seeded(model),
        train=(train, train),
        reported=(train[:256], train[:256]),
        test=(test, test),
        criterion=FlowNLL(),
        batch_size=batch_size,
        test_metric=nll,
        targets=(50.0, 40.0),
        description="MiniBooNE excerpt, continuous normalizing flow, negative log-likelihood",
    )


def _flow(
    owner: str, size: int, width: int, depth: int, trace: Trace, solver: str, tolerance: float, **block: Any
) -> Callable[[], nn.Module]:
    at_least(owner, "width", width)
    at_least(owner, "depth", depth)
    if trace not in ("exact", "hutchinson"):
        raise SpecError(f"trace of {owner} cannot be {trace!r}; give exact or hutchinson.")

    def model() -> nn.Module:
        field = WithDivergence(FlowField(size, width, depth), size)
        return NormalizingFlow(ode_block(owner, field, solver, tolerance, **block), trace == "hutchinson")

    return model


def _read(path: Path) -> Tensor:
    try:
        import numpy as np
    except ImportError as error:
        raise missing_extra("the problem miniboone", "numpy", "problems") from error
    try:
        rows = torch.as_tensor(np.load(path, allow_pickle=False)["X"]).double()
        if rows.ndim != 2 or not bool(torch.isfinite(rows).all()):
            raise ValueError("no finite table")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {_REMEDY}.") from error
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}); {_REMEDY}.") from error
    return rows
