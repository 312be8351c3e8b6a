"""What `flow` does: run, show, keep."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pullback.cli.progress import Bar
from pullback.cli.render import number
from pullback.cli.reporting import stderr, stdout
from pullback.errors import PullbackError
from pullback.flow import AdaptedFlow, FlowRun
from pullback.flow.problems import FlowProblem, load_flow_problem
from pullback.plotting import require_matplotlib, save_flow
from pullback.problems import SpecError, machine, measuring

_BY = {"cholesky": "Cholesky", "qr": "QR", "truncated": "singular values", "lsmr": "LSMR"}
#: Most seconds of a run to which no stopping time is promised.
_SECONDS = 60.0


@dataclass(frozen=True)
class Wanted:
    """What the command line asks of a run; see `pullback flow --help`."""

    eps: float | None
    until: float | None
    seed: int
    regime: str
    method: str
    tol: float | None
    seconds: float | None


class FlowBar(Bar):
    """A progress bar in s/T that shows the smallest singular value; the observer a run calls.

    Args:
        console: Where to draw.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console, share="s/T {task.percentage:>3.0f}%")

    def __call__(self, share: float, smallest: float | None) -> None:
        """Takes note of a point.

        Args:
            share: Of the time of the run.
            smallest: The smallest singular value of D, if it is watched.
        """
        if self.due():
            self.show(share, "" if smallest is None else f"smallest singular value {smallest:.2e}")


def run_flow(
    problem: str, wanted: Wanted, *, threads: int, data: Path | None, out: Path | None, as_json: bool
) -> FlowRun:
    """Runs a flow, prints the result and keeps it.

    Args:
        problem: What the command line calls the problem.
        wanted: The options of the run.
        threads: Threads that torch may use.
        data: The data folder.
        out: Folder for ``result.json`` and ``flow.png``, made if need be.
        as_json: Whether to print JSON rather than a table.

    Returns:
        The run.

    Raises:
        PullbackError: If what was asked for means nothing.
        KeyboardInterrupt: After Ctrl-C, once what was reached is printed and kept.
    """
    if out is not None:
        _prepare(out)
    loaded = load_flow_problem(problem, data)
    with measuring(threads), FlowBar(stderr()) as bar:
        run = _run(loaded, wanted, bar)
    record = {"problem": problem, "seed": wanted.seed, **run.to_json(), "machine": machine(threads)}
    record["notes"] = [*loaded.notes, *run.notes]
    if loaded.loss_time is not None:
        record["rank_loss_time"] = loaded.loss_time(wanted.seed)
    if as_json:
        typer.echo(json.dumps(record, allow_nan=False))
    else:
        stdout().print(_table(problem, loaded, wanted, run))
    if out is not None:
        _keep(record, run, out, problem)
    if run.ended == "interrupted":
        raise KeyboardInterrupt
    return run


def _run(problem: FlowProblem, wanted: Wanted, bar: FlowBar) -> FlowRun:
    try:
        prepared = AdaptedFlow(problem.make_model(wanted.seed), problem.inputs, problem.targets, regime=wanted.regime)
        usual = math.inf if prepared.promised else _SECONDS
        try:
            return prepared.run(
                wanted.eps,
                until=wanted.until,
                method=wanted.method,
                tol=wanted.tol,
                seconds=usual if wanted.seconds is None else wanted.seconds,
                progress=bar,
            )
        finally:
            prepared.close()
    except ValueError as error:
        raise SpecError(str(error)) from error


def _table(name: str, problem: FlowProblem, wanted: Wanted, run: FlowRun) -> RenderableType:
    """One row per fact."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    certificate, by = run.certificate, _BY.get(run.solver, run.solver)
    rows: list[tuple[str, str]] = [
        ("regime", f"{run.regime}, D {run.shape[0]} x {run.shape[1]} of rank {run.rank}, by {by}"),
        ("stopping time", "none promised" if run.stopping_time is None else f"{run.stopping_time:.6g}"),
        ("ended", f"at s = {run.s:.6g}: {run.ended}"),
        (
            "cost",
            f"{run.cost:.6g}" + ("" if certificate.predicted is None else f", predicted {certificate.predicted:.6g}"),
        ),
    ]
    if certificate.held is not None:
        rows.append(("promise", "kept" if certificate.held else "not kept"))
    if certificate.slope is not None and certificate.expected is not None:
        rows.append(("slope of ln C", f"{certificate.slope:.6g}, law {certificate.expected:.6g}"))
    if certificate.deviation is not None:
        rows.append(("off the line", f"{number(certificate.deviation)} of its length at most"))
    if certificate.smallest is not None:
        rows.append(("smallest sing. value", number(certificate.smallest)))
    for loss in run.losses:
        known = "" if problem.loss_time is None else f"; known: {problem.loss_time(wanted.seed):.8g}"
        rows.append(("rank lost", f"at s = {loss.s:.8g}, {loss.rank} left{known}"))
    if run.end is not None:
        flat = (
            "" if run.end.dimension is None else f", critical submanifold of dimension {run.end.dimension} (estimated)"
        )
        rows.append(("end point", run.end.kind + flat))
    rows.append(("evaluations", f"{run.evaluations} in {number(run.seconds)} s"))
    for title, text in rows:
        grid.add_row(Text(f"  {title}"), Text(text))
    notes = [Text(f"  {note}") for note in (*problem.notes, *run.notes)]
    return Group(Text(f"{name}, seed {wanted.seed}", style="bold"), grid, *notes)


def _prepare(out: Path) -> None:
    """Finds out before the run what would go wrong after it."""
    require_matplotlib()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PullbackError(f"the folder {out} cannot be made ({error.strerror}); choose another --out.") from error


def _keep(record: dict[str, Any], run: FlowRun, out: Path, title: str) -> None:
    kept = out / "result.json"
    try:
        kept.write_text(json.dumps(record, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        picture = save_flow(run, out / "flow.png", title)
    except OSError as error:
        raise PullbackError(f"{out} cannot be written to ({error.strerror}); choose another --out.") from error
    stderr().print(f"kept {kept} and {picture}", markup=False, soft_wrap=True)
