"""Trainings that repeat themselves: the one whose path is looked at, and those of twins."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pullback.action import Action, ActionRecorder, PulledBack, path_action
from pullback.action.path import step_action
from pullback.action.record import summed
from pullback.certification.settings import DescentSpec
from pullback.certification.subject import Subject
from pullback.certification.watch import Watch
from pullback.flow.record import Path as Curve
from pullback.optim import GaussNewton, LayerwiseMetric
from pullback.problems.errors import SpecError
from pullback.problems.optimizer_entry import Stepper
from pullback.problems.optimizer_spec import OptimizerSpec
from pullback.problems.optimizers import optimizer_entry
from pullback.problems.runner import batches
from pullback.stability import Descent, StabilityError
from pullback.stability.objective import Data

#: Bytes that the weights of all steps of one training of descent may take.
_MOST = 2**31
#: The defect of steps that follow the flow's direction, but straight on.
CURVED = "discretisation"
#: Of Gauss's rule between two points of descent.
_NODES = 3
_PARTITIONS = {"layerwise-metric": "layerwise", "gauss-newton": "global"}


@dataclass(frozen=True)
class Place:
    """A point of the path.

    Attributes:
        step: steps taken before it.
        theta: packed weights there, (K,).
        batch: what the step from there saw.
        mu: mass of the metric of that step; None without one.
    """

    step: int
    theta: Tensor
    batch: Data
    mu: float | None


@dataclass
class Path:
    """A training, looked at.

    Attributes:
        places: points at which rates are measured, in order.
        losses: (step, loss with decay on all data) at the places.
        actions: of every step; for descent that of the curve through its points with the flow's slopes there, what is
            left of the flow between the steps.
        discrete: for descent the action in discrete time, zero but for round-off.
        metric: in which the action is taken, in words.
        h: length of the steps where they have one.
        partition: of the optimizer's own pulled-back metric; None where the identity is taken.
        why: why that metric, in words.
    """

    places: list[Place] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    discrete: float | None = None
    metric: str = "identity"
    h: float | None = None
    partition: str | None = None
    why: str = ""

    @property
    def action(self) -> Action | None:
        """Of all steps; None before the first."""
        return summed(self.actions) if self.actions else None

    @property
    def steps(self) -> int:
        """How many were taken."""
        return len(self.actions)


def steps_of_places(steps: int, points: int) -> list[int]:
    """The steps before which the path is looked at: both ends and places between, each once."""
    return sorted({round(k * steps / (points - 1)) for k in range(points)})


def descent(subject: Subject, spec: DescentSpec) -> Descent:
    """Full-batch steps as a learner.

    Raises:
        SpecError: If its path would not fit into memory.
    """
    needed = 8 * subject.objective.size * (spec.steps + 1)
    if needed > _MOST:
        raise SpecError(
            f"the paths of twins would take {2 * needed / 2**30:.1f} GB; take fewer than {spec.steps} steps "
            "or a smaller model."
        )
    return Descent(subject.objective, subject.start, steps=spec.steps, h=spec.lr, scaling=False)


def follow_descent(subject: Subject, spec: DescentSpec, points: int, path: Path, watch: Watch) -> None:
    """Trains by descent, filling the path as it goes.

    Raises:
        StabilityError: If a gradient is not finite.
    """
    learner, objective = descent(subject, spec), subject.objective
    path.h, path.why = spec.lr, "descent steps in it"
    looked, theta = steps_of_places(spec.steps, points), subject.start
    loss, g = objective.loss_and_gradient(theta, subject.data)
    path.discrete = 0.0
    for k in range(spec.steps):
        if k in looked:
            _note(path, Place(k, theta, subject.data, None), loss)
        following = learner.step(theta, subject.data)
        own = step_action(following - theta, g, learner.metric, spec.lr, None, objective.modules)
        path.discrete += own.total
        loss, after = objective.loss_and_gradient(following, subject.data)
        curve = Curve([0.0, spec.lr], [theta, following], [-g, -after])
        between = path_action(objective.model, objective.criterion, subject.data, curve, decay=spec.decay, nodes=_NODES)
        path.actions.append(replace(between, defects={(CURVED, CURVED): between.total}))
        theta, g = following, after
        watch.tell((k + 1) / spec.steps)
    _note(path, Place(spec.steps, theta, subject.data, None), loss)


def follow(subject: Subject, spec: OptimizerSpec, seed: int, steps: int, points: int, path: Path, watch: Watch) -> None:
    """Trains by an optimizer of the registry, filling the path as it goes.

    Raises:
        SpecError: If the optimizer refuses model or options.
        StabilityError: If a step is not finite.
    """
    path.partition, path.why = _metric_of(spec)
    data, looked = subject.data, steps_of_places(steps, points)
    with _started(subject, spec, seed) as (model, criterion, optimizer):
        metric: PulledBack | None = None
        if path.partition is not None:
            metric = PulledBack(model, criterion, data, mu=lambda: _mu(optimizer), partition=path.partition)
            path.metric = "mu I + U^T U of each step's own batch"
        recorder = ActionRecorder(model, criterion, data, metric=metric)
        source = batches(subject.problem, seed)
        for k in range(steps):
            batch = next(source)
            if metric is not None:
                metric.data = batch
            theta = recorder.objective.get()
            loss = recorder.objective.loss(theta, data)
            if not math.isfinite(loss):
                raise StabilityError(f"The loss is {loss} after {k} steps; take shorter ones.")
            closure = _closure(model, criterion, optimizer, batch)
            closure()
            with recorder.observe(h=lambda: _time(optimizer)):
                _ = optimizer.step(closure) if optimizer_entry(spec.name).closure else optimizer.step()
            path.actions.append(recorder.steps[-1])
            if k in looked:
                _note(path, Place(k, theta, batch, None if metric is None else _mu(optimizer)), loss)
            watch.tell((k + 1) / steps)
        theta = recorder.objective.get()
        mu = None if metric is None else _mu(optimizer)
        _note(path, Place(steps, theta, batch, mu), recorder.objective.loss(theta, data))


def train(subject: Subject, spec: OptimizerSpec, seed: int, steps: int, data: Data) -> Tensor:
    """Trains by an optimizer of the registry on other data of the same problem; packed weights, (K,)."""
    problem = replace(subject.problem, train=data)
    with _started(subject, spec, seed) as (model, criterion, optimizer):
        source = batches(problem, seed)
        for _ in range(steps):
            closure = _closure(model, criterion, optimizer, next(source))
            if optimizer_entry(spec.name).closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


@contextlib.contextmanager
def _started(subject: Subject, spec: OptimizerSpec, seed: int) -> Iterator[tuple[nn.Module, nn.Module, Stepper]]:
    """Model, criterion and optimizer at their beginning, with the same random numbers every time."""
    model, criterion = subject.build(seed), copy.deepcopy(subject.problem.criterion)
    optimizer = optimizer_entry(spec.name).make(spec.options, model, criterion)
    torch.manual_seed(seed)
    try:
        yield model, criterion, optimizer
    finally:
        if hasattr(optimizer, "close"):
            optimizer.close()


def _closure(model: nn.Module, criterion: nn.Module, optimizer: Stepper, batch: Data) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return closure


def _metric_of(spec: OptimizerSpec) -> tuple[str | None, str]:
    """The partition of the metric that the optimizer steps in, where it can be had exactly; and why."""
    usual = _PARTITIONS.get(spec.name)
    if usual is None:
        return None, f"the metric of {spec.name}, if it has one, is not available as an exact fixed one"
    if spec.options.get("samples") is not None or spec.options.get("mass", "identity") != "identity":
        return None, f"{spec.label} steps in a sketched or weighted metric"
    return str(spec.options.get("partition") or usual), f"{spec.name} steps in it"


def _mu(optimizer: Any) -> float:
    return float(optimizer.last.mu)


def _time(optimizer: Any) -> float:
    """What a step counts as time: the learning rate, times the factor on the direction of our own; one without both."""
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    time = float(groups[0].get("lr", 1.0)) if groups else 1.0
    if isinstance(optimizer, LayerwiseMetric | GaussNewton):
        assert optimizer.last is not None
        time *= float(optimizer.last.scale)
    return time or 1.0


def _note(path: Path, place: Place, loss: float) -> None:
    path.places.append(place)
    path.losses.append((place.step, loss))
