"""Policies of single samples against the dense recursion of theory 5."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from oracle import assert_close
from pullback import Sampled
from pullback.control.forms import Forms
from pullback.control.samplewise import Policy, Recursion
from samplewise import Riccati, curvature_of, engine, network

METRICS = {"one column": lambda: Sampled(m=1), "two columns": lambda: Sampled(m=2), "exact": lambda: None}


def gaussian(N, sizes, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(N, sizes[0], dtype=torch.float64)
    return nn.MSELoss(), x, torch.randn(N, sizes[-1], dtype=torch.float64)


def classes(N, sizes, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(N, sizes[0], dtype=torch.float64)
    return nn.CrossEntropyLoss(), x, torch.randint(sizes[-1], (N,))


def both(sizes, N, metric, size, diagonals, positive=False, problem=classes, seed=0):
    """The library's policies and the twin's."""
    model = network(sizes, seed)
    criterion, x, y = problem(N, sizes, seed)
    curvature = curvature_of(model, size, diagonals)
    ours = engine(model, criterion, x, y, curvature, METRICS[metric](), positive)
    # Of a sample's own loss: N times its share, so the root of N in the factor.
    S = ours.term.factors[id(model[-1])][0].factor().permute(1, 2, 0) * N**0.5
    z = model(x)
    (lam,) = torch.autograd.grad(criterion(z, y), z)
    return model, ours, Riccati(model, x, N * lam, S, curvature, positive), curvature


def policy_parts(policy: Policy, N, r):
    """W (N, r, r) and gamma (N, r), whatever they are kept as."""
    W = torch.eye(r, dtype=torch.float64).expand(N, r, r) if policy.W is None else policy.W.reshape(N, r, r)
    gamma = torch.zeros(N, r, dtype=torch.float64) if policy.gamma is None else policy.gamma.reshape(N, r)
    return W, gamma


def compare(sizes, N, metric, size, diagonals, positive=False, problem=classes, seed=0):
    """k, K of every stage, and V_x, V_xx behind it; the number clamped."""
    model, ours, twin, curvature = both(sizes, N, metric, size, diagonals, positive, problem, seed)
    states = [h.requires_grad_() for h in twin.states[1:-1]]
    costates = []
    for k, h in enumerate(states):
        z = model[2 * k + 2 :](h)
        criterion, _, y = problem(N, sizes, seed)
        costates.append(N * torch.autograd.grad(criterion(z, y), h)[0])
        h.requires_grad_(False)
    r, last = ours.term.r, len(ours.blocks) - 1
    for k, block in enumerate(ours.blocks):
        W, gamma = policy_parts(ours.policies[k][0], N, r)
        rows = ours.beside[k].rows[0].dense()
        U, g = rows[:-1] * N**0.5, rows[-1] * N
        Q = curvature.matrices[id(block.params[0])]
        gamma = gamma * N**0.5
        for n, stage in enumerate(twin.stages[k]):
            found = -torch.linalg.solve(Q, g[n] - U[:, n].T @ gamma[n])
            assert_close(found, stage.k)
            if k:
                plan = ours.route.plans[k][0]
                ((_, S),) = ours.term.ports.carriers(plan.rank)
                assert_close(-torch.linalg.solve(Q, U[:, n].T @ W[n] @ S[:, n] * N**0.5), stage.K)
            if k < last and not positive:  # where positive the policy holds the values in front of the stage
                plan = ours.route.plans[k + 1][0]
                ((_, S),) = ours.term.ports.carriers(plan.rank)
                Sn = S[:, n] * N**0.5
                assert_close(Sn.T @ W[n] @ Sn, stage.V_xx)
                assert_close(costates[k][n] - Sn.T @ gamma[n], stage.V_x)
            if k and positive:
                plan = ours.route.plans[k][0]
                ((_, S),) = ours.term.ports.carriers(plan.rank)
                Sn = S[:, n] * N**0.5
                before = twin.stages[k - 1][n]
                assert_close(Sn.T @ W[n] @ Sn, before.V_xx)
                assert_close(costates[k - 1][n] - Sn.T @ gamma[n], before.V_x)
    assert ours.clamped == sum(twin.clamped[not positive :])  # what is in front of the first stage nobody asks
    return ours.clamped


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("diagonals", [True, False], ids=["diagonal", "full"])
@pytest.mark.parametrize("positive", [False, True], ids=["clamped", "positive"])
def test_values_and_gains_are_those_of_the_dense_recursion(metric, diagonals, positive):
    assert compare([3, 5, 4, 4, 3], 6, metric, 30.0, diagonals, positive) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_of_least_squares(metric):
    assert compare([2, 4, 3, 2], 5, metric, 50.0, True, problem=gaussian) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_a_curvature_that_is_too_small_is_clamped_and_counted(metric):
    assert compare([3, 5, 4, 4, 3], 6, metric, 0.2, True) > 0
    _, ours, _, _ = both([3, 5, 4, 4, 3], 6, metric, 0.2, True)
    for (policy,) in ours.policies:
        W, _ = policy_parts(policy, 6, ours.term.r)
        assert float(torch.linalg.eigvalsh(W).min()) > -1e-12


@pytest.mark.parametrize("size", [0.05, 1.0])
@pytest.mark.parametrize("metric", METRICS)
def test_the_positive_form_needs_no_clamp(metric, size):
    assert compare([3, 5, 4, 3], 5, metric, size, True, positive=True) == 0


@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    N=st.integers(1, 5),
    metric=st.sampled_from(sorted(METRICS)),
    positive=st.booleans(),
    seed=st.integers(0, 100),
)
def test_for_any_chain(widths, N, metric, positive, seed):
    compare([*widths, 3], N, metric, 1000.0, True, positive, seed=seed)


def test_several_columns_with_one_are_one_column():
    """The matrices of r columns, for r = 1, beside the numbers of the form that is used there."""
    torch.manual_seed(0)
    for positive, size in itertools.product((False, True), (0.3, 3.0)):
        numbers, matrices = Recursion(2.0, positive), Recursion(2.0, positive)
        for _ in range(4):
            h, b = size * torch.rand(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
            numbers.stage(Forms(h, b))
            matrices.stage(Forms(h[:, None, None], b[:, None]))
        assert_close(matrices.W[:, 0, 0], numbers.W)
        assert_close(matrices.gamma[:, 0], numbers.gamma)
        counts = [int(sum(flag.sum() for flag in run.clamped)) for run in (numbers, matrices)]
        assert counts[0] == counts[1]
        assert (counts[0] > 0) == (size > 1 and not positive)


def test_a_term_without_the_stage_keeps_its_values():
    run = Recursion(3.0)
    run.stage(Forms(torch.full((4,), 0.1), torch.ones(4)))
    before = run.behind()
    assert run.stage(None) == before
    assert run.behind() == before
