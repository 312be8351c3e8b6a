"""``pullback sweep``: optimizers over grids of their options."""

from __future__ import annotations

from typing import Annotated

import typer

from pullback.cli import options
from pullback.cli.reporting import exit_codes

EXAMPLES = options.examples(
    'pullback sweep digits --grid "sgd:lr=0.1|1,momentum=0|0.9" --out map',
    'pullback sweep wine --grid "adam:lr=1e-3|1e-2|1e-1,sgd:lr=0.1|1" --steps 50',
    'pullback sweep digits --grid "adam:betas=0.9/0.99|0.9/0.999" --metric test',
    'pullback sweep cifar10 --data DIR --grid "layerwise-metric:samples=1|2"',
)


def sweep(
    problem: options.ProblemArgument,
    *,
    grid: Annotated[
        str,
        typer.Option(
            help="Like --optimizers of compare, with | between the values of an option: "
            "A:key=1|2,key=3|4,B:key=5|6. Quote it, the shell has its own use for |.",
            metavar="A:key=V|V,...",
            show_default=False,
        ),
    ],
    seconds: options.SecondsOption = None,
    steps: options.StepsOption = None,
    epochs: options.EpochsOption = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What is best at the end of a run: loss (training), validation or test (the test metric), or "
            "validation-loss. Without it validation where there are such data, else loss.",
            metavar="M",
        ),
    ] = None,
    seeds: options.SeedsOption = 3,
    threads: options.ThreadsOption = 1,
    data: options.DataOption = None,
    out: Annotated[
        options.OutFolder, typer.Option(help="Keep result.json and a map per optimizer there.", metavar="DIR")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Run every combination of options: same initial models, same batches, interleaved seed by seed.

    Give at most one of --seconds, --steps and --epochs. Ctrl-C keeps what was reached.
    """
    with exit_codes():
        from pullback.cli.race import finish, make_budget, run_sweep
        from pullback.problems import parse_grid

        result = run_sweep(
            problem,
            parse_grid(grid),
            budget=make_budget(seconds, steps, epochs),
            metric=metric,
            seeds=seeds,
            threads=threads,
            data=data,
            out=out,
            as_json=as_json,
        )
        finish(result.comparison)
