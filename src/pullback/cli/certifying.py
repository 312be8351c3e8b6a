"""What `certify` does: run, show, keep."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console

from pullback.certification import Certificate, Settings, certify
from pullback.cli.progress import Bar
from pullback.cli.reporting import stderr, stdout
from pullback.errors import PullbackError
from pullback.plotting import require_matplotlib, save_certificate
from pullback.problems import SpecError, load_problem
from pullback.problems.options import parse_value


def parse_sizes(text: str | None) -> tuple[int, ...] | None:
    """Reads ``--sizes``.

    Args:
        text: Whole numbers separated by commas, or None.

    Returns:
        The numbers as written; None if nothing is stated.

    Raises:
        SpecError: If one is no whole number.
    """
    if text is None:
        return None
    values = [parse_value(part) for part in text.split(",")]
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        raise SpecError(f"--sizes is {text!r}; write whole numbers separated by commas, such as 100,200,400.")
    return tuple(numbers)


class PhasesBar(Bar):
    """A progress bar by phase; the observer that a certificate calls.

    Args:
        console: Where to draw.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console, remaining=False)
        self._phase = ""

    def __call__(self, phase: str, share: float, about: str) -> None:
        """Takes note of progress.

        Args:
            phase: What is being done.
            share: The part of it that is done.
            about: A few words.
        """
        if phase != self._phase or self.due():
            self._phase = phase
            self.show(share, f"{phase} {about}".strip())


def run_certify(
    problem: str, settings: Settings, *, threads: int, data: Path | None, out: Path | None, as_json: bool
) -> Certificate:
    """Makes a certificate, prints it and keeps it.

    Args:
        problem: What the command line calls the problem.
        settings: The options.
        threads: Threads that torch may use.
        data: The data folder.
        out: Folder for ``certificate.txt``, ``result.json`` and pictures, made if need be.
        as_json: Whether to print JSON rather than text.

    Returns:
        The certificate.

    Raises:
        PullbackError: If what was asked for means nothing, or a training is not finite.
        KeyboardInterrupt: After Ctrl-C, once what was reached is printed and kept.
    """
    if out is not None:
        _prepare(out)
    loaded = load_problem(problem, data)
    with PhasesBar(stderr()) as bar:
        found = certify(loaded, settings, threads=threads, progress=bar)
    if as_json:
        typer.echo(json.dumps(found.to_json(), allow_nan=False))
    else:
        stdout().print(str(found), markup=False, soft_wrap=True)
    if out is not None:
        _keep(found, out)
    if found.ended == "interrupted":
        raise KeyboardInterrupt
    return found


def _prepare(out: Path) -> None:
    """Finds out before the run what would go wrong after it."""
    require_matplotlib()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PullbackError(f"the folder {out} cannot be made ({error.strerror}); choose another --out.") from error


def _keep(found: Certificate, out: Path) -> None:
    text, record = out / "certificate.txt", out / "result.json"
    try:
        text.write_text(f"{found}\n", encoding="utf-8")
        record.write_text(json.dumps(found.to_json(), allow_nan=False, indent=1) + "\n", encoding="utf-8")
        pictures = save_certificate(found, out)
    except OSError as error:
        raise PullbackError(f"{out} cannot be written to ({error.strerror}); choose another --out.") from error
    names = ", ".join(path.name for path in (text, record, *pictures))
    stderr().print(f"kept {names} in {out}", markup=False, soft_wrap=True)
