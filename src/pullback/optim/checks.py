"""What an optimizer is given, checked before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pullback.curvature import SOLVERS
from pullback.optim.options import Damping, Momentum


def check_options(
    name: str,
    model: object,
    damping: object,
    momentum: object,
    solver: str,
    memory: float | None,
    **rates: float,
) -> None:
    """Refuse arguments that are not of their kind.

    Args:
        name: the optimizer's class, for the message.
        model: must be a module.
        damping: options or None.
        momentum: options or None.
        solver: a solver's name or "auto".
        memory: bytes or None.
        **rates: numbers that must be finite and at least 0.

    Raises:
        TypeError, ValueError: with the remedy.
    """
    check_model(name, model)
    if damping is not None and not isinstance(damping, Damping):
        raise TypeError(f"damping must be Damping(...), got {damping!r}; write Damping(initial={damping!r}).")
    if momentum is not None and not isinstance(momentum, Momentum):
        raise TypeError(f"momentum must be Momentum(...), got {momentum!r}; write Momentum() for the model's own.")
    check_rates(**rates)
    if solver not in ("auto", *SOLVERS):
        raise ValueError(f"solver must be 'auto' or one of {', '.join(SOLVERS)}, got {solver!r}.")
    if memory is not None and not memory > 0:
        raise ValueError(f"memory must be a positive number of bytes, got {memory}.")


def check_model(name: str, model: object) -> None:
    """Refuse what is not a module.

    Args:
        name: the optimizer's class, for the message.
        model: what it was given.

    Raises:
        TypeError: with the remedy.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name} takes the model itself (an nn.Module), got {type(model).__name__}; write it as (model, criterion)."
        )


def check_rates(**rates: float) -> None:
    """Refuse numbers that are not finite or negative.

    Args:
        **rates: the numbers by name.

    Raises:
        ValueError: naming it.
    """
    for key, value in rates.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{key} must be finite and at least 0, got {value}.")


def check_weights(params: Iterable[Tensor]) -> None:
    """Refuse weights that a metric cannot be formed for.

    Args:
        params: the parameters to optimise.

    Raises:
        TypeError: if one is not float32 or float64, or has no values.
    """
    for p in params:
        if p.dtype not in (torch.float32, torch.float64) or p.is_meta:
            raise TypeError(
                f"A parameter is {'on the meta device' if p.is_meta else f'of dtype {p.dtype}'}; metrics need "
                "float32 or float64 weights (half precision: keep float32 weights and use torch.autocast)."
            )
