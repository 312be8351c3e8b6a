"""What the problems with neural ODEs share: the block, a clock for every row, and a small field."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pullback.ode import ODEBlock
from pullback.ode.solver import FIXED
from pullback.problems.errors import SpecError
from pullback.problems.models import mlp
from pullback.problems.preparation import at_least


def ode_block(
    owner: str,
    field: nn.Module,
    solver: str,
    tolerance: float,
    *,
    adjoint: bool,
    steps: int = 8,
    learn_t1: bool = False,
    penalty: float = 0.0,
) -> ODEBlock:
    """The flow of a field from time 0 to time 1, or to a learned time that begins there.

    Args:
        owner: The problem, for the error message.
        field: Called with a time and a state (N, ...); gives its velocity, of the same shape.
        solver: A method of torchdiffeq.
        tolerance: Relative tolerance of an adaptive solver; the absolute one is a tenth of it.
        adjoint: Whether the backward pass solves backwards in time, or goes through the steps of the solver.
        steps: Steps of a solver of fixed ones over the time 1.
        learn_t1: Whether the time it ends at is learned.
        penalty: c of the cost c/2 t1^2 of a learned time.

    Returns:
        A module from (N, ...) to (N, ...).

    Raises:
        SpecError: If the solver or a number makes no sense.
    """
    at_least(owner, "steps", steps)
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise SpecError(f"tolerance of {owner} is {tolerance}; give a positive number such as 1e-5.")
    try:
        return ODEBlock(
            field,
            0.0,
            1.0,
            solver=solver,
            rtol=tolerance,
            atol=tolerance / 10,
            step=1 / steps if solver in FIXED else None,
            adjoint=adjoint,
            learn=["t1"] if learn_t1 else [],
            penalty=penalty,
        )
    except ValueError as error:
        raise SpecError(f"{owner}: {error}") from error


class OwnClock(nn.Module):
    r"""A field whose rows run on clocks of their own: :math:`d(x, T)/ds = (T f(x), 0)`.

    From s = 0 to s = 1 the state of a row goes from x(0) to x(T), for its own T. So all times at which trajectories
    were observed, regular or not, are rows of one solve, and every row is a sample of its own.

    Args:
        field: f, of states (N, d) alone.
    """

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, s: Tensor, state: Tensor) -> Tensor:
        """The velocity.

        Args:
            s: The time, not looked at.
            state: x beside T, shape (N, d + 1).

        Returns:
            Shape (N, d + 1).
        """
        x, T = state[:, :-1], state[:, -1:]
        return torch.cat([T * self.field(x), torch.zeros_like(T)], 1)


class Observed(nn.Module):
    """The states of an autonomous system at given times: start, then the flow, then what is seen of the state.

    Args:
        start: From the inputs but their last column to the state x(0), shape (N, d).
        block: The flow of an `OwnClock`.
        seen: From x(T), shape (N, d), to the outputs; None for the state itself.
    """

    def __init__(self, start: nn.Module, block: ODEBlock, seen: nn.Module | None = None) -> None:
        super().__init__()
        self.start, self.block = start, block
        self.seen = nn.Identity() if seen is None else seen

    def forward(self, inputs: Tensor) -> Tensor:
        """What is seen at the times.

        Args:
            inputs: What the start is made of, and T in the last column, shape (N, k + 1).

        Returns:
            Shape (N, ...).
        """
        x = self.start(inputs[:, :-1])
        out: Tensor = self.seen(self.block(torch.cat([x, inputs[:, -1:]], 1))[:, :-1])
        return out


def small_field(size: int, width: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A field of one hidden tanh layer that begins slow: its last layer is a tenth of torch's.

    Args:
        size: Numbers of a state.
        width: Hidden width.
        dtype: Floating dtype of the parameters.

    Returns:
        A model from (N, size) to (N, size).
    """
    return slow(mlp([size, width, size], nn.Tanh, dtype))


def slow(field: nn.Sequential) -> nn.Sequential:
    """Divides the last layer of a field by ten, so that the flow begins near the identity.

    Args:
        field: Ends in a linear layer.

    Returns:
        The same module.
    """
    with torch.no_grad():
        for parameter in field[-1].parameters():
            parameter.mul_(0.1)
    return field


class Reading(NamedTuple):
    """What the ODE blocks of a model did.

    Attributes:
        nfe: Evaluations of the fields in the last forward pass.
        t1: The time at which the first block ends now.
    """

    nfe: int
    t1: float


def reading(model: nn.Module) -> Reading | None:
    """Reads the ODE blocks of a model.

    Args:
        model: Any model.

    Returns:
        The reading, None if there is no block.
    """
    end = end_time(model)
    return None if end is None else Reading(evaluations(model), end)


def evaluations(model: nn.Module) -> int:
    """How often the fields of a model were evaluated in its last forward pass.

    Args:
        model: Any model.

    Returns:
        The sum over its ODE blocks, of each its last call; 0 if there are none.
    """
    return sum(module.nfe for module in model.modules() if isinstance(module, ODEBlock))


def end_time(model: nn.Module) -> float | None:
    """The time at which the first ODE block of a model ends now.

    Args:
        model: Any model.

    Returns:
        t1, or None if there is no block.
    """
    return next((module.t1 for module in model.modules() if isinstance(module, ODEBlock)), None)
