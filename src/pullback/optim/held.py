"""Parameters that live on manifolds, and what would pull them off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from pullback.errors import ManifoldError
from pullback.manifolds import Manifold


def refuse_pulls(
    held: Mapping[int, Manifold], groups: Iterable[dict[str, Any]], ridge: float, names: Mapping[int, str]
) -> None:
    """Refuse costs and decay that know nothing of manifolds.

    Args:
        held: manifolds by id of the parameter, of those that live on one.
        groups: the optimizer's param_groups.
        ridge: weight of a quadratic cost.
        names: names of parameters by id.

    Raises:
        ManifoldError: naming the first parameter concerned.
    """
    if held and ridge:
        name = names.get(next(iter(held)), "?")
        raise ManifoldError(f"Parameter '{name}' lives on a manifold, where a ridge has no meaning; leave it out.")
    for group in groups:
        found = [p for p in group["params"] if id(p) in held]
        if found and group["weight_decay"]:
            raise ManifoldError(
                f"Parameter '{names.get(id(found[0]), '?')}' lives on a manifold, which "
                f"weight_decay={group['weight_decay']} would leave; put it into a parameter group of its own with "
                "weight_decay=0."
            )


def refuse_strays(held: Mapping[int, Manifold], strays: Iterable[Tensor], names: Mapping[int, str]) -> None:
    """Refuse constrained parameters without rows, which a fallback optimizer would move.

    Args:
        held: as of :func:`refuse_pulls`.
        strays: parameters without rows.
        names: names of parameters by id.

    Raises:
        ManifoldError: naming the first of them.
    """
    for p in strays:
        if id(p) in held:
            raise ManifoldError(
                f"Parameter '{names.get(id(p), '?')}' lives on a manifold but can be given no rows, and the fallback "
                "optimizer would move it off; freeze it or call its module by samples."
            )


def tangent(held: Mapping[int, Manifold], grads: dict[int, Tensor], params: Iterable[Tensor]) -> dict[int, Tensor]:
    """Gradients, of constrained parameters only what is tangent; the rest is no slope.

    Args:
        held: as of :func:`refuse_pulls`.
        grads: gradients by id of the parameter.
        params: the parameters.
    """
    if not held:
        return grads
    own = {id(p): p for p in params if id(p) in held and id(p) in grads}
    return grads | {key: held[key].project(p, grads[key]) for key, p in own.items()}
