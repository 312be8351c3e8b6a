"""How twins draw together as the data grow: the fitted exponent of n, with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pullback.stability.errors import StabilityError
from pullback.stability.objective import Data
from pullback.stability.twins import Learner, State, Twins, twins


@dataclass(frozen=True)
class Fit:
    """A power law ``c n^exponent``.

    Attributes:
        exponent: the slope in logarithms.
        low: lower end of its interval.
        high: upper end.
        level: confidence of the interval.
        constant: c.
    """

    exponent: float
    low: float
    high: float
    level: float
    constant: float

    def __str__(self) -> str:
        return f"n^{self.exponent:.2f} ({100 * self.level:g}%: {self.low:.2f} to {self.high:.2f})"

    def to_dict(self) -> dict[str, float]:
        """All of it as plain numbers."""
        return dict(vars(self))


def fit_power(ns: Sequence[float], values: Sequence[float], level: float = 0.95) -> Fit:
    """Least squares in logarithms, with Student's interval for the slope.

    One value per n: pairs of one n share their data and are not independent, so only the scatter between the n counts.

    Args:
        ns: at least three different numbers of samples.
        values: positive, one per n.
        level: confidence of the interval.

    Raises:
        StabilityError: if there are fewer than three different n, or a value is not positive and finite.
    """
    if len(ns) != len(values) or len(set(ns)) < 3:
        raise StabilityError(
            f"There are {len(set(ns))} different n and {len(values)} values; a fit needs three of both."
        )
    if not all(v > 0 and math.isfinite(v) for v in values) or not min(ns) > 0:
        raise StabilityError(f"The smallest value is {min(values)}; logarithms need positive finite ones.")
    if not 0 < level < 1:
        raise StabilityError(f"level is {level}; give a share between 0 and 1.")
    x, y = [math.log(n) for n in ns], [math.log(v) for v in values]
    slope, intercept = statistics.linear_regression(x, y)
    rest = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    middle = statistics.fmean(x)
    error = math.sqrt(rest / (len(x) - 2) / sum((a - middle) ** 2 for a in x))
    half = student(len(x) - 2, level) * error
    return Fit(slope, slope - half, slope + half, level, math.exp(intercept))


def student(freedom: int, level: float) -> float:
    """How many standard errors a two-sided Student interval reaches, for whole degrees of freedom.

    By bisection of the closed form of the distribution (Abramowitz & Stegun 26.7.3 and 26.7.4).
    """

    def inside(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        sine, cosine = math.sin(angle), math.cos(angle)
        term = total = 1.0 if freedom % 2 == 0 else cosine
        for k in range(2 if freedom % 2 else 1, freedom - 1, 2):
            term *= cosine**2 * k / (k + 1)
            total += term
        if freedom % 2 == 0:
            return sine * total
        return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))

    low, high = 0.0, 1.0
    while inside(high) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return high


@dataclass
class Scaling:
    """Twins at several n, and the exponents fitted to them; print it.

    Attributes:
        reports: twins per n, in order of n.
        distance: fit of the mean twin distance (mean of logarithms over pairs).
        loss: fit of the mean loss change, likewise.
    """

    reports: list[Twins]
    distance: Fit
    loss: Fit

    @property
    def held(self) -> bool:
        """Whether every derived bound held for every pair at every n."""
        return all(report.held for report in self.reports)

    def __str__(self) -> str:
        held = "held" if self.held else "BROKEN"
        head = f"twin distance {self.distance}, loss change {self.loss}; derived bounds {held}"
        return "\n".join([head, *(str(report) for report in self.reports)])

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and words."""
        fits = {"distance": self.distance.to_dict(), "loss": self.loss.to_dict()}
        return {"held": self.held, **fits, "reports": [report.to_dict() for report in self.reports]}


def scaling(
    learner: Learner[State],
    data: Data,
    ns: Sequence[int],
    n_pairs: int,
    *,
    spare: Data,
    held_out: Data | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> Scaling:
    """Train twins on the first n rows of the data, for several n, and fit exponents.

    Args:
        learner: what is trained.
        data: at least as many rows as the largest n, in random order.
        ns: at least three numbers of samples.
        n_pairs: pairs of twins at each n.
        spare: samples to put in place of others.
        held_out: see :func:`~pullback.stability.twins`.
        seed: of the draws.
        level: confidence of the intervals.

    Raises:
        StabilityError: if an n is larger than the data, or as :func:`fit_power` and :func:`~pullback.stability.twins`.
    """
    if len(set(ns)) < 3 or max(ns) > len(data[0]):
        raise StabilityError(f"n are {list(ns)} of {len(data[0])} rows; give three or more, none above the rows.")
    order = sorted(set(ns))
    reports = [
        twins(learner, (data[0][:n], data[1][:n]), n_pairs, spare=spare, held_out=held_out, seed=seed + n)
        for n in order
    ]
    distances = [_middle([t.distance for t in report.pairs]) for report in reports]
    changes = [_middle([t.loss_change for t in report.pairs]) for report in reports]
    return Scaling(reports, fit_power(order, distances, level), fit_power(order, changes, level))


def _middle(values: Sequence[float]) -> float:
    """The geometric mean; zero if a value is."""
    return statistics.geometric_mean(values) if min(values) > 0 else 0.0
