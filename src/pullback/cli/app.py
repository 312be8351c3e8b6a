"""The commands, gathered: a new one is a file and a line here."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from pullback.cli import certify, compare, flow, listing, sweep, train

app = typer.Typer(
    name="pullback",
    no_args_is_help=True,
    rich_markup_mode="rich",
    # Plain tracebacks: a boxed one with local variables prints whole tensors.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(installed_version("pullback"))
        raise typer.Exit


@app.callback(epilog="Begin with [bold]pullback compare digits[/bold].")
def pullback(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Train PyTorch models with the geometry they really have, and race optimizers on real problems."""


app.command("problems", epilog=listing.PROBLEMS_EXAMPLES)(listing.problems)
app.command("optimizers", epilog=listing.OPTIMIZERS_EXAMPLES)(listing.optimizers)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("sweep", epilog=sweep.EXAMPLES)(sweep.sweep)
app.command("flow", epilog=flow.EXAMPLES)(flow.flow)
app.command("certify", epilog=certify.EXAMPLES)(certify.certify)
