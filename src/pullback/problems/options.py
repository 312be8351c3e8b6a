"""The little language of the command line: ``name:key=value,key=value``."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeAlias

from pullback.problems.errors import SpecError, nearest

Scalar: TypeAlias = bool | int | float | str | None
Value: TypeAlias = Scalar | tuple[int | float, ...]

_WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None}


def parse_value(text: str) -> Value:
    """Reads one value: a word, a number, or numbers joined by ``/``.

    The words true, false and none are the Python values; other words stay text. Numbers are finite.

    Args:
        text: What stands after the ``=``, e.g. ``3e-3`` or ``0.9/0.999``.

    Returns:
        The value; ``0.9/0.999`` becomes the tuple ``(0.9, 0.999)``.
    """
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    number = _number(text)
    if number is not None:
        return number
    parts = [_number(part) for part in text.split("/")]
    numbers = tuple(part for part in parts if part is not None)
    return numbers if len(numbers) == len(parts) > 1 else text


def format_value(value: Value) -> str:
    """Writes a value so that `parse_value` reads it back.

    Args:
        value: A value that `parse_value` can return.

    Returns:
        Its shortest text.
    """
    if isinstance(value, tuple):
        return "/".join(format_value(part) for part in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def parse_spec(text: str) -> tuple[str, dict[str, Value]]:
    """Splits ``name:key=value,...`` into the name and its options.

    Args:
        text: For instance ``digits:batch_size=64,width=32``.

    Returns:
        The name and the options, in the order written.

    Raises:
        SpecError: If the name is empty, an option is not ``key=value``, or a key comes twice.
    """
    name, colon, rest = text.strip().partition(":")
    if not name.strip():
        raise SpecError(f"{text!r} has no name; write name or name:key=value,...")
    if colon and not rest.strip():
        raise SpecError(f"{text!r} ends with a colon; write {name}:key=value,... or drop the colon.")
    return name.strip(), parse_options(rest, owner=name.strip())


def parse_options(text: str, owner: str) -> dict[str, Value]:
    """Reads ``key=value,key=value``.

    Args:
        text: The options; empty means none.
        owner: Whose options they are, for the error message.

    Returns:
        The options, in the order written; ``-`` in a key is read as ``_``.

    Raises:
        SpecError: If an option is not ``key=value`` or a key comes twice.
    """
    options: dict[str, Value] = {}
    for token in text.split(",") if text.strip() else []:
        key, equals, value = token.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key or not value.strip():
            raise SpecError(f"{token.strip()!r} is not an option of {owner}; options are written key=value.")
        if key in options:
            raise SpecError(f"{owner} has the option {key!r} twice; keep one.")
        options[key] = parse_value(value)
    return options


def format_spec(name: str, options: Mapping[str, Value]) -> str:
    """Writes ``name:key=value,...`` so that `parse_spec` reads it back.

    Args:
        name: The name.
        options: The options, in the order to write them.

    Returns:
        The text; the bare name if there are no options.
    """
    pairs = ",".join(f"{key}={format_value(value)}" for key, value in options.items())
    return f"{name}:{pairs}" if pairs else name


def check_options(owner: str, options: Mapping[str, Value], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Checks options against the names and types that exist.

    Args:
        owner: Whose options they are, for the error message.
        options: What was written.
        hints: The type of each option that exists: bool, int, float, str, None, a union of these, or Any.

    Returns:
        The options, whole numbers turned to floats where a float is wanted.

    Raises:
        SpecError: If a key is unknown or a value is of the wrong type.
    """
    checked = {}
    for key, value in options.items():
        if key not in hints:
            none = "" if hints else f" {owner} has no options."
            raise SpecError(f"{owner} has no option {key!r}.{none or nearest(key, hints)}")
        checked[key] = _coerce(owner, key, value, hints[key])
    return checked


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    return None


_NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "none"}


def _coerce(owner: str, key: str, value: Value, hint: Any) -> Any:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if any(kind is Any or typing.get_origin(kind) in (tuple, typing.Literal) for kind in kinds):
        return value  # The owner judges.
    if str in kinds and not isinstance(value, tuple):
        return format_value(value)
    wanted = " or ".join(_NOUNS[kind] for kind in kinds if kind in _NOUNS)
    if not wanted:
        raise SpecError(f"{key} of {owner} cannot be written as text; set it from Python.")
    raise SpecError(f"{key} of {owner} must be {wanted}, not {format_value(value)!r}.")
