"""Neural ODEs whose blocks the tape reads through: gradients, factors and rows from one solve backwards in time.

Solving is torchdiffeq's, as it comes; it needs the extra ``ode``.
"""

from pullback.ode import rows as _rows  # its rule registers itself
from pullback.ode.block import ODEBlock
from pullback.ode.flow import Flow
from pullback.ode.solver import Solver
from pullback.ode.time import Time

__all__ = ["Flow", "ODEBlock", "Solver", "Time"]

del _rows
