"""Products with a Jacobian and its transpose, by reverse mode alone: the transpose of the transpose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vjp

#: A linear map of vectors.
Linear = Callable[[Tensor], Tensor]


def jacobian_products(f: Linear, x: Tensor) -> tuple[Linear, Linear]:
    """J v and J^T u of a function at a point; the graphs are built once, each product is one pass through one.

    Args:
        f: (n,) to any shape.
        x: the point, (n,).
    """
    y, pulled, *_ = vjp(f, x)

    def pull(u: Tensor) -> Tensor:
        out: Tensor = pulled(u)[0]
        return out

    pushed = vjp(pull, torch.zeros_like(y))[1]

    def push(v: Tensor) -> Tensor:
        out: Tensor = pushed(v)[0]
        return out

    return push, pull
