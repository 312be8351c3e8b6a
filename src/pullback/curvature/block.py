"""A block: parameters that share modules, with their rows of U in every term."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pullback.tape import Rows, Term
from pullback.tape.rules import DenseRows


class Block:
    """Parameters and U_l, stacked over terms: R rows in all, n columns.

    Args:
        params: the parameters, in packing order.
        rows: rows by index of the term; terms without an entry have zero rows.
        sizes: rows of every term, in order.
        name: names of the parameters' modules.

    Attributes:
        R: rows over all terms.
        widths: coordinates of every parameter, its numbers.
        n: their sum.
    """

    #: whether parameters live on manifolds, so that packed vectors are tangent coordinates
    curved = False

    def __init__(
        self, params: Sequence[nn.Parameter], rows: dict[int, Rows], sizes: Sequence[int], name: str = ""
    ) -> None:
        self.params = tuple(params)
        self.rows = rows
        self.sizes = list(sizes)
        self.name = name
        self.R = sum(sizes)
        self.widths = [p.numel() for p in self.params]
        self.n = sum(self.widths)

    @property
    def rule(self) -> str:
        """How the rows are made."""
        return next(iter(self.rows.values())).rule

    def gram(self, out: Tensor | None = None, half: bool = False) -> Tensor:
        """K = U U^T, shape (R, R).

        Args:
            out: memory it may be written to; a fresh tensor without.
            half: whether nobody reads below the diagonal, so that nothing need be written there.
        """
        if len(self.sizes) == 1:
            return self.rows[0].gram() if out is None else self.rows[0].gram_into(out, half)
        first = next(iter(self.rows.values()))
        K = _like(first).new_zeros(self.R, self.R)
        cut = self._offsets()
        for t, left in self.rows.items():
            K[cut[t] : cut[t + 1], cut[t] : cut[t + 1]] = left.gram()
            for k, right in self.rows.items():
                if k > t:
                    part = left.cross(right)
                    K[cut[t] : cut[t + 1], cut[k] : cut[k + 1]] = part
                    K[cut[k] : cut[k + 1], cut[t] : cut[t + 1]] = part.T
        return K

    def matvec(self, delta: Tensor) -> Tensor:
        """U delta, packed (n,) to (R,)."""
        if len(self.sizes) == 1:
            return self.rows[0].matvec(delta)
        parts = [
            self.rows[t].matvec(delta) if t in self.rows else delta.new_zeros(size) for t, size in enumerate(self.sizes)
        ]
        return torch.cat(parts)

    def rmatvec(self, v: Tensor) -> Tensor:
        """U^T v, (R,) to packed (n,)."""
        if len(self.sizes) == 1:
            return self.rows[0].rmatvec(v)
        cut = self._offsets()
        out: Tensor | None = None
        for t, rows in self.rows.items():
            part = rows.rmatvec(v[cut[t] : cut[t + 1]])
            out = part if out is None else out.add_(part)
        assert out is not None
        return out

    def dense(self) -> Tensor:
        """U, shape (R, n); for tests and small problems."""
        first = next(iter(self.rows.values()))
        parts = [
            self.rows[t].dense().reshape(-1, self.n) if t in self.rows else _like(first).new_zeros(size, self.n)
            for t, size in enumerate(self.sizes)
        ]
        return torch.cat(parts)

    def primal(self) -> Tensor:
        """U^T U, shape (n, n), a fresh tensor."""
        parts = [rows.primal() for rows in self.rows.values()]
        out = parts[0]
        for part in parts[1:]:
            out += part
        return out

    def gram_flops(self) -> float:
        """Multiply-adds of :meth:`gram`."""
        own = sum(rows.gram_flops() for rows in self.rows.values())
        # Cross terms cost as the own ones do, times the number of pairs over the number of terms.
        return own * len(self.rows)

    def primal_flops(self) -> float:
        """Multiply-adds of :meth:`primal`."""
        return sum(rows.primal_flops() for rows in self.rows.values())

    def diagonal(self) -> Tensor:
        """Diagonal of U^T U, shape (n,)."""
        parts = [rows.diagonal() for rows in self.rows.values()]
        out = parts[0]
        for part in parts[1:]:
            out = out + part
        return out

    def matvec_flops(self) -> float:
        """Multiply-adds of a product with U or U^T, roughly."""
        return sum(rows.matvec_flops() for rows in self.rows.values())

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """One vector (n,) from tensors in the parameters' shapes."""
        if len(tensors) == 1:
            return tensors[0].reshape(-1)
        return torch.cat([t.reshape(-1) for t in tensors])

    def unpack(self, vector: Tensor) -> list[Tensor]:
        """Views of a packed vector in the parameters' shapes."""
        if len(self.params) == 1:
            return [vector.view_as(self.params[0])]
        pieces = vector.split([p.numel() for p in self.params])
        return [piece.view_as(p) for piece, p in zip(pieces, self.params, strict=True)]

    def coordinates(self, tensors: Sequence[Tensor]) -> Tensor:
        """One vector (n,) from changes of the parameters; :meth:`pack` is for gradients, which differ on manifolds."""
        return self.pack(tensors)

    def like(self, rows: dict[int, Rows]) -> Block:
        """The same parameters with other rows."""
        return Block(self.params, rows, self.sizes, self.name)

    def to(self, dtype: torch.dtype) -> Block:
        """The same block in another precision."""
        return self.like({t: r.to(dtype) for t, r in self.rows.items()})

    def _offsets(self) -> list[int]:
        out = [0]
        for size in self.sizes:
            out.append(out[-1] + size)
        return out


def _like(rows: Rows) -> Tensor:
    """A tensor of the rows' dtype and device."""
    return rows.dense(0, 1)


def blocks_of(terms: Sequence[Term]) -> list[Block]:
    """The blocks of a linearisation: one per module, or per set of modules tied by shared parameters.

    Args:
        terms: swept terms.
    """
    sizes = [term.R for term in terms]
    found: list[tuple[int, str, Rows]] = []
    for t, term in enumerate(terms):
        for unit in term.plan.units:
            calls = term.factors[id(unit.module)]
            for call in calls:
                call.call.check_inputs(unit.name)
            found.append((t, unit.name, unit.rows(calls, term.N)))
    blocks = []
    for members in _tied([rows for _, _, rows in found]):
        own = [found[k] for k in members]
        if len(own) == 1:
            t, name, alone = own[0]
            blocks.append(Block(alone.params, {t: alone}, sizes, name or "(model)"))
            continue
        names = " + ".join(dict.fromkeys(name or "(model)" for _, name, _ in own))
        params = tuple(dict.fromkeys(p for _, _, rows in own for p in rows.params))
        once = len({t for t, _, _ in own}) == len(own)
        if once and all(rows.params == params for _, _, rows in own):
            blocks.append(Block(params, {t: rows for t, _, rows in own}, sizes, names))
        else:
            merged = {t: _merge(params, [rows for k, _, rows in own if k == t]) for t, _, _ in own}
            blocks.append(Block(params, merged, sizes, names))
    return blocks


def _tied(rows: Sequence[Rows]) -> list[list[int]]:
    """Indices of rows that share parameters, directly or through others."""
    every = [id(p) for r in rows for p in r.params]
    if len(set(every)) == len(every):
        return [[k] for k in range(len(rows))]
    groups: list[tuple[set[int], list[int]]] = []
    for k, r in enumerate(rows):
        ids, members = {id(p) for p in r.params}, [k]
        apart = []
        for other in groups:
            if other[0] & ids:
                ids |= other[0]
                members = other[1] + members
            else:
                apart.append(other)
        groups = [*apart, (ids, members)]
    return [sorted(members) for _, members in sorted(groups, key=lambda g: min(g[1]))]


def _merge(params: Sequence[nn.Parameter], parts: Sequence[Rows]) -> Rows:
    """Sum of rows that share some parameters: U = sum over calls, cross terms included."""
    n = sum(p.numel() for p in params)
    first = parts[0].dense()
    U = first.new_zeros(*first.shape[:2], n)
    start, where = 0, {}
    for p in params:
        where[id(p)] = start
        start += p.numel()
    for k, rows in enumerate(parts):
        dense, column = (first if k == 0 else rows.dense()), 0
        for p in rows.params:
            at = where[id(p)]
            U[..., at : at + p.numel()] += dense[..., column : column + p.numel()]
            column += p.numel()
    return DenseRows(params, U, "tied " + " + ".join(dict.fromkeys(rows.rule for rows in parts)))
