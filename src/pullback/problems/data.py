"""Where the data folder is."""

from __future__ import annotations

import os
from pathlib import Path

from pullback.problems.errors import DataError


def data_folder(owner: str, data: Path | None, source: str = "") -> Path:
    """Finds the data folder.

    Args:
        owner: The problem that asks, for the error message.
        data: The folder, or None for the environment variable PULLBACK_DATA.
        source: Where the data come from and how they are laid out, as the end of a sentence.

    Returns:
        The folder; it exists.

    Raises:
        DataError: If no folder is named, or there is none of that name.
    """
    named = data or Path(os.environ.get("PULLBACK_DATA", ""))
    end = f"; {source}" if source else "."
    if named == Path():
        raise DataError(f"{owner} reads its data from a folder; name it with --data DIR or in PULLBACK_DATA{end}")
    if not named.is_dir():
        raise DataError(f"there is no data folder {named}; name one with --data DIR or in PULLBACK_DATA{end}")
    return named
