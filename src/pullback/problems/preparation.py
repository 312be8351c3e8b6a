"""Checks and scalings that several problems share."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.problems.errors import SpecError, nearest

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def dtype_of(owner: str, name: str) -> torch.dtype:
    """Reads the option ``dtype``.

    Args:
        owner: The problem, for the error message.
        name: "float32" or "float64".

    Returns:
        The dtype.

    Raises:
        SpecError: If it is neither.
    """
    if name not in DTYPES:
        raise SpecError(f"dtype of {owner} cannot be {name!r}.{nearest(name, DTYPES)}")
    return DTYPES[name]


def at_least(owner: str, option: str, value: int, least: int = 1) -> int:
    """Checks a size.

    Args:
        owner: The problem, for the error message.
        option: What the size is called.
        value: The size.
        least: The smallest that makes sense.

    Returns:
        The size.

    Raises:
        SpecError: If it is smaller.
    """
    if value < least:
        raise SpecError(f"{option} of {owner} is {value}; give {least} or more.")
    return value


def standardise(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Zero mean and unit variance per column, by the training rows alone.

    Args:
        train: The training rows, shape (N, ...).
        others: Other rows, to be moved and scaled likewise.

    Returns:
        All of them, scaled; a column that is constant in `train` is moved alone.
    """
    mean, scale = train.mean(0), train.std(0, correction=0)
    scale = torch.where(scale > 1e-12 * mean.abs(), scale, torch.ones_like(scale))
    return tuple((rows - mean) / scale for rows in (train, *others))


def data_generator(seed: int) -> torch.Generator:
    """Random numbers for the data of a seed, unrelated to those of its weights and of its batches.

    Args:
        seed: The seed of the run.

    Returns:
        A generator.
    """
    return torch.Generator().manual_seed(seed + 2**31)
