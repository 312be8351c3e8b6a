"""Problems from the user's own file: ``file.py:function``."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from pullback.problems.entry import Entry
from pullback.problems.errors import DataError, MissingExtraError, SpecError, nearest
from pullback.problems.options import parse_options
from pullback.problems.problem import Problem

_FILE_SPEC = re.compile(r"(?P<file>.+\.py)(?::(?P<function>[^:]*))?(?::(?P<options>.*))?", re.DOTALL)


def is_file_spec(text: str) -> bool:
    """Whether a problem is named by a file rather than by a registered name.

    Args:
        text: What the command line says.

    Returns:
        True for ``file.py``, ``file.py:function`` and ``file.py:function:key=value,...``.
    """
    return _FILE_SPEC.fullmatch(text.strip()) is not None


def load_from_file(text: str, data: Path | None = None) -> Problem:
    """Runs a Python file and calls the function in it that returns a problem.

    Args:
        text: ``file.py:function`` or ``file.py:function:key=value,...``.
        data: The data folder, handed to the function if it has an argument ``data``.

    Returns:
        The problem.

    Raises:
        SpecError: If the file or the function does not exist, either raises, or no `Problem` is returned.
        DataError: If the function raises it.
        MissingExtraError: If the function raises it.
    """
    match = _FILE_SPEC.fullmatch(text.strip())
    assert match is not None, "call is_file_spec first"
    path, name = Path(match["file"]), match["function"]
    if not name:
        raise SpecError(f"{path} does not say which function; write {path}:function.")
    module = _run(path)
    function = getattr(module, name, None)
    if not callable(function):
        # Only what the file itself defines: its imports are not what was meant.
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise SpecError(f"{path} has no function {name!r}.{nearest(name, own)}")
    owner = f"{path}:{name}"
    options = parse_options(match["options"] or "", owner)
    try:
        return Entry(owner, function).make(options, data)
    except (SpecError, DataError, MissingExtraError):
        raise
    except Exception as error:
        raise SpecError(f"{owner} raised {_where(error, path)}") from error


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        neighbours = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise SpecError(f"there is no file {path}.{nearest(path.name, neighbours)}")
    name = f"pullback_problem_{re.sub(r'[^0-9a-zA-Z_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles defined in the file look their module up by name.
    sys.modules[name] = module
    # The file may import its neighbours, as a script may.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SpecError(f"{path} could not be loaded: {_where(error, path)}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _where(error: Exception, path: Path) -> str:
    """Names the error and the last line of the user's file that it passed through."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name
    ]
    if isinstance(error, SyntaxError):
        lines, error = [error.lineno], SyntaxError(error.msg)
    at = f" (line {lines[-1]})" if lines and lines[-1] else ""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}{at}"
