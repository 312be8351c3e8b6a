"""Metrics of parameters: blocks, the groups they form, and the spaces their metrics are inverted in."""

from pullback.curvature.averages import Averages, Form
from pullback.curvature.block import Block, blocks_of
from pullback.curvature.cholesky import Factorised, factorise
from pullback.curvature.choose import SOLVERS, Space, solver_for
from pullback.curvature.dual import Dual
from pullback.curvature.free import MatrixFree
from pullback.curvature.kronecker import Averaged, Shared
from pullback.curvature.linearisation import Gradient, Linearisation
from pullback.curvature.mass import Mass, check_mass, scales_of, weigh
from pullback.curvature.partition import Partition, check_partition, divide
from pullback.curvature.primal import Primal
from pullback.curvature.scalars import scalars
from pullback.curvature.solver import Solver
from pullback.curvature.tails import Tails
from pullback.curvature.tangent import displace
from pullback.curvature.workspace import Workspace
from pullback.tape.memory import memory_budget

__all__ = [
    "SOLVERS",
    "Averaged",
    "Averages",
    "Block",
    "Dual",
    "Factorised",
    "Form",
    "Gradient",
    "Linearisation",
    "Mass",
    "MatrixFree",
    "Partition",
    "Primal",
    "Shared",
    "Solver",
    "Space",
    "Tails",
    "Workspace",
    "blocks_of",
    "check_mass",
    "check_partition",
    "displace",
    "divide",
    "factorise",
    "memory_budget",
    "scalars",
    "scales_of",
    "solver_for",
    "weigh",
]
