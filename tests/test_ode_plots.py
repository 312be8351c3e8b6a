from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pullback.plotting import plot_density, plot_times, plot_trajectories, save_figure


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([2 * x, torch.full_like(x[:, :1], 2 * 0.6931471805599453)], 1)


def test_trajectories_are_drawn_over_time_and_in_the_plane(tmp_path: Path) -> None:
    times, fine = torch.arange(5.0), torch.linspace(0, 4, 9)
    states = torch.stack([times, times**2], 1)
    fitted = torch.stack([fine, fine**2], 1)
    figure = plot_trajectories(times, states, fine, {"a": fitted, "b": fitted + 1}, ["x", "y"])
    left, right = figure.axes
    assert [len(np.asarray(line.get_xdata())) for line in left.lines] == [5, 9, 9, 5, 9, 9]
    assert np.asarray(right.lines[1].get_ydata())[-1] == 16.0
    assert save_figure(figure, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    alone = plot_trajectories(times, states[:, :1], fine, {"a": fitted[:, :1]}, ["x"])
    assert len(alone.axes) == 1
    with pytest.raises(ValueError, match=r"a has shape \(9, 2\) beside 9 times and 1 names"):
        plot_trajectories(times, states[:, :1], fine, {"a": fitted}, ["x"])


def test_densities_share_their_colours_and_are_those_of_the_flow() -> None:
    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) / 2
    model = Scaled().train()
    figure = plot_density({"one": model, "two": model}, points)
    one, two = (axes.images[0] for axes in figure.axes[1:3])
    # A normal of deviation 1/2 in the plane: 4 / (2 pi) at its top.
    assert float(np.asarray(one.get_array()).max()) == pytest.approx(2 / torch.pi, rel=1e-2)
    assert one.get_clim() == two.get_clim()
    assert model.training
    with pytest.raises(ValueError, match=r"give \(N, 2\)"):
        plot_density({}, torch.zeros(3, 4))


def test_times_and_evaluations_over_the_steps() -> None:
    figure = plot_times({"fixed": {"t1": [1, 1], "evaluations": [20, 26]}, "learned": {"t1": [1], "evaluations": [20]}})
    left, right = figure.axes
    assert list(np.asarray(left.lines[0].get_ydata())) == [1, 1]
    assert list(np.asarray(right.lines[0].get_ydata())) == [20, 26]
    assert list(np.asarray(right.lines[1].get_xdata())) == [1]
