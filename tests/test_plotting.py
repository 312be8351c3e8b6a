from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pullback.plotting import plot_loss, plot_sweep, save_plot, save_sweep
from pullback.problems import Comparison, Evaluation, Measure, MissingExtraError, Run, Sweep, parse_grid


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


def swept(by: str, grid: str, values: dict[str, list[float]], failing: tuple[str, ...] = ()) -> Sweep:
    """Runs whose final loss, or one minus whose final accuracy, is given for each label."""
    runs = []
    for spec in (spec for part in parse_grid(grid) for spec in part.specs()):
        for seed, value in enumerate(values.get(spec.label, [])):
            history = (Evaluation(0.0, 0, 9.0, 0.0), Evaluation(1.0, 5, value, 1 - value))
            failure = "broke" if spec.label in failing else None
            runs.append(Run(spec.name, spec.options, seed, 5, 1.0, 1.0, history, (), failure))
    return Sweep(of(*runs), tuple(parse_grid(grid)), Measure(by, "loss" if by == "loss" else "accuracy"))


MAP = "sgd:lr=0.1|1|10,momentum=0|0.9,adam:lr=1e-3|1e-2|1"
LOSSES = {
    "sgd:lr=0.1,momentum=0": [1.0, 2.0, 3.0],
    "sgd:lr=0.1,momentum=0.9": [0.01, 0.02, 0.03],
    "sgd:lr=1,momentum=0": [8.0, 99.0, 7.0],
    "sgd:lr=1,momentum=0.9": [1.0, 1.0, 1.0],
    "sgd:lr=10,momentum=0": [99.0, 99.0, 5.0],
    "adam:lr=0.001": [0.5, 0.4, 0.6],
    "adam:lr=0.01": [0.005, 0.004, 99.0],
    "adam:lr=1": [99.0, 99.0, 99.0],
}


def test_two_options_are_a_map() -> None:
    figure = plot_sweep(swept("loss", MAP, LOSSES, failing=("sgd:lr=1,momentum=0.9",)))["sgd"]
    ax, bar = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("lr", "momentum")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.1", "1", "10"]
    assert bar.get_ylabel() == "training loss"
    words = {text.get_position(): text.get_text() for text in ax.texts}
    assert words[0, 0] == "2"
    assert words[0, 1] == "0.02"
    assert words[1, 0] == "8\n1/3 failed"
    assert words[1, 1] == "3/3 failed"
    assert words[2, 0] == "2/3 failed"
    assert words[2, 1] == ""
    boxes = {patch.get_xy(): patch for patch in ax.patches}
    assert boxes[0.5, 0.5].get_hatch() == boxes[1.5, -0.5].get_hatch() == "//"
    assert boxes[1.5, 0.5].get_hatch() is None
    # The better the brighter, and a frame around the best.
    assert sum(boxes[-0.5, 0.5].get_facecolor()[:3]) > sum(boxes[0.5, -0.5].get_facecolor()[:3])
    assert (-0.46, 0.54) in {(round(x, 2), round(y, 2)) for x, y in boxes}
    assert "median of 3 seeds" in figure.get_suptitle()


def test_one_option_is_a_line_and_all_pictures_have_one_scale() -> None:
    figures = plot_sweep(swept("loss", MAP, LOSSES))
    (ax,) = figures["adam"].axes
    assert ax.get_xlabel() == "lr"
    assert ax.get_yscale() == "log"
    (line,) = ax.get_lines()
    assert list(line.get_ydata())[:2] == [0.5, 0.005]
    assert str(line.get_ydata()[2]) == "nan"
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["1/3 failed", "3/3 failed"]
    assert [patch.get_hatch() for patch in ax.patches] == ["//"]
    # The map's colours reach from the best median of both to the worst, the line's axis a little further.
    low, high = figures["sgd"].axes[1].get_ylim()
    assert (low, high) == pytest.approx((0.005, 8.0))
    assert ax.get_ylim()[0] < low < high < ax.get_ylim()[1]


def test_accuracies_are_linear_and_the_best_over_further_options_is_drawn() -> None:
    grid = "sgd:lr=0.1|1,momentum=0|0.9,nesterov=false|true"
    values = {f"sgd:lr={lr},momentum={m},nesterov={n}": [0.5] for lr in ("0.1", "1") for m in ("0", "0.9") for n in
              ("false", "true")}  # fmt: skip
    values["sgd:lr=1,momentum=0.9,nesterov=true"] = [0.25]
    figure = plot_sweep(swept("test", grid, values))["sgd"]
    ax, bar = figure.axes
    assert {text.get_position(): text.get_text() for text in ax.texts}[1, 1] == "0.75"
    assert bar.get_ylim() == (0.5, 0.75)
    assert "best over nesterov, test accuracy, one seed" in figure.get_suptitle()


def test_names_of_options_stay_clear_of_their_values() -> None:
    figure = plot_sweep(swept("loss", "sgd:lr=0.1|1,weight_decay=0|0.001|0.01", {}))["sgd"]
    figure.draw_without_rendering()
    ax = figure.axes[0]
    values = min(tick.get_window_extent().x0 for tick in ax.get_yticklabels())
    assert ax.yaxis.label.get_window_extent().x1 < values - 0.08 * figure.dpi


def test_the_title_has_the_options_with_one_value_and_is_parted_if_long() -> None:
    short, long = ("sgd:lr=0.1|1,momentum=0.9", "sgd:lr=0.1|1,momentum=0.9,dampening=0.125,nesterov=false")
    (figure,) = plot_sweep(swept("loss", short, {})).values()
    assert figure.get_suptitle().splitlines()[0].endswith(": sgd:momentum=0.9")
    (figure,) = plot_sweep(swept("loss", long, {})).values()
    assert figure.get_suptitle().splitlines()[1] == "sgd:momentum=0.9,dampening=0.125,nesterov=false"


def test_a_sweep_without_runs_or_options_is_still_a_picture(tmp_path: Path) -> None:
    paths = save_sweep(swept("loss", "sgd:lr=0.1|1,momentum=0|0.9,adam", {}), tmp_path)
    assert [path.name for path in paths] == ["sweep-sgd.png", "sweep-adam.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    (ax,) = plot_sweep(swept("loss", "adam", {"adam": [0.5, 0.6]}))["adam"].axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["adam"]
