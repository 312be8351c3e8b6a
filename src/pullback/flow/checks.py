"""What is refused before a flow starts, and the reachable minimum where targets contradict each other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pullback.flow.aims import Aim, Squared
from pullback.flow.errors import FlowError


def check_inputs(inputs: tuple[Any, ...]) -> None:
    """Refuse inputs that are not finite."""
    for t in inputs:
        if isinstance(t, Tensor) and t.is_floating_point() and not bool(torch.isfinite(t).all()):
            bad = int((~torch.isfinite(t)).sum())
            raise FlowError(f"{bad} of {t.numel()} input numbers are not finite; drop those rows or fill them in.")


def check_start(aim: Aim, x: Tensor, cost: float, eps: float | None) -> None:
    """Refuse a start that is the end, and an eps that round-off would hide.

    Args:
        aim: the cost.
        x: the outputs at the start, in its coordinates.
        cost: their cost.
        eps: what is asked for.
    """
    if not math.isfinite(cost):
        raise FlowError("The cost at the start is not finite; look for overflow in outputs or targets.")
    floor = aim.resolution(x)
    if cost <= floor:
        raise FlowError(
            f"The residual is zero at the start (cost {cost:.1e}, round-off {floor:.1e}): there is nothing to flow to."
        )
    if eps is None:
        return
    if not (eps > 0 and math.isfinite(eps)):
        raise FlowError(f"eps is {eps}; give a positive cost to stop at.")
    if eps < floor:
        raise FlowError(
            f"eps = {eps:.1e} is below what {x.dtype} resolves of these outputs, about {floor:.1e}; ask for more, or "
            "use float64."
        )
    if eps >= cost:
        raise FlowError(f"The cost at the start, {cost:.3e}, is not above eps = {eps:.3e}; give a smaller one.")


def duplicates(inputs: tuple[Any, ...], samples: int) -> Tensor | None:
    """Number of the distinct input of every sample, (N,); None if all are distinct or cannot be compared."""
    parts = [t for t in inputs if isinstance(t, Tensor) and t.ndim and len(t) == samples]
    if not parts or len(parts) < len(inputs):
        return None
    table = torch.cat([t.reshape(samples, -1).double() for t in parts], 1)
    groups: Tensor = torch.unique(table, dim=0, return_inverse=True)[1]
    return None if int(groups.max()) + 1 == samples else groups


def reachable(aim: Squared, groups: Tensor) -> tuple[float, tuple[int, int] | None]:
    """The least cost with equal outputs for equal inputs, and the first two samples that contradict each other."""
    y = aim.target(0.0).view(-1, len(groups)).T
    count = torch.bincount(groups).to(y)
    means = torch.zeros(len(count), y.shape[1], dtype=y.dtype).index_add_(0, groups, y) / count[:, None]
    apart = (y - means[groups]).abs().amax(1) > 1e-12 * (1 + y.abs().amax())
    if not bool(apart.any()):
        return 0.0, None
    first = int(apart.nonzero()[0])
    other = next(k for k in (groups == groups[first]).nonzero()[:, 0].tolist() if k != first)
    return aim.c * float((y - means[groups]).square().sum()), (first, other)


def check_duplicates(aim: Aim, inputs: tuple[Any, ...], x: Tensor, samples: int, regime: str) -> list[str]:
    """Refuse targets that contradict each other, unless the flow of any rank is asked for; else say what there is.

    Args:
        aim: the cost.
        inputs: the model's inputs.
        x: coordinates of the outputs, (R,).
        samples: N.
        regime: what is asked for.
    """
    groups = duplicates(inputs, samples)
    if groups is None or not isinstance(aim, Squared) or aim.path is not None:
        return []
    # A model may tell equal rows apart (their position): then nothing is contradictory.
    per = x.view(-1, samples).T
    first = torch.zeros(int(groups.max()) + 1, dtype=torch.int64).scatter_(0, groups, torch.arange(samples))
    if not torch.allclose(per, per[first[groups]], rtol=1e-9, atol=1e-12):
        return []
    least, pair = reachable(aim, groups)
    repeated = samples - (int(groups.max()) + 1)
    if pair is None:
        return [f"{repeated} inputs are repeated with equal targets: D cannot have full row rank; drop them."]
    said = (
        f"Samples {min(pair)} and {max(pair)} have the same input and different targets: D cannot have full row rank, "
        f"and no weights reach less than C = {least:.6g}"
    )
    if regime != "any-rank":
        raise FlowError(f"{said}. Average or drop the duplicates, or ask for regime='any-rank'.")
    return [f"{said}."]
