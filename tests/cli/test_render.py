from __future__ import annotations

import io

import pytest
from rich.console import Console

from pullback.cli import progress as progress_module
from pullback.cli.progress import RunsBar
from pullback.cli.render import number, render
from pullback.problems import Comparison, Evaluation, Progress, Run


def comparison() -> Comparison:
    def make(seed: int, options: dict[str, float], loss: float, failure: str | None = None) -> Run:
        history = (Evaluation(0.0, 0, 2.0, 0.1), Evaluation(0.5, 100, loss, 0.9))
        return Run("adam", dict(options), seed, 100, 0.5, 0.5, history, (0.1, 0.01), failure)

    long = {"lr": 0.003, "weight_decay": 0.01, "eps": 1e-9}
    runs = [
        make(0, {}, 0.02),
        make(0, long, 0.2),
        make(1, {}, 0.004),
        make(1, long, 1.5, failure="the [bold]end"),
    ]
    return Comparison("digits", "accuracy", {"threads": 2}, tuple(runs))


@pytest.mark.parametrize("width", [160, 100, 80, 60, 40, 24])
def test_the_table_fits_and_says_the_same_at_any_width(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(comparison(), console))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    words = text.split()
    for word in (
        "adam",
        "digits,",
        "accuracy",
        "0.012",
        "[0.008,",
        "0.016]",
        "ms/step",
        "(2/2)",
        "(1/2)",
        "(0/2)",
        "1",
    ):
        assert word in words
    assert "the [bold]end" in " ".join(words)


def test_medians_and_the_worst_of_steps_and_seconds() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(comparison(), console))
    first, second = console.file.getvalue().splitlines()[3:5]  # type: ignore[attr-defined]
    # 0.02 and 0.004 at step 100: both below 0.1, one below 0.01, so that the median run is never below.
    assert "100, 100  0.5, 0.5 (2/2)" in " ".join(first.split()).replace(" 0.5,", "  0.5,")
    assert "- (1/2)" in first
    assert "0.02" in first
    assert "- (0/2)" in second


def test_columns_line_up() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(comparison(), console))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    header, first, second = lines[2:5]
    for title in ("loss", "accuracy", "steps", "ms/step", "seconds"):
        end = header.index(title) + len(title)
        assert all(row[end - 1] != " " for row in (first, second))
        assert all(row[end] == " " for row in (first, second))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.01234, "0.0123"),
        (4.2e-7, "4.20e-7"),
        (123456.0, "1.23e5"),
        (1.0, "1"),
        (-2e-5, "-2.00e-5"),
    ],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def step(seed: int, fraction: float) -> Progress:
    return Progress("adam:lr=1", seed, 5, 0.1, fraction, 0.25)


def test_the_bar_waits_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with RunsBar(console, total=2) as bar:
        bar(step(0, 0.5))
        bar(step(0, 1.0))
        assert console.file.getvalue() == ""  # type: ignore[attr-defined]
        now[0] = 2.5
        bar(step(1, 0.5))
        bar._bar.refresh()
        text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2/2 adam:lr=1 seed 1 loss 0.25" in text
    assert "75%" in text


def test_the_bar_and_the_table_say_what_ode_blocks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with RunsBar(console, total=1) as bar:
        now[0] = 2.5
        bar(Progress("adam", 0, 5, 0.1, 0.5, 0.113, 45, 0.79123))
        bar._bar.refresh()
        text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "seed 0 loss 0.113  nfe 45  t1 0.791" in text
    history = (Evaluation(0.0, 0, 2.0, 0.1, nfe=20, t1=1.0), Evaluation(0.5, 100, 0.1, 0.9, nfe=45, t1=0.79123))
    run = Run("adam", {}, 0, 100, 0.5, 0.5, history)
    plain = Console(file=io.StringIO(), width=120)
    plain.print(render(Comparison("circles", "nll", {"threads": 1}, (run,)), plain))
    header, row = plain.file.getvalue().splitlines()[-2:]  # type: ignore[attr-defined]
    assert header.split()[-4:] == ["nfe", "t1", "ms/step", "seconds"]
    assert row.split()[-4:-2] == ["45", "0.791"]
    assert "nfe" not in render_text(comparison())


def render_text(result: Comparison) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render(result, console))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_no_bar_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=120)
    with RunsBar(console, total=1) as bar:
        now[0] = 5.0
        bar(step(0, 0.5))
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
