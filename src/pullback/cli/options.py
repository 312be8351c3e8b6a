"""Arguments that several commands share, and how their examples are written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer


def examples(*lines: str) -> str:
    """Formats the examples at the end of a command's help.

    Args:
        lines: Command lines, each at most 76 characters so that it stays on its line.

    Returns:
        Text for typer's ``epilog``.
    """
    # A blank line between paragraphs is how rich's help keeps lines apart; "[" would begin its markup.
    return "\n\n".join(("[bold]Examples[/bold]", *(line.replace("[", r"\[") for line in lines)))


ProblemArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        help="A name from [bold]pullback problems[/bold], with options NAME:key=value,..., "
        "or your own file.py:function that returns a Problem.",
        show_default=False,
    ),
]
SecondsOption: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Train each run this many seconds; evaluations are not counted.", metavar="S"),
]
StepsOption: TypeAlias = Annotated[int | None, typer.Option(help="Train each run this many steps.", metavar="K")]
EpochsOption: TypeAlias = Annotated[
    int | None, typer.Option(help="Train each run this many passes over the data.", metavar="E")
]
TargetOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Training losses to report steps and seconds to, separated by commas; else the problem's own.",
        metavar="L,...",
    ),
]
TargetValidationOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Levels of the test metric on the validation data to report steps and seconds to, separated by commas; "
        "loss=L for the loss on them.",
        metavar="V,...",
    ),
]
StopOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--stop",
        help="End each run once it has reached all targets stated; of the problem's own, the lowest.",
    ),
]
SeedsOption: TypeAlias = Annotated[
    int, typer.Option(help="How many seeds: initial models and batch orders.", metavar="N", min=1)
]
ThreadsOption: TypeAlias = Annotated[int, typer.Option(help="Threads torch may use.", metavar="T", min=1)]
DataOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="Data folder, for the problems that read one.", metavar="DIR", envvar="PULLBACK_DATA"),
]
OutFolder: TypeAlias = Path | None
OutOption: TypeAlias = Annotated[
    OutFolder,
    typer.Option(
        help="Keep result.json and pictures in this folder: loss.png; of neural ODEs times.png, and "
        "trajectories.png or density.png.",
        metavar="DIR",
    ),
]
JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
]
