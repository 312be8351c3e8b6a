"""Which solver a group gets: the one asked for, or the cheapest that fits into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pullback.curvature.block import Block
from pullback.curvature.dual import Dual
from pullback.curvature.free import MatrixFree
from pullback.curvature.primal import Primal
from pullback.curvature.solver import Solver
from pullback.curvature.workspace import Workspace
from pullback.errors import StepError
from pullback.tape.memory import memory_budget, shown

Space = Literal["auto", "dual", "primal", "cg"]

SOLVERS: dict[str, type[Solver]] = {kind.name: kind for kind in (Dual, Primal, MatrixFree)}


def solver_for(
    blocks: Sequence[Block],
    space: Space = "auto",
    budget: float | None = None,
    workspace: Workspace | None = None,
    slot: int = 0,
) -> Solver:
    """The solver of a group of blocks.

    ``"auto"`` takes dual or primal, whichever costs fewer operations and fits; conjugate gradients if
    neither fits. A solver asked for by name must fit.

    Args:
        blocks: blocks that move jointly.
        space: the solver's name, or ``"auto"``.
        budget: bytes it may take; None for :func:`memory_budget`.
        workspace: where large matrices live between steps; None for a fresh one.
        slot: a name of this group in the workspace.

    Raises:
        StepError: before anything is allocated, if the solver asked for does not fit.
    """
    budget = memory_budget() if budget is None else budget
    if space != "auto":
        need = SOLVERS[space].bytes(blocks)
        if need > budget:
            raise StepError(_too_large(blocks, space, need, budget))
        return SOLVERS[space](blocks, workspace, slot)
    fits: list[type[Solver]] = [kind for kind in (Dual, Primal) if kind.bytes(blocks) <= budget]
    if not fits:
        return MatrixFree(blocks, workspace, slot)
    cheapest = fits[0] if len(fits) == 1 else min(fits, key=lambda kind: kind.flops(blocks))
    return cheapest(blocks, workspace, slot)


def _too_large(blocks: Sequence[Block], space: str, need: float, budget: float) -> str:
    size = blocks[0].R if space == "dual" else sum(block.n for block in blocks)
    names = ", ".join(block.name for block in blocks[:3]) + (", ..." if len(blocks) > 3 else "")
    return (
        f"solver='{space}' for {names} needs {shown(need)} ({size} x {size}), over the {shown(max(0.0, budget))} "
        "left for it; use solver='auto', metric=Sampled(m=1), a smaller batch or partition='layerwise', or raise "
        "memory=."
    )
