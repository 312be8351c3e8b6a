"""``pullback train``: one optimizer on one problem."""

from __future__ import annotations

from typing import Annotated

import typer

from pullback.cli import options
from pullback.cli.reporting import exit_codes, stderr, stdout

EXAMPLES = options.examples(
    "pullback train digits --optimizer layerwise-metric",
    "pullback train digits:width=32 --optimizer adam:lr=3e-3 --epochs 50",
    "pullback train diabetes --optimizer gauss-newton --steps 30 --coverage",
    "pullback train mine.py:make --optimizer muon:lr=0.02 --seconds 10 --json",
)


def train(
    problem: options.ProblemArgument,
    *,
    optimizer: Annotated[
        str,
        typer.Option(help="NAME or NAME:key=value,...; see [bold]pullback optimizers[/bold].", metavar="NAME"),
    ] = "layerwise-metric",
    seconds: options.SecondsOption = None,
    steps: options.StepsOption = None,
    epochs: options.EpochsOption = None,
    target: options.TargetOption = None,
    target_validation: options.TargetValidationOption = None,
    stop: options.StopOption = False,
    seeds: options.SeedsOption = 1,
    threads: options.ThreadsOption = 1,
    data: options.DataOption = None,
    out: options.OutOption = None,
    as_json: options.JsonOption = False,
    coverage: Annotated[
        bool, typer.Option("--coverage", help="Print how the optimizer treats each parameter.")
    ] = False,
) -> None:
    """Train one optimizer on a problem.

    Give at most one of --seconds, --steps and --epochs. Ctrl-C keeps what was reached.
    """
    with exit_codes():
        from pullback.cli.race import finish, make_budget, parse_targets, race
        from pullback.problems import parse_optimizer

        result = race(
            problem,
            [parse_optimizer(optimizer)],
            budget=make_budget(seconds, steps, epochs),
            targets=parse_targets(target),
            target_validation=target_validation,
            stop=stop,
            seeds=seeds,
            threads=threads,
            data=data,
            out=out,
            as_json=as_json,
        )
        if coverage:
            report = result.runs[0].coverage or f"{optimizer} has no coverage report."
            console = stderr() if as_json else stdout()
            console.print(report, markup=False, soft_wrap=True)
        finish(result)
