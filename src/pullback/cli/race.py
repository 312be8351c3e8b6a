"""What `train`, `compare` and `sweep` have in common: run, show, keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import typer
from rich.console import Console, RenderableType
from torch import nn

from pullback.cli.progress import RunsBar
from pullback.cli.render import render
from pullback.cli.render_sweep import render_sweep
from pullback.cli.reporting import stderr, stdout
from pullback.errors import PullbackError, SolverError
from pullback.plotting import require_matplotlib, save_ode, save_plot, save_sweep
from pullback.problems import (
    Budget,
    Comparison,
    Grid,
    InterruptedComparison,
    Measure,
    OptimizerSpec,
    Problem,
    Progress,
    SpecError,
    Sweep,
    Target,
    ValidationTarget,
    compare,
    load_problem,
)
from pullback.problems.options import parse_value
from pullback.problems.record import Json
from pullback.problems.target import LOSS

_Models: TypeAlias = dict[str, nn.Module]


def make_budget(seconds: float | None, steps: int | None, epochs: int | None) -> Budget | None:
    """Makes the budget that the command line states.

    Args:
        seconds: From ``--seconds``.
        steps: From ``--steps``.
        epochs: From ``--epochs``.

    Returns:
        The budget, or None if nothing is stated.

    Raises:
        SpecError: If more than one is stated, or the one is not positive.
    """
    stated = {"--seconds": seconds, "--steps": steps, "--epochs": epochs}
    given = [name for name, value in stated.items() if value is not None]
    if len(given) > 1:
        raise SpecError(f"{' and '.join(given)} are both given; keep one.")
    return Budget(seconds=seconds, steps=steps, epochs=epochs) if given else None


def parse_targets(text: str | None) -> tuple[float, ...] | None:
    """Reads the training losses of ``--target``.

    Args:
        text: Numbers separated by commas, or None.

    Returns:
        The losses, each once, in the order written; None if nothing is stated.

    Raises:
        SpecError: If one is not a finite number.
    """
    if text is None:
        return None
    levels = [parse_value(part) for part in text.split(",")]
    numbers = [float(level) for level in levels if isinstance(level, int | float) and not isinstance(level, bool)]
    if len(numbers) < len(levels):
        raise SpecError(f"--target is {text!r}; write training losses separated by commas, such as 1e-6,1e-10.")
    return tuple(dict.fromkeys(numbers))


def parse_validation_targets(text: str | None, problem: Problem) -> tuple[ValidationTarget, ...]:
    """Reads the levels of ``--target-validation``.

    Args:
        text: Numbers separated by commas, those of the loss written ``loss=L``; or None.
        problem: Whose test metric the bare numbers are of.

    Returns:
        The levels, each once, in the order written; none if nothing is stated.

    Raises:
        SpecError: If one is not a finite number, or nobody knows which way the metric should go.
    """
    levels = []
    for part in text.split(",") if text is not None else []:
        key, equals, number = part.rpartition("=")
        level = parse_value(number)
        if not isinstance(level, int | float) or isinstance(level, bool) or (equals and key.strip() != LOSS):
            raise SpecError(
                f"--target-validation is {text!r}; write levels of the test metric separated by commas, or loss=L."
            )
        levels.append(ValidationTarget(LOSS if equals else problem.metric_name, float(level)))
    return tuple(dict.fromkeys(levels))


def race(
    problem: str,
    specs: Sequence[OptimizerSpec],
    *,
    budget: Budget | None,
    targets: tuple[float, ...] | None = None,
    target_validation: str | None = None,
    stop: bool = False,
    seeds: int,
    threads: int,
    data: Path | None,
    out: Path | None,
    as_json: bool,
) -> Comparison:
    """Runs optimizers on a problem, prints the result and keeps it.

    Args:
        problem: What the command line calls the problem.
        specs: The optimizers.
        budget: When each run stops; the problem's default if None.
        targets: Training losses whose time of arrival is reported; the problem's own if None.
        target_validation: From ``--target-validation``.
        stop: Whether a run ends once it has reached all that were stated; the lowest of the problem's own if none
            were.
        seeds: How many seeds.
        threads: Threads that torch may use.
        data: The data folder.
        out: Folder for ``result.json``, ``loss.png`` and, of models with ODE blocks, what `save_ode` draws of the first
            seed; made if need be.
        as_json: Whether to print JSON rather than a table.

    Returns:
        The runs.

    Raises:
        PullbackError: If what was asked for means nothing, before anything is trained.
        InterruptedComparison: After Ctrl-C, once what was reached is printed and kept.
    """
    loaded = _load(problem, data, out)
    if targets is not None:
        loaded = replace(loaded, targets=targets)
    wanted = parse_validation_targets(target_validation, loaded)
    loaded = replace(loaded, validation_targets=wanted)
    if stop and not (loaded.targets or wanted):
        raise SpecError(f"--stop needs a target, and {loaded.name} has none; give one with --target.")
    training = [] if wanted and targets is None else [min(loaded.targets, default=None)]
    until = [level for level in (*training, *wanted) if stop and level is not None]

    def pictures(result: Comparison, models: _Models, folder: Path) -> list[Path]:
        paths = [save_plot(result, folder / "loss.png")]
        try:
            return paths + save_ode(loaded.for_seed(0), result, models, folder)
        except SolverError as error:
            stderr().print(f"not drawn: {error}", markup=False, soft_wrap=True)
            return paths

    report = _Report(Comparison.to_json, render, pictures)
    return _execute(
        loaded, specs, report, budget=budget, until=until, seeds=seeds, threads=threads, out=out, as_json=as_json
    )


def run_sweep(
    problem: str,
    grids: Sequence[Grid],
    *,
    budget: Budget | None,
    metric: str | None,
    seeds: int,
    threads: int,
    data: Path | None,
    out: Path | None,
    as_json: bool,
) -> Sweep:
    """Runs every combination of some grids on a problem, prints the result and keeps it.

    Args:
        problem: What the command line calls the problem.
        grids: The grids, one per optimizer.
        budget: When each run stops; the problem's default if None.
        metric: From ``--metric``.
        seeds: How many seeds.
        threads: Threads that torch may use.
        data: The data folder.
        out: Folder for ``result.json`` and a map per optimizer, made if need be.
        as_json: Whether to print JSON rather than a table.

    Returns:
        The runs, with their grids.

    Raises:
        PullbackError: If what was asked for means nothing, before anything is trained.
        InterruptedComparison: After Ctrl-C, once what was reached is printed and kept.
    """
    # Cells are judged at their end, so the times to the problem's own levels would only widen the table.
    loaded = replace(_load(problem, data, out), targets=())
    measure = Measure.of(loaded, metric)

    def swept(result: Comparison) -> Sweep:
        return Sweep(result, tuple(grids), measure)

    report = _Report(
        to_json=lambda result: swept(result).to_json(),
        table=lambda result, _console: render_sweep(swept(result)),
        pictures=lambda result, _models, folder: save_sweep(swept(result), folder),
    )
    specs = [spec for grid in grids for spec in grid.specs()]
    return swept(_execute(loaded, specs, report, budget=budget, seeds=seeds, threads=threads, out=out, as_json=as_json))


@dataclass(frozen=True)
class _Report:
    """What becomes of runs: the object that is printed or kept, the table, and the pictures in a folder."""

    to_json: Callable[[Comparison], Json]
    table: Callable[[Comparison, Console], RenderableType]
    pictures: Callable[[Comparison, _Models, Path], list[Path]]


class _Keeper:
    """Passes progress on, and keeps the models of the first seed for the pictures."""

    def __init__(self, bar: RunsBar) -> None:
        self.models: _Models = {}
        self._bar = bar

    def __call__(self, progress: Progress) -> None:
        if progress.seed == 0 and progress.model is not None:
            self.models[progress.label] = progress.model
        self._bar(progress)


def _load(problem: str, data: Path | None, out: Path | None) -> Problem:
    if out is not None:
        _prepare(out)
    with stderr().status("loading"):
        return load_problem(problem, data)


def _execute(
    problem: Problem,
    specs: Sequence[OptimizerSpec],
    report: _Report,
    *,
    budget: Budget | None,
    until: Sequence[Target] = (),
    seeds: int,
    threads: int,
    out: Path | None,
    as_json: bool,
) -> Comparison:
    """Runs, prints and keeps, after Ctrl-C too."""
    interruption: InterruptedComparison | None = None
    with RunsBar(stderr(), len(specs) * seeds) as bar:
        watch = _Keeper(bar)
        try:
            result = compare(problem, specs, seeds=seeds, budget=budget, until=until, threads=threads, progress=watch)
        except InterruptedComparison as interrupted:
            interruption, result = interrupted, interrupted.comparison
    if as_json:
        typer.echo(json.dumps(report.to_json(result), allow_nan=False))
    else:
        console = stdout()
        console.print(report.table(result, console))
    if out is not None:
        _keep(result, report, watch.models, out)
    if interruption is not None:
        raise interruption
    return result


def finish(result: Comparison) -> None:
    """Ends a command with the exit code that its runs deserve.

    Args:
        result: The runs.

    Raises:
        Exit: With code 1 if every run failed.
    """
    if all(run.failure is not None for run in result.runs):
        raise typer.Exit(1)


def _prepare(out: Path) -> None:
    """Finds out before the training what would go wrong after it."""
    require_matplotlib()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PullbackError(f"the folder {out} cannot be made ({error.strerror}); choose another --out.") from error


def _keep(result: Comparison, report: _Report, models: _Models, out: Path) -> None:
    record = out / "result.json"
    try:
        record.write_text(json.dumps(report.to_json(result), allow_nan=False, indent=1) + "\n", encoding="utf-8")
        kept = [record, *report.pictures(result, models, out)]
    except OSError as error:
        raise PullbackError(f"{out} cannot be written to ({error.strerror}); choose another --out.") from error
    named = ", ".join(str(path) for path in kept[:-1])
    stderr().print(f"kept {named} and {kept[-1]}", markup=False, soft_wrap=True)
