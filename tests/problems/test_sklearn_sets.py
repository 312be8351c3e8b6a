from __future__ import annotations

import sys

import pytest
import torch

from pullback.problems import Budget, MissingExtraError, SpecError, load_problem, run

SHAPES = [("digits", 64, 10), ("wine", 13, 3), ("breast-cancer", 30, 2), ("diabetes", 10, 1)]


@pytest.mark.parametrize(("name", "width", "outputs"), SHAPES)
def test_shapes_dtypes_and_split(name: str, width: int, outputs: int) -> None:
    problem = load_problem(name)
    assert problem.test is not None
    rows = len(problem.train[0]) + len(problem.test[0])
    assert len(problem.test[0]) == pytest.approx(0.2 * rows, abs=1)
    assert problem.train[0].shape[1] == width
    assert problem.dtype == problem.train[0].dtype == (torch.float64 if name == "diabetes" else torch.float32)
    model = problem.make_model(0)
    assert model(problem.train[0]).shape == (len(problem.train[0]), outputs)
    assert problem.criterion(model(problem.train[0]), problem.train[1]).ndim == 0


@pytest.mark.parametrize("name", ["digits", "wine", "diabetes"])
def test_the_seed_drives_the_model_and_not_the_split(name: str) -> None:
    first, second = load_problem(name), load_problem(name)
    assert torch.equal(first.train[0], second.train[0])
    state = torch.random.get_rng_state()
    same, again, other = (next(iter(first.make_model(seed).parameters())) for seed in (0, 0, 1))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["wine", "breast-cancer", "diabetes"])
def test_standardised_by_the_training_rows(name: str) -> None:
    problem = load_problem(f"{name}:dtype=float64")
    assert problem.test is not None
    inputs = problem.train[0]
    torch.testing.assert_close(inputs.mean(0), torch.zeros_like(inputs[0]))
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones_like(inputs[0]))
    assert problem.test[0].mean(0).abs().max() > 1e-3
    if name == "diabetes":
        assert problem.train[1].mean().abs() < 1e-12
        assert problem.train[1].std(correction=0) == pytest.approx(1.0)


def test_classes_are_stratified() -> None:
    problem = load_problem("digits")
    assert problem.test is not None
    shares = [torch.bincount(targets, minlength=10) / len(targets) for targets in (problem.train[1], problem.test[1])]
    assert (shares[0] - shares[1]).abs().max() < 0.005
    assert problem.train[0].min() == 0.0
    assert problem.train[0].max() == 1.0


def test_digits_as_regression() -> None:
    problem, classes = load_problem("digits-regression:width=32"), load_problem("digits:width=32")
    assert problem.test is not None
    assert problem.train[1].shape == (1437, 10)
    assert torch.equal(problem.train[1].argmax(1), classes.train[1])
    assert torch.equal(problem.train[1].sum(1), torch.ones(1437))
    assert problem.metric_name == "accuracy"
    assert problem.score(problem.test[1], problem.test[1]) == 1.0
    assert problem.score(-problem.test[1], problem.test[1]) < 0.2
    assert load_problem("digits-regression:dtype=float64").train[1].dtype == torch.float64
    result = run(problem, "gauss-newton:samples=2", budget=Budget(steps=3))
    assert result.failure is None


def test_options() -> None:
    problem = load_problem("digits:batch_size=64,width=32,dtype=float64")
    assert (problem.batch_size, problem.dtype) == (64, torch.float64)
    assert [tuple(p.shape) for p in problem.make_model(0).parameters()][::2] == [(32, 64), (16, 32), (10, 16)]
    assert problem.name == "digits:batch_size=64,width=32,dtype=float64"
    assert load_problem("digits:batch_size=none").batch_size is None


@pytest.mark.parametrize("name", ["digits", "digits-regression", "wine", "breast-cancer", "diabetes"])
def test_depth_is_linear_layers_of_one_width(name: str) -> None:
    model = load_problem(f"{name}:depth=5,width=12,batch_size=32").make_model(0)
    first, *hidden, last = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert (first[0], hidden, last[1]) == (12, [(12, 12)] * 3, 12)
    assert len(list(load_problem(f"{name}:depth=1").make_model(0).parameters())) == 2
    with pytest.raises(SpecError, match=r"depth of .* is 0; give 1 or more"):
        load_problem(f"{name}:depth=0")


def test_the_default_digits_are_64_64_32_10() -> None:
    problem = load_problem("digits")
    assert [tuple(p.shape) for p in problem.make_model(0).parameters()][::2] == [(64, 64), (32, 64), (10, 32)]
    assert problem.batch_size == 128


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r'wine needs scikit-learn: pip install "pullback\[problems\]"'):
        load_problem("wine")
