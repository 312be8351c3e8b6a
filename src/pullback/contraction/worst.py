r"""Rates along a trajectory, and the worst of a sampled region with what that says about the rest of it.

If a share p of the region (in the measure samples are drawn from) had rates below the worst of n independent samples,
all of them would have missed it, with probability at most :math:`(1 - p)^n`. So with confidence :math:`1 - \delta` the
share is at most :math:`1 - \delta^{1/n}` (an order statistic, whatever the distribution). It bounds no single point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.contraction.errors import ContractionError
from pullback.contraction.metrics import Metric
from pullback.contraction.rates import Field, rate_at
from pullback.contraction.record import Rate
from pullback.contraction.regions import Region


@dataclass(frozen=True)
class PathRates:
    """Rates at the points of a trajectory; nothing is known between them.

    Attributes:
        times: of the points; their numbers where none were given.
        rates: there.
    """

    times: tuple[float, ...]
    rates: tuple[Rate, ...]

    @property
    def worst(self) -> Rate:
        """The smallest."""
        return min(self.rates, key=lambda rate: rate.value)

    @property
    def converged(self) -> bool:
        """Whether all have."""
        return all(rate.converged for rate in self.rates)

    def __str__(self) -> str:
        """One sentence."""
        apart = sum(not rate.converged for rate in self.rates)
        said = f"; UNPROVED at {apart} of them, not converged" if apart else ""
        return f"worst rate {self.worst.value:.6g} at {len(self.rates)} points of the trajectory{said}"


@dataclass(frozen=True)
class RegionRate:
    """The worst of the rates that were sampled in a region.

    Attributes:
        worst: the smallest sampled rate, what is estimated to be missing taken off.
        at: the point it was found at, (n,).
        samples: how many were drawn.
        confidence: 1 - delta.
        share: with that confidence, at most this share of the region lies below ``worst``.
        unconverged: rates that have not converged.
        left: number of the first point of the trajectory outside of the region; None if it stays.
        proved: always False: sampling bounds a share of the region, not all of it.
        certified: whether the statement about the share holds: every rate from all eigenvalues or converged, and the
            trajectory, if there is one, inside.
        region: the region in words.
    """

    worst: float
    at: Tensor
    samples: int
    confidence: float
    share: float
    unconverged: int
    left: int | None
    region: str
    proved: bool = False

    @property
    def certified(self) -> bool:
        """See above."""
        return self.unconverged == 0 and self.left is None

    @property
    def why_not(self) -> str:
        """The reason for which nothing is certified; empty if it is."""
        if self.left is not None:
            return f"point {self.left} of the trajectory lies outside of the {self.region}"
        return f"{self.unconverged} of {self.samples} rates have not converged" if self.unconverged else ""

    def __str__(self) -> str:
        """As it stands in a certificate."""
        found = f"worst of {self.samples} sampled rates in the {self.region}: {self.worst:.6g}"
        if not self.certified:
            return f"{found}; NO CERTIFICATE: {self.why_not}"
        return (
            f"{found}; with confidence {self.confidence:g} at most a share {self.share:.3g} of it lies below "
            "(sampled, no bound for every point)"
        )


def rate_along(
    field: Field,
    points: Tensor | Sequence[Tensor],
    *,
    times: Sequence[float] | None = None,
    metric: Metric = None,
    timed: bool = False,
    **options: Any,
) -> PathRates:
    """Rates at the points of a trajectory.

    Args:
        field: h, as for :func:`rate_at`.
        points: the points, (T, n).
        times: of the points; their numbers by default. (A flow's path: ``points=path.thetas, times=path.times``.)
        metric: as for :func:`rate_at`.
        timed: whether the field is a function of (t, x).
        **options: of :func:`rate_at`.

    Raises:
        ContractionError: if there are no points, not as many times, or a rate cannot be had.
    """
    places = list(points)
    when = [float(k) for k in range(len(places))] if times is None else [float(t) for t in times]
    if not places or len(when) != len(places):
        raise ContractionError(f"There are {len(places)} points and {len(when)} times; give one time for every point.")
    rates = [
        rate_at(field, x, metric=metric, t=t if timed else None, **options) for x, t in zip(places, when, strict=True)
    ]
    return PathRates(tuple(when), tuple(rates))


def rate_over(
    field: Field,
    region: Region,
    *,
    samples: int = 300,
    confidence: float = 0.95,
    metric: Metric = None,
    trajectory: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
    **options: Any,
) -> RegionRate:
    """The worst rate over a sampled region.

    Args:
        field: h, as for :func:`rate_at`.
        region: a :class:`Ball`, :class:`Box`, :class:`Sampled`, or what has their methods.
        samples: points to draw.
        confidence: 1 - delta, between 0 and 1.
        metric: as for :func:`rate_at`.
        trajectory: points that the statement is meant for, (T, n); leaving the region voids the certificate.
        seed: of the draws.
        **options: of :func:`rate_at`.

    Raises:
        ContractionError: if nothing is to be drawn, the confidence is out of range, or a rate cannot be had.
    """
    if samples < 1:
        raise ContractionError(f"{samples} samples were asked for; give at least one.")
    if not 0 < confidence < 1:
        raise ContractionError(f"The confidence is {confidence}; give a number between 0 and 1.")
    points = region.draw(samples, torch.Generator().manual_seed(seed))
    rates = [rate_at(field, x, metric=metric, **options) for x in points]
    values = torch.tensor([rate.value for rate in rates], dtype=torch.float64)
    worst = int(values.argmin())
    left = None
    if trajectory is not None:
        left = next((k for k, x in enumerate(trajectory) if not region.contains(x)), None)
    share = 1 - (1 - confidence) ** (1 / samples)
    unconverged = sum(not rate.converged for rate in rates)
    return RegionRate(float(values[worst]), points[worst], samples, confidence, share, unconverged, left, str(region))
