"""Gauss-Legendre nodes and weights."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=64)
def gauss_legendre(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes in (0, 1), ascending, and weights that sum to 1; exact for polynomials of degree 2 count - 1.

    The nodes are the eigenvalues of the symmetric tridiagonal matrix of the recurrence of the Legendre polynomials, the
    weights the squares of the first entries of its eigenvectors (Golub & Welsch 1969).

    Args:
        count: number of nodes, at least 1.
    """
    k = torch.arange(1, count, dtype=torch.float64)
    beside = k / (4 * k.square() - 1).sqrt()
    matrix = torch.diag(beside, 1) + torch.diag(beside, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return tuple(((values + 1) / 2).tolist()), tuple(vectors[0].square().tolist())
