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
    divide,
    scales_of,
    solver_for,
    weigh,
)
from pullback.errors import StepError


class System:
    """Groups of a partition with their solvers and gradients.

    All vectors inside are in units of the mass: ``D^{1/2}`` times the change of a parameter, ``D^{-1/2}``
    times a gradient.

    Args:
        lin: the linearisation.
        partition: who moves with whom.
        mass: the mass D.
        space: which solver.
        budget: bytes a solver may take, None for the default.
        names: name of every parameter by id.
        largest: keeps the largest diagonal of a block seen so far (for the Marquardt mass).
        workspace: where large matrices live between steps.

    Attributes:
        solvers: one per group.
        gradients: the gradient of every group.
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
    ) -> None:
        self.lin = lin
        whole = lin.gradient(lin.blocks)
        if not all(math.isfinite(float(g @ g)) for g in whole.g):
            raise StepError("A gradient is not finite; no step was taken.")
        scales = scales_of(lin.blocks, mass, names, largest)
        index = {id(block): k for k, block in enumerate(lin.blocks)}
        self.solvers: list[Solver] = []
        self.gradients: list[Gradient] = []
        self._scales: list[list[float | Tensor] | None] = []
        for blocks in divide(lin.blocks, partition, names):
            own = [index[id(block)] for block in blocks]
            g = [whole.g[k] for k in own]
            rest = None if whole.rest is None else [whole.rest[k] for k in own]
            if scales is None:
                self._scales.append(None)
            else:
                scale = [scales[k] for k in own]
                blocks = [weigh(block, s) for block, s in zip(blocks, scale, strict=True)]
                g = [a * s for a, s in zip(g, scale, strict=True)]
                rest = None if rest is None else [a * s for a, s in zip(rest, scale, strict=True)]
                self._scales.append(scale)
            self.solvers.append(solver_for(blocks, space, budget, workspace, len(self.solvers)))
            self.gradients.append(Gradient(g, whole.e0, rest))
        trace = float(torch.stack([solver.trace() for solver in self.solvers]).sum())
        if not math.isfinite(trace):
            raise StepError("The metric is not finite; no step was taken. Look for overflow in the model.")
        self.unit = trace / max(1, lin.R)

    @property
    def params(self) -> list[Tensor]:
        """All parameters that move."""
        return [p for solver in self.solvers for block in solver.blocks for p in block.params]

    def sharpen(self, mu: float) -> None:
        """Solve in float64 once the damping is so small that a float32 Gram has lost it (theory 3).

        Under a sketch the metric's own noise is larger than what float32 loses, down to the last digits.
        """
        if mu < (1e-4 if self.lin.exact else 1e-6) * self.unit:
            for solver in self.solvers:
                solver.sharpen()

    def packed(self, values: Mapping[int, Tensor]) -> list[list[Tensor]]:
        """Changes of parameters (zero where there is none) as packed vectors per block and group."""
        out = []
        for solver, scale in zip(self.solvers, self._scales, strict=True):
            parts = []
            for k, block in enumerate(solver.blocks):
                pieces = [values[id(p)] if id(p) in values else torch.zeros_like(p) for p in block.params]
                part = block.pack(pieces)
                parts.append(part if scale is None else part / scale[k])
            out.append(parts)
        return out

    def move(
        self, direction: Direction, alpha: float, rates: Mapping[int, float]
    ) -> tuple[dict[int, Tensor], Tensor, float, float]:
        """Move the weights by s = lr alpha d.

        Args:
            direction: the direction d.
            alpha: factor on it.
            rates: learning rate by parameter.

        Returns:
            s by parameter, U s, g . s and |s|^2 (in units of the mass).
        """
        lrs = {rates[id(p)] for p in self.params}
        factor = alpha * (next(iter(lrs)) if len(lrs) == 1 else 1.0)
        bent: list[list[Tensor]] = []
        moved: list[Tensor] = []
        pieces: list[Tensor] = []
        for solver, scale, parts in zip(self.solvers, self._scales, direction.d, strict=True):
            bent.append([])
            for k, (block, d) in enumerate(zip(solver.blocks, parts, strict=True)):
                s = d * factor
                if len(lrs) > 1:
                    s *= block.pack([torch.full_like(p, rates[id(p)]) for p in block.params])
                bent[-1].append(s)
                real = s if scale is None else s * scale[k]
                moved += block.params
                pieces += block.unpack(real)
        torch._foreach_add_(moved, pieces)
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
