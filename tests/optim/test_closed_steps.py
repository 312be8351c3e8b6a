"""Steps of feedback and of geodesic Gauss-Newton against their dense twin, with every option that bends them."""

from __future__ import annotations

import pytest
from torch import nn

import pullback
from closed import PARTITIONS, chain, compare
from pullback import Damping, Momentum

FIXED = Damping(control="fixed", initial=3.0)


@pytest.mark.parametrize("solver", ["dual", "primal", "auto"])
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("anticipate", [True, False])
def test_step_is_the_dense_step(solver, partition, anticipate):
    opt = compare(anticipate=anticipate, partition=partition, solver=solver)
    words = {(True, True): "acceleration", (True, False): "plain", (False, True): "anticipation"}
    assert opt.last.note == words.get((partition == "global", anticipate), "feedback")


@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("mass", ["marquardt", "module"])
@pytest.mark.parametrize("partition", ["layerwise", "ends together", "global"])
def test_with_a_mass(solver, mass, partition):
    compare(3, solver=solver, mass=mass, partition=partition)


@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("mass", ["identity", "marquardt"])
@pytest.mark.parametrize("lr", [1.0, 0.4])
def test_with_spring_momentum(solver, mass, lr):
    compare(3, solver=solver, mass=mass, lr=lr, momentum=Momentum(kind="spring", decay=0.7))


@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("changed", [{"clip": 0.05}, {"penalty": 0.05}, {"lr": 0.3}, {"lr": 0.5, "decay": 0.2}])
@pytest.mark.parametrize("anticipate", [True, False])
def test_with_what_users_do_to_gradients_and_rates(solver, changed, anticipate):
    compare(2, solver=solver, anticipate=anticipate, **changed)
    compare(2, solver=solver, geodesic=True, partition="global", **changed)


@pytest.mark.parametrize("partition", ["layerwise", "ends together"])
def test_geodesic_steps_of_several_groups_are_refused(partition):
    """Nothing between modules is watched then."""
    model, _, _ = chain()
    with pytest.raises(ValueError, match=r"moves all modules jointly, .* take FeedbackGaussNewton for stages"):
        pullback.GaussNewton(model, nn.MSELoss(), geodesic=True, partition=PARTITIONS[partition][0])


@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("changed", [{}, {"momentum": Momentum(kind="spring", decay=0.7)}, {"penalty": 0.05}])
def test_from_further_down_the_arc(solver, changed, monkeypatch):
    monkeypatch.setattr("pullback.optim.closed_loop.ARC", (0.5,))
    compare(2, alpha=0.5, solver=solver, **changed)
    compare(2, alpha=0.5, solver=solver, anticipate=False, **changed)
