"""``pullback certify``: what is proved, measured and not claimed of a training."""

from __future__ import annotations

from typing import Annotated

import typer

from pullback.cli import options
from pullback.cli.reporting import exit_codes

EXAMPLES = options.examples(
    "pullback certify digits --out certificate",
    "pullback certify wine --optimizer descent:lr=0.1,decay=0.1 --pairs 10",
    "pullback certify diabetes --sizes 40,80,160,320 --steps 100 --json",
    "pullback certify digits:width=16,depth=2 --optimizer layerwise-metric --steps 50",
)


def certify(
    problem: options.ProblemArgument,
    *,
    optimizer: Annotated[
        str,
        typer.Option(
            help="descent:lr=...,decay=... (full-batch steps, whose twins have derived bounds), or one of "
            "[bold]pullback optimizers[/bold] (twins are measured).",
            metavar="NAME",
        ),
    ] = "descent",
    steps: Annotated[
        int | None,
        typer.Option(help="Steps of every training; else 200.", metavar="K", min=1),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of twins at each n.", metavar="P", min=1)] = 3,
    points: Annotated[
        int, typer.Option(help="Places along the path at which rates are measured, both ends too.", metavar="N", min=2)
    ] = 9,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Numbers of samples to train twins on, separated by commas; from three on exponents are fitted.",
            metavar="N,...",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of model, batches and twins.", metavar="K", min=0)] = 0,
    seconds: Annotated[
        float | None, typer.Option(help="Begin no further rate or pair of twins after so long.", metavar="S")
    ] = None,
    threads: options.ThreadsOption = 1,
    data: options.DataOption = None,
    out: Annotated[
        options.OutFolder,
        typer.Option(help="Keep certificate.txt, result.json and pictures in this folder.", metavar="DIR"),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Train, and say what is proved, what only measured and what not claimed: rates, constants, twins, action.

    Ctrl-C keeps what was reached.
    """
    with exit_codes():
        from pullback.certification import Settings
        from pullback.cli.certifying import parse_sizes, run_certify

        settings = Settings(
            optimizer=optimizer,
            steps=steps,
            pairs=pairs,
            points=points,
            sizes=parse_sizes(sizes),
            seed=seed,
            seconds=seconds,
        )
        run_certify(problem, settings, threads=threads, data=data, out=out, as_json=as_json)
