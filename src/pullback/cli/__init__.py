"""The command line, ``pullback``: a thin face on `pullback.problems`."""

from __future__ import annotations

import sys

# What `pullback.cli.app` imports beside the library itself.
_NEEDED = {"typer", "rich"}


def main() -> None:
    """Runs the command line; the entry point ``pullback``.

    Raises:
        SystemExit: Always: 0 on success, 1 if nothing could be trained or the extra ``cli`` is missing, 2 if
            what was asked for means nothing, 130 after Ctrl-C.
    """
    try:
        from pullback.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        print(f'the command line needs {error.name}: pip install "pullback[cli]"', file=sys.stderr)
        sys.exit(1)
    app(prog_name="pullback")
