"""Riemannian modules: state maps with parameters and a metric of their own, closed under composition."""

from pullback.modules.base import RiemannianModule
from pullback.modules.branches import Parallel, parallel
from pullback.modules.chain import Residual, Series, residual, series
from pullback.modules.composite import Composite
from pullback.modules.errors import CompositionError
from pullback.modules.leaf import Leaf, Map, riemannian
from pullback.modules.levels import Hierarchy, hierarchy
from pullback.modules.local import Local
from pullback.modules.loop import Feedback, feedback
from pullback.modules.pulled import PulledBack

__all__ = [
    "Composite",
    "CompositionError",
    "Feedback",
    "Hierarchy",
    "Leaf",
    "Local",
    "Map",
    "Parallel",
    "PulledBack",
    "Residual",
    "RiemannianModule",
    "Series",
    "feedback",
    "hierarchy",
    "parallel",
    "residual",
    "riemannian",
    "series",
]
