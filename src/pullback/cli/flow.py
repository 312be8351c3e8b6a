"""``pullback flow``: an adapted flow, its stopping time and its certificate."""

from __future__ import annotations

from typing import Annotated

import typer

from pullback.cli import options
from pullback.cli.reporting import exit_codes

EXAMPLES = options.examples(
    "pullback flow diabetes --eps 1e-6",
    "pullback flow concrete:rows=256 --eps 1e-6 --seed 3 --out flow --json",
    "pullback flow rank-loss --eps 1e-6 --tol 1e-8",
    "pullback flow digits-regression --seconds 30",
)


def flow(
    problem: Annotated[
        str,
        typer.Argument(
            help="concrete, diabetes, digits-regression, rank-loss with options NAME:key=value,...; a problem from "
            "[bold]pullback problems[/bold] with squared error or cross entropy, or your own file.py:function.",
            show_default=False,
        ),
    ],
    *,
    eps: Annotated[
        float | None,
        typer.Option(help="The cost to stop at; its time is known beforehand while D has full row rank.", metavar="C"),
    ] = None,
    until: Annotated[float | None, typer.Option(help="A time s to stop at instead.", metavar="S")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial model.", metavar="K", min=0)] = 0,
    regime: Annotated[
        str, typer.Option(help="auto, over-parametrised, borderline, under-parametrised or any-rank.", metavar="R")
    ] = "auto",
    method: Annotated[
        str, typer.Option(help="dopri5, dopri8, ... of torchdiffeq, or discrete.", metavar="M")
    ] = "dopri5",
    tol: Annotated[
        float | None, typer.Option(help="Error of a step relative to the way that is left; else 1e-6.", metavar="T")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Most seconds; 60 if no stopping time is promised.", metavar="S")
    ] = None,
    threads: options.ThreadsOption = 1,
    data: options.DataOption = None,
    out: Annotated[
        options.OutFolder, typer.Option(help="Keep result.json and flow.png in this folder.", metavar="DIR")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Run an adapted flow: gradient descent in output space, over at a time known beforehand.

    Ctrl-C keeps what was reached.
    """
    with exit_codes():
        from pullback.cli.flowing import Wanted, run_flow

        wanted = Wanted(eps, until, seed, regime, method, tol, seconds)
        run_flow(problem, wanted, threads=threads, data=data, out=out, as_json=as_json)
