"""Real problems and fair races: data, model and loss under a name, and optimizers run on them side by side.

>>> from pullback.problems import Budget, compare, load_problem
>>> result = compare(load_problem("wine"), "sgd:lr=0.1,adam:lr=1e-2", seeds=1, budget=Budget(steps=3))
>>> [run.label for run in result.runs]
['sgd:lr=0.1', 'adam:lr=0.01']
"""

from pullback.problems import cifar as _cifar  # noqa: F401 (registers its problems)
from pullback.problems import density as _density  # noqa: F401 (registers its problems)
from pullback.problems import digits_ode as _digits_ode  # noqa: F401 (registers its problems)
from pullback.problems import fashion as _fashion  # noqa: F401 (registers its problems)
from pullback.problems import gene_circuit as _gene_circuit  # noqa: F401 (registers its problems)
from pullback.problems import kinetics as _kinetics  # noqa: F401 (registers its problems)
from pullback.problems import mass_spring as _mass_spring  # noqa: F401 (registers its problems)
from pullback.problems import populations as _populations  # noqa: F401 (registers its problems)
from pullback.problems import series_sets as _series_sets  # noqa: F401 (registers its problems)
from pullback.problems import shakespeare as _shakespeare  # noqa: F401 (registers its problems)
from pullback.problems import skew_network as _skew_network  # noqa: F401 (registers its problems)
from pullback.problems import sklearn_sets as _sklearn_sets  # noqa: F401 (registers its problems)
from pullback.problems import spirals as _spirals  # noqa: F401 (registers its problems)
from pullback.problems import sunspots as _sunspots  # noqa: F401 (registers its problems)
from pullback.problems import synthetic as _synthetic  # noqa: F401 (registers its problems)
from pullback.problems import uci as _uci  # noqa: F401 (registers its problems)
from pullback.problems.budget import Budget
from pullback.problems.comparison import InterruptedComparison, compare
from pullback.problems.entry import Entry
from pullback.problems.errors import DataError, MissingExtraError, SpecError
from pullback.problems.grid import Grid, parse_grid
from pullback.problems.machine import machine, measuring
from pullback.problems.optimizer_entry import OptimizerEntry
from pullback.problems.optimizer_spec import OptimizerSpec, parse_optimizer, parse_optimizers
from pullback.problems.optimizers import optimizer_entries
from pullback.problems.problem import Problem
from pullback.problems.record import Comparison, Evaluation, InterruptedRun, Run
from pullback.problems.registry import entries, load_problem, register
from pullback.problems.runner import Progress, run
from pullback.problems.summary import Arrival, Quartiles, Summary, summarise
from pullback.problems.sweep import Cell, Measure, Sweep
from pullback.problems.target import Target, ValidationTarget

__all__ = [
    "Arrival",
    "Budget",
    "Cell",
    "Comparison",
    "DataError",
    "Entry",
    "Evaluation",
    "Grid",
    "InterruptedComparison",
    "InterruptedRun",
    "Measure",
    "MissingExtraError",
    "OptimizerEntry",
    "OptimizerSpec",
    "Problem",
    "Progress",
    "Quartiles",
    "Run",
    "SpecError",
    "Summary",
    "Sweep",
    "Target",
    "ValidationTarget",
    "compare",
    "entries",
    "load_problem",
    "machine",
    "measuring",
    "optimizer_entries",
    "parse_grid",
    "parse_optimizer",
    "parse_optimizers",
    "register",
    "run",
    "summarise",
]
