"""Trains a problem with an optimizer and keeps the record; prints nothing."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pullback.errors import SolverError
from pullback.problems.budget import Budget
from pullback.problems.clock import Clock
from pullback.problems.errors import MissingExtraError, SpecError, one_line
from pullback.problems.evaluator import Evaluator
from pullback.problems.least_squares import Solver
from pullback.problems.machine import measuring
from pullback.problems.odes import reading
from pullback.problems.optimizer_entry import Stepper
from pullback.problems.optimizer_spec import OptimizerSpec, parse_optimizer
from pullback.problems.optimizers import optimizer_entry
from pullback.problems.problem import Problem, Split
from pullback.problems.record import INTERRUPTED, InterruptedRun, Run
from pullback.problems.schedule import Schedule
from pullback.problems.target import Target, ValidationTarget, met


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
        nfe: Evaluations of vector fields in the last forward pass of the step, None without ODE blocks.
        t1: The time at which the first ODE block ends, None without ODE blocks.
        model: The model, as it is now; not to be changed.
    """

    label: str
    seed: int
    steps: int
    seconds: float
    fraction: float
    loss: float
    nfe: int | None = None
    t1: float | None = None
    model: nn.Module | None = None


Observer: TypeAlias = Callable[[Progress], None]


def run(
    problem: Problem,
    optimizer: str | OptimizerSpec,
    *,
    seed: int = 0,
    budget: Budget | None = None,
    until: Target | Iterable[Target] | None = None,
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
        until: Also stop once this level is reached, a training loss or one on the validation data; of several, once
            each of them has been.
        threads: Threads that torch may use.
        progress: Called after each step.

    Returns:
        The record; a loss that is not finite or an exception from a step ends the run and is recorded as its
        failure. A step after which an ODE cannot be solved is undone by optimizers that can, and the run goes on.

    Raises:
        SpecError: If the optimizer or an option does not exist or is refused.
        MissingExtraError: If the optimizer is in a package that is not installed.
        InterruptedRun: On Ctrl-C; a KeyboardInterrupt that carries the partial record.
    """
    spec = parse_optimizer(optimizer) if isinstance(optimizer, str) else optimizer
    with measuring(threads):
        return _Trial(problem, spec, seed, budget or problem.default_budget, _levels(until), progress).run()


class _Finished(Exception):  # noqa: N818 (no error)
    """Ends a solver that drives itself."""


class _Trial:
    """The state of one run."""

    def __init__(
        self,
        problem: Problem,
        spec: OptimizerSpec,
        seed: int,
        budget: Budget,
        until: set[Target],
        progress: Observer | None,
    ) -> None:
        self.problem = problem.for_seed(seed)
        self.spec, self.seed, self.budget, self.progress = spec, seed, budget, progress
        # The levels not reached yet; a run without any ends with its budget.
        self.bounded, self.missing = bool(until), until
        self.entry = optimizer_entry(spec.name)
        self.clock = Clock()
        self.steps_per_epoch = problem.steps_per_epoch
        self.schedule = Schedule(budget, self.steps_per_epoch)
        self.evaluator = Evaluator(self.problem)
        self.steps = 0
        self.trials = 0
        self.last = math.nan
        self.finished = False
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
            if isinstance(optimizer, Solver):
                optimizer.solve(*self.problem.train, self.problem.loss_scale, _stop)
            self._step(model, criterion, optimizer, *next(batches(self.problem, self.seed)))
        self.coverage, self.trials = None, 0

    def _attempt(self) -> str | None:
        model, criterion = self._start()
        try:
            self.last = self.evaluator.evaluate(model, 0.0, 0)
        except Exception as error:
            raise SpecError(
                f"{self.problem.name} cannot be evaluated ({one_line(error)}); "
                "check that its model, data, criterion and test metric fit together."
            ) from error
        try:
            with self._optimizer(model, criterion) as optimizer:
                failure = self._train(model, criterion, optimizer)
            if failure is None:
                self.evaluator.unseal(model)
            return failure
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
        if isinstance(optimizer, Solver):
            return self._drive(model, optimizer)
        source = batches(self.problem, self.seed)
        failure = None
        while not self.finished and failure is None:
            with self.clock:
                loss = self._stepped(model, criterion, optimizer, *next(source))
            self.trials += getattr(getattr(optimizer, "last", None), "trials", 0)
            failure = self._after_step(model, loss, optimizer)
        return failure

    def _drive(self, model: nn.Module, solver: Solver) -> str | None:
        """Lets an optimizer run that drives itself; the clock stands still while its iterations are evaluated."""
        self.steps_per_epoch = 1  # It takes all data at once.
        self.schedule = Schedule(self.budget, self.steps_per_epoch)
        failure: str | None = None

        def tick(loss: float) -> None:
            nonlocal failure
            with self.clock.paused():
                self.trials = solver.trials
                failure = self._after_step(model, loss)
                if failure is not None or self.finished:
                    raise _Finished

        with contextlib.suppress(_Finished), self.clock:
            solver.solve(*self.problem.train, self.problem.loss_scale, tick)
        return failure

    def _after_step(self, model: nn.Module, loss: float, optimizer: Stepper | None = None) -> str | None:
        """Counts, evaluates if due and tells; what is wrong, or None."""
        self.steps += 1
        seconds, ode = self.clock.seconds, reading(model)
        fraction = self.budget.fraction(seconds, self.steps, self.steps_per_epoch)
        near = any(not isinstance(level, ValidationTarget) and loss <= level for level in self.missing)
        if self.schedule.due(seconds, self.steps) or fraction >= 1 or near or not math.isfinite(loss):
            self.last = self._evaluated(model, seconds, optimizer)
            if not math.isfinite(self.last):
                return f"the training loss is {self.last}"
            self.missing = {level for level in self.missing if not met(level, self.evaluator.history[-1])}
        self.finished = fraction >= 1 or (self.bounded and not self.missing)
        if self.progress is not None:
            used = 1.0 if self.finished else fraction
            nfe, t1 = ode or (None, None)
            self.progress(Progress(self.spec.label, self.seed, self.steps, seconds, used, self.last, nfe, t1, model))
        return None

    def _evaluated(self, model: nn.Module, seconds: float, optimizer: Stepper | None) -> float:
        """The training loss; if the last step has left an ODE without a solution, before it."""
        training = model.training
        try:
            return self.evaluator.evaluate(model, seconds, self.steps)
        except SolverError as error:
            model.train(training)
            if not _undone(optimizer, error):
                raise
        return self.evaluator.evaluate(model, seconds, self.steps)

    def _stepped(
        self, model: nn.Module, criterion: nn.Module, optimizer: Stepper, inputs: Tensor, targets: Tensor
    ) -> float:
        """A step and its loss; the loss is nan if instead the step before was undone, which counts as one."""
        try:
            return self._step(model, criterion, optimizer, inputs, targets)
        except SolverError as error:
            if not _undone(optimizer, error):
                raise
            return math.nan

    def _step(
        self, model: nn.Module, criterion: nn.Module, optimizer: Stepper, inputs: Tensor, targets: Tensor
    ) -> float:
        def closure() -> Tensor:
            self.trials += 1
            optimizer.zero_grad()
            loss = self.problem.loss(model(inputs), targets, criterion)
            loss.backward()
            return loss

        if self.entry.closure:
            return float(optimizer.step(closure).detach())
        optimizer.zero_grad()
        loss = self.problem.loss(model(inputs), targets, criterion)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def _record(self, failure: str | None) -> Run:
        return Run(
            optimizer=self.spec.name,
            options=self.spec.options,
            seed=self.seed,
            steps=self.steps,
            seconds=self.clock.seconds,
            cpu_seconds=self.clock.cpu_seconds,
            trials=self.trials or None,
            history=tuple(self.evaluator.history),
            targets=self.problem.targets,
            validation_targets=self.problem.validation_targets,
            failure=failure,
            coverage=self.coverage,
        )


def _levels(until: Target | Iterable[Target] | None) -> set[Target]:
    if until is None:
        return set()
    return {until} if isinstance(until, int | float | ValidationTarget) else set(until)


def _undone(optimizer: object, error: SolverError) -> bool:
    """Whether the step that led to an error was undone, so that training can go on."""
    undo: Callable[[SolverError], bool] | None = getattr(optimizer, "undo", None)
    return undo is not None and undo(error)


def _stop(loss: float) -> None:
    raise _Finished


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
