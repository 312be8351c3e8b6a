"""What OCNOpt refuses: options, gradients, and terms whose samples cannot be told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from pullback.errors import StepError
from pullback.tape import Term
from pullback.tape.prior import Quadratic

#: what a sample's policy counts on
Counting = Literal["mean", "positive", "clamped"]


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are finite."""
    return not tensors or bool(torch.isfinite(torch.stack(torch._foreach_norm(list(tensors)))).all())


def not_finite(loss: float) -> StepError:
    """The error of bad numbers in the data."""
    return StepError(f"The loss is {loss} or a gradient is not finite; no step was taken. Look for bad data.")


def too_far() -> StepError:
    """The error of a step that overflows."""
    return StepError(
        "The deviation that the layers answer to is not finite; no step was taken. Lower the learning rate."
    )


def check_policies(
    criterion: object, rank: int | None, form: str, bound: float | None, eps: float, batch_norm: str
) -> None:
    """Refuse options that are not of their kind."""
    if form not in get_args(Counting):
        raise ValueError(f"form must be 'mean', 'positive' or 'clamped', got {form!r}.")
    if form != "mean" and isinstance(criterion, list | tuple | dict):
        raise TypeError(
            f"OCNOpt(form={form!r}) takes one criterion module, got {type(criterion).__name__}; take form='mean', or "
            "write the sum of several as a module."
        )
    if bound is not None and not bound > 0:
        raise ValueError(f"bound must be positive, or None for none; got {bound}.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be at least 1, or None for the exact factor; got {rank!r}.")
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be finite and at least 0, got {eps}.")
    if batch_norm == "frozen":
        raise ValueError(
            "Feedback runs the model with moved weights, where batch statistics differ; put BatchNorm layers in eval "
            "mode or use GroupNorm instead of batch_norm='frozen'."
        )


def check_roots(terms: Sequence[Term]) -> None:
    """Refuse terms that share a call of the model: their costates arrive there as one."""
    roots = [id(root) for term in terms for root in {id(root): root for root in term.roots}.values()]
    if len(set(roots)) < len(roots):
        raise StepError(
            "Two uses of the criterion rest on the same call of the model, so the gradients of single samples are not "
            "told apart; call the model once for each, or write one criterion of both."
        )


def check_penalties(terms: Sequence[Term]) -> None:
    """Refuse the costs of parameters themselves."""
    if any(isinstance(term.use.criterion, Quadratic) for term in terms):
        raise StepError(
            "A module of the model has a penalty on its own parameters, which is no sample's; set it to 0 with OCNOpt, "
            "or use GaussNewton, FeedbackGaussNewton or Kronecker."
        )
