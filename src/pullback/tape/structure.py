"""What a use of the loss is: how many samples, which structure of calls, whether its batch may be repeated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pullback.errors import CoverageError
from pullback.tape.graph import Reached
from pullback.tape.term import LossUse


def samples(use: LossUse, found: Reached) -> int:
    """Number N of independent samples behind a prediction.

    Args:
        use: the use of the loss.
        found: the calls that reach its prediction.

    Raises:
        CoverageError: if the model's calls do not agree on one, or the prediction has another.
    """
    if use.z.ndim == 0 or use.z.numel() == 0:
        raise CoverageError(
            f"The loss was given predictions of shape {tuple(use.z.shape)}; at least one sample along the "
            "first axis is needed."
        )
    batches = {call.batch() for call in found.roots}
    returned = {call.rows for call in found.roots}
    if not _fits(batches, use.z) and _fits(returned, use.z):
        # Inputs whose first axis is not the batch (words of all samples with offsets): outputs tell.
        batches = returned
    if len(batches) != 1 or None in batches:
        raise CoverageError(
            "The loss depends on " + (f"calls of the model with batches {sorted(map(str, batches))}"
            if batches else "no call of the model that was recorded")
            + "; give it the output of model(inputs), the batch along the first axis."
        )  # fmt: skip
    (N,) = batches
    assert N is not None
    if N == 0 or use.z.shape[0] % N:
        raise CoverageError(
            f"The model took {N} samples and the loss got predictions {tuple(use.z.shape)}; their first axis "
            "must be the batch."
        )
    return N


def _fits(batches: set[int | None], z: Tensor) -> bool:
    """Whether all calls agree on a number of samples, and the prediction has as many or a multiple."""
    first = next(iter(batches), None)
    return len(batches) == 1 and bool(first) and z.shape[0] % (first or 1) == 0


def structure(found: Reached, use: LossUse, r: int, N: int) -> Any:
    """What must be the same for a plan to hold: modules, shapes, modes, trained parameters.

    Args:
        found: the calls that reach the prediction.
        use: the use of the loss.
        r: factor columns.
        N: samples.
    """
    calls = tuple((id(call.module), call.module.training, call.shape) for call, _ in found.calls)
    trained = tuple(found.params)
    # What one sample alone showed (it cannot mix with others) does not hold for several.
    return calls, trained, tuple(use.z.shape[1:]), r, N > 1, use.path is None, found.wiring
