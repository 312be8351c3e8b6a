from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pullback.problems import Budget, SpecError, load_problem, run
from pullback.problems.emsa import ExtendedMSA
from pullback.problems.vision import image_net

RHO = 0.7


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()


def test_the_augmented_hamiltonian_is_the_formula() -> None:
    emsa = ExtendedMSA(net(), rho=RHO)
    stage = emsa.stages[1]
    layer = stage[0]
    assert isinstance(layer, nn.Linear)
    x, x_next, p, p_next = draw(6, 4), draw(6, 5), draw(6, 4), draw(6, 5)
    value = 0.0
    for i in range(6):
        f = torch.tanh(layer.weight @ x[i] + layer.bias).detach()
        jacobian = (1 - f**2)[:, None] * layer.weight.detach()
        value += float(p_next[i] @ f) / 6
        value -= RHO / 2 * float((x_next[i] - f).square().sum() + (p[i] - jacobian.T @ p_next[i]).square().sum()) / 6
    assert emsa.augmented(stage, x, x_next, p, p_next).item() == pytest.approx(value, rel=1e-10)


def test_its_gradient_at_the_present_weights_is_minus_that_of_the_loss() -> None:
    model, x, y = net(), draw(8, 3), draw(8, 2)
    before = [weight.detach().clone() for weight in model.parameters()]
    backward(model, x, y)
    slopes = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    emsa = ExtendedMSA(model, rho=RHO, inner=1, maximiser="gradient", inner_lr=0.25)
    backward(model, x, y)
    emsa.step()
    # One step uphill of each layer, from the states and costates of the old weights.
    for old, slope, new in zip(before, slopes, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old - 0.25 * slope, rtol=1e-10, atol=1e-12)


def test_a_linear_stage_goes_to_the_solution_of_its_normal_equations() -> None:
    model, x, y = net(), draw(40, 3), draw(40, 2)
    emsa = ExtendedMSA(model, rho=RHO, inner=500)
    backward(model, x, y)
    states, costates = [x, *emsa._states[1:]], [None, *(-40 * s.grad for s in emsa._states[1:] if s.grad is not None)]
    s, s_next, p, p_next = states[2].detach(), states[3].detach(), costates[2], costates[3]
    assert p is not None
    assert p_next is not None
    emsa.step()
    # d/dW of the sum over the samples, with ones beside the states for the bias and W = V E:
    # P'^T S + rho (X' - S V^T)^T S + rho P'^T (P - P' V E) E^T = 0.
    full = torch.cat([s, torch.ones(40, 1, dtype=torch.float64)], 1)
    keep = torch.diag(torch.tensor([1.0] * 5 + [0.0], dtype=torch.float64))
    padded = torch.cat([p, torch.zeros(40, 1, dtype=torch.float64)], 1)
    right = p_next.T @ full + RHO * s_next.T @ full + RHO * p_next.T @ padded
    eye = torch.eye(2, dtype=torch.float64)
    matrix = RHO * torch.kron(eye, full.T @ full) + RHO * torch.kron(p_next.T @ p_next, keep)
    solution = torch.linalg.solve(matrix, right.flatten()).reshape(2, 6)
    found = torch.cat([model[4].weight, model[4].bias[:, None]], 1).detach()
    torch.testing.assert_close(found, solution, rtol=1e-3, atol=1e-4)
    # L-BFGS is content before round-off; the solution itself is stationary to it.
    reached = emsa.augmented(emsa.stages[2], s, s_next, p, p_next)
    with torch.no_grad():
        model[4].weight.copy_(solution[:, :5])
        model[4].bias.copy_(solution[:, 5])
    best = emsa.augmented(emsa.stages[2], s, s_next, p, p_next)
    assert (best - reached).item() == pytest.approx(0.0, abs=1e-8)
    slopes = torch.autograd.grad(best, list(emsa.stages[2].parameters()))
    assert all(slope.abs().max() < 1e-10 for slope in slopes)


def test_evaluations_leave_the_states_alone_and_close_takes_the_hooks_off() -> None:
    model, x, y = net(), draw(8, 3), draw(8, 2)
    emsa = ExtendedMSA(model)
    with pytest.raises(RuntimeError, match=r"call the model and backward\(\) before step"):
        emsa.step()
    backward(model, x, y)
    with torch.no_grad():
        model(draw(5, 3))
    emsa.step()
    with pytest.raises(RuntimeError, match="no states"):
        emsa.step()
    assert emsa.step(lambda: backward(model, x, y)) is None
    emsa.zero_grad()
    assert all(weight.grad is None for weight in model.parameters())
    emsa.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("model", "part"),
    [
        (nn.Linear(2, 2), "nn.Sequential models, not Linear"),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), r"no stage for 1 \(LayerNorm"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)), "no stage for 1"),
        (nn.Sequential(nn.Tanh()), "layers with weights"),
        (nn.Sequential(*[nn.Linear(2, 2)] * 2), "none of them used twice"),
        (nn.Sequential(nn.Linear(2, 2)).requires_grad_(False), "frozen"),
    ],
)
def test_other_models_are_refused(model: nn.Module, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        ExtendedMSA(model)


@pytest.mark.parametrize("options", [{"rho": -1.0}, {"inner": 0}, {"inner_lr": 0.0}, {"maximiser": "adam"}])
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="give"):
        ExtendedMSA(net(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", ["", ":maximiser=gradient", ":costate=false"])
def test_it_trains_a_problem(options: str) -> None:
    result = run(load_problem("wine:batch_size=32"), f"e-msa{options}", budget=Budget(steps=8))
    assert result.failure is None
    assert result.loss is not None
    assert result.loss < 0.8 * result.history[0].loss


@pytest.mark.parametrize("maximiser", ["lbfgs", "gradient"])
def test_convolutions(maximiser: str) -> None:
    torch.manual_seed(0)
    model = image_net("x", "small", (1, 8), 4)()
    emsa = ExtendedMSA(model, maximiser=maximiser)
    images, labels = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
    losses = []
    for _ in range(12):
        emsa.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        emsa.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def test_a_model_it_cannot_have_is_heard_of_first() -> None:
    with pytest.raises(SpecError, match=r"e-msa refuses: e-msa has no stage for 1 \(ResidualBlock"):
        run(load_problem("residual"), "e-msa", budget=Budget(steps=1))
