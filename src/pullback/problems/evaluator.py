"""Losses and scores of a model on the way: train and validation always, a sealed test split at the end."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from pullback.problems.odes import reading
from pullback.problems.problem import Problem, Split
from pullback.problems.record import Evaluation

# Rows per forward pass of an evaluation: bounds the memory that activations of large data take.
_CHUNK = 1024


class Evaluator:
    """Keeps the history of one run.

    Args:
        problem: What is trained, with the data of the run's seed.

    Attributes:
        history: The evaluations so far.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.history: list[Evaluation] = []
        self._chosen: dict[str, Any] | None = None
        self._least = math.inf

    def evaluate(self, model: nn.Module, seconds: float, steps: int) -> float:
        """Adds an evaluation; model and random numbers are left as they were.

        Args:
            model: The model as it is now.
            seconds: Charged seconds so far.
            steps: Steps so far.

        Returns:
            The loss on the training data.
        """
        problem = self._problem
        trained = reading(model)  # Of the training pass, before those of the evaluation.
        was_training = model.training
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            loss = self._loss(model, problem.reported or problem.train)
            validation, score = (None, None) if problem.validation is None else self._both(model, problem.validation)
            test = None if problem.sealed else self._score(model)
        model.train(was_training)
        if trained is not None and not trained.nfe:
            trained = reading(model)
        self.history.append(Evaluation(seconds, steps, loss, test, validation, score, *(trained or ())))
        if problem.sealed and validation is not None and validation < self._least:
            self._least, self._chosen = validation, copy.deepcopy(model.state_dict())
        return loss

    def unseal(self, model: nn.Module) -> None:
        """Scores a sealed test split and writes the score into the last evaluation.

        Args:
            model: The trained model; it gets the weights that had the least validation loss, if there are
                validation data.
        """
        if not (self._problem.sealed and self.history):
            return
        if self._chosen is not None:
            model.load_state_dict(self._chosen)
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            self.history[-1] = self.history[-1]._replace(test=self._score(model))

    def _loss(self, model: nn.Module, split: Split) -> float:
        return float(self._problem.loss(_outputs(model, split[0]), split[1]))

    def _both(self, model: nn.Module, split: Split) -> tuple[float, float]:
        """Loss and test metric from one pass."""
        outputs = _outputs(model, split[0])
        return float(self._problem.loss(outputs, split[1])), self._problem.score(outputs, split[1])

    def _score(self, model: nn.Module) -> float | None:
        problem = self._problem
        if problem.model_metric is not None:
            return float(problem.model_metric(model))
        return None if problem.test is None else problem.score(_outputs(model, problem.test[0]), problem.test[1])


def _outputs(model: nn.Module, inputs: Tensor) -> Any:
    if len(inputs) <= _CHUNK:
        return model(inputs)
    return torch.cat([model(chunk) for chunk in torch.split(inputs, _CHUNK)])
