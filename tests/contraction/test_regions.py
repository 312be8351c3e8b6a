"""Regions, the worst of samples, and that the stated confidence is the one there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pullback.contraction import Ball, Box, ContractionError, Sampled, part, rate_over

f64 = torch.float64


def cubic(x: Tensor) -> Tensor:
    return -x - x**3


def soft(x: Tensor) -> Tensor:
    """Rate 1 - |x|^2 on a line."""
    return -x + x**3 / 3


def test_balls_and_boxes_draw_inside_and_uniformly() -> None:
    draws = torch.Generator().manual_seed(0)
    ball = Ball(torch.tensor([1.0, -2.0, 0.5], dtype=f64), 2.0)
    points = ball.draw(4000, draws)
    assert all(ball.contains(x) for x in points)
    # The share within half the radius is that of the volumes.
    inner = ((points - ball.centre).norm(dim=1) < 1).double().mean()
    assert float(inner) == pytest.approx(1 / 8, abs=0.02)
    box = Box(torch.tensor([-1.0, 0.0], dtype=f64), torch.tensor([1.0, 5.0], dtype=f64))
    points = box.draw(4000, draws)
    assert all(box.contains(x) for x in points)
    assert points.mean(0).tolist() == pytest.approx([0, 2.5], abs=0.1)
    assert not box.contains(torch.tensor([0.0, 5.1], dtype=f64))


def test_the_worst_is_the_smallest_sampled() -> None:
    box = Box(-torch.ones(1, dtype=f64), torch.ones(1, dtype=f64))
    found = rate_over(soft, box, samples=50, confidence=0.9)
    points = box.draw(50, torch.Generator().manual_seed(0))
    assert found.worst == pytest.approx(float((1 - points**2).min()), abs=1e-12)
    assert found.at.tolist() == pytest.approx(points[points.abs().argmax()].tolist())
    assert found.share == pytest.approx(1 - 0.1 ** (1 / 50))
    assert found.certified
    assert not found.proved
    assert "with confidence 0.9 at most a share 0.045" in str(found)


def test_the_confidence_is_kept() -> None:
    """The share below the worst of n is known here: |x| beyond it. It exceeds the stated one in 1 - c of all runs."""
    box = Box(-torch.ones(1, dtype=f64), torch.ones(1, dtype=f64))
    missed = 0
    for seed in range(400):
        found = rate_over(soft, box, samples=10, confidence=0.8, seed=seed)
        true = 1 - abs(float(found.at))
        missed += true > found.share
    # 80 of 400 expected, standard deviation 8.
    assert 50 < missed < 110


def test_a_trajectory_that_leaves_voids_the_certificate() -> None:
    ball = Ball(torch.zeros(1, dtype=f64), 1.0)
    path = torch.tensor([[0.5], [0.9], [1.2], [0.3]], dtype=f64)
    found = rate_over(cubic, ball, samples=20, trajectory=path)
    assert found.left == 2
    assert not found.certified
    assert "NO CERTIFICATE: point 2 of the trajectory lies outside of the ball of radius 1 in 1 dimensions" in str(
        found
    )
    with pytest.raises(ContractionError, match="The rates of plant certify nothing: point 2"):
        part("plant", found, size=1)
    inside = part("plant", rate_over(cubic, ball, samples=20, trajectory=path[:2]), size=1)
    assert not inside.proved
    assert inside.confidence == 0.95
    assert "NOT PROVED" in str(inside)
    assert "a share of at least 0.8609 of the ball" in str(inside)


def test_rates_that_did_not_converge_void_it_too() -> None:
    n = 70
    W = torch.randn(n, n, dtype=f64)
    ball = Ball(torch.zeros(n, dtype=f64), 1.0)
    found = rate_over(lambda x: W @ torch.tanh(x), ball, samples=3, steps=3)
    assert found.unconverged == 3
    assert "3 of 3 rates have not converged" in found.why_not


def test_regions_of_ones_own() -> None:
    def sampler(samples: int, draws: torch.Generator) -> Tensor:
        return torch.randn(samples, 1, dtype=f64, generator=draws)

    known = rate_over(cubic, Sampled(sampler, lambda x: abs(float(x)) < 9), samples=5, trajectory=torch.ones(1, 1))
    assert known.certified
    # Where it cannot be told whether a point is inside, it is not taken to be.
    assert rate_over(cubic, Sampled(sampler), samples=5, trajectory=torch.ones(1, 1)).left == 0
    with pytest.raises(ContractionError, match=r"The sampler gave \(1, 5\) for 5 samples"):
        rate_over(cubic, Sampled(lambda samples, _: torch.ones(1, samples)), samples=5)


def test_what_is_refused() -> None:
    ball = Ball(torch.zeros(1, dtype=f64), 1.0)
    with pytest.raises(ContractionError, match="give at least one"):
        rate_over(cubic, ball, samples=0)
    with pytest.raises(ContractionError, match=r"confidence is 1\.0"):
        rate_over(cubic, ball, confidence=1.0)
    with pytest.raises(ContractionError, match="radius of the ball is -1"):
        Ball(torch.zeros(1), -1.0)
    with pytest.raises(ContractionError, match=r"shapes \(2,\) and \(3,\)"):
        Box(torch.zeros(2), torch.ones(3))
    with pytest.raises(ContractionError, match="swap them"):
        Box(torch.ones(2), torch.zeros(2))
