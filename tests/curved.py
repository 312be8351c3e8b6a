"""Dense twins: bases of tangent spaces from the equations of the manifolds, retractions without factorisations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from pullback.manifolds import Orthogonal, PositiveDefinite, Sphere, Stiefel, constrain, manifolds_of


def point(manifold, shape, seed=0):
    """A point drawn at random, float64."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=gen, dtype=torch.float64)
    return manifold.nearest(w @ w.T + 0.5 * torch.eye(len(w)) if isinstance(manifold, PositiveDefinite) else w)


def equations(manifold, w: Tensor) -> Tensor:
    """What vanishes on the manifold, flat."""
    if isinstance(manifold, Sphere):
        return (w.square().sum() - manifold.radius**2)[None]
    if isinstance(manifold, Stiefel):
        W = w.mT if w.shape[0] < w.shape[1] else w
        return (W.T @ W - torch.eye(W.shape[1], dtype=w.dtype)).reshape(-1)
    return (w - w.T).reshape(-1)


def basis(manifold, w: Tensor) -> Tensor:
    """Any basis of the tangent space, (n, dimension): the null space of the equations' derivative."""
    J = jacrev(lambda v: equations(manifold, v))(w).reshape(-1, w.numel())
    _, s, Vh = torch.linalg.svd(J)
    rank = int((s > 1e-10 * s[0]).sum())
    return Vh[rank:].T


def product(manifold, w: Tensor) -> Tensor:
    """The manifold's own inner product, (n, n)."""
    if isinstance(manifold, PositiveDefinite):
        return torch.kron(w.inverse(), w.inverse())
    return torch.eye(w.numel(), dtype=w.dtype)


def retract(manifold, w: Tensor, d: Tensor) -> Tensor:
    """The retraction in other words; differentiable at d = 0."""
    if isinstance(manifold, Sphere):
        return manifold.radius * (w + d) / (w + d).square().sum().sqrt()
    if isinstance(manifold, PositiveDefinite):
        return w + d + 0.5 * d @ w.inverse() @ d
    if w.shape[0] < w.shape[1]:
        return retract(manifold, w.mT, d.mT).mT
    # (W + d)(I + d^T d)^{-1/2}, the root by the iteration of Denman and Beavers
    Y = torch.eye(d.shape[1], dtype=d.dtype) + d.T @ d
    Z = torch.eye(d.shape[1], dtype=d.dtype)
    for _ in range(12):
        Y, Z = (Y + Z.inverse()) / 2, (Z + Y.inverse()) / 2
    return (w + d) @ Z


class Quadratic(nn.Module):
    """x -> (x^T P_k x)_k for matrices P_k; one is a parameter A, the other its square."""

    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.A = nn.Parameter(point(PositiveDefinite(), (k, k), 3))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.einsum("ni,ij,nj->n", x, self.A, x)
        return torch.stack([z, torch.einsum("ni,ij,jk,nk->n", x, self.A, self.A, x)], 1)


class Dense(nn.Module):
    """x -> x W^T without a rule of its own."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def net(seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Linear layers on every manifold and a flat one, inputs and targets."""
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), Quadratic()]
    model = nn.Sequential(*layers, nn.Linear(2, 2)).double()
    constrain(model, "0.weight", Stiefel(), project=True)
    constrain(model, "2.weight", Orthogonal(), project=True)
    constrain(model[4], "weight", Sphere(2.0), project=True)
    constrain(model, "6.A", PositiveDefinite())
    return model, torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)


class Blocks:
    """Dense E, G and H of a model under the mean squared error, parameters in the order of named_parameters."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        held = manifolds_of(model)
        self.params = [p.detach().clone() for p in model.parameters()]
        self.manifolds = [held.get(id(p)) for p in model.parameters()]
        own = {name: p.detach() for name, p in model.named_parameters()}
        J = jacrev(lambda q: functional_call(model, q, (x,)))(own)
        J = torch.cat([j.reshape(y.numel(), -1) for j in J.values()], 1)
        r = (model(x) - y).detach().reshape(-1)
        self.H, self.g = 2 / y.numel() * J.T @ J, 2 / y.numel() * J.T @ r
        pairs = list(zip(self.manifolds, self.params, strict=True))
        eye = [torch.eye(p.numel(), dtype=torch.float64) for p in self.params]
        self.E = torch.block_diag(*[e if m is None else basis(m, p) for e, (m, p) in zip(eye, pairs, strict=True)])
        self.G = torch.block_diag(*[e if m is None else product(m, p) for e, (m, p) in zip(eye, pairs, strict=True)])

    def direction(self, mu: float, H: Tensor | None = None, mass: Tensor | None = None) -> Tensor:
        """-E (E^T M E)^{-1} E^T g."""
        M = mu * (self.G if mass is None else mass * self.G) + (self.H if H is None else H)
        return -self.E @ torch.linalg.solve(self.E.T @ M @ self.E, self.E.T @ self.g)

    def moved(self, d: Tensor) -> list[Tensor]:
        """The parameters after a step."""
        parts = d.split([p.numel() for p in self.params])
        out = []
        for p, m, s in zip(self.params, self.manifolds, parts, strict=True):
            s = s.view_as(p)
            out.append(p + s if m is None else retract(m, p, s))
        return out
