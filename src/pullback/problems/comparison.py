"""Several optimizers on one problem, seed by seed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Sequence

from pullback.problems.budget import Budget
from pullback.problems.errors import MissingExtraError, SpecError
from pullback.problems.machine import machine, measuring
from pullback.problems.optimizer_spec import OptimizerSpec, parse_optimizers
from pullback.problems.optimizers import optimizer_entry
from pullback.problems.problem import Problem
from pullback.problems.record import INTERRUPTED, Comparison, InterruptedRun, Run
from pullback.problems.runner import Observer, run
from pullback.problems.target import Target


def compare(
    problem: Problem,
    optimizers: str | Sequence[OptimizerSpec],
    *,
    seeds: int | Iterable[int] = 3,
    budget: Budget | None = None,
    until: Target | Sequence[Target] | None = None,
    threads: int = 1,
    progress: Observer | None = None,
) -> Comparison:
    """Trains a problem with several optimizers, interleaved: for each seed, each optimizer.

    Interleaving lets the drift of the machine (its clock rate, its other users) hit all optimizers alike.

    Args:
        problem: What to train.
        optimizers: ``name:key=value,...,name,...`` or the parsed forms.
        seeds: How many seeds, counted from 0, or the seeds themselves.
        budget: When each run stops; the problem's default if None.
        until: Each run also stops once it has reached this level, a training loss or one on the validation data; of
            several, each of them.
        threads: Threads that torch may use.
        progress: Called after each step.

    Returns:
        The runs in the order they were made, and the machine.

    Raises:
        SpecError: If an optimizer, an option or a seed's data do not exist or are refused, before anything is
            trained.
        MissingExtraError: If an optimizer is in a package that is not installed.
        InterruptedComparison: On Ctrl-C; a KeyboardInterrupt that carries the comparison so far.
    """
    specs = parse_optimizers(optimizers) if isinstance(optimizers, str) else list(optimizers)
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not specs or not numbers:
        raise SpecError("a comparison needs at least one optimizer and one seed; give both.")
    runs: list[Run] = []

    def so_far() -> Comparison:
        return Comparison(problem.name, problem.metric_name, machine(threads), tuple(runs))

    try:
        with measuring(threads):
            for seed in numbers:
                problem.for_seed(seed)
            _try_out(problem, specs)
        for seed in numbers:
            for spec in specs:
                runs.append(
                    run(problem, spec, seed=seed, budget=budget, until=until, threads=threads, progress=progress)
                )
    except InterruptedRun as stop:
        runs.append(stop.run)
        raise InterruptedComparison(so_far()) from stop
    except KeyboardInterrupt as stop:
        raise InterruptedComparison(so_far()) from stop
    return so_far()


class InterruptedComparison(KeyboardInterrupt):
    """Ctrl-C during a comparison; carries what was reached.

    Attributes:
        comparison: The finished runs and, last, the one that was interrupted, if any.
    """

    def __init__(self, comparison: Comparison) -> None:
        super().__init__(INTERRUPTED)
        self.comparison = comparison


def _try_out(problem: Problem, specs: Iterable[OptimizerSpec]) -> None:
    """Builds each optimizer once: a refused option is heard of before an hour of training, not after."""
    for spec in specs:
        model = problem.build_model(0)
        try:
            optimizer = optimizer_entry(spec.name).make(spec.options, model, copy.deepcopy(problem.criterion))
        except (SpecError, MissingExtraError):
            raise
        except Exception:  # Recorded as the failure of its runs.
            continue
        with contextlib.suppress(Exception):
            getattr(optimizer, "close", lambda: None)()
