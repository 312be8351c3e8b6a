"""What the factors of a batch will take, said before it is taken.

Pulled-back factors are as many as the factor has columns, each as large as the outputs of the layers; rows without a
structure of their own (norms, the generic rule) come on top. Both follow from shapes, so that a batch can be refused
while the machine still has the memory to say so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pullback.errors import StepError
from pullback.tape.sweep import Strategy


def memory_budget() -> float:
    """Bytes a step may take by default: half of what the machine has."""
    try:
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a POSIX machine
        return 4e9


def width(dtype: torch.dtype) -> float:
    """Bytes to allow for a number: one of float32 may stay while the solve goes on with its copy in float64."""
    return 8.0 if dtype == torch.float64 else 12.0


@dataclass(frozen=True)
class Sizes:
    """Numbers per row of U, that is, per factor column and sample.

    Attributes:
        factors: of the factor at the outputs of all calls.
        largest: of the largest of these.
        dense: of rows that a rule forms one by one.
        graph: of every operation's output: what a pass over the repeated batch holds.
        names: modules whose rows are formed one by one, the largest first.
    """

    factors: float
    largest: float
    dense: float
    graph: float
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, edge: GradientEdge, swept: Sequence[GradientEdge], dense: Mapping[str, float], N: int) -> Sizes:
        """Read them off the graph.

        Args:
            edge: where the prediction comes from.
            swept: the tensors that get factors.
            dense: numbers per row by name of the module that forms its rows one by one.
            N: samples.
        """
        outputs = [_numbers(e.node, e.output_nr) / N for e in swept] or [0.0]
        names = tuple(sorted(dense, key=lambda name: -dense[name]))
        return cls(sum(outputs), max(outputs), sum(dense.values()), _graph(edge) / N, names)

    def held(self, rows: int, dtype: torch.dtype) -> float:
        """Bytes until the step is through: factors, rows, and a product with the largest factor."""
        return rows * (width(dtype) * (self.factors + self.dense) + 8 * self.largest)

    def sweep(self, rows: int, dtype: torch.dtype, strategy: Strategy) -> float:
        """Bytes while the columns are pulled back."""
        working = self.largest if strategy == "loop" else self.graph
        return rows * size(dtype) * (self.factors + working)

    def said(self) -> str:
        """What takes most where it is not the factors, for a message."""
        if self.dense <= self.factors:
            return ""
        more = ", ..." if len(self.names) > 3 else ""
        return f", most of it rows held one by one for {', '.join(self.names[:3])}{more}"


@dataclass(frozen=True)
class Room:
    """What a step may take, and what earlier losses of the same step hold.

    Attributes:
        budget: bytes allowed in all.
        taken: bytes of them that are held.
    """

    budget: float
    taken: float = 0.0

    def allow_factor(self, z: Tensor, columns: int, N: int) -> None:
        """Refuse the factor at the prediction itself, of which a copy is made, if it does not fit.

        Args:
            z: the prediction.
            columns: its factor's columns.
            N: samples.

        Raises:
            StepError: if it does not.
        """
        self._allow(2 * size(z.dtype) * columns * z.numel(), columns, N)

    def affordable(self, sizes: Sizes, S: Tensor, N: int, strategy: Strategy, free: bool) -> Strategy:
        """The way to sweep that fits: the one given, or the loop, which takes least.

        Args:
            sizes: what the plan holds.
            S: factor at the prediction.
            N: samples.
            strategy: how the plan sweeps.
            free: whether the loop may stand in.

        Raises:
            StepError: if no way that is allowed fits.
        """
        if free and self._swept(sizes, S, N, strategy) + self.taken > self.budget:
            strategy = "loop"
        held, swept = sizes.held(S.shape[0] * N, S.dtype), self._swept(sizes, S, N, strategy)
        way = strategy if strategy != "loop" and swept > held else ""
        self._allow(max(held, swept), S.shape[0], N, sizes.said(), way)
        return strategy

    def spare(self, sizes: Sizes, S: Tensor, N: int, strategy: Strategy) -> bool:
        """Whether a way to sweep fits beside the loop's factors, with which its own are compared."""
        need = self._swept(sizes, S, N, "loop") + self._swept(sizes, S, N, strategy)
        return need + self.taken <= self.budget

    def _swept(self, sizes: Sizes, S: Tensor, N: int, strategy: Strategy) -> float:
        return S.numel() * S.element_size() + sizes.sweep(S.shape[0] * N, S.dtype, strategy)

    def _allow(self, need: float, columns: int, N: int, said: str = "", way: str = "") -> None:
        if need + self.taken <= self.budget:
            return
        beside = f", beside the {shown(self.taken)} of earlier losses of this step" if self.taken else ""
        remedies = ["sweep='loop'"] * bool(way) + ["metric=Sampled(m=1)"] * (columns > 1)
        remedies += ["a smaller batch", "fewer trained parameters"] + ["fewer losses a step"] * bool(self.taken)
        swept = f", swept by {way}" if way else ""
        raise StepError(
            f"The factors of this batch ({columns} columns of {N} samples{swept}) take up to {shown(need)}{said}"
            f"{beside}, over the {shown(self.budget)} allowed; use {', '.join(remedies)}, or raise memory=."
        )


def shown(count: float) -> str:
    """Bytes in a readable unit."""
    unit = next((u for u in ("GB", "MB") if count >= 0.1 * _UNITS[u]), "kB")
    return f"{count / _UNITS[unit]:.1f} {unit}"


_UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


def size(dtype: torch.dtype) -> float:
    """Bytes of a number in a factor: half precision is widened."""
    return 8.0 if dtype == torch.float64 else 4.0


def _numbers(node: Any, output: int) -> int:
    return math.prod(node._input_metadata[output].shape)


def _graph(edge: GradientEdge) -> float:
    """Numbers in the outputs of all operations behind an edge."""
    total, seen, stack = 0, {edge.node}, [edge.node]
    while stack:
        node = stack.pop()
        if not node.next_functions:
            continue  # parameters and inputs
        total += sum(_numbers(node, k) for k in range(len(node._input_metadata)))
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return float(total)
