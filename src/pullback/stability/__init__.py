"""Stability: bounds for trainings whose data differ in one sample, and twins to hold them against (docs/theory 16).

What is derived here is called derived; the scaling that Pehle & Slotine state stands beside it and bounds nothing.
"""

from pullback.stability.bounds import Bound, along_intervals, along_steps, data_factor, replace_one, stated_scaling
from pullback.stability.constants import Constants, data_share, gradient_bound, measure, output_lipschitz
from pullback.stability.descent import Descent, Trail, Training
from pullback.stability.errors import StabilityError
from pullback.stability.fixed import FixedMetric
from pullback.stability.objective import Data, Objective
from pullback.stability.ridge import Expansion, KernelRidge, Ridge
from pullback.stability.scaling import Fit, Scaling, fit_power, scaling
from pullback.stability.twins import Learner, Pair, Twin, Twins, compare, twins

__all__ = [
    "Bound",
    "Constants",
    "Data",
    "Descent",
    "Expansion",
    "Fit",
    "FixedMetric",
    "KernelRidge",
    "Learner",
    "Objective",
    "Pair",
    "Ridge",
    "Scaling",
    "StabilityError",
    "Trail",
    "Training",
    "Twin",
    "Twins",
    "along_intervals",
    "along_steps",
    "compare",
    "data_factor",
    "data_share",
    "fit_power",
    "gradient_bound",
    "measure",
    "output_lipschitz",
    "replace_one",
    "scaling",
    "stated_scaling",
    "twins",
]
