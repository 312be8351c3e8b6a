r"""The rate of a flow or a map at a point, from the generalised Jacobian.

For :math:`x' = h(x)` and :math:`M = \Theta^\top \Theta` the rate is the largest :math:`\lambda` with

.. math:: h_x^\top M + M h_x + M' \le -2 \lambda M,

minus the largest eigenvalue of the symmetric part of :math:`F = (\Theta' + \Theta h_x) \Theta^{-1}` (standard; Theory
15).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev

from pullback.contraction.errors import ContractionError
from pullback.contraction.lanczos import Ritz, lanczos
from pullback.contraction.metrics import Metric, factor, matrix, raw, varies
from pullback.contraction.products import jacobian_products
from pullback.contraction.record import DELTA, Rate, exact

#: Up to here all eigenvalues cost less than they save.
DENSE = 64

Field = Callable[..., Tensor]


def rate_at(
    field: Field,
    x: Tensor,
    *,
    metric: Metric = None,
    t: float | None = None,
    method: str = "auto",
    symmetric: bool = False,
    tol: float = 1e-8,
    steps: int = 200,
    seed: int = 0,
) -> Rate:
    """The contraction rate of x' = h(x) at a point.

    Args:
        field: h, (n,) to (n,); a function of (t, x) if ``t`` is given.
        x: the point, (n,).
        metric: see :mod:`pullback.contraction.metrics`; a function of the state adds its change along the flow.
        t: the time, for fields that depend on it.
        method: ``"dense"`` (all eigenvalues), ``"lanczos"`` (products only), or ``"auto"``: dense up to 64 numbers.
        symmetric: whether the Jacobian is symmetric (a gradient flow): one product a step in place of two.
        tol: what Lanczos may miss, relative to the ends of the spectrum.
        steps: most steps of Lanczos.
        seed: of its start.

    Raises:
        ContractionError: if point, field or metric do not fit each other, hold numbers that are not finite, or the
            metric is not positive definite.
        ValueError: if the method is none of those.
    """
    dense = _dense(method, x)
    h = check_field(field, x, t)
    M = matrix(metric, x)
    change = _change(metric, h, x) if varies(metric) else None
    if dense:
        J = check_jacobian(jacrev(h)(x), x)
        S = J if M is None else M @ J
        S = (S + S.T) / 2 if change is None else (S + S.T + change) / 2
        return exact(-float(torch.linalg.eigvalsh(_whiten(S, M))[-1]), len(x), len(x))
    theta = None if M is None else factor(M)
    push, pull = jacobian_products(h, x)

    def half(u: Tensor) -> Tensor:
        """Half of (J^T M + M J + M') u."""
        out = push(u)
        if M is None:
            return out if symmetric else (out + pull(u)) / 2
        out = M @ out + pull(M @ u)
        return (out if change is None else out + change @ u) / 2

    def product(v: Tensor) -> Tensor:
        if theta is None:
            return half(v)
        u = torch.linalg.solve_triangular(theta, v[:, None], upper=True)
        out: Tensor = torch.linalg.solve_triangular(theta.T, half(u[:, 0])[:, None], upper=False)[:, 0]
        return out

    found = lanczos(product, len(x), tol=tol, steps=steps, dtype=x.dtype, generator=_generator(seed))
    per = 1 if symmetric and M is None else 2
    return _of(found, per * found.steps)


def discrete_rate(
    step: Field,
    x: Tensor,
    *,
    metric: Metric = None,
    method: str = "auto",
    tol: float = 1e-8,
    steps: int = 200,
    seed: int = 0,
) -> Rate:
    r"""The contraction rate of a map x -> f(x) at a point, :math:`-\ln |\Theta(f(x)) f_x \Theta(x)^{-1}|_2`.

    The norm by Lanczos on the product with its transpose, which in exact arithmetic is Golub-Kahan bidiagonalisation.

    Args:
        step: f, (n,) to (n,).
        x: the point, (n,).
        metric: as in :func:`rate_at`.
        method: as in :func:`rate_at`.
        tol: what Lanczos may miss of the square of the norm, relative to it.
        steps: most steps of Lanczos.
        seed: of its start.

    Returns:
        The rate; its ``factor`` is the norm, below one for a contraction.

    Raises:
        ContractionError: as :func:`rate_at`.
        ValueError: if the method is none of those.
    """
    dense = _dense(method, x)
    f = check_field(step, x, None)
    y = f(x)
    M, N = matrix(metric, x), matrix(metric, y)
    here, there = (None, None) if M is None or N is None else (factor(M), factor(N))
    if dense:
        J = check_jacobian(jacrev(f)(x), x)
        if here is not None and there is not None:
            J = torch.linalg.solve_triangular(here, there @ J, upper=True, left=False)
        norm = float(torch.linalg.matrix_norm(J, 2))
        return exact(_minus_log(norm), len(x), len(x), norm)
    push, pull = jacobian_products(f, x)

    def product(v: Tensor) -> Tensor:
        if here is None or there is None:
            return pull(push(v))
        u = torch.linalg.solve_triangular(here, v[:, None], upper=True)[:, 0]
        w = pull(there.T @ (there @ push(u)))
        out: Tensor = torch.linalg.solve_triangular(here.T, w[:, None], upper=False)[:, 0]
        return out

    found = lanczos(product, len(x), tol=tol, steps=steps, dtype=x.dtype, generator=_generator(seed))
    norm, above = (max(v, 0.0) ** 0.5 for v in (found.value + found.error, found.above(DELTA)))
    upper = max(found.value, 0.0) ** 0.5
    return Rate(
        _minus_log(norm), _minus_log(above), _minus_log(upper), found.residual, found.error, found.converged, False,
        1 - DELTA, "lanczos", 2 * found.steps, 2 * found.steps, found.vector[:, None], norm,
    )  # fmt: skip


def check_field(field: Field, x: Tensor, t: float | None) -> Callable[[Tensor], Tensor]:
    """The field as a function of the state alone, tried once.

    Raises:
        ContractionError: if point or velocity are no vectors of one shape, or not finite.
    """
    if x.ndim != 1 or not x.is_floating_point() or len(x) == 0:
        raise ContractionError(f"A point is a floating vector, got {x.dtype} of shape {tuple(x.shape)}; flatten it.")
    if not bool(torch.isfinite(x).all()):
        raise ContractionError(f"{int((~torch.isfinite(x)).sum())} of {len(x)} numbers of the point are not finite.")

    def h(state: Tensor) -> Tensor:
        return field(state) if t is None else field(t, state)

    velocity: Any = h(x)
    if not isinstance(velocity, Tensor) or velocity.shape != x.shape:
        got = tuple(velocity.shape) if isinstance(velocity, Tensor) else type(velocity).__name__
        raise ContractionError(f"The field gave {got} at a point of shape {tuple(x.shape)}; both must be the same.")
    if not bool(torch.isfinite(velocity).all()):
        raise ContractionError("The field is not finite at the point; look for overflow or a division by zero.")
    return h


def check_jacobian(J: Tensor, x: Tensor) -> Tensor:
    """A square Jacobian of finite numbers.

    Raises:
        ContractionError: if it is not.
    """
    if J.shape != (len(x), len(x)):
        raise ContractionError(f"The Jacobian has shape {tuple(J.shape)}, the state {tuple(x.shape)}.")
    if not bool(torch.isfinite(J).all()):
        raise ContractionError("The Jacobian is not finite at the point.")
    out: Tensor = J.detach()
    return out


def _change(metric: Metric, h: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """M' along the flow."""

    def at(state: Tensor) -> Tensor:
        M = raw(metric, state)
        assert M is not None
        return M

    change = jacobian_products(at, x)[0](h(x))
    if not bool(torch.isfinite(change).all()):
        raise ContractionError("The change of the metric along the flow is not finite.")
    return (change + change.T).detach() / 2


def _whiten(S: Tensor, M: Tensor | None) -> Tensor:
    """Theta^-T S Theta^-1, symmetric."""
    if M is None:
        return S
    L = torch.linalg.cholesky(M)
    out = torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, S, upper=False).T, upper=False)
    whole: Tensor = (out + out.T) / 2
    return whole


def _of(found: Ritz, products: int) -> Rate:
    return Rate(
        -(found.value + found.error), -found.above(DELTA), -found.value, found.residual, found.error, found.converged,
        False, 1 - DELTA, "lanczos", products, products, found.vector[:, None],
    )  # fmt: skip


def _dense(method: str, x: Tensor) -> bool:
    if method not in ("auto", "dense", "lanczos"):
        raise ValueError(f"method must be 'auto', 'dense' or 'lanczos', got {method!r}.")
    return method == "dense" or (method == "auto" and x.numel() <= DENSE)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _minus_log(norm: float) -> float:
    if norm == 0:
        return math.inf
    return -math.inf if math.isinf(norm) else -math.log(norm)
