"""What does not fit is refused, at composition where it is known and at the first call where it is not."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pullback.modules import CompositionError, feedback, hierarchy, parallel, residual, riemannian, series
from pullback.modules.shape import fits, met, shape_of


def ident(inputs=None, outputs=None):
    return riemannian(lambda x: x, {}, inputs=inputs, outputs=outputs)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: series(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).inputs and series(nn.Linear(3, 4), ident(5)),
            r"part 0 \(Linear\) returns states of shape \(\.\.\., 4\) but part 1 \(Map\) takes \(5,\)",
        ),
        (series, "Series needs a module"),
        (lambda: series(ident(2, (2, 3)), ident((3, 2))), r"shape \(2, 3\) but part 1 \(Map\) takes \(3, 2\)"),
        (
            lambda: parallel(nn.Linear(3, 2), nn.Linear(4, 2)),
            r"would take states of shape \(\.\.\., 4\).*\(\.\.\., 3\)",
        ),
        (lambda: parallel(ident(3, 2), ident(3, 4)), r"would return states of shape \(4,\), .* return \(2,\)"),
        (lambda: parallel(ident(3), ident(2), split=[3, 3]), r"shape \(2,\) but gets a share of \(3,\)"),
        (lambda: parallel(ident(), split=[3, 3]), r"split has \[3, 3\] for 1 modules"),
        (lambda: residual(nn.Linear(3, 2)), r"takes states of shape \(\.\.\., 3\) and returns \(\.\.\., 2\)"),
        (lambda: feedback(nn.Linear(3, 2), nn.Linear(2, 4), rounds=1), r"returns states of shape \(\.\.\., 4\)"),
        (lambda: feedback(nn.Linear(3, 2), nn.Linear(3, 3), rounds=1), r"forward part returns.*\(\.\.\., 2\)"),
        (lambda: hierarchy(nn.Linear(3, 2), nn.Linear(4, 1)), r"shape \(\.\.\., 4\) but gets .*\(3,\).*: \(5,\)"),
    ],
)
def test_known_shapes_are_compared_at_composition(make, says):
    with pytest.raises(CompositionError, match=says):
        make()


@pytest.mark.parametrize(
    ("module", "width", "says"),
    [
        (riemannian(nn.Linear(3, 2)), 4, r"Linear takes states of shape \(\.\.\., 3\), got \(4,\) \(a batch of 5\)"),
        (series(ident(), nn.Linear(3, 2)), 4, r"takes states of shape \(\.\.\., 3\), got \(4,\)"),
        (
            series(nn.Linear(3, 4), riemannian(lambda x, W: x @ W, [torch.ones(5, 2)])),
            3,
            r"In Series, Map was given states of shape \(4,\) and failed: .*4.*5",
        ),
        (parallel(ident(), riemannian(lambda x: x[:, :1], {})), 3, r"shape \(3,\), Map \(1,\).*joined by sum"),
        (parallel(ident(), ident(), split=[2, 2]), 5, r"shape \(5,\), the shares \[2, 2\] add up to 4"),
        (residual(riemannian(lambda x: x[:, :1], {})), 3, r"given states of shape \(3,\) and returned \(1,\)"),
        (
            feedback(ident(), riemannian(lambda x: x[:, :1], {}), rounds=1),
            3,
            r"shape \(1,\) to an input of shape \(3,\)",
        ),
        (riemannian(lambda x: x.sum(), {}), 3, r"given 5 samples, states of shape \(3,\), and returned \(\)"),
        (riemannian(lambda x: (x, x), {}), 3, "returned tuple"),
        (ident(3, 2), 3, r"returned states of shape \(3,\), declared are \(2,\)"),
    ],
)
def test_unknown_shapes_are_compared_at_the_call(module, width, says):
    with pytest.raises(CompositionError, match=says):
        module(torch.ones(5, width))
    with pytest.raises((CompositionError, RuntimeError), match=says.split(" and failed: ")[-1]):
        module.linearise(torch.ones(5, width))


def test_hierarchies_take_vectors():
    with pytest.raises(CompositionError, match=r"takes vectors as states, got the shape \(3, 2\)"):
        hierarchy(ident(), ident())(torch.ones(5, 3, 2))
    with pytest.raises(CompositionError, match="takes one tensor"):
        ident()("x")


def test_errors_of_a_part_that_has_run_are_its_own():
    state = {"broken": False}

    def f(x):
        if state["broken"]:
            raise RuntimeError("sensor lost")
        return x

    module = series(riemannian(f, {}), ident())
    module(torch.ones(2, 2))
    state["broken"] = True
    with pytest.raises(RuntimeError, match=r"^sensor lost$"):
        module(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: riemannian(nn.Linear(2, 2), mass=0.0), ValueError, "positive and finite, got 0"),
        (lambda: riemannian(nn.Linear(2, 2), mass=float("nan")), ValueError, "got nan"),
        (lambda: riemannian(nn.Linear(2, 2), mass=torch.eye(2)), TypeError, r"\(2, 2\) is no mass"),
        (lambda: riemannian(nn.Linear(2, 2), mass={"bias": -1.0}), ValueError, "'module.bias' must be positive"),
        (lambda: series(nn.Linear(2, 2), mass={"x": 1.0}), TypeError, "one factor"),
        (lambda: riemannian(lambda x, k: k * x), TypeError, "needs its initial parameters"),
        (lambda: riemannian(lambda x, k: k * x, []), TypeError, r"takes 1 parameters after the state \(k\), got 0"),
        (lambda: riemannian(lambda x, k: k * x, [2.0]), TypeError, "must be a floating tensor"),
        (lambda: riemannian(lambda x, k: k * x, [torch.tensor(torch.inf)]), ValueError, "not finite"),
        (lambda: riemannian(lambda x, k: k * x, {"forward": torch.ones(1)}), ValueError, "cannot be named 'forward'"),
        (lambda: riemannian(nn.Linear(2, 2), {"k": torch.ones(1)}), TypeError, "its own parameters"),
        (lambda: riemannian(series(nn.Linear(2, 2))), TypeError, "is a Riemannian module already"),
        (lambda: riemannian(3), TypeError, "a module or a function, got int"),
        (lambda: ident(inputs=(2, ...)), ValueError, "shape of a state"),
        (lambda: ident(inputs=0), ValueError, "positive number"),
        (lambda: parallel(ident(), join="product"), ValueError, "'sum' or 'concatenate', got 'product'"),
        (lambda: feedback(ident(), ident(), rounds=-1), ValueError, "at least 0, got -1"),
    ],
)
def test_options_are_checked(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_masses_that_do_not_fit():
    with pytest.raises(CompositionError, match=r"a mass for 'module\.wait' but no such"):
        riemannian(nn.Linear(2, 2), mass={"wait": 2.0}).masses()
    with pytest.raises(CompositionError, match=r"shape \(3,\), the parameter \(2, 2\)"):
        series(riemannian(nn.Linear(2, 2), mass={"weight": torch.ones(3)})).masses()
    layer = nn.Linear(2, 2)
    with pytest.raises(CompositionError, match="shared by modules that give it different masses"):
        series(riemannian(layer, mass=2.0), riemannian(layer)).masses()
    tensor = torch.tensor([1.0, 2.0])
    masses = series(series(riemannian(layer, mass={"bias": tensor}), mass=3.0), mass=0.5).masses("net.")
    name = "net.parts.0.parts.0.module."
    assert masses[name + "weight"] == 1.5
    assert torch.equal(masses[name + "bias"], 1.5 * tensor)


def test_copies_and_state_dicts():
    module = series(nn.Linear(2, 3), riemannian(lambda x, k: k * x, [torch.tensor(2.0)], mass=2.0))
    twin = copy.deepcopy(module)
    twin.load_state_dict({name: t + 1 for name, t in module.state_dict().items()})
    x = torch.randn(4, 2)
    expected = 3 * nn.functional.linear(x, module.parts[0].module.weight + 1, module.parts[0].module.bias + 1)
    torch.testing.assert_close(twin(x), expected)
    assert twin.masses() == module.masses()


SHAPES = st.one_of(
    st.none(),
    st.lists(st.integers(1, 2), max_size=3).map(tuple),
    st.lists(st.integers(1, 2), max_size=2).map(lambda s: (..., *s)),
)


@given(a=SHAPES, b=SHAPES)
def test_shapes_fit_if_some_state_has_both(a, b):
    import itertools

    every = [t for n in range(4) for t in itertools.product((1, 2), repeat=n)]

    def has(shape, t):
        if shape is None:
            return True
        tail = shape[1:] if shape and shape[0] is ... else shape
        return t[len(t) - len(tail) :] == tail if tail != shape and len(t) >= len(tail) else t == shape

    both = [t for t in every if has(a, t) and has(b, t)]
    assert fits(a, b) == bool(both) == fits(b, a)
    if both:
        assert [t for t in every if has(met(a, b), t)] == both
    assert a is None or shape_of(a) == a
