r"""How far trainings drift apart whose data differ in one of n samples, derived in docs/theory 16.

Let :math:`|\nabla l_i| \le \kappa`, :math:`M \ge \mu I`, and let the flow :math:`\theta' = -M^{-1} \nabla L` of one
data set contract at rate :math:`\lambda` in M between the two trajectories. Then

.. math:: |\delta\theta(T)| \le \frac{2 \kappa}{n \mu} \int_0^T e^{-\int_t^T \lambda} dt

and a loss whose gradient is at most :math:`\kappa` between the two ends changes by at most :math:`\kappa` times that.
If M holds the data, :math:`M = \mu I + \tfrac1n \sum_i u_i u_i^\top` with :math:`|u_i|^2 \le B^2`, both are
multiplied by :math:`1 + B^2 / \mu`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pullback.stability.errors import StabilityError


@dataclass(frozen=True)
class Bound:
    """A bound, or a stated scaling beside it.

    Attributes:
        name: which.
        distance: of the parameters of twins; None where it says nothing of it.
        loss: of the change of any sample's loss.
        derived: whether it is derived (docs/theory 16); a stated scaling is no bound here.
        assumes: what it holds under.
        measured: which of its constants were only measured, on samples: with these it is as good as the sampling.
        of_loss: likewise, of those that only the change of the loss needs.
        constants: the numbers that went in.
    """

    name: str
    distance: float | None
    loss: float
    derived: bool
    assumes: tuple[str, ...]
    measured: tuple[str, ...] = ()
    of_loss: tuple[str, ...] = ()
    constants: dict[str, float] = field(default_factory=dict)

    @property
    def proved(self) -> bool:
        """Whether it is derived and all it assumes was proved, up to round-off."""
        return self.derived and not self.measured and not self.of_loss

    @property
    def kind(self) -> str:
        """What it is, in words."""
        if not self.derived:
            return "not a bound here"
        return "proved" if self.proved else "derived, constants sampled"

    @property
    def distance_kind(self) -> str:
        """What it is as far as the distance goes, in words."""
        return "proved" if self.derived and not self.measured else self.kind

    def __str__(self) -> str:
        distance = "" if self.distance is None else f"distance <= {self.distance:.3g}, "
        sign = "<=" if self.derived else "~"
        head = f"{self.name} ({self.kind}): {distance}loss change {sign} {self.loss:.3g}"
        lines = [f"  assumes {line}" for line in self.assumes] + [f"  only measured: {line}" for line in self.measured]
        lines += [f"  only measured, for the loss alone: {line}" for line in self.of_loss]
        return "\n".join([head, *lines])

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and words."""
        own = {"name": self.name, "distance": self.distance, "loss": self.loss, "derived": self.derived}
        words = {
            "proved": self.proved,
            "assumes": list(self.assumes),
            "measured": list(self.measured),
            "of_loss": list(self.of_loss),
        }
        return own | words | {"constants": dict(self.constants)}


def data_factor(B2: float | None, mu: float) -> float:
    """``1 + B^2 / mu`` for a metric that holds the data, 1 for a fixed one (None)."""
    if B2 is None:
        return 1.0
    if not (B2 >= 0 and math.isfinite(B2)):
        raise StabilityError(f"B^2 is {B2}; give the largest |u_i|^2, or None for a metric without data.")
    return 1 + B2 / mu


def reach(rate: float, time: float) -> float:
    r""":math:`\int_0^T e^{-\lambda (T - t)} dt`: how long a push of unit strength adds up.

    Raises:
        StabilityError: if the time is infinite and the rate not positive.
    """
    if math.isinf(time):
        if not rate > 0:
            raise StabilityError(
                f"The rate is {rate:.3g}: without contraction nothing bounds infinite time; give the time of training."
            )
        return 1 / rate
    if abs(rate * time) < 1e-9:  # the quotient of two numbers that underflow says nothing
        return time * (1 - rate * time / 2)
    return -math.expm1(-rate * time) / rate


def replace_one(
    *,
    kappa: float,
    n: int,
    mu: float,
    rate: float,
    time: float = math.inf,
    B2: float | None = None,
    source: str,
    proved: bool = False,
    also: tuple[str, ...] = (),
) -> Bound:
    """The bound with one rate for all times (docs/theory 16).

    Args:
        kappa: largest norm of a sample's gradient, over both data sets along one trajectory, and of the losses that are
            compared between the two ends. With ``B2`` also of the whole gradient.
        n: samples, at least two.
        mu: smallest eigenvalue of the metric.
        rate: the flow's contraction rate in the metric, between the trajectories; may be negative at finite time.
        time: how long was trained.
        B2: largest |u_i|^2 if the metric holds the data; None for a fixed metric.
        source: where the rate comes from, in words.
        proved: whether the rate was proved between the trajectories, or only measured at places.
        also: what else was only measured, in words.

    Raises:
        StabilityError: if a constant makes no sense, or time is infinite without contraction.
    """
    check_constants(kappa=kappa, n=n, mu=mu, rate=rate)
    if not time > 0:
        raise StabilityError(f"The time is {time}; give a positive one.")
    distance = data_factor(B2, mu) * 2 * kappa / (n * mu) * reach(rate, time)
    own = {"kappa": kappa, "n": float(n), "mu": mu, "rate": rate, "time": time}
    words = f"rate {rate:.3g} between the two trajectories: {source}"
    own |= {} if B2 is None else {"B2": B2}
    return _bound("one rate", distance, kappa, words, proved, also, _metric_words(B2, mu), own)


def along_intervals(
    lengths: Sequence[float],
    rates: Sequence[float],
    kappas: Sequence[float],
    *,
    n: int,
    mu: float,
    B2: float | None = None,
    source: str,
    proved: bool = False,
    also: tuple[str, ...] = (),
) -> Bound:
    """The bound of a flow whose rate changes: one lower bound of the rate and one kappa per interval of time.

    Rates may be negative: the distance then grows, for as long as they are.

    Args:
        lengths: of the intervals of time, in order.
        rates: in each the smallest contraction rate.
        kappas: in each the largest norm of a sample's gradient; the largest of all is that of the losses too.
        n: as in :func:`replace_one`, as are the rest.
        mu: likewise.
        B2: likewise.
        source: likewise.
        proved: likewise.
        also: likewise.

    Raises:
        StabilityError: if there is no interval, the lists differ in length, or a constant makes no sense.
    """
    _same_length(lengths, rates, kappas)
    if not all(h > 0 for h in lengths):
        raise StabilityError(f"An interval of time has length {min(lengths):g}; give positive ones.")
    distance, strength = 0.0, data_factor(B2, mu) * 2 / (n * mu)
    for h, rate, kappa in zip(lengths, rates, kappas, strict=True):
        check_constants(kappa=kappa, n=n, mu=mu, rate=rate)
        distance = math.exp(-rate * h) * distance + strength * kappa * reach(rate, h)
    own = {"kappa": max(kappas), "n": float(n), "mu": mu, "rate": min(rates), "time": sum(lengths)}
    words = f"rates from {min(rates):.3g} to {max(rates):.3g} along the path: {source}"
    return _bound("rates along the path", distance, max(kappas), words, proved, also, _metric_words(B2, mu), own)


def along_steps(
    lengths: Sequence[float],
    factors: Sequence[float],
    kappas: Sequence[float],
    *,
    n: int,
    mu: float,
    B2: float | None = None,
    kappa_end: float | None = None,
    name: str = "step by step",
    source: str,
    proved: bool = False,
    also: tuple[str, ...] = (),
    of_loss: tuple[str, ...] = (),
) -> Bound:
    r"""The bound in discrete time: steps :math:`\theta - h M^{-1} \nabla L` that stretch distances by at most q.

    .. math:: |\delta\theta_T| \le \sum_k \Big( \prod_{j > k} q_j \Big) h_k \frac{2 \kappa_k}{n \mu}

    Args:
        lengths: h of every step.
        factors: q of every step, the Lipschitz constant of the step in M between the two trajectories.
        kappas: largest norm of a sample's gradient where the twin stands before the step.
        n: as in :func:`replace_one`, as are the rest.
        mu: likewise.
        B2: likewise.
        kappa_end: largest norm of a gradient of the losses that are compared; None for the largest of ``kappas``.
        name: of the bound.
        source: where the factors come from, in words.
        proved: likewise.
        also: likewise.
        of_loss: what only the change of the loss needs and was only measured, in words.

    Raises:
        StabilityError: as :func:`along_intervals`.
    """
    _same_length(lengths, factors, kappas)
    distance, strength = 0.0, data_factor(B2, mu) * 2 / (n * mu)
    for h, q, kappa in zip(lengths, factors, kappas, strict=True):
        check_constants(kappa=kappa, n=n, mu=mu, rate=q)
        if not (q >= 0 and h > 0):
            raise StabilityError(
                f"A step has length {h:g} and factor {q:g}; lengths are positive, factors not negative."
            )
        distance = q * distance + strength * h * kappa
    kappa = max(kappas) if kappa_end is None else kappa_end
    own = {"kappa": kappa, "n": float(n), "mu": mu, "time": sum(lengths), "largest_factor": max(factors)}
    words = f"factors from {min(factors):.4g} to {max(factors):.4g} a step: {source}"
    found = _bound(name, distance, kappa, words, proved, also, _metric_words(B2, mu), own)
    return replace(found, of_loss=of_loss)


def stated_scaling(*, kappa: float, lipschitz: float, xi: float, mu: float, n: int) -> Bound:
    r"""The scaling :math:`\kappa^2 L / (\xi \mu \sqrt n)` that P states, with constant one.

    The exact theorem was not available. We read L as the Lipschitz constant of the outputs in the parameters and xi as
    smallest over largest eigenvalue of the metric; the constant in front is unknown, so this bounds nothing here.
    """
    check_constants(kappa=kappa, n=n, mu=mu, rate=0.0)
    if not (lipschitz >= 0 and 0 < xi <= 1):
        raise StabilityError(f"L is {lipschitz} and xi {xi}; give L >= 0 and 0 < xi <= 1.")
    own = {"kappa": kappa, "lipschitz": lipschitz, "xi": xi, "mu": mu, "n": float(n)}
    value = kappa**2 * lipschitz / (xi * mu * math.sqrt(n))
    return Bound(
        "P, O(kappa^2 L / (xi mu sqrt n))", None, value, False, ("constant unknown, set to one",), constants=own
    )


def check_constants(*, kappa: float, n: int, mu: float, rate: float) -> None:
    """Refuse constants that make no sense.

    Raises:
        StabilityError: if n < 2, mu is not positive, or a number is negative or not finite.
    """
    if n < 2:
        raise StabilityError(f"There are n = {n} samples; replacing one of them needs n of at least 2.")
    if not (mu > 0 and math.isfinite(mu)):
        raise StabilityError(f"The mass mu is {mu}: the metric is not positive definite; add a mass to it.")
    if not (kappa >= 0 and math.isfinite(kappa)) or not math.isfinite(rate):
        raise StabilityError(f"kappa is {kappa} and the rate or factor {rate}; measure them where all is finite.")


def _bound(
    name: str,
    distance: float,
    kappa: float,
    words: str,
    proved: bool,
    also: tuple[str, ...],
    metric: str,
    constants: dict[str, float],
) -> Bound:
    assumes, measured = ((words, metric), also) if proved else ((metric,), (words, *also))
    return Bound(name, distance, kappa * distance, True, assumes, measured, constants=constants)


def _same_length(*lists: Sequence[float]) -> None:
    sizes = [len(one) for one in lists]
    if not sizes[0] or len(set(sizes)) > 1:
        raise StabilityError(
            f"There are {sizes} lengths, rates and kappas; give one of each per interval, at least one."
        )


def _metric_words(B2: float | None, mu: float) -> str:
    if B2 is None:
        return f"a metric that does not depend on the data, M >= {mu:.3g} I"
    return f"a metric that holds the data: M >= {mu:.3g} I, |u_i|^2 <= {B2:.3g}, factor {data_factor(B2, mu):.3g}"
