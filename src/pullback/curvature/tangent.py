r"""Blocks whose parameters live on manifolds: rows U E, gradients E^T g, steps E c.

With E an orthonormal basis of the tangent space at the present point (theory 9, last line)

.. math:: d = -E (\mu I + E^\top U^\top U E)^{-1} E^\top g,

so in coordinates of the tangent space everything stays as it is. Steps are added to flat parameters and retracted on
the others. The retraction makes coordinates a chart of the manifold around the point, so that what is measured in a new
forward pass (trial losses, deviations, the look ahead) is measured through the chart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pullback.curvature.block import Block
from pullback.manifolds import Manifold, Tangent
from pullback.tape import Rows
from pullback.tape.rules.square import square

#: tangent space of a parameter and its manifold; None where it is flat
Place = tuple[Manifold, Tangent] | None


class TangentRows(Rows):
    """Rows U E, in tangent coordinates where a parameter has them.

    Products with U stay products of the inner rule; Grams are taken from dense rows, (R, dimensions).

    Args:
        inner: the rows U.
        tangents: tangent space of every parameter of ``inner``, None for a flat one.
    """

    def __init__(self, inner: Rows, tangents: Sequence[Tangent | None]) -> None:
        super().__init__(inner.params, inner.r, inner.N)
        self.inner = inner
        self.tangents = list(tangents)
        self.sizes = [p.numel() for p in inner.params]
        self.n = sum(widths(inner.params, tangents))
        self.rule = f"{inner.rule}, tangent"

    def gram(self) -> Tensor:
        """See the base class."""
        return square([self.dense().reshape(-1, self.n)])

    def gram_into(self, out: Tensor, half: bool = False) -> Tensor:
        """See the base class."""
        return square([self.dense().reshape(-1, self.n)], out, half)

    def matvec(self, delta: Tensor) -> Tensor:
        """See the base class."""
        parts = delta.split(widths(self.params, self.tangents))
        pairs = zip(parts, self.tangents, strict=True)
        return self.inner.matvec(torch.cat([c if t is None else t.from_tangent(c).reshape(-1) for c, t in pairs]))

    def rmatvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        return self._pulled(self.inner.rmatvec(v))

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """See the base class."""
        return self._pulled(self.inner.dense(start, stop))

    def gram_flops(self) -> float:
        """See the base class."""
        return float(self.R) ** 2 * self.n

    def matvec_flops(self) -> float:
        """See the base class."""
        return self.inner.matvec_flops()

    def to(self, dtype: torch.dtype) -> TangentRows:
        """See the base class."""
        return TangentRows(self.inner.to(dtype), [None if t is None else t.to(dtype) for t in self.tangents])

    def _pulled(self, g: Tensor) -> Tensor:
        """E^T g of packed vectors, (*any, numbers) to (*any, n)."""
        parts = zip(g.split(self.sizes, -1), self.params, self.tangents, strict=True)
        return torch.cat([x if t is None else t.to_tangent(x.unflatten(-1, p.shape)) for x, p, t in parts], -1)


class TangentBlock(Block):
    """A block with parameters on manifolds: its n columns, and vectors packed for it, are tangent coordinates.

    Args:
        params: the parameters, in packing order.
        places: manifold and tangent space of each, None for a flat one.
        rows: rows U E by index of the term.
        sizes: rows of every term, in order.
        name: names of the parameters' modules.
    """

    curved = True

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        places: Sequence[Place],
        rows: dict[int, Rows],
        sizes: Sequence[int],
        name: str = "",
    ) -> None:
        super().__init__(params, rows, sizes, name)
        self.places = list(places)
        self.widths = widths(params, [None if place is None else place[1] for place in places])
        self.n = sum(self.widths)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """E^T g: one vector (n,) from gradients in the parameters' shapes."""
        return self._each(tensors, lambda tangent, g: tangent.to_tangent(g))

    def coordinates(self, tensors: Sequence[Tensor]) -> Tensor:
        """Coordinates (n,) of the tangent directions nearest to changes in the parameters' shapes."""
        return self._each(tensors, lambda tangent, d: tangent.coordinates(d))

    def unpack(self, vector: Tensor) -> list[Tensor]:
        """E c: tangent directions in the parameters' shapes."""
        parts = zip(vector.split(self.widths), self.params, self.places, strict=True)
        return [c.view_as(p) if place is None else place[1].from_tangent(c) for c, p, place in parts]

    def like(self, rows: dict[int, Rows]) -> TangentBlock:
        """See the base class."""
        return TangentBlock(self.params, self.places, rows, self.sizes, self.name)

    def _each(self, tensors: Sequence[Tensor], seen: Callable[[Tangent, Tensor], Tensor]) -> Tensor:
        pairs = zip(tensors, self.places, strict=True)
        return torch.cat([t.reshape(-1) if place is None else seen(place[1], t) for t, place in pairs])


def widths(params: Sequence[nn.Parameter], tangents: Sequence[Tangent | None]) -> list[int]:
    """Coordinates of every parameter: its numbers, or the dimension of its tangent space."""
    return [p.numel() if t is None else t.dimension for p, t in zip(params, tangents, strict=True)]


def tangential(blocks: Sequence[Block], held: Mapping[int, Manifold]) -> list[Block]:
    """Blocks in tangent coordinates at the present point; flat ones as they are.

    Args:
        blocks: the blocks of a linearisation.
        held: manifolds by id of the parameter.

    Raises:
        ManifoldError: if a parameter has left its manifold.
    """
    places: dict[int, Place] = {}
    out: list[Block] = []
    for block in blocks:
        if not any(id(p) in held for p in block.params):
            out.append(block)
            continue
        for p in block.params:
            manifold = held.get(id(p))
            what = f"A parameter of '{block.name}'"
            places[id(p)] = None if manifold is None else (manifold, manifold.tangent(p, what))
        own = {t: TangentRows(rows, [_tangent(places[id(p)]) for p in rows.params]) for t, rows in block.rows.items()}
        out.append(
            TangentBlock(block.params, [places[id(p)] for p in block.params], dict(own), block.sizes, block.name)
        )
    return out


def _tangent(place: Place) -> Tangent | None:
    return None if place is None else place[1]


def displace(params: Sequence[Tensor], steps: Sequence[Tensor], held: Mapping[int, Manifold]) -> None:
    """Move parameters by steps in their shapes: added, or retracted where they live on a manifold.

    Args:
        params: the parameters, at the point in whose tangent spaces the steps lie.
        steps: the steps.
        held: manifolds by id of the parameter.
    """
    if not held:
        torch._foreach_add_(list(params), list(steps))
        return
    for p, s in zip(params, steps, strict=True):
        manifold = held.get(id(p))
        if manifold is None:
            p.add_(s)
        else:
            p.copy_(manifold.retract(p, s))
