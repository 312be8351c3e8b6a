"""Composition: a thousand drawn systems beside the dense rate of the whole, and each rule where it is exact."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from pullback.contraction import (
    ContractionError,
    Guarantee,
    compose,
    gain,
    hierarchy,
    linear_part,
    parallel,
    part,
    skew_feedback,
    small_gain,
)

f64 = torch.float64


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=f64)


def dense_rate(A: Tensor, M: Tensor) -> float:
    """The rate of x' = A x in M: generalised eigenvalues, by another way than the library's."""
    values, vectors = torch.linalg.eigh(M)
    root, back = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    F = root @ A @ back
    return -float(torch.linalg.eigvalsh((F + F.T) / 2)[-1])


def abscissa_rate(A: Tensor) -> float:
    return -float(torch.linalg.eigvals(A).real.max())


def drawn_part(n: int, name: str) -> tuple[Tensor, Guarantee]:
    A = torch.randn(n, n, dtype=f64) - (1 + 2 * random.random()) * n**0.5 * eye(n)
    L = torch.randn(n, n, dtype=f64)
    M = None if random.random() < 0.3 else L @ L.T / n + 0.5 * eye(n)
    return A, linear_part(name, A, metric=M)


def drawn(depth: int, name: str) -> tuple[Tensor, Guarantee, str]:
    """A system of that depth at most with its guarantee, and the rule at its top."""
    if depth == 0 or (depth < 3 and random.random() < 0.3):
        return *drawn_part(random.randint(1, 5), name), "part"
    (A, a, _), (B, b, _) = drawn(depth - 1, name + "l"), drawn(depth - 1, name + "r")
    rule = random.choice(["series", "parallel", "skew", "small gain"])
    G21 = torch.randn(b.size, a.size, dtype=f64)
    G12 = torch.zeros(a.size, b.size, dtype=f64)
    if rule == "parallel":
        # A field on the same state, its rate measured in the same metric.
        C = torch.randn(a.size, a.size, dtype=f64)
        other = Guarantee(dense_rate(C, a.metric), a.blocks, True, a.how)
        return A + C, parallel(a, other), rule
    if rule == "skew":
        G12 = -torch.linalg.solve(a.metric, 0.7 * G21.T @ b.metric)
    elif rule == "small gain":
        if min(a.rate, b.rate) <= 0:
            rule = "series"
        else:
            G12 = torch.randn(a.size, b.size, dtype=f64)
            G12 *= (0.2 + 0.7 * random.random()) * a.rate * b.rate / (gain(a, G12, b) * gain(b, G21, a))
    whole = torch.cat([torch.cat([A, G12], 1), torch.cat([G21, B], 1)])
    return whole, compose(a, b, G12, G21), rule


def test_a_thousand_compositions_are_never_above_the_whole() -> None:
    random.seed(0)
    torch.manual_seed(0)
    seen: dict[str, list[float]] = {}
    for k in range(1000):
        A, guarantee, rule = drawn(3, f"s{k}")
        assert A.shape == (guarantee.size, guarantee.size)
        whole = dense_rate(A, guarantee.metric)
        slack = 1e-9 * float(torch.linalg.matrix_norm(A, 2)) * float(torch.linalg.cond(guarantee.metric)) ** 0.5
        assert guarantee.rate <= whole + slack, (k, rule, guarantee.rate, whole)
        assert guarantee.rate <= abscissa_rate(A) + slack
        assert guarantee.proved
        seen.setdefault(rule, []).append(whole - guarantee.rate)
    assert set(seen) == {"series", "parallel", "skew", "small gain"}
    assert min(len(gaps) for gaps in seen.values()) > 80


@pytest.mark.parametrize("seed", range(20))
def test_skew_feedback_is_exact(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    (A, a), (B, b) = drawn_part(3, "a"), drawn_part(2, "b")
    G21 = torch.randn(2, 3, dtype=f64)
    G12 = -torch.linalg.solve(a.metric, 2.5 * G21.T @ b.metric)
    both = skew_feedback(a, b, G12, G21)
    assert both.weights == {"a": 1.0, "b": pytest.approx(2.5)}
    assert both.rate == min(a.rate, b.rate)
    whole = torch.cat([torch.cat([A, G12], 1), torch.cat([G21, B], 1)])
    assert dense_rate(whole, both.metric) == pytest.approx(both.rate, abs=1e-10)
    assert compose(a, b, G12, G21).rate == both.rate


@pytest.mark.parametrize("seed", range(20))
def test_hierarchy_of_scalars_is_exact(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    (A, a), (B, b) = drawn_part(1, "up"), drawn_part(1, "down")
    G = torch.randn(1, 1, dtype=f64)
    for options in ({}, {"margin": 0.01}, {"eps": 0.3}):
        both = hierarchy(a, b, G, **options)
        whole = torch.cat([torch.cat([A, 0 * G], 1), torch.cat([G, B], 1)])
        assert dense_rate(whole, both.metric) == pytest.approx(both.rate, abs=1e-10)
        if "margin" in options:
            assert both.rate == pytest.approx(min(a.rate, b.rate) - 0.01, abs=1e-12)
    # The order of the state is kept where the second part is upstream.
    turned = compose(b, a, G)
    assert [block.name for block in turned.blocks] == ["down", "up"]
    flipped = torch.cat([torch.cat([B, G], 1), torch.cat([0 * G, A], 1)])
    assert dense_rate(flipped, turned.metric) == pytest.approx(turned.rate, abs=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_small_gain_is_tight_where_couplings_are_aligned(seed: int) -> None:
    """Each coupling maps the slowest direction of one part to that of the other: the bound is the rate."""
    random.seed(seed)
    torch.manual_seed(seed)
    parts = [drawn_part(n, name) for n, name in ((3, "a"), (4, "b"))]
    slow, back = [], []
    for A, g in parts:
        F = g.theta @ A @ torch.linalg.inv(g.theta)
        slow.append(torch.linalg.eigh((F + F.T) / 2)[1][:, -1])
        back.append(torch.linalg.inv(g.theta))
    (A, a), (B, b) = parts
    size = 0.8 * (a.rate * b.rate) ** 0.5
    if min(a.rate, b.rate) <= 0:
        with pytest.raises(ContractionError, match="Small gain needs contracting parts"):
            small_gain(a, b, 0.1, 0.1)
        return
    G12 = 2 * size * back[0] @ torch.outer(slow[0], slow[1]) @ b.theta
    G21 = size / 2 * back[1] @ torch.outer(slow[1], slow[0]) @ a.theta
    both = small_gain(a, b, G12, G21)
    assert both.weights["b"] == pytest.approx(4)
    whole = torch.cat([torch.cat([A, G12], 1), torch.cat([G21, B], 1)])
    assert dense_rate(whole, both.metric) == pytest.approx(both.rate, rel=1e-9)
    # Given as numbers the gains are assumptions, and named.
    stated = small_gain(a, b, 2 * size, size / 2)
    assert stated.rate == pytest.approx(both.rate)
    assert len(stated.assumptions) == 2
    assert "the gain from b to a is at most" in str(stated)


def test_gain_is_the_dense_norm() -> None:
    (_, a), (_, b) = drawn_part(3, "a"), drawn_part(2, "b")
    G = torch.randn(3, 2, dtype=f64)

    def root(M: Tensor, power: float) -> Tensor:
        values, vectors = torch.linalg.eigh(M)
        return (vectors * values**power) @ vectors.T

    dense = torch.linalg.matrix_norm(root(a.metric, 0.5) @ G @ root(b.metric, -0.5), 2)
    assert gain(a, G, b) == pytest.approx(float(dense), rel=1e-12)


def test_parallel_wants_one_metric() -> None:
    a, b = linear_part("a", -eye(2)), linear_part("b", -2 * eye(2), metric=3 * eye(2))
    assert parallel(a, b).rate == pytest.approx(3)
    with pytest.raises(ContractionError, match="The metrics of a and c differ"):
        parallel(a, linear_part("c", -eye(2), metric=torch.tensor([[2.0, 0.5], [0.5, 1.0]])))
    with pytest.raises(ContractionError, match="a has 2 numbers of state and c 3"):
        parallel(a, linear_part("c", -eye(3)))


def test_compose_says_why_not() -> None:
    a, b = linear_part("a", -eye(2)), linear_part("b", -eye(2))
    G = torch.tensor([[0.0, 3.0], [1.0, 0.0]], dtype=f64)
    with pytest.raises(
        ContractionError, match=r"No rule applies to a and b\. The feedback .* is not skew.*l1 l2 > g12"
    ):
        compose(a, b, G, G)
    assert compose(a, b).rate == 1
    assert compose(a, b, 0 * G, None).weights == {"a": 1.0, "b": 1.0}
    # Skew and small at once: skew gives more.
    assert compose(a, b, 0.1 * G, -0.1 * G.T).rate == 1


def test_a_certificate_is_readable() -> None:
    plant = linear_part("plant", torch.tensor([[-1.0, 0.5], [0.0, -2.0]], dtype=f64))
    observer = part("observer", 3.0, size=1, region="|x| < 1")
    both = hierarchy(plant, observer, 0.7)
    text = str(both)
    assert text.splitlines()[0] == f"plant + observer: contracts at rate {both.rate:.6g} or faster"
    for line in (
        "status: proved, given what is assumed",
        "where: |x| < 1",
        "assumed: observer contracts at rate 3 in its metric",
        "because:",
    ):
        assert line in text
    assert "      plant: linear, rate" in text
