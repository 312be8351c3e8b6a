from __future__ import annotations

from pathlib import Path

import pytest

from pullback.problems import DataError, Problem, SpecError, entries, load_problem, register, registry

FILE = '''
from dataclasses import dataclass
import torch
from torch import nn
from neighbour import NAME
from pullback.problems import DataError, Problem

@dataclass
class Shape:
    rows: int

def make(rows: int = 4, data=None) -> Problem:
    """A problem of one's own."""
    x = torch.ones(Shape(rows).rows, 1)
    return Problem(name=NAME, make_model=lambda seed: nn.Linear(1, 1), train=(x, x), criterion=nn.MSELoss(),
                   test_metric="rmse", description=str(data))

def needs(rows: int) -> Problem:
    return make(rows)

def wrong():
    return 3

def broken():
    return 1 / 0

def no_data():
    raise DataError("there is no moon.")

constant = 7
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text('NAME = "own"\n')
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.setattr("sys.dont_write_bytecode", True)


def test_the_embedded_problems_are_listed() -> None:
    names = [entry.name for entry in entries()]
    assert {"digits", "wine", "breast-cancer", "diabetes", "fashion-mnist", "fashion-mnist-cnn"} <= set(names)
    assert {"function-2d", "sinc", "residual", "rates", "uci", "digits-regression"} <= set(names)
    assert {"spirals", "circles", "moons", "digits-ode"} <= set(names)
    assert names == sorted(names)
    assert all(entry.summary and "\n" not in entry.summary for entry in entries())
    reading = {"cifar10", "fashion-mnist", "fashion-mnist-cnn", "shakespeare", "uci", "lynx-hare", "sunspots"}
    reading |= {"miniboone", "japanese-vowels", "articulary-words", "italy-power", "arrow-head"}
    assert {entry.name for entry in entries() if entry.needs_data} == reading
    assert all("data" not in entry.parameters for entry in entries())


def test_a_new_problem_is_one_decorated_function(line: Problem) -> None:
    @register("my-line")
    def my_line(*, rows: int = 3) -> Problem:
        """A line."""
        return line

    assert load_problem("my-line") is line
    assert load_problem("my-line:rows=5").name == "line:rows=5"
    with pytest.raises(SpecError, match="already"):
        register("my-line")(my_line)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("digit", "Did you mean 'digits'"),
        ("Digits", "Did you mean 'digits'"),
        ("zzzzzzz", "Known: arrow-head"),
        ("wine:widht=3", "Did you mean 'width'"),
        ("wine:width=wide", "width of wine must be a whole number"),
        ("wine:width=0", "1 or more"),
        ("wine:dtype=float23", "Did you mean 'float32'"),
        ("wine:batch_size=0", "batch_size"),
    ],
)
def test_typos_are_refused_with_the_nearest(text: str, part: str) -> None:
    with pytest.raises(SpecError, match=part):
        load_problem(text)


def test_a_problem_of_ones_own(own: Path) -> None:
    problem = load_problem(f"{own}:make")
    assert (problem.name, len(problem.train[0]), problem.description) == ("own", 4, "None")
    problem = load_problem(f"{own}:make:rows=7", data="somewhere")
    assert (problem.name, len(problem.train[0]), problem.description) == ("own:rows=7", 7, "somewhere")


@pytest.mark.parametrize(
    ("function", "part"),
    [
        ("", "which function"),
        (":", "which function"),
        (":mkae", "Did you mean 'make'"),
        (":constant", "no function 'constant'"),
        (":wrong", "returned int"),
        (":broken", r"ZeroDivisionError: division by zero \(line 25\)"),
        (":needs", "needs the option 'rows'"),
        (":make:rwos=1", "Did you mean 'rows'"),
    ],
)
def test_a_file_gone_wrong_is_explained(own: Path, function: str, part: str) -> None:
    with pytest.raises(SpecError, match=part):
        load_problem(f"{own}{function}")


def test_errors_on_purpose_pass_through(own: Path) -> None:
    with pytest.raises(DataError, match="moon"):
        load_problem(f"{own}:no_data")


def test_a_missing_file_gets_the_nearest(own: Path) -> None:
    with pytest.raises(SpecError, match=r"Did you mean 'mine.py'"):
        load_problem(f"{own.parent}/mien.py:make")
    with pytest.raises(SpecError, match="no file"):
        load_problem("nowhere/mine.py:make")


@pytest.mark.parametrize(
    ("text", "part"),
    [("x = 1\ndef f(:\n", r"SyntaxError: .* \(line 2\)"), ("import nonsuch", "ModuleNotFoundError")],
)
def test_a_file_that_does_not_load_is_explained(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(SpecError, match=part):
        load_problem(f"{path}:f")


def test_words_that_an_option_may_be() -> None:
    found = {entry.name: entry.choices for entry in entries()}
    assert found["lynx-hare"] == {"field": ("lotka-volterra", "neural")}
    assert found["japanese-vowels"] == {"field": ("driven", "cde")}
    assert found["arrow-head"] == {"field": ("cde", "driven")}
    assert found["wine"] == {}
