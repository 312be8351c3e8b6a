from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pullback.plotting import plot_density, plot_times, plot_trajectories, save_figure, save_ode
from pullback.problems import Budget, Progress, compare, load_problem
from pullback.problems.trajectories import Trajectories


class Times(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return x[:, :1] * x[:, 1:]


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([2 * x, torch.full_like(x[:, :1], 2 * 0.6931471805599453)], 1)


def test_trajectories_are_drawn_over_time_and_in_the_plane(tmp_path: Path) -> None:
    times, fine = torch.arange(5.0), torch.linspace(0, 4, 9)
    states = torch.stack([times, times**2], 1)
    fitted = torch.stack([fine, fine**2], 1)
    figure = plot_trajectories(times, states, fine, {"a": fitted, "b": fitted + 1}, ["x", "y"])
    left, right = figure.axes
    assert [len(np.asarray(line.get_xdata())) for line in left.lines] == [
        5,
        9,
        9,
        5,
        9,
        9,
        0,
        0,
    ]  # the last two are for the legend
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
    fixed, learned = {"t1": [1, 1], "nfe": [20, 26]}, {"t1": [1, 0.9], "nfe": [20, 14], "step": [0, 5]}
    figure = plot_times({"fixed": fixed, "learned": learned})
    left, right = figure.axes
    assert list(np.asarray(left.lines[0].get_ydata())) == [1, 1]
    assert list(np.asarray(right.lines[0].get_ydata())) == [20, 26]
    assert list(np.asarray(right.lines[0].get_xdata())) == [1, 2]
    assert list(np.asarray(right.lines[1].get_xdata())) == [0, 5]
    assert len(plot_times({"fixed": fixed}).axes) == 1


def test_runs_are_drawn_by_what_their_problem_shows(tmp_path: Path) -> None:
    def pictures(text: str, optimizer: str, steps: int) -> list[str]:
        models: dict[str, nn.Module] = {}

        def keep(progress: Progress) -> None:
            assert progress.model is not None
            models[progress.label] = progress.model

        problem = load_problem(text)
        result = compare(problem, optimizer, seeds=1, budget=Budget(steps=steps), progress=keep)
        return [path.name for path in save_ode(problem.for_seed(0), result, models, tmp_path)]

    assert pictures("spirals:trajectories=2,points=4,width=4,horizon=0.3,solver=rk4", "adam:lr=1e-2", 1) == [
        "trajectories.png"
    ]
    small = "circles:points=16,width=4,depth=1,learn_t1=true,tolerance=1e-3"
    assert pictures(small, "adam:lr=1e-2", 2) == ["times.png", "density.png"]
    assert pictures("wine", "adam", 1) == []


def test_fitted_pieces_are_apart() -> None:
    shown = Trajectories(
        times=torch.zeros(1, dtype=torch.float64),
        observed=torch.zeros(1, 1, dtype=torch.float64),
        pieces=torch.tensor([[2.0], [3.0]], dtype=torch.float64),
        begins=torch.tensor([10.0, 20.0], dtype=torch.float64),
        lengths=torch.tensor([1.0, 4.0], dtype=torch.float64),
        names=("x",),
        view=torch.exp,
    )
    model = Times().train()
    fine, fitted = shown.fine, shown.fitted(model)
    assert model.training
    assert fitted.shape == (len(fine), 1)
    first, second = (part[:-1] for part in fine.chunk(2))
    assert (float(first[0]), float(first[-1]), float(second[0]), float(second[-1])) == (10.0, 11.0, 20.0, 24.0)
    ends = torch.isnan(fine)
    assert int(ends.sum()) == 2
    assert torch.equal(torch.isnan(fitted[:, 0]), ends)
    one, two = (part[:-1, 0] for part in fitted.chunk(2))
    torch.testing.assert_close(one, (2 * (first - 10)).exp())
    torch.testing.assert_close(two, (3 * (second - 20)).exp())
