"""Metrics of parameters: blocks, their groups, and the spaces they are inverted in."""

from pullback.curvature.block import Block, blocks_of
from pullback.curvature.cholesky import Factorised, factorise
from pullback.curvature.group import Group, Space, memory_budget
from pullback.curvature.linearisation import Gradient, Linearisation

__all__ = [
    "Block",
    "Factorised",
    "Gradient",
    "Group",
    "Linearisation",
    "Space",
    "blocks_of",
    "factorise",
    "memory_budget",
]
