"""Pulling the columns of a factor back through the graph: three ways to the same numbers.

``loop`` runs one backward pass per column. ``vmap`` runs one batched pass; it is quick for multilayer
perceptrons and slow where an operation has no batching rule. ``fold`` repeats the batch r times in a new
forward pass and runs one ordinary backward pass. Which is cheapest depends on the model, so it is timed
once, and a way whose numbers differ from the loop's is never used.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pullback.errors import CoverageError

Strategy = Literal["loop", "vmap", "fold"]

STRATEGIES: tuple[Strategy, ...] = ("loop", "vmap", "fold")
#: Seconds after which a way to sweep has been timed for long enough.
_LONG = 0.05
#: Columns that the loop is tried on, of more.
_FEW = 6


def loop(z: GradientEdge, edges: Sequence[GradientEdge], S: Tensor) -> list[Tensor]:
    """One backward pass per column.

    Args:
        z: where the prediction comes from, of shape (B, *out).
        edges: outputs of the recorded calls.
        S: cotangents, shape (r, B, *out).

    Returns:
        For every edge the factor there, shape (r, *shape of that output).
    """
    if S.shape[0] == 1:
        return [g[None] for g in _grad(z, edges, S[0])]
    columns = [list(_grad(z, edges, column)) for column in S]
    # Edge by edge from the last, each part given up once it is copied: never two copies of everything.
    return [torch.stack([column.pop() for column in columns]) for _ in edges][::-1]


def vmap(z: GradientEdge, edges: Sequence[GradientEdge], S: Tensor) -> list[Tensor]:
    """All columns in one batched backward pass. Arguments as for :func:`loop`."""
    with warnings.catch_warnings():
        # "There is a performance drop because ...": the timing sees it, the user need not.
        warnings.simplefilter("ignore", UserWarning)
        return list(_grad(z, edges, S, is_grads_batched=True))


def _grad(z: GradientEdge, edges: Sequence[GradientEdge], v: Tensor, **options: Any) -> tuple[Tensor, ...]:
    # Never allow_unused: an edge that the walk found and the engine does not reach is an error.
    return torch.autograd.grad(z, edges, v, retain_graph=True, **options)


def connected(z: GradientEdge, edges: Sequence[GradientEdge], v: Tensor) -> list[bool]:
    """Which edges the engine reaches from the prediction; for the message when one is missing."""
    grads = torch.autograd.grad(z, edges, v, retain_graph=True, allow_unused=True)
    return [g is not None for g in grads]


def agree(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two sweeps gave the same factors up to round-off."""
    for a, b in zip(left, right, strict=True):
        tolerance = min(1e3 * torch.finfo(a.dtype).eps, 0.05) * float(a.abs().amax())
        if a.shape != b.shape or not float((a - b).abs().amax()) <= tolerance:
            return False
    return True


def _best(run: Callable[[], object], first: float, repeats: int, leading: float) -> float:
    """The best of a first run and some more, as far as they are worth their time."""
    best, spent = first, first
    for run_before in range(repeats):
        # What is slow is measured well enough by one run, unless it might lead once it is warm.
        if spent > _LONG and (run_before or not leading < first < 2 * leading):
            break
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
    return best


def probes(columns: int) -> list[int]:
    """Which columns of many the loop is tried on: a few from end to end; all where they are few."""
    if columns <= _FEW:
        return list(range(columns))
    return [k * (columns - 1) // (_FEW - 1) for k in range(_FEW)]


def choose(
    candidates: dict[Strategy, Callable[[], list[Tensor]]], repeats: int = 3, columns: int = 0
) -> tuple[Strategy, list[Tensor], dict[Strategy, float]]:
    """Time the candidates once and take the fastest that agrees with the loop.

    Args:
        candidates: the ways to sweep, ``loop`` among them: that one on the columns :func:`probes` names alone.
        repeats: timed runs of each, of which the best counts; fewer where they take long, so that a first step is
            not several times as dear as it need be.
        columns: how many there are; 0 if the loop takes all of them.

    Returns:
        The chosen name, the loop's factors, and the seconds of each way that was usable; those of the loop are
        extrapolated from the columns it was tried on.

    Raises:
        CoverageError: if the loop itself fails.
    """
    start = time.perf_counter()
    try:
        reference = candidates["loop"]()
    except RuntimeError as error:
        raise CoverageError(
            f"The factor could not be pulled back through the model ({error}); if it is compiled, give the "
            "optimizer the original module."
        ) from error
    picks = probes(columns)
    share = len(picks) / columns if columns else 1.0
    seconds: dict[Strategy, float] = {}
    seconds["loop"] = _best(candidates["loop"], time.perf_counter() - start, repeats, 0.0) / share
    for name, run in candidates.items():
        if name == "loop":
            continue
        try:
            start = time.perf_counter()
            found = run()
            first = time.perf_counter() - start
            if not agree(reference, found if share == 1 else [part[picks] for part in found]):
                continue
            seconds[name] = _best(run, first, repeats, min(seconds.values()))
        except RuntimeError:
            # No batching rule, or a model that cannot take a larger batch: the loop always can.
            continue
    return min(seconds, key=lambda k: seconds[k]), reference, seconds
