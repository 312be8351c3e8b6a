from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pullback.plotting import plot_loss, save_plot
from pullback.problems import Comparison, Evaluation, MissingExtraError, Run


def run_of(
    label: str,
    seed: int,
    losses: list[float],
    seconds: float = 1.0,
    failure: str | None = None,
    targets: tuple[float, ...] = (),
) -> Run:
    history = tuple(Evaluation(seconds * k, 3 * k, loss, None) for k, loss in enumerate(losses))
    steps = 3 * (len(losses) - 1)
    return Run(label, {}, seed, steps, seconds * (len(losses) - 1), 0.0, history, targets, failure)


def of(*runs: Run) -> Comparison:
    return Comparison("test", "accuracy", {"threads": 1}, runs)


def test_the_median_in_its_band_over_seconds_and_steps() -> None:
    figure = plot_loss(of(*(run_of("a", seed, [8.0, 4.0 * 4**seed, 2.0 * 4**seed]) for seed in range(3))))
    seconds, steps = figure.axes
    assert (seconds.get_xlabel(), steps.get_xlabel()) == ("seconds of training", "steps")
    assert seconds.get_ylabel() == "training loss"
    assert seconds.get_yscale() == "log"
    (line,) = steps.get_lines()
    x, y = line.get_xdata(), line.get_ydata()
    assert (x[0], x[-1]) == (0.0, 6.0)
    assert (y[0], y[-1]) == (pytest.approx(8.0), pytest.approx(8.0))
    assert len(steps.collections) == 1
    assert "3 seeds" in figure.get_suptitle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]


def test_one_seed_is_drawn_as_it_was() -> None:
    figure = plot_loss(of(run_of("a", 0, [8.0, 4.0, 2.0], targets=(3.0,))))
    median, target = figure.axes[1].get_lines()
    assert list(median.get_xdata()) == [0.0, 3.0, 6.0]
    assert list(median.get_ydata()) == pytest.approx([8.0, 4.0, 2.0])
    assert list(target.get_ydata()) == [3.0, 3.0]
    assert not figure.axes[1].collections


def test_failures_are_marked_and_clipped_and_do_not_cut_the_median() -> None:
    runs = [
        run_of("a", 0, [1.0, 0.5, 0.2]),
        run_of("a", 1, [1.0, 1e30], failure="broke"),
        run_of("b", 0, [1.0, 1e9], failure="x"),
    ]
    figure = plot_loss(of(*runs))
    median, failed, cross, *_ = figure.axes[1].get_lines()
    assert median.get_xdata()[-1] == 6.0
    assert max(failed.get_ydata()) == 10.0
    assert cross.get_marker() == "x"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b (failed)"]


def test_an_interrupted_run_has_no_cross() -> None:
    figure = plot_loss(of(run_of("a", 0, [1.0, 0.5], failure="interrupted")))
    assert [line.get_marker() for line in figure.axes[0].get_lines()] == ["None"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a (interrupted)"]


def test_times_of_different_orders_get_a_logarithmic_axis() -> None:
    seconds, steps = plot_loss(of(run_of("a", 0, [1.0, 0.5, 0.1]), run_of("b", 0, [1.0, 0.5, 0.1], seconds=50.0))).axes
    assert (seconds.get_xscale(), steps.get_xscale()) == ("log", "linear")
    assert all(line.get_xdata()[0] > 0 for line in seconds.get_lines())


def test_losses_below_zero_get_a_linear_axis() -> None:
    figure = plot_loss(of(run_of("a", 0, [1.0, -1.0, -2.0]), run_of("a", 1, [1.0, -3.0, -4.0])))
    assert figure.axes[0].get_yscale() == "linear"
    assert figure.axes[1].get_lines()[0].get_ydata()[-1] == pytest.approx(-3.0)


def test_nothing_but_failures_at_once_is_still_a_picture(tmp_path: Path) -> None:
    nothing = Run("a", {}, 0, 0, 0.0, 0.0, (), (), "interrupted")
    save_plot(of(nothing, run_of("b", 0, [float("nan")], failure="x")), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'drawing needs matplotlib: pip install "pullback\[plotting\]"'):
        plot_loss(of())
