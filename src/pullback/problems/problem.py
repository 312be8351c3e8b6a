"""A problem: data, model, loss and the levels worth timing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pullback.problems.budget import Budget
from pullback.problems.errors import SpecError, nearest, one_line
from pullback.problems.target import ValidationTarget
from pullback.problems.trajectories import Trajectories

Split: TypeAlias = tuple[Tensor, Tensor]
Metric: TypeAlias = Callable[[Tensor, Tensor], float]


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The share of right answers.

    Args:
        outputs: Scores, shape (N, C, ...), or shape (N,) or (N, 1) where a positive score means class 1.
        targets: Class indices, shape (N, ...), or (N, 1) beside (N, 1) scores.

    Returns:
        A number between zero and one.
    """
    if outputs.ndim == 1 or (outputs.ndim == 2 and outputs.shape[1] == 1):
        guess = (outputs.reshape(-1) > 0).to(targets.dtype)
        return (guess == targets.reshape(-1)).double().mean().item()
    return (outputs.argmax(1) == targets).double().mean().item()


def rmse(outputs: Tensor, targets: Tensor) -> float:
    """The root of the mean squared error, in the unit of the targets.

    Args:
        outputs: Predictions, floating, any shape.
        targets: Floating, the same number of elements.

    Returns:
        A number not below zero.
    """
    return (outputs - targets.reshape(outputs.shape)).double().square().mean().sqrt().item()


METRICS: dict[str, Metric] = {"accuracy": accuracy, "rmse": rmse}


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Everything that a run needs but the optimizer. All fields are given by keyword.

    Attributes:
        name: A short name, shown in tables and plots.
        make_model: Makes the model from the seed of the run; called under that seed, and the model is then
            cast to `dtype`, so a plain ``lambda seed: nn.Linear(3, 1)`` will do.
        train: Inputs (N, ...) and targets (N, ...).
        criterion: Loss module, called as ``criterion(model(inputs), targets)``; its value over all of `train`,
            times `loss_scale`, is the reported loss.
        loss_scale: Factor on the criterion: 0.5 with ``MSELoss`` is the mean of half squares.
        test: Inputs and targets that are not trained on, or None.
        validation: Inputs and targets for choosing anything, or None; each evaluation records the loss and the
            test metric on them.
        sealed: Whether `test` is scored once alone, at the end of a run: with the weights that had the least
            loss on `validation`, or with the last ones without `validation`. Else each evaluation scores it.
        batch_size: Rows per step, drawn without replacement in an order given by the seed; None for the full
            batch.
        dtype: Floating dtype of the model and of floating inputs.
        test_metric: "accuracy", "rmse", or a function of outputs and targets.
        model_metric: A function of the model, in eval mode, that is reported in place of a test metric: how far
            the parameters are from the true ones, say; None for none.
        reported: Inputs and targets on which the training loss is reported, where all of `train` would take too
            long; None for all of `train`.
        targets: Training losses whose time of arrival is reported, in the order reported.
        validation_targets: Levels on the validation data whose time of arrival is reported too.
        description: One line.
        budget: How long to train if nothing is said; 20 epochs with mini-batches and 200 steps without, if
            None.
        trajectories: What a picture of the trained model shows, None for none.
        redraw: The same problem with the data of a seed, where every seed has its own; its train, reported,
            validation, test, test_metric and trajectories are taken. None if the data are the same for all seeds.

    Raises:
        SpecError: If the parts do not fit together.
    """

    name: str
    make_model: Callable[[int], nn.Module]
    train: Split
    criterion: nn.Module
    loss_scale: float = 1.0
    test: Split | None = None
    validation: Split | None = None
    sealed: bool = False
    batch_size: int | None = None
    dtype: torch.dtype = torch.float32
    test_metric: str | Metric = "accuracy"
    model_metric: Callable[[nn.Module], float] | None = None
    reported: Split | None = None
    targets: tuple[float, ...] = ()
    validation_targets: tuple[ValidationTarget, ...] = ()
    description: str = ""
    budget: Budget | None = None
    trajectories: Trajectories | None = None
    redraw: Callable[[int], Problem] | None = None

    def __post_init__(self) -> None:
        for part in ("train", "reported", "validation", "test"):
            split: Split | None = getattr(self, part)
            if split is not None:
                self._check_split(part, split)
        if self.batch_size is not None and self.batch_size < 1:
            raise SpecError(
                f"batch_size of {self.name} is {self.batch_size}; give 1 or more, or none for the full batch."
            )
        if isinstance(self.test_metric, str) and self.test_metric not in METRICS:
            raise SpecError(f"{self.name} has no test metric {self.test_metric!r}.{nearest(self.test_metric, METRICS)}")
        if not (self.loss_scale > 0 and math.isfinite(self.loss_scale)):
            raise SpecError(f"loss_scale of {self.name} is {self.loss_scale}; give a positive number.")
        if self.model_metric is not None and self.test is not None:
            raise SpecError(f"{self.name} has test data and a model_metric, which take the same column; keep one.")
        if not all(math.isfinite(level) for level in self.targets):
            raise SpecError(f"the target levels of {self.name} must be finite numbers, not {self.targets}.")
        if self.validation_targets and self.validation is None:
            raise SpecError(
                f"{self.name} has targets on validation data and no such data; give it some, or drop the targets."
            )

    def _check_split(self, part: str, split: Split) -> None:
        inputs, targets = split
        if not len(inputs) or len(inputs) != len(targets):
            raise SpecError(
                f"{part} of {self.name} has {len(inputs)} inputs and {len(targets)} targets; "
                "give as many of the one as of the other, and at least one."
            )
        if inputs.is_floating_point() and inputs.dtype != self.dtype:
            raise SpecError(
                f"{part} inputs of {self.name} are {inputs.dtype} but the problem says {self.dtype}; "
                "convert the inputs or change dtype."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the training data, the last one possibly smaller."""
        return math.ceil(len(self.train[0]) / self.batch_size) if self.batch_size else 1

    @property
    def default_budget(self) -> Budget:
        """The budget of a run for which none is stated."""
        return self.budget or (Budget(epochs=20) if self.batch_size else Budget(steps=200))

    @property
    def metric_name(self) -> str:
        """The name of the test metric, for tables."""
        metric = self.model_metric or self.test_metric
        return metric if isinstance(metric, str) else getattr(metric, "__name__", "test")

    def for_seed(self, seed: int) -> Problem:
        """The problem with the data of a seed.

        Args:
            seed: The seed of the run.

        Returns:
            This very problem if all seeds have the same data.

        Raises:
            SpecError: If there are no data for that seed.
        """
        if self.redraw is None:
            return self
        drawn = self.redraw(seed)
        return replace(
            self,
            train=drawn.train,
            reported=drawn.reported,
            validation=drawn.validation,
            test=drawn.test,
            test_metric=drawn.test_metric,
            trajectories=drawn.trajectories,
            redraw=None,
        )

    def loss(self, outputs: Tensor, targets: Tensor, criterion: nn.Module | None = None) -> Tensor:
        """The loss that is minimised and reported.

        Args:
            outputs: What the model says, shape (N, ...).
            targets: What is true, shape (N, ...).
            criterion: A copy of the criterion that an optimizer watches; the problem's own if None.

        Returns:
            A scalar tensor.
        """
        value: Tensor = (criterion or self.criterion)(outputs, targets)
        return value if self.loss_scale == 1.0 else self.loss_scale * value

    def build_model(self, seed: int) -> nn.Module:
        """Makes the model, in training mode and of the problem's dtype.

        Args:
            seed: The seed of the run; torch is seeded with it too.

        Returns:
            The model.

        Raises:
            SpecError: If `make_model` raises; its own, or what else it raised in words.
        """
        torch.manual_seed(seed)
        try:
            return self.make_model(seed).to(self.dtype).train()
        except SpecError:
            raise
        except Exception as error:
            raise SpecError(f"make_model of {self.name} raised {one_line(error)}") from error

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """Evaluates the test metric.

        Args:
            outputs: What the model says, shape (N, ...).
            targets: What is true, shape (N, ...).

        Returns:
            The metric as a Python float.
        """
        metric = METRICS[self.test_metric] if isinstance(self.test_metric, str) else self.test_metric
        return float(metric(outputs, targets))
