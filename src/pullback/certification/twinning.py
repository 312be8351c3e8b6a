"""Twins at several n, pair by pair, so that what was reached is kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from pullback.certification.rates import largest_ends
from pullback.certification.settings import DescentSpec, Settings
from pullback.certification.subject import Subject
from pullback.certification.training import descent, train
from pullback.certification.watch import Watch
from pullback.problems.optimizer_spec import OptimizerSpec
from pullback.stability import Descent, Fit, Learner, Scaling, StabilityError, Training, Twins, compare, fit_power
from pullback.stability.objective import Data
from pullback.stability.twins import replaced

#: Places along a path at which the spectrum between the first twins of each n is sampled.
_SAMPLED = 10
#: Draws of a sample for every pair that is wanted, for data that hold a sample twice.
_TRIES = 100


def train_twins(subject: Subject, settings: Settings, sizes: Sequence[int], reports: list[Twins], watch: Watch) -> None:
    """Trains pairs of twins on the first n samples, for several n, filling the reports as it goes.

    Args:
        subject: What is trained.
        settings: With what, and how many pairs.
        sizes: Numbers of samples, ascending.
        reports: Where reports are put, one per n, once they have a pair.
        watch: Told of progress; no pair is begun once it is over.

    Raises:
        StabilityError: If training does not repeat itself, or weights are not finite.
    """
    plain, sampled = _learners(subject, settings)
    work, done = sum(sizes) * (settings.pairs + 1), 0
    for at, n in enumerate(sizes):
        if watch.over():
            return
        data = (subject.data[0][:n], subject.data[1][:n])
        state = plain.train(data)
        if at == 0 and plain.distance(state, plain.train(data)) != 0:
            raise StabilityError("Training on the same data twice ends elsewhere; take an optimizer without noise.")
        done += n
        watch.tell(done / work, f"n = {n}")
        report = Twins(n)
        for k, other in enumerate(_drawn(data, subject.spare, settings.pairs, settings.seed + n)):
            if watch.over():
                return
            report.pairs.append(compare(sampled if k == 0 else plain, data, other, subject.held_out, state))
            if k == 0:
                reports.append(report)
            done += n
            watch.tell(done / work, f"n = {n}, pair {k + 1}")


def fits(reports: Sequence[Twins]) -> tuple[Fit, Fit] | None:
    """Exponents in n of distance and loss change, by geometric means; None below three n, or if twins agree."""
    ns = [report.n for report in reports]
    distances = [[twin.distance for twin in report.pairs] for report in reports]
    changes = [[twin.loss_change for twin in report.pairs] for report in reports]
    if len(ns) < 3 or min(map(min, [*distances, *changes])) <= 0:
        return None
    first, second = ([_middle(values) for values in rows] for rows in (distances, changes))
    return fit_power(ns, first), fit_power(ns, second)


def as_scaling(reports: Sequence[Twins]) -> Scaling | None:
    """The reports as a scaling, for its picture; None without a fit."""
    found = fits(reports)
    return None if found is None else Scaling(list(reports), *found)


def _middle(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp()) if len(values) > 1 else fmean(values)


def _learners(subject: Subject, settings: Settings) -> tuple[Learner[Any], Learner[Any]]:
    """One for all pairs, and one for the first of each n that has the bound of sampled spectra and P's scaling too."""
    spec = settings.spec
    if isinstance(spec, DescentSpec):
        plain = descent(subject, spec)
        objective = subject.objective
        sampled = Descent(
            objective, subject.start, steps=spec.steps, h=spec.lr, spectrum=partial(largest_ends, objective),
            every=max(1, spec.steps // _SAMPLED),
        )  # fmt: skip
        return plain, sampled
    learner = Training(subject.objective, _trainer(subject, spec, settings))
    return learner, learner


def _trainer(subject: Subject, spec: OptimizerSpec, settings: Settings) -> Any:
    def trained(data: Data) -> Tensor:
        return train(subject, spec, settings.seed, settings.count, data)

    return trained


def _drawn(data: Data, spare: Data, pairs: int, seed: int) -> list[Data]:
    """Data sets that differ from the first in one drawn sample each.

    Raises:
        StabilityError: If every sample drawn is the one that is there already.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[Data] = []
    for _ in range(_TRIES * pairs):
        j = int(torch.randint(len(data[0]), (), generator=generator))
        k = int(torch.randint(len(spare[0]), (), generator=generator))
        if any(not torch.equal(own[j], other[k]) for own, other in zip(data, spare, strict=True)):
            found.append(replaced(data, j, (spare[0][k], spare[1][k])))
        if len(found) == pairs:
            return found
    raise StabilityError("The samples to put in place of others equal those they are drawn for; give other data.")
