"""Pictures of twins and of action hold the numbers they were given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pullback.action import ActionRecorder
from pullback.plotting import plot_action, plot_twins, save_action, save_twins
from pullback.stability import Ridge, scaling

f64 = torch.float64


def test_twins_are_drawn_with_their_bounds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(90, 3, dtype=f64), torch.randn(90, dtype=f64)
    found = scaling(Ridge(0.5, data_scale=1.0), (x[:60], y[:60]), [15, 30, 60], 3, spare=(x[60:], y[60:]))
    figure = plot_twins(found, "ridge")
    left, right = figure.axes
    assert left.get_xscale() == left.get_yscale() == right.get_yscale() == "log"
    *_, measured, right_bound, naive = left.get_lines()
    assert list(measured.get_xdata()) == [15, 30, 60]
    middle = [sorted(t.distance for t in r.pairs)[1] for r in found.reports]
    assert list(measured.get_ydata()) == pytest.approx(middle)
    promised = [sorted(t.bounds[0].distance for t in r.pairs)[1] for r in found.reports]
    assert list(right_bound.get_ydata()) == pytest.approx(promised)
    assert right_bound.get_label() == "one rate: proved"
    assert right_bound.get_linestyle() == "-"
    assert "not a bound here" in naive.get_label()
    assert naive.get_linestyle() != "-"
    assert save_twins(found, tmp_path / "twins.png", "ridge").stat().st_size > 10_000


def test_action_is_stacked_by_module_and_summed_by_defect(tmp_path: Path) -> None:
    model, criterion = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double(), nn.MSELoss()
    x, y = torch.randn(8, 2, dtype=f64), torch.randn(8, 1, dtype=f64)
    opt, recorder = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), ActionRecorder(model, criterion, (x, y))
    for _ in range(4):
        opt.zero_grad()
        criterion(model(x[:4]), y[:4]).backward()
        with recorder.observe(h=0.1):
            opt.step()
    left, right = plot_action(recorder.steps, "SGD").axes
    tops = [bar.get_y() + bar.get_height() for bar in left.containers[-1]]
    assert tops == pytest.approx([step.total for step in recorder.steps])
    lines = {line.get_label(): line.get_ydata() for line in right.get_lines()}
    assert set(lines) == {"whole", "momentum", "momentum x noise", "noise"}
    assert lines["whole"][-1] == pytest.approx(recorder.action.total)
    assert lines["momentum"][-1] + lines["momentum x noise"][-1] + lines["noise"][-1] == pytest.approx(
        lines["whole"][-1]
    )
    assert save_action(recorder.steps, tmp_path / "action.png", "SGD").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no step"):
        plot_action([], "none")
