"""What `train` and `compare` have in common: run, show, keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
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


def race(
    problem: str,
    specs: Sequence[OptimizerSpec],
    *,
    budget: Budget | None,
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
    stop: InterruptedComparison | None = None
    with RunsBar(console, len(specs) * seeds) as bar:
        try:
            result = compare(loaded, specs, seeds=seeds, budget=budget, threads=threads, progress=bar)
        except InterruptedComparison as interrupted:
            stop, result = interrupted, interrupted.comparison
    _show(result, as_json)
    if out is not None:
        _keep(result, out)
    if stop is not None:
        raise stop
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
