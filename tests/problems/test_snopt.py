from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pullback.curvature.eigen import EigenBlock
from pullback.curvature.moments import MatrixMoment
from pullback.ode import ODEBlock
from pullback.problems import Budget, SpecError, load_problem, run
from pullback.problems.snopt import SNOpt

EPS, ALPHA, LR = 0.05, 0.75, 0.02


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(9, k, dtype=torch.float64, generator=generator) for k in (3, 2))  # type: ignore[return-value]


class Dense:
    """The rule once more, layer by layer, from inputs and costates that hooks have seen."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        layer.register_forward_hook(self.keep)
        self.h = self.m = torch.empty(0)
        self.bases: tuple[Tensor, Tensor] | None = None

    def keep(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        self.x = x if self.layer.bias is None else torch.cat([x, torch.ones_like(x[:, :1])], 1)
        output.register_hook(lambda g: setattr(self, "h", len(g) * g))

    def update(self, renew: bool) -> Tensor:
        N = len(self.x)
        g = self.h.T @ self.x / N
        if renew:
            (b, P), (a, Q) = (torch.linalg.eigh(v.T @ v / N) for v in (self.h, self.x))
            self.bases, self.m = (P, Q), b[:, None] * a
        assert self.bases is not None
        P, Q = self.bases
        inside = P.T @ g @ Q
        self.m = ALPHA * self.m + (1 - ALPHA) * N * inside**2
        return P @ (inside / (self.m + EPS)) @ Q.T


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_the_rule_layer_by_layer(momentum: float) -> None:
    x, y = data()
    ours, theirs = net(), net()
    criterion = nn.MSELoss()
    optimizer = SNOpt(ours, criterion, lr=LR, eps=EPS, alpha=ALPHA, every=3, momentum=momentum)
    twins = [Dense(layer) for layer in theirs if isinstance(layer, nn.Linear)]
    velocities: list[Tensor | None] = [None, None]
    for step in range(7):
        optimizer.zero_grad()
        criterion(ours(x), y).backward()
        optimizer.step()
        theirs.zero_grad()
        nn.functional.mse_loss(theirs(x), y).backward()
        with torch.no_grad():
            for k, twin in enumerate(twins):
                move = twin.update(step % 3 == 0)
                velocity = velocities[k]
                velocities[k] = move if velocity is None else momentum * velocity + move
                full = velocities[k]
                assert full is not None
                twin.layer.weight.sub_(LR * full[:, : twin.layer.in_features])
                if twin.layer.bias is not None:
                    twin.layer.bias.sub_(LR * full[:, -1])
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.layer(x))
        return out


def test_factors_of_a_field_are_integrals_over_time() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(ODEBlock(Field(), rtol=1e-9, atol=1e-10)).double()
    x, y = torch.randn(2, 5, 2, dtype=torch.float64)
    criterion = nn.MSELoss()
    fine = Field().double()
    assert isinstance(model[0], ODEBlock)
    fine.load_state_dict(model[0].func.state_dict())
    optimizer = SNOpt(model, criterion)
    criterion(model(x), y).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    steps = 400
    state, inside, outside = x, [], []
    for _ in range(steps):  # midpoint rule
        middle = state + 0.5 / steps * fine(torch.tensor(0.0), state)
        h = fine.layer(middle)
        h.retain_grad()
        inside.append(torch.cat([middle.detach(), torch.ones(5, 1, dtype=torch.float64)], 1))
        outside.append(h)
        state = state + torch.tanh(h) / steps
    nn.functional.mse_loss(state, y).backward()
    given, pulled = torch.stack(inside), torch.stack([h.grad for h in outside if h.grad is not None])
    A = torch.einsum("tni,tnj->ij", given, given) / (5 * steps)
    # What arrives at a midpoint is dt times the costate of the mean over the samples.
    B = torch.einsum("tni,tnj->ij", pulled, pulled) * (5 * steps) ** 2 / (5 * steps)
    (block,) = optimizer.blocks
    assert isinstance(block, EigenBlock)
    # The steps' own costate is that of their ends, half a step late.
    for moment, exact, error in ((block.left, B, 1e-3), (block.right, A, 1e-5)):
        assert isinstance(moment, MatrixMoment)
        torch.testing.assert_close(moment.C[0], exact, rtol=error, atol=1e-8)
    # The step that renews the bases moves along the true gradient.
    for found, p in zip(gradients, fine.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"eps": 0.0}, {"alpha": 1.0}, {"every": 0}, {"momentum": 1.0}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give positive lr and eps"):
        SNOpt(net(), nn.MSELoss(), **options)  # type: ignore[arg-type]
    text = ",".join(f"{key}={value:g}" for key, value in options.items())
    with pytest.raises(SpecError, match="snopt refuses"):
        run(load_problem("wine"), f"snopt:{text}", budget=Budget(steps=1))


def test_it_trains_a_problem() -> None:
    result = run(load_problem("wine:batch_size=32"), "snopt:lr=1e-2,every=5", budget=Budget(steps=12))
    assert result.failure is None
    assert result.loss is not None
    assert result.loss < 0.8 * result.history[0].loss
