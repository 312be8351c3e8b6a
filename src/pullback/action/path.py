r"""The action of a path: continuous, or a list of steps (docs/theory 16).

Expanding the square, whatever the metric,

.. math:: \tfrac12 |\theta' + M^{-1} \nabla L|_M^2
          = \tfrac12 \theta'^\top M \theta' + \tfrac12 \nabla L^\top M^{-1} \nabla L + \theta' \cdot \nabla L,

the last of which integrates to L(T) - L(0). Both sides are evaluated; what they differ by is the error of quadrature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pullback.action.metrics import Local, ParameterMetric, check_step
from pullback.action.record import Action, summed
from pullback.flow.record import Path
from pullback.stability.errors import StabilityError
from pullback.stability.fixed import FixedMetric
from pullback.stability.objective import Data, Objective, check_data


def gauss(nodes: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of Gauss's rule on [0, 1], from the eigenvalues of Legendre's recurrence."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    side = k / (4 * k**2 - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(side, 1) + torch.diag(side, -1))
    return ((values + 1) / 2).tolist(), vectors[0].square().tolist()


def density(
    velocity: Tensor, g: Tensor, metric: Local, modules: dict[str, Tensor]
) -> tuple[float, float, float, dict[str, float]]:
    """Half |v + M^{-1} g|_M^2 at one point, with its kinetic and force parts and the modules' shares."""
    solved, carried = metric.solve(g), metric.apply(velocity)
    off = velocity + solved
    each = 0.5 * off * metric.apply(off)
    shares = {name: float(each[where].sum()) for name, where in modules.items()}
    return float(each.sum()), 0.5 * float(velocity @ carried), 0.5 * float(g @ solved), shares


def path_action(
    model: nn.Module,
    criterion: nn.Module,
    data: Data,
    path: Path,
    *,
    metric: ParameterMetric | None = None,
    decay: float = 0.0,
    nodes: int = 8,
) -> Action:
    """The action of a continuous path of packed weights.

    Args:
        model: the model; its own weights stay as they are.
        criterion: a loss module that averages.
        data: inputs and targets of the loss.
        path: as :func:`metric_flow` or a run of :mod:`pullback.flow` leaves it, packed as ``named_parameters``; between
            its points by cubic interpolation, of which this is the action.
        metric: None for the identity.
        decay: weight decay, part of the loss.
        nodes: of Gauss's rule between two points.

    Raises:
        StabilityError: if the path has fewer than two points, times do not grow, or numbers are not finite.
    """
    objective = Objective(model, criterion, decay=decay)
    check_data(data, 1)
    _check_points(path.thetas, objective)
    if any(b <= a for a, b in pairwise(path.times)):
        raise StabilityError("The times of the path do not grow; give points in order, each once.")
    metric = FixedMetric() if metric is None else metric
    parts = []
    for a, b in pairwise(path.times):
        for u, w in zip(*gauss(nodes), strict=True):
            s, h = a + u * (b - a), w * (b - a)
            theta = path.at(s)
            g = objective.gradient(theta, data)
            total, kinetic, force, shares = density(path.slope_at(s), g, metric.at(theta), objective.modules)
            parts.append(Action(h * total, h * kinetic, h * force, 0.0, 0.0, {k: h * v for k, v in shares.items()}, h))
    whole = summed(parts)
    work = objective.loss(path.thetas[-1], data) - objective.loss(path.thetas[0], data)
    return Action(whole.total, whole.kinetic, whole.force, work, 0.0, whole.modules, whole.time)


def steps_action(
    model: nn.Module,
    criterion: nn.Module,
    data: Data,
    thetas: Sequence[Tensor],
    h: float,
    *,
    metric: ParameterMetric | None = None,
    decay: float = 0.0,
) -> Action:
    r"""The action of steps in discrete time, :math:`\sum_k \tfrac{h}{2} |\delta_k / h + M^{-1} \nabla L|_M^2`.

    Metric and gradient are those where a step begins, so a step :math:`-h M^{-1} \nabla L` has none.

    Args:
        model: see :func:`path_action`, as the rest.
        criterion: likewise.
        data: likewise.
        thetas: packed weights, one more than steps.
        h: the time a step takes.
        metric: likewise.
        decay: likewise.

    Raises:
        StabilityError: as :func:`path_action`, or if h is not positive.
    """
    objective = Objective(model, criterion, decay=decay)
    check_data(data, 1)
    check_step(h)
    _check_points(thetas, objective)
    metric = FixedMetric() if metric is None else metric
    parts, (loss, g) = [], objective.loss_and_gradient(thetas[0], data)
    for theta, following in pairwise(thetas):
        after, g_after = objective.loss_and_gradient(following, data)
        parts.append(step_action(following - theta, g, metric.at(theta), h, after - loss, objective.modules))
        loss, g = after, g_after
    return summed(parts)


def step_action(
    step: Tensor, g: Tensor, metric: Local, h: float, work: float | None, modules: dict[str, Tensor]
) -> Action:
    """The action of one step (K,), the gradient and the metric being those where it begins."""
    total, kinetic, force, shares = density(step / h, g, metric, modules)
    remainder = 0.0 if work is None else work - float(step @ g)
    return Action(
        h * total, h * kinetic, h * force, work, remainder, {name: h * value for name, value in shares.items()}, h
    )


def metric_flow(
    model: nn.Module,
    criterion: nn.Module,
    data: Data,
    *,
    until: float,
    points: int = 64,
    metric: ParameterMetric | None = None,
    decay: float = 0.0,
    tol: float = 1e-10,
    method: str = "dopri5",
) -> Path:
    r"""The metric gradient flow :math:`\theta' = -M^{-1} \nabla L` from the model's weights, by torchdiffeq.

    Args:
        model: see :func:`path_action`.
        criterion: likewise.
        data: likewise.
        until: the time it ends at.
        points: intervals of equal time between points that are kept.
        metric: likewise.
        decay: likewise.
        tol: tolerance of the integrator, relative and absolute.
        method: one of torchdiffeq's.

    Raises:
        StabilityError: if torchdiffeq is not installed, or time and points are not positive.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise StabilityError('A metric flow needs torchdiffeq: pip install "pullback[flow]".') from error
    if points < 1:
        raise StabilityError(f"points is {points}; give at least one interval.")
    objective = Objective(model, criterion, decay=decay)
    check_data(data, 1)
    check_step(until)
    local = FixedMetric() if metric is None else metric

    def slope(_: Tensor, theta: Tensor) -> Tensor:
        return -local.at(theta).solve(objective.gradient(theta, data))

    times = torch.linspace(0, until, points + 1, dtype=torch.float64)
    solve: Callable[..., Tensor] = odeint
    thetas = solve(slope, objective.get(), times, rtol=tol, atol=tol, method=method)
    return Path(times.tolist(), list(thetas), [slope(times[0], theta) for theta in thetas])


def _check_points(thetas: Sequence[Tensor], objective: Objective) -> None:
    if len(thetas) < 2:
        raise StabilityError(f"A path has at least two points, this one has {len(thetas)}; record more of it.")
    for theta in thetas:
        objective.unpack(theta)
        if not bool(torch.isfinite(theta).all()):
            raise StabilityError("A point of the path is not finite; end the path before.")
