"""Numbers for the host: how scalar tensors are read with as little waiting as possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scalars(values: Sequence[Tensor]) -> list[float]:
    """Scalar tensors as numbers.

    On a device one transfer reads them all; on the CPU there is nothing to wait for, and reading each costs a tenth
    of stacking them.

    Args:
        values: tensors without axes, on one device.
    """
    if not values or values[0].device.type == "cpu":
        return [float(value) for value in values]
    return [float(value) for value in torch.stack([value.double() for value in values]).tolist()]


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)`` without the call where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)
