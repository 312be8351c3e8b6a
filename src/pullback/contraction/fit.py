r"""A constant metric in which given Jacobians contract together, as fast as can be found.

The condition :math:`J^\top M + M J \le -2 \lambda M` is linear in J: what holds for some Jacobians holds for every mean
of them, so for a field whose Jacobian stays in their convex hull the rate is a rate of the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.contraction.centre import Centre
from pullback.contraction.errors import ContractionError

#: Largest state for which several Jacobians are fitted: the Newton systems have n (n + 1) / 2 unknowns.
SIZE = 30


@dataclass(frozen=True)
class Fitted:
    """A fitted metric.

    Attributes:
        M: the metric, symmetric positive definite, its smallest eigenvalue one, (n, n).
        rate: the common rate in it, by dense eigenvalues.
        bound: minus the largest spectral abscissa of the Jacobians, which no metric can beat.
        condition: of M.
        steps: outer steps taken.
        converged: whether the last step gained less than a tenth of the tolerance (one Jacobian: whether the bound
            was reached to it). For several this says that going on is slow, not that no better metric exists.
    """

    M: Tensor
    rate: float
    bound: float
    condition: float
    steps: int
    converged: bool


def fit_metric(
    jacobians: Tensor | Sequence[Tensor], *, tol: float = 1e-3, condition: float = 1e8, steps: int = 60
) -> Fitted:
    """Fit a constant metric.

    For one Jacobian by a Lyapunov equation (scipy) with a shift just below the bound; for several by the method of
    centres: the analytic centre of the metrics of a rate has a higher one.

    Args:
        jacobians: one, (n, n), or several of the same shape, (K, n, n) or in a list.
        tol: how much of the rate may be given away, relative to the largest modulus of an eigenvalue.
        condition: largest condition of M.
        steps: most steps.

    Raises:
        ContractionError: if shapes differ, numbers are not finite, or several Jacobians are larger than 30.
    """
    J = _stack(jacobians)
    n = J.shape[-1]
    values = torch.linalg.eigvals(J)
    bound, scale = -float(values.real.max()), max(float(values.abs().max()), 1e-300)
    if len(J) == 1:
        return _one(J, bound, tol * scale, condition)
    if n > SIZE:
        raise ContractionError(
            f"Several Jacobians of size {n} are too large for the fit (at most {SIZE}); fit one of them, or their "
            "mean, and ask for the rate of the others in that metric."
        )
    M, gained, k = _first(J, condition), float("inf"), 0
    rate = common_rate(J, M)
    while k < steps and gained > 0.1 * tol * scale:
        k += 1
        better = Centre(J, rate - 0.5 * tol * scale, condition).find(M)
        new = common_rate(J, better)
        gained = new - rate
        if new > rate:
            M, rate = better, new
    values = torch.linalg.eigvalsh(M)
    return Fitted(M / values[0], rate, bound, float(values[-1] / values[0]), k, gained <= 0.1 * tol * scale)


def common_rate(jacobians: Tensor, M: Tensor) -> float:
    """The smallest rate of Jacobians (K, n, n) in a metric (n, n), densely."""
    L = torch.linalg.cholesky(M)
    G = jacobians.mT @ M
    S = (G + G.mT) / 2
    inner = torch.linalg.solve_triangular(L, S, upper=False).mT
    return -float(torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, inner, upper=False)).max())


def _stack(jacobians: Tensor | Sequence[Tensor]) -> Tensor:
    parts = [jacobians] if isinstance(jacobians, Tensor) and jacobians.ndim == 2 else list(jacobians)
    if not parts:
        raise ContractionError("There are no Jacobians to fit a metric to.")
    shape = parts[0].shape
    for part in parts:
        if part.ndim != 2 or part.shape[0] != part.shape[1] or part.shape != shape:
            raise ContractionError(
                f"Jacobians must be square and of one shape, got {tuple(part.shape)} beside {tuple(shape)}."
            )
        if not bool(torch.isfinite(part).all()):
            raise ContractionError("A Jacobian holds numbers that are not finite.")
    return torch.stack([part.detach().double() for part in parts])


def _one(J: Tensor, bound: float, slack: float, condition: float) -> Fitted:
    """(J + s I)^T M + M (J + s I) = -I with s just below the bound, further below if M gets too badly conditioned."""
    eye = torch.eye(J.shape[-1], dtype=torch.float64)
    best: tuple[float, Tensor] | None = None
    margin, k = slack / 2, 0
    while best is None or float(torch.linalg.cond(best[1])) > condition:
        k += 1
        M = lyapunov(J[0] + (bound - margin) * eye)
        if M is not None:
            best = (common_rate(J, M), M)
        margin *= 2
    rate, M = best
    values = torch.linalg.eigvalsh(M)
    return Fitted(
        M / values[0], rate, bound, float(values[-1] / values[0]), k, rate >= bound - slack - 1e-12 * abs(bound)
    )


def lyapunov(A: Tensor) -> Tensor | None:
    """The metric M with A^T M + M A = -I; None if round-off leaves none that is positive definite.

    Raises:
        ContractionError: if scipy is missing.
    """
    try:
        from scipy.linalg import solve_continuous_lyapunov
    except ImportError as error:
        raise ContractionError("fit_metric needs scipy; install pullback[contraction].") from error
    size = len(A)
    found = torch.from_numpy(solve_continuous_lyapunov(A.T.numpy(), -torch.eye(size, dtype=A.dtype).numpy()))
    found = (found + found.T) / 2
    if not bool(torch.isfinite(found).all()) or int(torch.linalg.cholesky_ex(found).info) != 0:
        return None
    return found


def _first(J: Tensor, condition: float) -> Tensor:
    """The better of the identity and the metric of the mean, its condition well below the limit."""
    eye = torch.eye(J.shape[-1], dtype=torch.float64)
    mean = _one(J.mean(0, keepdim=True), -float(torch.linalg.eigvals(J.mean(0)).real.max()), 0.2, condition / 10).M
    return max((eye, mean), key=lambda M: common_rate(J, M))
