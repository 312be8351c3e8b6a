"""``pullback problems`` and ``pullback optimizers``: what there is, and its options."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from pullback.cli import options
from pullback.cli.reporting import exit_codes, stdout

PROBLEMS_EXAMPLES = options.examples("pullback problems", "pullback train digits:width=32,batch_size=64")
OPTIMIZERS_EXAMPLES = options.examples(
    "pullback optimizers", "pullback train digits --optimizer adam:lr=3e-3,betas=0.9/0.99"
)


def problems() -> None:
    """List the problems and their options."""
    with exit_codes():
        from pullback.problems import entries

        for entry in entries():
            note = "Reads a data folder: --data DIR or PULLBACK_DATA." if entry.needs_data else ""
            defaults = {key: parameter.default for key, parameter in entry.parameters.items()}
            words = {key: "|".join(choices) for key, choices in entry.choices.items()}
            _print(entry.name, entry.summary, note, _options((defaults | words).items()))
        stdout().print(
            "Your own: [bold]file.py:function[/bold], which returns a Problem; its arguments are its options."
        )


def optimizers() -> None:
    """List the optimizers and their options."""
    with exit_codes():
        from pullback.problems import MissingExtraError, optimizer_entries

        for entry in optimizer_entries():
            try:
                listed = _options((key, option.default) for key, option in entry.options().items())
            except MissingExtraError as error:
                listed = f"{error}"
            _print(entry.name, entry.summary, "", listed)


def _options(defaults: Iterable[tuple[str, Any]]) -> str:
    from pullback.problems.options import format_value

    return ", ".join(f"{key}={format_value(default)}" for key, default in defaults)


def _print(name: str, summary: str, note: str, listed: str) -> None:
    console = stdout()
    body: list[RenderableType] = [Text(summary), *([Text(note)] if note else []), Text(listed, style="dim")]
    console.print(Text(name, style="bold"))
    for part in body:
        console.print(Padding(part, (0, 0, 0, 4), expand=False))
