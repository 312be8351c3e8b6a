"""The dense twin of policies of single samples: theory 5 word by word, sample by sample, with explicit f_x and f_u."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from pullback.control import Policy, recursion
from pullback.control.forms import all_forms
from pullback.control.route import Route
from pullback.curvature import Block
from pullback.curvature.block import blocks_of
from pullback.metric import OutputMetric
from pullback.tape import Term
from pullback.tape.costates import CostateTape


def network(sizes: list[int], seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


class Dense:
    """A curvature of any kind: a matrix per block, found by its first parameter.

    With ``diagonals`` the matrices are diagonal, and said to be.
    """

    def __init__(self, matrices: dict[int, Tensor], diagonals: bool = False) -> None:
        self.matrices = matrices
        self.diagonals = diagonals

    def diagonal(self, params):
        if not self.diagonals:
            return None
        d = self.matrices[id(params[0])].diagonal().reciprocal()
        return [piece.view_as(p) for piece, p in zip(d.split([p.numel() for p in params]), params, strict=True)]

    def solve(self, params, tensors):
        lead = tensors[0].shape[: tensors[0].ndim - params[0].ndim]
        v = torch.cat([t.reshape(*lead, -1) for t in tensors], -1)
        x = torch.linalg.solve(self.matrices[id(params[0])], v.reshape(-1, v.shape[-1]).T).T.view(v.shape)
        pieces = x.split([p.numel() for p in params], -1)
        return [piece.reshape(*lead, *p.shape) for piece, p in zip(pieces, params, strict=True)]


def curvature_of(model: nn.Sequential, size: float, diagonals: bool, seed: int = 1) -> Dense:
    """A random positive matrix for every linear layer."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for layer in model[::2]:
        n = sum(p.numel() for p in layer.parameters())
        A = torch.rand(n, n, generator=generator, dtype=torch.float64)
        Q = torch.diag(0.5 + A[0]) if diagonals else A @ A.T / n + 0.5 * torch.eye(n, dtype=torch.float64)
        matrices[id(layer.weight)] = size * Q
    return Dense(matrices, diagonals)


@dataclass
class Engine:
    """Policies as the library makes them, with what they are made of."""

    term: Term
    blocks: list[Block]
    beside: list[Block]
    policies: list[list[Policy]]
    clamped: int
    route: Route


def engine(
    model: nn.Module,
    criterion: nn.Module,
    x: Tensor,
    y: Tensor,
    curvature: Dense,
    metric: OutputMetric | None,
    positive: bool = False,
) -> Engine:
    tape = CostateTape(model, criterion, metric, "loop", wiring="all")
    model.zero_grad()
    criterion(model(x), y).backward()
    (term,) = tape.terms
    with torch.no_grad():
        blocks, beside = blocks_of([term]), blocks_of([term.beside()])
        route = Route([term], [[block] for block in blocks])
        forms = [all_forms([beside[k]], curvature, 1) for k in route.order]
        policies, clamped = recursion(forms, [term.N], positive)
    tape.close()
    order = route.order
    return Engine(term, [blocks[k] for k in order], [beside[k] for k in order], policies, clamped, route)


@dataclass
class Stage:
    """Everything of one sample at one stage: V_x and V_xx are those behind it."""

    k: Tensor
    K: Tensor
    V_x: Tensor
    V_xx: Tensor


class Riccati:
    """Values and gains of a chain of linear layers and tanhs.

    Args:
        model: a :func:`network`.
        x: its inputs.
        lam: gradient of every sample's own loss at the prediction, (N, c).
        S: factor of its curvature there, (N, c, r).
        curvature: Q_uu of every layer.
        positive: whether a sample's curvature holds its own factor.
    """

    def __init__(
        self, model: nn.Sequential, x: Tensor, lam: Tensor, S: Tensor, curvature: Dense, positive: bool = False
    ) -> None:
        self.layers = list(model[::2])
        self.last = len(self.layers) - 1
        self.states = [x]
        for k, layer in enumerate(self.layers):
            self.states.append(self.f(k, self.states[-1], self.flat(layer)).detach())
        self.clamped = [0] * len(self.layers)
        samples = [self.sample(n, lam, S, curvature, positive) for n in range(len(x))]
        self.stages = [[own[k] for own in samples] for k in range(len(self.layers))]

    @staticmethod
    def flat(layer: nn.Module) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in layer.parameters()])

    def f(self, k: int, x: Tensor, u: Tensor) -> Tensor:
        layer = self.layers[k]
        pieces = u.split([p.numel() for p in layer.parameters()])
        named = {name: v.view_as(p) for v, (name, p) in zip(pieces, layer.named_parameters(), strict=True)}
        y = functional_call(layer, named, (x,))
        return y if k == self.last else torch.tanh(y)

    def sample(self, n: int, lam: Tensor, S: Tensor, curvature: Dense, positive: bool) -> list[Stage]:
        V_x, Z = lam[n], S[n].T  # V_xx = Z^T Z
        out = []
        for k in range(self.last, -1, -1):
            x, u = self.states[k][n], self.flat(self.layers[k])
            f_x, f_u = jacrev(self.f, argnums=(1, 2))(k, x, u)
            V_xx = Z.T @ Z
            Q_x, Q_u = f_x.T @ V_x, f_u.T @ V_x
            Q_xx, Q_ux = f_x.T @ V_xx @ f_x, f_u.T @ V_xx @ f_x
            Q_uu = curvature.matrices[id(self.layers[k].weight)]
            if positive:
                Q_uu = Q_uu + f_u.T @ V_xx @ f_u
            inverse = torch.linalg.inv(Q_uu)
            out.append(Stage(-inverse @ Q_u, -inverse @ Q_ux, V_x, V_xx))
            # The factor of Q_xx - Q_ux^T Q_uu^{-1} Q_ux, by the symmetric root of the r x r matrix in its middle.
            values, vectors = torch.linalg.eigh(torch.eye(len(Z), dtype=Z.dtype) - Z @ f_u @ inverse @ f_u.T @ Z.T)
            self.clamped[k] += int((values < 0).sum())
            root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
            if not (values < 0).any():
                dense = Q_xx - Q_ux.T @ inverse @ Q_ux
                Zf = root @ Z @ f_x
                assert float((Zf.T @ Zf - dense).abs().max()) < 1e-12 * max(1.0, float(Q_xx.abs().max()))
            V_x, Z = Q_x - Q_ux.T @ inverse @ Q_u, root @ Z @ f_x
        return out[::-1]

    def updated(self) -> list[Tensor]:
        """The layers' weights after the second forward pass."""
        x, out = self.states[0], []
        for k, layer in enumerate(self.layers):
            dx = x - self.states[k]
            answers = [own.k + own.K @ d for own, d in zip(self.stages[k], dx, strict=True)]
            u = self.flat(layer) + torch.stack(answers).mean(0)
            out.append(u)
            x = self.f(k, x, u)
        return out


class Meanwise:
    """The dense twin of policies that count on the mean: values of the layers' outputs as matrices, sample by sample.

    Behind a layer sample n's share of the loss is ``-c dx + dx P dx / 2``.

    Args:
        chain: layers, states and Jacobians.
        P: the metric at the prediction, (N, out, out), of the shares.
        steps: the host's step of every layer.
        curvature: Q_uu of every layer.
        share: how much of the steps is taken.
    """

    def __init__(self, chain: Riccati, P: Tensor, steps: list[Tensor], curvature: Dense, share: float = 1.0) -> None:
        self.chain, self.steps = chain, [share * s for s in steps]
        N = len(P)
        self.jacobians = [
            [jacrev(chain.f, argnums=(1, 2))(k, chain.states[k][n], chain.flat(layer)) for n in range(N)]
            for k, layer in enumerate(chain.layers)
        ]
        c = [P.new_zeros(P.shape[1]) for _ in range(N)]
        values, self.means, self.stages = list(P), [], []
        for k in range(chain.last, -1, -1):
            Q = curvature.matrices[id(chain.layers[k].weight)]
            inverse = torch.linalg.inv(Q)
            f = self.jacobians[k]
            m = self.steps[k] + inverse @ sum(f_u.T @ own for (_, f_u), own in zip(f, c, strict=True))
            for n, (_, f_u) in enumerate(f):
                V = values[n]
                values[n] = V - V @ f_u @ torch.linalg.inv(Q / N**0.5 + f_u.T @ V @ f_u) @ f_u.T @ V
                c[n] = c[n] - values[n] @ f_u @ m
            self.stages.append((inverse, list(values), list(c)))
            values = [f_x.T @ V @ f_x for (f_x, _), V in zip(f, values, strict=True)]
            c = [f_x.T @ own for (f_x, _), own in zip(f, c, strict=True)]
            self.means.append(m)
        self.stages, self.means = self.stages[::-1], self.means[::-1]
        moved = [torch.zeros_like(own) for own in chain.states[0]]
        for f, m in zip(self.jacobians, self.means, strict=True):
            moved = [f_x @ dx + f_u @ m for (f_x, f_u), dx in zip(f, moved, strict=True)]
        self.length = float(sum(z @ V @ z for z, V in zip(moved, P, strict=True)))

    def updated(self) -> list[Tensor]:
        """The layers' weights after the second forward pass."""
        chain = self.chain
        x, out = chain.states[0], []
        for k, layer in enumerate(chain.layers):
            inverse, values, c = self.stages[k]
            dx = x - chain.states[k]
            v = sum(
                f_u.T @ (V @ f_x @ d - own)
                for (f_x, f_u), V, own, d in zip(self.jacobians[k], values, c, dx, strict=True)
            )
            u = chain.flat(layer) + self.steps[k] - inverse @ v
            out.append(u)
            x = chain.f(k, x, u)
        return out
