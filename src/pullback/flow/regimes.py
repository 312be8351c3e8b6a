"""Which flow it is: by the rank of D and its two dimensions; and how its pseudo-inverse is taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from pullback.curvature import memory_budget
from pullback.flow.errors import FlowError
from pullback.flow.inverse import Inverse, Products, Triangular, Truncated
from pullback.flow.system import Jacobian

Regime = Literal["over-parametrised", "borderline", "under-parametrised", "any-rank"]
Solver = Literal["cholesky", "qr", "truncated", "lsmr"]

#: Numbers of a D that may be formed, for singular values and for QR.
DENSE = 1 << 23
#: Condition of D from which a start is called badly conditioned (deep nets have it).
CONDITION = 5e6
#: Condition from which QR of D is taken in place of Cholesky of its Gram.
_SQUARED = 1e5
#: What eigenvalues of a Gram in double precision can tell of singular values.
_GRAM = 1e-7


@dataclass
class Choice:
    """The regime of a flow and how it was found.

    Attributes:
        regime: which of the four.
        rank: singular values above the tolerance; the smaller dimension where it could not be computed.
        rows: QN, numbers of outputs (modulo their fibre).
        columns: K, parameters.
        values: singular values of D at the start, descending; None where they could not be computed.
        tolerance: singular values at most this times the largest count as none.
        solver: how D^+ is taken; a badly conditioned D takes QR where that fits.
        budget: bytes for matrices.
        iterations: most of LSMR's.
        products: LSMR's tolerance.
        notes: what there is to say, in sentences.
    """

    regime: Regime
    rank: int
    rows: int
    columns: int
    values: Tensor | None
    tolerance: float
    solver: Solver
    budget: float
    iterations: int
    products: float
    fixed: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def condition(self) -> float | None:
        """Largest over smallest singular value at the start."""
        if self.values is None:
            return None
        return float(self.values[0] / self.values[-1].clamp_min(torch.finfo(self.values.dtype).tiny))

    @property
    def promised(self) -> bool:
        """Whether D has full row rank, so that the law of the cost holds while it keeps it."""
        return self.regime in ("over-parametrised", "borderline")

    def invert(self, D: Jacobian, condition: float | None) -> Inverse:
        """D^+ at a point.

        Args:
            D: the Jacobian there.
            condition: its condition as last known.
        """
        if self.solver == "lsmr":
            return Products(D, self.products, self.iterations)
        if self.regime == "any-rank":
            return Truncated(D, self.tolerance, dense=D.numbers <= DENSE)
        fits = D.numbers <= DENSE
        bad = self.solver == "qr" or (condition is not None and condition > _SQUARED and not self.fixed)
        try:
            return Triangular(D, qr=bad and fits)
        except FlowError:
            # A trial stage may be far worse than the points that are accepted.
            if bad or self.fixed or not fits:
                raise
            return Triangular(D, qr=True)


def choose(
    D: Jacobian,
    *,
    regime: str = "auto",
    solver: str = "auto",
    tolerance: float | None = None,
    memory: float | None = None,
    iterations: int = 2000,
    products: float = 1e-10,
) -> Choice:
    """The regime of a flow that starts at D.

    Args:
        D: the Jacobian at the start.
        regime: ``"auto"``, or the one that is wanted: refused if the rank is another, but for ``"any-rank"``.
        solver: ``"auto"``, ``"cholesky"``, ``"qr"`` or ``"lsmr"``.
        tolerance: singular values at most this times the largest count as none; None for 1e-9 in double precision
            (1e-7 where only the Gram can be decomposed), 1e-4 in single.
        memory: bytes for matrices, None for half of the machine's.
        iterations: most iterations of LSMR.
        products: LSMR's tolerance.

    Raises:
        FlowError: if the wanted regime is not the one the rank allows.
        ValueError: if an option is none of those.
    """
    if regime not in ("auto", *get_args(Regime)):
        raise ValueError(f"regime must be 'auto' or one of {', '.join(get_args(Regime))}, got {regime!r}.")
    if solver not in ("auto", "cholesky", "qr", "lsmr"):
        raise ValueError(f"solver must be 'auto', 'cholesky', 'qr' or 'lsmr', got {solver!r}.")
    QN, K = D.rows, D.columns
    small, budget = min(QN, K), memory_budget() if memory is None else memory
    free = solver == "lsmr" or (solver == "auto" and 32.0 * small**2 > budget)
    floor = 1e-4 if D.z.dtype != torch.float64 else 1e-9 if D.numbers <= DENSE else _GRAM
    wanted = floor if tolerance is None else tolerance
    values = None if free else spectrum(D)
    rank = small if values is None else int((values > wanted * values[0]).sum())
    own: Regime = "any-rank"
    if rank == small:
        own = "borderline" if QN == K else "over-parametrised" if QN < K else "under-parametrised"
    taken: Regime = own if regime == "auto" else regime  # type: ignore[assignment]
    if taken not in (own, "any-rank"):
        raise FlowError(
            f"The {taken} flow was asked for, but D is {QN} x {K} of rank {rank} (tolerance {wanted:.0e}): that is the "
            f"{own} one. Leave regime='auto', or change the width of the model or the number of samples."
        )
    how: Solver = "lsmr" if free else "truncated" if taken == "any-rank" else "qr" if solver == "qr" else "cholesky"
    choice = Choice(taken, rank, QN, K, values, wanted, how, budget, iterations, products, solver == "cholesky")
    choice.notes += _notes(choice)
    return choice


def spectrum(D: Jacobian) -> Tensor:
    """All singular values of D, descending: of D itself where it may be formed, else from its Gram."""
    if D.numbers <= DENSE:
        values: Tensor = torch.linalg.svdvals(D.dense())
        return values
    squares: Tensor = torch.linalg.eigvalsh(D.gram() if D.rows <= D.columns else D.normal())
    return squares.flip(0).clamp_min(0).sqrt()


def _notes(choice: Choice) -> list[str]:
    notes = []
    if choice.values is None:
        notes.append("The rank of D could not be computed without a matrix; it is taken to be full.")
    condition = choice.condition
    if choice.regime == "any-rank" and choice.rank < min(choice.rows, choice.columns):
        notes.append(
            f"D has rank {choice.rank} of {min(choice.rows, choice.columns)}: the projected flow runs, and no stopping "
            "time is promised."
        )
    elif condition is not None and condition >= CONDITION:
        notes.append(
            f"D is badly conditioned at the start (cond D = {condition:.1e}, {CONDITION:.0e} or more): steps will be "
            "short. Standardise the inputs, take wider or fewer layers, or regime='any-rank' with rank_tol=1e-5, "
            "which leaves the weak modes where they are."
        )
    return notes
