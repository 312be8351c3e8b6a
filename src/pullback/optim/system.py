"""The linear system of one step: blocks in groups, in units of their mass, with the gradient split along them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pullback.control import Direction
from pullback.curvature import (
    Block,
    Gradient,
    Linearisation,
    Mass,
    Partition,
    Solver,
    Space,
    Workspace,
    displace,
    divide,
    memory_budget,
    scalars,
    scales_of,
    solver_for,
    weigh,
)
from pullback.errors import StepError


class Groups:
    """Blocks sorted into groups, in units of their mass, with the gradient split along them.

    All vectors inside are in units of the mass: ``D^{1/2}`` times the change of a parameter, ``D^{-1/2}``
    times a gradient.

    Args:
        lin: the linearisation.
        partition: who moves with whom.
        mass: the mass D.
        names: name of every parameter by id.
        largest: keeps the largest diagonal of a block seen so far (for the Marquardt mass).
        ridge: c of a cost c/2 |w|^2 of the weights.

    Attributes:
        plain: blocks of every group.
        blocks: the same in units of the mass.
        gradients: the gradient of every group.
        scales: ``D^{-1/2}`` by group and block, None for the identity.
        params: all parameters that move.
    """

    def __init__(
        self,
        lin: Linearisation,
        *,
        partition: Partition,
        mass: Mass,
        names: Mapping[int, str],
        largest: Callable[[Block, Tensor], Tensor],
        ridge: float = 0.0,
    ) -> None:
        self.lin = lin
        self.ridge = ridge
        whole = lin.gradient(lin.blocks, ridge)
        if not all(map(math.isfinite, scalars([g @ g for g in whole.g]))):
            raise StepError("A gradient is not finite; no step was taken.")
        scales = scales_of(lin.blocks, mass, names, largest)
        index = {id(block): k for k, block in enumerate(lin.blocks)}
        self.plain = divide(lin.blocks, partition, names)
        self.blocks: list[list[Block]] = []
        self.gradients: list[Gradient] = []
        self.scales: list[list[float | Tensor] | None] = []
        for blocks in self.plain:
            own = [index[id(block)] for block in blocks]
            g = [whole.g[k] for k in own]
            rest = None if whole.rest is None else [whole.rest[k] for k in own]
            if scales is None:
                self.scales.append(None)
            else:
                scale = [scales[k] for k in own]
                blocks = [weigh(block, s) for block, s in zip(blocks, scale, strict=True)]
                g = [a * s for a, s in zip(g, scale, strict=True)]
                rest = None if rest is None else [a * s for a, s in zip(rest, scale, strict=True)]
                self.scales.append(scale)
            self.blocks.append(blocks)
            self.gradients.append(Gradient(g, whole.e0, rest))
        self.params: list[Tensor] = [p for blocks in self.plain for block in blocks for p in block.params]

    def packed(self, values: Mapping[int, Tensor]) -> list[list[Tensor]]:
        """Changes of parameters (zero where there is none) as packed vectors per block and group."""
        out = []
        for blocks, scale in zip(self.plain, self.scales, strict=True):
            parts = []
            for k, block in enumerate(blocks):
                pieces = [values[id(p)] if id(p) in values else torch.zeros_like(p) for p in block.params]
                part = block.coordinates(pieces)
                parts.append(part if scale is None else part / scale[k])
            out.append(parts)
        return out

    def unit_of(self, trace: float) -> float:
        """Mean diagonal of the Gram, in which damping is bounded.

        Args:
            trace: trace of U^T U over all groups.
        """
        if not math.isfinite(trace):
            raise StepError("The metric is not finite; no step was taken. Look for overflow in the model.")
        return trace / max(1, self.lin.R)

    def room(self, budget: float | None) -> float:
        """Bytes left for matrices.

        Args:
            budget: bytes the step may take, None for the default.
        """
        return (memory_budget() if budget is None else budget) - sum(term.held for term in self.lin.terms)

    def drowned(self, mu: float, unit: float) -> bool:
        """Whether the damping is so small that a float32 Gram has lost it (theory 3).

        Under a sketch the metric's own noise is larger than what float32 loses, down to the last digits.
        """
        return mu < (1e-4 if self.lin.exact else 1e-6) * unit


class System(Groups):
    """Groups with a solver each, for steps in open loop.

    Args:
        lin: the linearisation.
        partition: who moves with whom.
        mass: the mass D.
        space: which solver.
        budget: bytes the factors and the matrices of all groups may take, None for the default.
        names: name of every parameter by id.
        largest: keeps the largest diagonal of a block seen so far (for the Marquardt mass).
        ridge: c of a cost c/2 |w|^2 of the weights.
        workspace: where large matrices live between steps.

    Attributes:
        solvers: one per group.
        unit: mean diagonal of the Gram, in which damping is bounded.
    """

    def __init__(
        self,
        lin: Linearisation,
        *,
        partition: Partition,
        mass: Mass,
        space: Space,
        budget: float | None,
        names: Mapping[int, str],
        largest: Callable[[Block, Tensor], Tensor],
        workspace: Workspace,
        ridge: float = 0.0,
    ) -> None:
        super().__init__(lin, partition=partition, mass=mass, names=names, largest=largest, ridge=ridge)
        self.solvers: list[Solver] = []
        left = self.room(budget)
        for k, blocks in enumerate(self.blocks):
            self.solvers.append(solver_for(blocks, space, left, workspace, k))
            left -= self.solvers[-1].bytes(blocks)
        self.unit = self.unit_of(sum(scalars([solver.trace() for solver in self.solvers])))

    def sharpen(self, mu: float) -> None:
        """Solve in float64 once the damping is that small."""
        if self.drowned(mu, self.unit):
            for solver in self.solvers:
                solver.sharpen()

    def move(
        self, direction: Direction, alpha: float, rates: Mapping[int, float]
    ) -> tuple[dict[int, Tensor], Tensor, float, float]:
        """Move the weights by s = lr alpha d, retracted where they live on manifolds.

        Args:
            direction: the direction d.
            alpha: factor on it.
            rates: learning rate by parameter.

        Returns:
            s by parameter, U s, g . s and |s|^2 (in units of the mass). On a manifold s is the tangent direction.
        """
        lrs = {rates[id(p)] for p in self.params}
        factor = alpha * (next(iter(lrs)) if len(lrs) == 1 else 1.0)
        bent: list[list[Tensor]] = []
        moved: list[Tensor] = []
        pieces: list[Tensor] = []
        for solver, scale, parts in zip(self.solvers, self.scales, direction.d, strict=True):
            bent.append([])
            for k, (block, d) in enumerate(zip(solver.blocks, parts, strict=True)):
                s = d * factor
                if len(lrs) > 1:
                    pairs = zip(block.params, block.widths, strict=True)
                    s *= torch.cat([s.new_full((width,), rates[id(p)]) for p, width in pairs])
                bent[-1].append(s)
                real = s if scale is None else s * scale[k]
                moved += block.params
                pieces += block.unpack(real)
        displace(moved, pieces, self.lin.held)
        step = {id(p): piece for p, piece in zip(moved, pieces, strict=True)}
        if len(lrs) == 1:
            return step, direction.Ud * factor, direction.slope * factor, direction.norm2 * factor**2
        return (step, *self._measured(bent))

    def _measured(self, moved: Sequence[Sequence[Tensor]]) -> tuple[Tensor, float, float]:
        """U s, g . s and |s|^2 by products: rates that differ bend the direction."""
        Us = torch.zeros_like(self.lin.e0)
        slope = norm2 = 0.0
        for solver, own, parts in zip(self.solvers, self.gradients, moved, strict=True):
            Us += solver.matvec(parts).to(Us.dtype)
            slope += sum(float(a @ b) for a, b in zip(own.g, parts, strict=True))
            norm2 += sum(float(b @ b) for b in parts)
        return Us, slope, norm2
