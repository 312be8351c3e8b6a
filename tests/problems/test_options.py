from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pullback.problems import SpecError
from pullback.problems.options import (
    check_options,
    format_spec,
    format_value,
    parse_options,
    parse_spec,
    parse_value,
)

numbers = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
words = st.from_regex(r"[a-z_]{4,12}", fullmatch=True).filter(lambda word: word not in {"true", "false", "none"})
values = st.none() | st.booleans() | numbers | words | st.lists(numbers, min_size=2, max_size=3).map(tuple)
keys = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("3e-3", 0.003),
        ("-1.5", -1.5),
        ("true", True),
        ("False", False),
        ("none", None),
        ("strong_wolfe", "strong_wolfe"),
        ("0.9/0.999", (0.9, 0.999)),
        ("a/b", "a/b"),
        ("nan", "nan"),
        ("1e999", "1e999"),
        (" 7 ", 7),
    ],
)
def test_values_are_read_as_what_they_look_like(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@given(values)
def test_a_written_value_is_read_back(value: Any) -> None:
    assert parse_value(format_value(value)) == value


@given(keys, st.dictionaries(keys, values, max_size=4))
def test_a_written_spec_is_read_back(name: str, options: dict[str, Any]) -> None:
    assert parse_spec(format_spec(name, options)) == (name, options)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no name"),
        (":a=1", "no name"),
        ("digits:", "colon"),
        ("digits:a", "key=value"),
        ("digits:a=", "key=value"),
        ("digits:=1", "key=value"),
        ("digits:a=1,a=2", "twice"),
        ("digits:a=1,", "key=value"),
    ],
)
def test_nonsense_is_refused_with_the_reason(text: str, part: str) -> None:
    with pytest.raises(SpecError, match=part):
        parse_spec(text)


def test_a_dash_in_a_key_is_an_underscore() -> None:
    assert parse_options("batch-size=3", "digits") == {"batch_size": 3}


def test_whole_numbers_serve_as_floats_and_numbers_as_words() -> None:
    hints = {"lr": float, "tag": str, "any": Any, "rate": float | Tensor}
    checked = check_options("x", {"lr": 1, "tag": 5, "any": (1, 2), "rate": 2}, hints)
    assert checked == {"lr": 1.0, "tag": "5", "any": (1, 2), "rate": 2.0}
    assert type(checked["lr"]) is float


@pytest.mark.parametrize(
    ("hint", "value", "part"),
    [
        (int, "many", "a whole number"),
        (int, 1.5, "a whole number"),
        (int, True, "a whole number"),
        (bool, 1, "true or false"),
        (float | None, "x", "a number or none"),
        (float | Tensor, "x", "a number, not 'x'"),
        (Tensor, 1, "from Python"),
        (str, (1, 2), "a word"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(hint: Any, value: Any, part: str) -> None:
    with pytest.raises(SpecError, match=part):
        check_options("x", {"key": value}, {"key": hint})


def test_opaque_hints_are_left_to_the_owner() -> None:
    assert check_options("x", {"key": "b"}, {"key": Literal["a"]}) == {"key": "b"}


def test_an_unknown_key_gets_the_nearest() -> None:
    with pytest.raises(SpecError, match="Did you mean 'batch_size'"):
        check_options("digits", {"batchsize": 1}, {"batch_size": int, "width": int})
    with pytest.raises(SpecError, match="no options"):
        check_options("plain", {"a": 1}, {})
