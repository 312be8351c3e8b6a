r"""Rows of single samples under a host's curvature: :math:`U Q_{uu}^{-1} U^\top` and :math:`U Q_{uu}^{-1} g`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pullback.control.host import Diagonal
from pullback.curvature import Block
from pullback.tape import DenseRows, OuterRows, Rows
from pullback.tape.rules.base import CHUNK_NUMBERS
from pullback.tape.rules.conv import ConvRows


class Curvature(Protocol):
    """Products with Q_uu^{-1}; see :class:`pullback.control.host.Host`."""

    def diagonal(self, params: Sequence[Tensor]) -> list[Diagonal] | None:
        """Q_uu^{-1} where it is diagonal."""

    def solve(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Q_uu^{-1} v."""


@runtime_checkable
class OuterCurvature(Protocol):
    """A curvature that is a Kronecker product for layers that are linear in their weight."""

    def outer(self, rows: OuterRows) -> tuple[Tensor, Tensor] | None:
        """Factor (r, N, o) and input (N, i) of rows at one position, each times its side of Q_uu^{-1}; or None."""


@dataclass
class Forms:
    """What a stage's curvature makes of its rows, sample by sample.

    Attributes:
        h: U Q_uu^{-1} U^T, shape (N, r, r); with one column (N,).
        b: U Q_uu^{-1} g, shape (N, r); with one column (N,).
    """

    h: Tensor
    b: Tensor

    def __add__(self, other: Forms) -> Forms:
        return Forms(self.h + other.h, self.b + other.b)


def forms(rows: Rows, curvature: Curvature) -> Forms:
    """The two of a stage in one term.

    Args:
        rows: rows of r + 1 columns, the last of which are the gradients of single samples.
        curvature: the host's.
    """
    both = _products(rows, curvature, rows.r - 1)
    if both.ndim == 2:
        return Forms(both[0], both[1])
    return Forms(both[..., :-1], both[..., -1])


def own_form(rows: Rows, curvature: Curvature) -> Tensor:
    """H alone, from rows of r columns.

    Args:
        rows: the rows.
        curvature: the host's.

    Returns:
        Shape (N, r, r); with one column (N,).
    """
    h = _products(rows, curvature, rows.r)
    return h[0] if h.ndim == 2 else h


def _products(rows: Rows, curvature: Curvature, first: int) -> Tensor:
    """U Q_uu^{-1} U^T of the first columns with all, sample by sample; see :func:`_contracted`."""
    inverse = curvature.diagonal(rows.params)
    both = _sided(rows, curvature, first) if inverse is None else _outer(rows, inverse, first)
    if both is not None:
        return both
    parts = []
    for U in rows.chunks():
        left = U[:first]
        if inverse is None:
            pieces = [own.view(*left.shape[:2], *p.shape) for own, p in _pieces(rows, left)]
            solved = curvature.solve(rows.params, pieces)
            left = torch.cat([piece.flatten(2) for piece in solved], 2)
        else:
            left = torch.cat([own * _flat(d) for (own, _), d in zip(_pieces(rows, left), inverse, strict=True)], 2)
        parts.append(_contracted(left, U))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1 if parts[0].ndim == 2 else 0)


def _outer(rows: Rows, inverse: Sequence[Diagonal], first: int) -> Tensor | None:
    r"""Rows that are outer products :math:`s \otimes (x, 1)`: by norms; None where they are not.

    .. math:: U_a Q_{uu}^{-1} U_b^\top = \sum_o s_{ao} s_{bo} \bigl(\textstyle\sum_i d_{oi} x_i^2 + d_o\bigr)
    """
    if not isinstance(rows, OuterRows) or rows.P > 1 or rows.input_first:
        return None
    s = rows.s[:, :, 0]
    weigh: Tensor | float = 0.0
    if rows.weight is not None:
        x2 = rows.input_rows(0, None)[:, 0].square()
        d = inverse[0]
        weigh = x2 @ d.T if isinstance(d, Tensor) else d * x2.sum(1, keepdim=True)
    if rows.bias is not None:
        weigh = weigh + inverse[-1]
    return _contracted(s[:first] * weigh, s)


def _sided(rows: Rows, curvature: Curvature, first: int) -> Tensor | None:
    r"""The same where Q_uu is :math:`A \otimes B`: :math:`(s_a^\top A^{-1} s_b)\,(x^\top B^{-1} x)`."""
    if not isinstance(curvature, OuterCurvature) or not isinstance(rows, OuterRows) or rows.P > 1 or rows.input_first:
        return None
    found = curvature.outer(rows)
    if found is None:
        return None
    s, (left, right) = rows.s[:, :, 0], found
    x = rows.input_rows(0, None)[:, 0]
    weigh = torch.linalg.vecdot(x, right[:, : x.shape[1]])
    if rows.bias is not None:
        weigh = weigh + right[:, -1]
    return _contracted(left[:first] * weigh[:, None], s)


def _contracted(left: Tensor, right: Tensor) -> Tensor:
    """Per sample, (r, N, m) with (q, N, m): (q, N) for one column on the left, else (N, r, q)."""
    if left.shape[0] == 1:
        products: Tensor = torch.linalg.vecdot(left, right)
        return products
    return left.permute(1, 0, 2) @ right.permute(1, 2, 0)


def formed(blocks: Sequence[Block]) -> list[Block]:
    """The same blocks, with rows over many positions summed up into dense ones: h needs them dense anyhow.

    A product with U then costs r N n in place of N n for each position. They are kept while all together are within
    what a rule may hold for a moment.

    Args:
        blocks: blocks of all stages.
    """
    out, left = [], CHUNK_NUMBERS
    for block in blocks:
        dense: dict[int, Rows] = {}
        for t, rows in block.rows.items():
            numbers = rows.R * rows.n
            if isinstance(rows, OuterRows | ConvRows) and 1 < rows.P >= rows.r and numbers <= left:
                dense[t] = DenseRows(rows.params, rows.dense(), rows.rule)
                left -= numbers
        out.append(Block(block.params, block.rows | dense, block.sizes, block.name) if dense else block)
    return out


def _pieces(rows: Rows, U: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Columns of every parameter, (..., numbers), with the parameter."""
    sizes = [p.numel() for p in rows.params]
    return list(zip(U.split(sizes, -1), rows.params, strict=True))


def _flat(d: Diagonal) -> Tensor | float:
    return d.reshape(-1) if isinstance(d, Tensor) else d


def all_forms(blocks: Sequence[Block], curvature: Curvature, terms: int) -> list[Forms | None]:
    """Forms of a stage in every term.

    Args:
        blocks: the stage's blocks, with the gradients beside the factor.
        curvature: the host's.
        terms: number of terms.
    """
    out: list[Forms | None] = []
    for t in range(terms):
        found = [forms(block.rows[t], curvature) for block in blocks if t in block.rows]
        out.append(None if not found else sum(found[1:], start=found[0]))
    return out
