"""Parameters that geoopt has put on a manifold, recognised where geoopt has been imported by the user."""

from __future__ import annotations

import sys

from torch import nn

from pullback.errors import ManifoldError
from pullback.manifolds.base import Manifold
from pullback.manifolds.positive import PositiveDefinite
from pullback.manifolds.sphere import Sphere
from pullback.manifolds.stiefel import Stiefel


def foreign(p: nn.Parameter) -> Manifold | None:
    """The manifold of a ``geoopt.ManifoldParameter``; None for any other parameter.

    Their sphere is that of a vector, their Stiefel manifold has orthonormal columns. The inner product in which steps
    are damped is that of the class here, also for their canonical one.

    Args:
        p: a parameter.

    Raises:
        ManifoldError: if there is none like it here.
    """
    geoopt = sys.modules.get("geoopt")  # who holds such a parameter has imported it
    if geoopt is None or not isinstance(p, geoopt.ManifoldParameter):
        return None
    theirs = p.manifold
    name = type(theirs).__name__
    if name == "Euclidean":
        return None
    if name in ("Sphere", "SphereExact") and p.ndim == 1 and getattr(theirs, "projector", None) is None:
        return Sphere()
    if name in ("Stiefel", "CanonicalStiefel", "EuclideanStiefel", "EuclideanStiefelExact") and p.ndim == 2:
        return Stiefel()
    if name == "SymmetricPositiveDefinite" and p.ndim == 2:
        return PositiveDefinite()
    raise ManifoldError(
        f"A parameter of shape {tuple(p.shape)} lives on geoopt's {name}, which has no counterpart here; take one of "
        "pullback.manifolds, or freeze it."
    )
