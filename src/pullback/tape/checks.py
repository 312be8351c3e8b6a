"""What is checked once per structure of calls: samples are apart, and rows reproduce the gradient.

Both checks run real backward passes through the user's own graph, so they see what no list of module types
could: samples mixed by a centring written by hand, time folded in the wrong order, a weight used twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.errors import MixingError
from pullback.tape import sweep
from pullback.tape.call import RootCall, wide
from pullback.tape.graph import Reached
from pullback.tape.nest import tensors
from pullback.tape.plan import Unit
from pullback.tape.recorder import Recorder, uses_batch_statistics
from pullback.tape.rules import sample_axis
from pullback.tape.term import LossUse, gather, one_sample


class NotFiniteError(ArithmeticError):
    """Numbers that are not finite met a structure of calls that has not been checked yet."""


def mixed_calls(use: LossUse, found: Reached, N: int) -> set[int]:
    """Ids of calls at whose output one sample's cotangent has entries for another sample.

    Args:
        use: the use of the loss.
        found: the calls that reach its prediction.
        N: samples.
    """
    if N < 2:
        return set()
    mixed = set()
    # Two samples, since an entry can be where one of them belongs by chance (the last of as many time steps).
    for which in (0, N // 2):
        columns = iter(sweep.loop(use.edge, found.edges, one_sample(use.z, N, which)))
        for call, edges in found.calls:
            for index in edges:
                part = next(columns)[0].movedim(sample_axis(call.module, index), 0)
                if part.shape[0] % N:
                    mixed.add(id(call))
                    continue
                apart = part.reshape(N, -1).clone()
                apart[which] = 0
                if bool((apart != 0).any()):
                    mixed.add(id(call))
    return mixed


def missed(units: Sequence[Unit], use: LossUse, found: Reached, N: int, costate: Tensor) -> dict[int, float]:
    """Parameters whose rows, fed with the costate, miss the gradient that autograd finds.

    Args:
        units: who gives rows to whom.
        use: the use of the loss.
        found: the calls that reach its prediction.
        N: samples.
        costate: gradient of the loss at the prediction.

    Returns:
        Relative error by id of the parameter; empty if all agree.

    Raises:
        NotFiniteError: if the gradient is not finite, so that nothing can be told.
    """
    given = {id(p) for unit in units for p in unit.parameters()}
    params = {k: p for k, p in found.params.items() if k in given}
    if not params:
        return {}
    true = torch.autograd.grad(use.edge, list(params.values()), costate, retain_graph=True)
    factors = gather(found, sweep.loop(use.edge, found.edges, costate[None]), 1)
    ours = {k: torch.zeros_like(p) for k, p in params.items()}
    for unit in units:
        rows = unit.rows(factors[id(unit.module)], N)
        total = rows.rmatvec(wide(costate.new_ones(N)))
        for p, g in zip(rows.params, rows.split(total), strict=True):
            ours[id(p)] += g
    norm = sum(float(g.square().sum()) for g in true) ** 0.5
    if not math.isfinite(norm):
        raise NotFiniteError
    # Under autocast the rows are as good as the half precision they came through.
    coarse = max([torch.finfo(costate.dtype).eps, *(torch.finfo(t.dtype).eps for t in _floating(found))])
    wrong = {}
    for (key, _), g in zip(params.items(), true, strict=True):
        eps = max(torch.finfo(g.dtype).eps, coarse)
        miss, scale = float((ours[key] - g).norm()), float(g.norm())
        if not miss <= eps**0.5 * scale + min(1e3 * eps, eps**0.5) * norm:
            wrong[key] = miss / max(scale, torch.finfo(g.dtype).tiny)
    return wrong


def _floating(found: Reached) -> list[Tensor]:
    """Floating inputs of the calls."""
    return [t for call, _ in found.calls for t in tensors(call.args) if t.is_floating_point()]


def refuse_mixing(found: Reached, mixed: set[int], recorder: Recorder) -> None:
    """Name the culprit when samples are mixed.

    Args:
        found: the calls that reach the prediction.
        mixed: what :func:`mixed_calls` found.
        recorder: for the names.

    Raises:
        MixingError: if a layer normalises over the batch, or the model's own output mixes samples.
    """
    for call, _ in found.calls:
        m = call.module
        if uses_batch_statistics(m) and recorder.name_of(m) not in recorder.frozen:
            # With feedback the weights move within a pass, and the statistics would with them.
            hold = "hold its statistics constant there with batch_norm='frozen', " * (recorder.wiring == "none")
            raise MixingError(
                f"'{recorder.name_of(m)}' ({type(m).__name__}) mixes the samples of a batch in training mode, so the "
                f"metric has no rows; {hold}call .eval() on it, or use GroupNorm."
            )
    for call, _ in found.calls:
        if isinstance(call, RootCall) and id(call) in mixed:
            raise MixingError(
                "The model's output for one sample depends on other samples of the batch, so the metric has no rows; "
                "the batch must be the first axis throughout, with no layer mixing along it."
            )
