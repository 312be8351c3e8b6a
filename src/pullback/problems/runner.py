"""Trains a problem with an optimizer and keeps the record; prints nothing."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pullback.problems.budget import Budget
from pullback.problems.errors import MissingExtraError, SpecError, one_line
from pullback.problems.machine import measuring
from pullback.problems.optimizer_entry import Stepper
from pullback.problems.optimizer_spec import OptimizerSpec, parse_optimizer
from pullback.problems.optimizers import optimizer_entry
from pullback.problems.problem import Problem, Split
from pullback.problems.record import INTERRUPTED, Evaluation, InterruptedRun, Run
from pullback.problems.schedule import Schedule

# Rows per forward pass of an evaluation: bounds the memory that activations of large data take.
_CHUNK = 4096


@dataclass(frozen=True)
class Progress:
    """How far a run is; given to the progress callback after each step, outside the charged time.

    Attributes:
        label: The optimizer with its options.
        seed: The seed of the run.
        steps: Steps taken.
        seconds: Charged seconds.
        fraction: The part of the budget that is used; one or more after the last step.
        loss: The training loss last evaluated.
    """

    label: str
    seed: int
    steps: int
    seconds: float
    fraction: float
    loss: float


Observer: TypeAlias = Callable[[Progress], None]


def run(
    problem: Problem,
    optimizer: str | OptimizerSpec,
    *,
    seed: int = 0,
    budget: Budget | None = None,
    threads: int = 1,
    progress: Observer | None = None,
) -> Run:
    """Trains a problem with one optimizer.

    The clock runs during training steps alone: evaluations, construction and one warm-up step on a throw-away
    copy, which takes torch's lazy initialisation, are not charged. For one seed the initial model and the
    order of the batches are the same whatever the optimizer. Torch's threads, denormal flag and random state
    are put back at the end.

    Args:
        problem: What to train.
        optimizer: ``name:key=value,...`` or its parsed form.
        seed: Drives the initial model, the order of the batches and anything random within a step.
        budget: When to stop; the problem's default if None.
        threads: Threads that torch may use.
        progress: Called after each step.

    Returns:
        The record; a loss that is not finite or an exception from a step ends the run and is recorded as its
        failure.

    Raises:
        SpecError: If the optimizer or an option does not exist or is refused.
        MissingExtraError: If the optimizer is in a package that is not installed.
        InterruptedRun: On Ctrl-C; a KeyboardInterrupt that carries the partial record.
    """
    spec = parse_optimizer(optimizer) if isinstance(optimizer, str) else optimizer
    with measuring(threads):
        return _Trial(problem, spec, seed, budget or problem.default_budget, progress).run()


class Clock:
    """Adds up wall-clock and processor seconds of the blocks it is the context of."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    def __enter__(self) -> None:
        self._cpu = time.process_time()
        self._wall = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._wall
        self.cpu_seconds += time.process_time() - self._cpu


class _Trial:
    """The state of one run."""

    def __init__(
        self, problem: Problem, spec: OptimizerSpec, seed: int, budget: Budget, progress: Observer | None
    ) -> None:
        self.problem, self.spec, self.seed, self.budget, self.progress = problem, spec, seed, budget, progress
        self.entry = optimizer_entry(spec.name)
        self.clock = Clock()
        self.schedule = Schedule(budget, problem.steps_per_epoch)
        self.steps = 0
        self.history: list[Evaluation] = []
        self.coverage: str | None = None

    def run(self) -> Run:
        try:
            self._warm_up()
            failure = self._attempt()
        except KeyboardInterrupt as stop:
            raise InterruptedRun(self._record(INTERRUPTED)) from stop
        return self._record(failure)

    def _warm_up(self) -> None:
        model, criterion = self._start()
        # Whatever goes wrong here goes wrong in the attempt too, and is recorded there.
        with contextlib.suppress(Exception), self._optimizer(model, criterion) as optimizer:
            self._step(model, criterion, optimizer, *next(batches(self.problem, self.seed)))
        self.coverage = None

    def _attempt(self) -> str | None:
        model, criterion = self._start()
        try:
            self._evaluate(model)
        except Exception as error:
            raise SpecError(
                f"{self.problem.name} cannot be evaluated ({one_line(error)}); "
                "check that its model, data, criterion and test metric fit together."
            ) from error
        try:
            with self._optimizer(model, criterion) as optimizer:
                return self._train(model, criterion, optimizer)
        except (SpecError, MissingExtraError):
            raise
        except Exception as error:  # Whatever an optimizer throws is its result; the other runs go on.
            return one_line(error)

    def _start(self) -> tuple[nn.Module, nn.Module]:
        # A copy: an optimizer may hook the criterion, and evaluations use the original.
        return self.problem.build_model(self.seed), copy.deepcopy(self.problem.criterion)

    @contextlib.contextmanager
    def _optimizer(self, model: nn.Module, criterion: nn.Module) -> Iterator[Stepper]:
        optimizer = self.entry.make(self.spec.options, model, criterion)
        # Constructors may draw numbers; noise within the steps is to begin the same for all.
        torch.manual_seed(self.seed)
        try:
            yield optimizer
        finally:
            if hasattr(optimizer, "coverage"):
                self.coverage = str(optimizer.coverage)
            if hasattr(optimizer, "close"):
                optimizer.close()

    def _train(self, model: nn.Module, criterion: nn.Module, optimizer: Stepper) -> str | None:
        source = batches(self.problem, self.seed)
        fraction, last = 0.0, self.history[-1].loss
        while fraction < 1:
            with self.clock:
                loss = self._step(model, criterion, optimizer, *next(source))
            self.steps += 1
            seconds = self.clock.seconds
            fraction = self.budget.fraction(seconds, self.steps, self.problem.steps_per_epoch)
            if self.schedule.due(seconds, self.steps) or fraction >= 1 or not math.isfinite(loss):
                last = self._evaluate(model)
                if not math.isfinite(last):
                    return f"the training loss is {last}"
            if self.progress is not None:
                self.progress(Progress(self.spec.label, self.seed, self.steps, seconds, fraction, last))
        return None

    def _step(
        self, model: nn.Module, criterion: nn.Module, optimizer: Stepper, inputs: Tensor, targets: Tensor
    ) -> float:
        if self.entry.closure:

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = criterion(model(inputs), targets)
                loss.backward()
                return loss

            return float(optimizer.step(closure).detach())
        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def _evaluate(self, model: nn.Module) -> float:
        problem = self.problem
        was_training = model.training
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            loss = float(problem.criterion(_outputs(model, problem.train[0]), problem.train[1]))
            test = None if problem.test is None else problem.score(_outputs(model, problem.test[0]), problem.test[1])
        model.train(was_training)
        self.history.append(Evaluation(self.clock.seconds, self.steps, loss, test))
        return loss

    def _record(self, failure: str | None) -> Run:
        return Run(
            optimizer=self.spec.name,
            options=self.spec.options,
            seed=self.seed,
            steps=self.steps,
            seconds=self.clock.seconds,
            cpu_seconds=self.clock.cpu_seconds,
            history=tuple(self.history),
            targets=self.problem.targets,
            failure=failure,
            coverage=self.coverage,
        )


def batches(problem: Problem, seed: int) -> Iterator[Split]:
    """Draws batches without end, each epoch in a new order.

    Args:
        problem: Whose training data to draw from.
        seed: Decides the order, together with nothing else.

    Yields:
        Inputs and targets of one step; the last batch of an epoch may be smaller.
    """
    inputs, targets = problem.train
    generator = torch.Generator().manual_seed(seed)
    while True:
        if problem.batch_size is None:
            yield inputs, targets
            continue
        order = torch.randperm(len(inputs), generator=generator)
        for rows in torch.split(order, problem.batch_size):
            yield inputs[rows], targets[rows]


def _outputs(model: nn.Module, inputs: Tensor) -> Any:
    if len(inputs) <= _CHUNK:
        return model(inputs)
    return torch.cat([model(chunk) for chunk in torch.split(inputs, _CHUNK)])
