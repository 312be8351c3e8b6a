"""What `train` and `compare` have in common: run, show, keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer

from pullback.cli.progress import RunsBar
from pullback.cli.render import render
from pullback.cli.reporting import stderr, stdout
from pullback.errors import PullbackError
from pullback.plotting import require_matplotlib, save_plot
from pullback.problems import (
    Budget,
    Comparison,
    InterruptedComparison,
    OptimizerSpec,
    SpecError,
    compare,
    load_problem,
)
from pullback.problems.options import parse_value


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


def race(
    problem: str,
    specs: Sequence[OptimizerSpec],
    *,
    budget: Budget | None,
    targets: tuple[float, ...] | None = None,
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
        stop: Whether a run ends once it has reached the lowest of them.
        seeds: How many seeds.
        threads: Threads that torch may use.
        data: The data folder.
        out: Folder for ``result.json`` and ``loss.png``, made if need be.
        as_json: Whether to print JSON rather than a table.

    Returns:
        The runs.

    Raises:
        PullbackError: If what was asked for means nothing, before anything is trained.
        InterruptedComparison: After Ctrl-C, once what was reached is printed and kept.
    """
    console = stderr()
    if out is not None:
        _prepare(out)
    with console.status("loading"):
        loaded = load_problem(problem, data)
    if targets is not None:
        loaded = replace(loaded, targets=targets)
    if stop and not loaded.targets:
        raise SpecError(f"--stop needs a target, and {loaded.name} has none; give one with --target.")
    until = min(loaded.targets) if stop else None
    interruption: InterruptedComparison | None = None
    with RunsBar(console, len(specs) * seeds) as bar:
        try:
            result = compare(loaded, specs, seeds=seeds, budget=budget, until=until, threads=threads, progress=bar)
        except InterruptedComparison as interrupted:
            interruption, result = interrupted, interrupted.comparison
    _show(result, as_json)
    if out is not None:
        _keep(result, out)
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


def _show(result: Comparison, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.to_json(), allow_nan=False))
        return
    console = stdout()
    console.print(render(result, console))


def _keep(result: Comparison, out: Path) -> None:
    record, picture = out / "result.json", out / "loss.png"
    try:
        record.write_text(json.dumps(result.to_json(), allow_nan=False, indent=1) + "\n", encoding="utf-8")
        save_plot(result, picture)
    except OSError as error:
        raise PullbackError(f"{out} cannot be written to ({error.strerror}); choose another --out.") from error
    stderr().print(f"kept {record} and {picture}", markup=False, soft_wrap=True)
