"""The constants of a certificate: what bounds are made of, measured at a few places of the path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pullback.action.metrics import LocalRows
from pullback.certification.rates import Ends, PulledRates
from pullback.certification.subject import Subject
from pullback.certification.training import Path, Place
from pullback.stability import Constants, gradient_bound, output_lipschitz
from pullback.stability.rows import PulledRows, largest_share

#: Samples whose share of a metric that holds its data is looked at: it takes the square of their outputs.
_SHARES = 256
_POWER = 50


def places_of(path: Path) -> list[Place]:
    """Beginning, middle and end of what was trained."""
    known = path.places
    return [known[k] for k in sorted({0, len(known) // 2, len(known) - 1})]


def measure_constants(subject: Subject, path: Path, ends: Sequence[Ends], pulled: PulledRates | None) -> Constants:
    """Constants of the loss on all data, at three places.

    Args:
        subject: What was trained.
        path: How.
        ends: Rates along it, at least one.
        pulled: The optimizer's own metric, or None for the identity.
    """
    objective, places = subject.objective, places_of(path)
    thetas = [place.theta for place in places]
    kappa = gradient_bound(objective, thetas, subject.data)
    lipschitz = max(output_lipschitz(objective, theta, subject.data[0]) for theta in thetas)
    rate = min(end.rate.value for end in ends)
    source = f"the smallest at {len(ends)} places of the path"
    n, count = len(subject.data[0]), len(places)
    if pulled is None:
        return Constants(n, kappa, 1.0, 1.0, lipschitz, rate, source, None, count)
    masses = [place.mu for place in places if place.mu is not None]
    tops = [_largest(pulled.metric_at(place), objective.size) for place in places]
    rows = PulledRows(objective, None, path.partition or "layerwise")
    few = [(place.theta, (place.batch[0][:_SHARES], place.batch[1][:_SHARES])) for place in places]
    B2 = max(largest_share(rows.at(theta, data), len(data[0])) for theta, data in few)
    xi = min(mu / top for mu, top in zip(masses, tops, strict=True))
    return Constants(n, kappa, min(masses), xi, lipschitz, rate, source, B2, count)


def constants_dict(constants: Constants, ends: Sequence[Ends], path: Path) -> dict[str, Any]:
    """All of it as plain numbers and words, with the other ends of what was measured."""
    tops = [end.largest for end in ends if end.largest is not None]
    return constants.to_dict() | {
        "largest_rate": max(end.rate.value for end in ends),
        "largest_eigenvalue": max(tops) if tops else None,
        "where": [place.step for place in places_of(path)],
        "metric": path.metric,
    }


def _largest(metric: LocalRows, size: int) -> float:
    """The largest eigenvalue of M, by power iteration: a lower bound."""
    v = torch.ones(size, dtype=torch.float64) / size**0.5
    top = metric.mu
    for _ in range(_POWER):
        v = metric.apply(v)
        top = float(v.norm())
        v = v / top
    return top
