"""What is refused, in words; estimates that have not converged are never a certificate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pullback.contraction import (
    Blocks,
    ContractionError,
    Guarantee,
    compose,
    discrete_rate,
    hierarchy,
    linear_part,
    part,
    rate_along,
    rate_at,
)
from pullback.contraction.record import exact

f64 = torch.float64
x = torch.ones(2, dtype=f64)


def decay(z: Tensor) -> Tensor:
    return -z


@pytest.mark.parametrize("rate", [rate_at, discrete_rate])
def test_metrics_that_are_none(rate: object) -> None:
    assert callable(rate)
    for metric, said in (
        (torch.diag(torch.tensor([1.0, -0.25])), r"not positive definite: its smallest eigenvalue is -0\.25"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), r"not symmetric: entries differ by 5\.0e-01"),
        (torch.eye(3), r"shape \(3, 3\) and the state \(2,\)"),
        (torch.full((2, 2), torch.nan), "numbers that are not finite"),
        (lambda z: -torch.eye(2, dtype=f64), "its smallest eigenvalue is -1"),
        (Blocks([(3, None)]), "3 numbers in all, the state 2"),
    ):
        with pytest.raises(ContractionError, match=said):
            rate(decay, x, metric=metric)
    with pytest.raises(ContractionError, match="weight of block 0 is -1"):
        Blocks([(2, None)], [-1.0])
    with pytest.raises(ContractionError, match="2 blocks and 1 weights"):
        Blocks([(1, None), (1, None)], [1.0])


@pytest.mark.parametrize("rate", [rate_at, discrete_rate])
def test_fields_and_points(rate: object) -> None:
    assert callable(rate)
    with pytest.raises(ContractionError, match="1 of 2 numbers of the point are not finite"):
        rate(decay, torch.tensor([1.0, torch.nan]))
    with pytest.raises(ContractionError, match=r"gave \(1,\) at a point of shape \(2,\)"):
        rate(lambda z: z[:1], x)
    with pytest.raises(ContractionError, match="The field is not finite"):
        rate(lambda z: z / 0, x)
    with pytest.raises(ContractionError, match="flatten it"):
        rate(decay, torch.ones(2, 2))
    with pytest.raises(ValueError, match="method must be"):
        rate(decay, x, method="qr")
    # Finite values, infinite slope: dense and by products.
    for method in ("dense", "lanczos"):
        with pytest.raises(ContractionError, match="not finite"):
            rate(lambda z: z.abs().sqrt(), torch.zeros(2, dtype=f64), method=method)


def test_trajectories() -> None:
    with pytest.raises(ContractionError, match="1 points and 2 times"):
        rate_along(decay, [x], times=[0, 1])
    with pytest.raises(ContractionError, match="0 points"):
        rate_along(decay, [])


def test_interfaces_that_differ() -> None:
    a, b = linear_part("a", -torch.eye(2)), linear_part("b", -torch.eye(3))
    with pytest.raises(ContractionError, match=r"from b to a has shape \(3, 2\); their interface is \(2, 3\)"):
        compose(a, b, torch.ones(3, 2))
    with pytest.raises(ContractionError, match=r"from a to b has shape \(2, 2\); their interface is \(3, 2\)"):
        hierarchy(a, b, torch.ones(2, 2))
    with pytest.raises(ContractionError, match="from a to b holds numbers that are not finite"):
        compose(a, b, None, torch.full((3, 2), torch.nan))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ContractionError, match="give a finite bound"):
            hierarchy(a, b, bad)
    with pytest.raises(ContractionError, match="Parts of a \\+ a have the same name"):
        compose(a, a)
    with pytest.raises(ContractionError, match="The margin below the smaller rate is 0"):
        hierarchy(a, b, 1.0, margin=0.0)
    with pytest.raises(ContractionError, match="eps of a hierarchy is -1"):
        hierarchy(a, b, 1.0, eps=-1.0)


def test_parts() -> None:
    with pytest.raises(ContractionError, match="not a number"):
        part("a", float("nan"), size=1)
    with pytest.raises(ContractionError, match=r"size 3 and a metric of shape \(2, 2\)"):
        part("a", 1.0, size=3, metric=torch.eye(2))
    with pytest.raises(ContractionError, match="size of the part a is not known"):
        part("a", 1.0)
    with pytest.raises(ContractionError, match=r"square matrix of finite numbers, got \(2, 3\)"):
        linear_part("a", torch.ones(2, 3))
    with pytest.raises(ContractionError, match=r"shape \(2, 2\) and a metric of shape \(3, 3\)"):
        linear_part("a", torch.eye(2), metric=torch.eye(3))
    with pytest.raises(ContractionError, match="eigenvalue is -1"):
        part("a", 1.0, metric=-torch.eye(2))


def test_what_is_not_converged_is_never_rounded_up() -> None:
    W = torch.randn(80, 80, dtype=f64)
    short = rate_at(lambda z: W @ z, torch.zeros(80, dtype=f64), steps=12)
    measured = part("a", short, size=80)
    assert not measured.proved
    assert measured.rate == short.lower < short.value
    assert measured.confidence == 0.99
    whole = hierarchy(linear_part("b", -torch.eye(1)), measured, 0.1, margin=0.1)
    assert not whole.proved
    assert whole.confidence == pytest.approx(0.99)
    assert "NOT shown to contract" in str(whole)
    with pytest.raises(ContractionError, match="has not converged and has no lower end"):
        part("a", rate_at(lambda z: W @ z, torch.zeros(80, dtype=f64), steps=2), size=80)


def test_chances_of_failure_add_up() -> None:
    unsure = [
        replace(linear_part(name, -torch.eye(1)), confidence=sure, region=where)
        for name, sure, where in (("a", 0.95, "here"), ("b", 0.9, "there"))
    ]
    both: Guarantee = compose(*unsure)
    assert both.confidence == pytest.approx(0.85)
    assert both.region == "here and there"
    point = part("p", exact(1.0, 1, 1), size=1)
    assert point.region == "where p has the Jacobian of the point its rate was taken at"
