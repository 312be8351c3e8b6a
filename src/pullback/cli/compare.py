"""``pullback compare``: several optimizers on one problem."""

from __future__ import annotations

from typing import Annotated

import typer

from pullback.cli import options
from pullback.cli.reporting import exit_codes

EXAMPLES = options.examples(
    "pullback compare digits",
    "pullback compare digits --optimizers adam:lr=3e-3,muon:lr=0.02 --out race",
    "pullback compare wine --optimizers gauss-newton:damping=0.1,lr=0.5,lbfgs",
    "pullback compare function-2d:depth=9 --steps 100 --target 1e-6,1e-10",
    "pullback compare fashion-mnist:rows=2000 --data DIR --seconds 20 --seeds 5",
    "pullback compare cifar10 --data DIR --target-validation 0.4,loss=1.6 --stop",
)


def compare(
    problem: options.ProblemArgument,
    *,
    optimizers: Annotated[
        str,
        typer.Option(
            help="Separated by commas, as are the options of each: A:key=value,key=value,B,C:key=value.",
            metavar="A,B,...",
        ),
    ] = "layerwise-metric,gauss-newton,adam:lr=3e-3,sgd:lr=0.1",
    seconds: options.SecondsOption = None,
    steps: options.StepsOption = None,
    epochs: options.EpochsOption = None,
    target: options.TargetOption = None,
    target_validation: options.TargetValidationOption = None,
    stop: options.StopOption = False,
    seeds: options.SeedsOption = 3,
    threads: options.ThreadsOption = 1,
    data: options.DataOption = None,
    out: options.OutOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Race optimizers on a problem: same initial models, same batches, interleaved seed by seed.

    Give at most one of --seconds, --steps and --epochs. Ctrl-C keeps what was reached.
    """
    with exit_codes():
        from pullback.cli.race import finish, make_budget, parse_targets, race
        from pullback.problems import parse_optimizers

        result = race(
            problem,
            parse_optimizers(optimizers),
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
        finish(result)
