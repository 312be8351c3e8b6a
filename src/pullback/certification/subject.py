"""What a certificate is about: model, loss and data in double precision, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from pullback.errors import PullbackError
from pullback.manifolds.declare import refuse_manifolds
from pullback.problems.errors import SpecError, one_line
from pullback.problems.problem import Problem, Split
from pullback.stability.objective import Data, Objective, check_data

_DOUBLE = torch.float64
#: Rows that are kept from training where a problem has no data to spare, as one in so many.
_KEPT = 5
#: Samples on which the loss is held against the mean of their losses.
_REHEARSED = 512
Found = TypeVar("Found")


@dataclass(frozen=True)
class Subject:
    """A problem made ready.

    Attributes:
        problem: the problem in double precision; its ``train`` is ``data``.
        data: the training samples in random order.
        spare: samples to put in place of others.
        held_out: samples for gaps and loss changes.
        objective: the loss at the initial weights, with the decay.
        start: the initial weights, (K,).
        notes: what was changed about the problem.
    """

    problem: Problem
    data: Data
    spare: Data
    held_out: Data
    objective: Objective
    start: Tensor
    notes: tuple[str, ...]

    def build(self, seed: int) -> nn.Module:
        """A model at the initial weights."""
        return self.problem.build_model(seed)


def make_subject(problem: Problem, seed: int, decay: float) -> Subject:
    """Makes a problem ready.

    Args:
        problem: Any whose samples are rows of one input and one target tensor.
        seed: Of the initial weights and of the order of the data.
        decay: Weight decay, part of the loss.

    Raises:
        SpecError: If the problem has no data tensors, too few samples, draws or mixes them in its forward pass, or its
            loss is not the mean of its samples' losses.
        ManifoldError: If parameters live on manifolds.
        StabilityError: If data are not finite.
    """
    problem = problem.for_seed(seed)
    notes: list[str] = []
    for part in ("train", "test", "validation"):
        _check_tensors(problem.name, part, getattr(problem, part))
    if problem.dtype != _DOUBLE:
        notes.append(f"in float64; the problem itself is {str(problem.dtype).removeprefix('torch.')}")
    if problem.loss_scale != 1:
        notes.append(f"the loss is the criterion's, without the problem's factor {problem.loss_scale:g}")
    train = _double(problem.train)
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    data = (train[0][order], train[1][order])
    other, said = _others(problem)
    if other is None:
        cut = len(order) // _KEPT
        data, other = (data[0][cut:], data[1][cut:]), (data[0][:cut], data[1][:cut])
        said = f"{cut} of {len(order)} training samples are kept for twins and gaps: the problem has no other data"
    notes.append(said)
    if len(data[0]) < 2 or len(other[0]) < 2:
        raise SpecError(
            f"{problem.name} has {len(data[0])} samples to train on and {len(other[0])} beside them; "
            "twins need at least 2 of each."
        )
    ready = replace(
        problem, dtype=_DOUBLE, train=data, reported=None, validation=None, validation_targets=(), test=None
    )
    model = ready.build_model(seed)
    _check_model(problem.name, model)
    objective = Objective(model, problem.criterion, decay=decay)
    subject = Subject(
        ready,
        check_data(data),
        _half(other, 0),
        check_data(_half(other, 1), 1),
        objective,
        objective.get(),
        tuple(notes),
    )
    _rehearse(subject)
    return subject


def _check_tensors(name: str, part: str, split: object) -> None:
    if split is None:
        return
    if not (isinstance(split, tuple) and len(split) == 2 and all(isinstance(piece, Tensor) for piece in split)):
        raise SpecError(f"{part} of {name} is no pair of tensors; a certificate needs one row per sample in each.")


def _double(split: Split) -> Split:
    x, y = split
    return (x.to(_DOUBLE) if x.is_floating_point() else x, y.to(_DOUBLE) if y.is_floating_point() else y)


def _others(problem: Problem) -> tuple[Split | None, str]:
    """Samples that are not trained on; sealed test data stay sealed."""
    if problem.test is not None and not problem.sealed:
        return _double(problem.test), "twins take samples from one half of the test data, gaps are on the other half"
    if problem.validation is not None:
        said = "twins take samples from one half of the validation data, gaps are on the other half"
        return _double(problem.validation), said
    return None, ""


def _half(split: Split, which: int) -> Data:
    return split[0][which::2], split[1][which::2]


def _check_model(name: str, model: nn.Module) -> None:
    refuse_manifolds("a certificate", model)
    for path, part in model.named_modules():
        mixes = isinstance(part, nn.modules.batchnorm._BatchNorm)
        draws = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
        if mixes or draws:
            why = "mixes samples" if mixes else "draws at random"
            raise SpecError(
                f"{path!r} of {name} is {type(part).__name__}, which {why}, so that samples have no loss of their own; "
                "take it out, or put LayerNorm in its place."
            )


def _rehearse(subject: Subject) -> None:
    """The loss must be the mean of the samples' losses, which must be there one by one."""
    objective, theta, name = subject.objective, subject.start, subject.problem.name
    some, two = ((subject.data[0][:k], subject.data[1][:k]) for k in (_REHEARSED, 2))
    one_by_one = _tried(name, lambda: objective.losses(theta, some))
    _tried(name, lambda: objective.gradient_norms(theta, two))
    whole = objective.loss(theta, some) - 0.5 * objective.decay * float(theta @ theta)
    mean = float(one_by_one.mean())
    if not abs(whole - mean) <= 1e-8 * max(1.0, abs(whole)):
        raise SpecError(
            f"the loss of {name} on {len(some[0])} samples is {whole:.6g} and the mean of their losses {mean:.6g}; "
            "a certificate needs a criterion that averages over samples (no class weights)."
        )


def _tried(name: str, function: Callable[[], Found]) -> Found:
    try:
        return function()
    except PullbackError:
        raise
    except Exception as error:  # Whatever a model or criterion throws when it is given one sample.
        raise SpecError(
            f"{name} cannot be certified: its model and loss do not take single samples under vmap ({one_line(error)})."
        ) from error
