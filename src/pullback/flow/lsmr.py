r"""LSMR (Fong and Saunders, 2011): the least-squares solution of smallest norm by products with D and its transpose.

Golub-Kahan bidiagonalisation; after k steps the bidiagonal factor holds Ritz values of D, of which the smallest is an
upper bound of its smallest singular value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Solution:
    """What LSMR found.

    Attributes:
        x: the solution, (K,).
        steps: products with D and with D^T.
        converged: whether the tolerance was met.
        largest: largest Ritz value, a lower bound of the largest singular value.
        smallest: smallest Ritz value, an upper bound of the smallest singular value.
    """

    x: Tensor
    steps: int
    converged: bool
    largest: float
    smallest: float


def lsmr(
    matvec: Callable[[Tensor], Tensor],
    rmatvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    tolerance: float,
    steps: int,
) -> Solution:
    r"""Minimise :math:`|D x - b|`, from zero: the solution of smallest norm.

    Args:
        matvec: D.
        rmatvec: its transpose.
        b: right-hand side, (QN,).
        tolerance: stops at :math:`|D x - b| \le tol |b|`, or where :math:`|D^\top (D x - b)|` is that small beside
            :math:`|D| |D x - b|`.
        steps: most steps.
    """
    beta = float(b.norm())
    u = b / beta if beta else b
    v = rmatvec(u)
    alpha = float(v.norm())
    v = v / alpha if alpha else v
    zetabar, alphabar, rho, rhobar, cbar, sbar = alpha * beta, alpha, 1.0, 1.0, 1.0, 0.0
    h, hbar, x = v.clone(), torch.zeros_like(v), torch.zeros_like(v)
    alphas, betas = [alpha], []
    norm_b, done, k, frobenius = beta, alpha * beta == 0, 0, alpha**2
    while k < steps and not done:
        k += 1
        u = matvec(v) - alpha * u
        beta = float(u.norm())
        if beta:
            u = u / beta
            v = rmatvec(u) - beta * v
            alpha = float(v.norm())
            v = v / alpha if alpha else v
        betas.append(beta)
        alphas.append(alpha)
        frobenius += alpha**2 + beta**2
        rho_old, rho = rho, (alphabar**2 + beta**2) ** 0.5
        c, s = alphabar / rho, beta / rho
        theta_new, alphabar = s * alpha, c * alpha
        rhobar_old, zeta_bar_old = rhobar, zetabar
        theta_bar, rho_temp = sbar * rho, cbar * rho
        rhobar = (rho_temp**2 + theta_new**2) ** 0.5
        cbar, sbar = rho_temp / rhobar, theta_new / rhobar
        zeta, zetabar = cbar * zetabar, -sbar * zetabar
        hbar = h - (theta_bar * rho / (rho_old * rhobar_old)) * hbar
        x = x + (zeta / (rho * rhobar)) * hbar
        h = v - (theta_new / rho) * h
        if abs(zetabar) <= tolerance * abs(zeta_bar_old) * 1e-3 or k % 10 == 0 or beta == 0 or alpha == 0:
            # |D^T r| is |zetabar|, for free; |r| itself is measured now and then.
            rest = float((b - matvec(x)).norm())
            done = rest <= tolerance * norm_b or abs(zetabar) <= tolerance * frobenius**0.5 * rest
            done = done or beta == 0 or alpha == 0
    ritz = _ritz(alphas[:k] or [0.0], betas[:k] or [0.0])
    return Solution(x, k, done, *ritz)


def _ritz(alphas: list[float], betas: list[float]) -> tuple[float, float]:
    """Largest and smallest singular value of the lower bidiagonal matrix (k + 1) x k."""
    k = min(len(alphas), 500)
    B = torch.zeros(k + 1, k, dtype=torch.float64)
    B.diagonal().copy_(torch.tensor(alphas[:k], dtype=torch.float64))
    B[1:].diagonal().copy_(torch.tensor(betas[:k], dtype=torch.float64))
    values = torch.linalg.svdvals(B)
    return float(values[0]), float(values[-1])
