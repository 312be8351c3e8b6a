"""Parameters that live on manifolds: tangent coordinates, retractions, and how a parameter is declared to have one."""

from pullback.manifolds.base import Manifold, Tangent
from pullback.manifolds.declare import constrain, edition, manifolds_of, refuse_manifolds
from pullback.manifolds.positive import PositiveDefinite
from pullback.manifolds.sphere import Sphere
from pullback.manifolds.stiefel import Orthogonal, Stiefel

__all__ = [
    "Manifold",
    "Orthogonal",
    "PositiveDefinite",
    "Sphere",
    "Stiefel",
    "Tangent",
    "constrain",
    "edition",
    "manifolds_of",
    "refuse_manifolds",
]
