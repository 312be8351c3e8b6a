from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from pullback.problems import Budget, Problem, SpecError, compare, load_problem, run
from pullback.problems.kinetics import RATES, Reactions, rate_error
from pullback.problems.preparation import standardise
from pullback.problems.synthetic import ResidualBlock


def parameters(problem: Problem, seed: int = 0) -> list[torch.Tensor]:
    return [p.detach() for p in problem.make_model(seed).parameters()]


def test_function_2d_is_what_it_says() -> None:
    problem = load_problem("function-2d")
    x, y = problem.train
    assert (x.shape, y.shape, x.dtype, problem.batch_size) == ((256, 2), (256, 1), torch.float64, None)
    assert x.abs().max() <= 1
    expected = [math.sin(4 * math.pi * a) * math.cos(3 * math.pi * b) + a * a / 2 for a, b in x.tolist()]
    torch.testing.assert_close(y.squeeze(1), torch.tensor(expected, dtype=torch.float64))
    model = problem.make_model(3)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [(20, 2), *[(20, 20)] * 7, (1, 20)]
    assert all(not layer.bias.any() for layer in layers)
    hidden = torch.cat([layer.weight.flatten() for layer in layers[1:-1]])
    assert hidden.std().item() == pytest.approx(20**-0.5, rel=0.05)
    outputs = model(x)
    assert problem.loss(outputs, y).item() == pytest.approx(0.5 * (outputs - y).square().mean().item(), rel=1e-14)


@pytest.mark.parametrize(("depth", "count"), [(1, 3), (2, 81), (3, 501)])
def test_function_2d_counts_linear_layers(depth: int, count: int) -> None:
    assert sum(p.numel() for p in parameters(load_problem(f"function-2d:depth={depth}"))) == count


@pytest.mark.parametrize("name", ["function-2d", "residual", "rates"])
def test_the_seed_draws_data_and_weights(name: str) -> None:
    problem = load_problem(name)
    again = load_problem(name)
    for seed in (0, 1):
        assert torch.equal(problem.for_seed(seed).train[1], again.for_seed(seed).train[1])
        assert all(map(torch.equal, parameters(problem, seed), parameters(again, seed)))
    assert torch.equal(problem.train[0], problem.for_seed(0).train[0])
    assert not torch.equal(problem.train[0], problem.for_seed(1).train[0])
    assert not torch.equal(parameters(problem, 0)[0], parameters(problem, 1)[0])
    torch.manual_seed(0)
    assert not torch.equal(problem.train[0].flatten()[:8], torch.rand(8, dtype=torch.float64) * 2 - 1)


def test_function_2d_races() -> None:
    problem = load_problem("function-2d:depth=3,points=40,width=10")
    result = compare(problem, "gauss-newton,adam:lr=1e-3", seeds=2, budget=Budget(steps=20))
    assert all(entry.failure is None for entry in result.runs)
    ours, adam = result.runs[:2]
    assert (ours.loss or 1) < 0.1 * (adam.loss or 0)
    assert list(ours.targets) == [1e-6, 1e-10]


def test_sinc() -> None:
    problem = load_problem("sinc")
    x, y = problem.train
    assert (len(x), x.min().item(), x.max().item(), problem.batch_size) == (20_000, -1.0, 1.0, 1000)
    torch.testing.assert_close(y, torch.sin(10 * x) / (10 * x))
    assert sum(p.numel() for p in parameters(problem)) == 61
    wavy = load_problem("sinc:normalised=true,points=50,dtype=float32")
    assert torch.equal(wavy.train[1], torch.sinc(10 * load_problem("sinc:points=50").train[0]).float())
    assert wavy.dtype == torch.float32
    result = run(load_problem("sinc:points=500,batch_size=100"), "gauss-newton", budget=Budget(epochs=8))
    assert (result.loss or 1) < 0.02


def test_residual() -> None:
    problem = load_problem("residual:blocks=2,points=60")
    blocks = [module for module in problem.make_model(0).modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 2
    x = torch.randn(4, 16, dtype=torch.float64)
    branch = blocks[0].up(torch.tanh(blocks[0].down(x)))
    torch.testing.assert_close(blocks[0](x), x + branch)
    torch.testing.assert_close(problem.train[1].std(correction=0), torch.tensor(1.0, dtype=torch.float64))
    result = run(problem, "gauss-newton", budget=Budget(steps=15))
    assert (result.loss or 1) < 1e-3
    assert "exact" in (result.coverage or "")
    noisy = load_problem("residual:blocks=2,points=60,noise=1")
    assert not torch.equal(noisy.train[1], problem.train[1])
    assert load_problem("residual:dtype=float32").train[0].dtype == torch.float32


def test_standardise_leaves_constant_columns() -> None:
    train, other = standardise(torch.tensor([[3.0, 1.0], [3.0, 3.0]]), torch.tensor([[4.0, 2.0]]))
    assert train.tolist() == [[0.0, -1.0], [0.0, 1.0]]
    assert other.tolist() == [[1.0, 0.0]]


def true_reactions(steps: int = 30) -> Reactions:
    return Reactions({name: math.log(rate) for name, rate in RATES.items()}, steps)


def test_the_integrator_is_of_order_four() -> None:
    initial = torch.tensor([[1.0, 0.5], [2.0, 1.0]], dtype=torch.float64)
    with torch.no_grad():
        fine = true_reactions(320)(initial)
        errors = [float((true_reactions(steps)(initial) - fine).abs().max()) for steps in (20, 40, 80)]
    assert all(3.5 < math.log2(coarse / finer) < 4.8 for coarse, finer in pairwise(errors))
    # The quantity that Lotka's reactions conserve: growth x - death log x + predation y - birth log y.
    end = fine.unflatten(1, (10, 2))
    kept = 0.4 * end[..., 0] - 0.8 * end[..., 0].log() + 0.5 * end[..., 1] - end[..., 1].log()
    assert (kept - kept[:, :1]).abs().max() < 1e-7


def test_the_rates_are_found() -> None:
    problem = load_problem("rates:noise=0,experiments=4,spread=0.2")
    exact = run(problem, "gauss-newton:sweep=vmap", budget=Budget(steps=8))
    assert exact.history[0].test is not None
    assert exact.history[0].test > 0.05
    assert exact.test is not None
    assert exact.test < 1e-6
    assert (exact.coverage or "").count("exact") == 4
    noisy = load_problem("rates")
    assert noisy.metric_name == "rate_error"
    outputs = true_reactions()(noisy.train[0])
    assert outputs.shape == noisy.train[1].shape == (16, 20)
    # At the true rates the loss is the mean of 320 squared standard normals.
    assert noisy.loss(outputs, noisy.train[1]).item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / 320))
    assert rate_error(true_reactions()) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("function-2d:depth=0", "depth of function-2d is 0; give 1 or more"),
        ("function-2d:width=0", "width of function-2d"),
        ("function-2d:points=0", "points of function-2d"),
        ("function-2d:depht=9", "Did you mean 'depth'"),
        ("function-2d:depth=9.5", "must be a whole number"),
        ("sinc:points=0", "points of sinc"),
        ("sinc:dtype=float", "Did you mean 'float64'|Did you mean 'float32'"),
        ("residual:blocks=0", "blocks of residual"),
        ("rates:noise=-1", "noise of rates is -1"),
        ("rates:experiments=0", "experiments of rates"),
        ("fuction-2d", "Did you mean 'function-2d'"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, part: str) -> None:
    with pytest.raises(SpecError, match=part):
        load_problem(text)
