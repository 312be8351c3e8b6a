"""The dense twin of a closed-loop step: a chain of three linear layers under the mean squared error, float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import pullback
from oracle import assert_close
from pullback import Damping
from pullback.control import Course
from pullback.optim.closed_loop import LOOK
from pullback.tape import Passage, Tape, replay

#: the optimizers that run the model again with weights that move on the way
CLOSED = {
    "feedback": pullback.FeedbackGaussNewton,
    "plain feedback": partial(pullback.FeedbackGaussNewton, anticipate=False),
    "geodesic": partial(pullback.GaussNewton, geodesic=True),
}

SIZES = [3, 5, 4, 2]


def chain(seed: int = 0, N: int = 9, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Three linear layers, inputs and targets."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for k in range(3):
        layers += [nn.Linear(SIZES[k], SIZES[k + 1]), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)
    return model.to(dtype), x.to(dtype), y.to(dtype)


def weights(model: nn.Module) -> Tensor:
    """All weights in one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def linear(course: Course, moved: dict[int, list[Tensor]]) -> Tensor:
    """The deviation by products with U, over all predictions."""
    return torch.cat([course.linear(t, moved) for t in range(len(course.terms))])


def along(
    model: nn.Module,
    tape: Tape,
    course: Course,
    directions: Sequence[Sequence[Tensor]],
    seen: Callable[[int, Tensor, Tensor], None],
    scale: float = 1.0,
) -> None:
    """Runs the model again, every stage moved by its direction on arrival; shows each deviation, measured and linear.

    The weights are left where they were.
    """
    terms = course.terms
    moved: dict[int, list[Tensor]] = {}
    params = [p for blocks in course.stages for block in blocks for p in block.params]
    before = [p.detach().clone() for p in params]

    def shown(k: int) -> None:
        if moved:
            seen(k, course.deviation(passage, k, moved), linear(course, moved))

    def arrived(k: int) -> None:
        shown(k)
        moved[k] = [scale * d for d in directions[k]]
        for block, step in zip(course.stages[k], moved[k], strict=True):
            torch._foreach_add_(list(block.params), block.unpack(step))

    passage = Passage(terms, course.moments, arrived, sorted({root.serial for term in terms for root in term.roots}))
    with torch.no_grad(), tape.recorder.paused():
        for k, moment in enumerate(passage.moments):
            if moment is None:
                arrived(k)
        with tape.recorder.heard(passage):
            replay(model, terms)
        shown(len(course.stages))
        torch._foreach_copy_(params, before)


class Twin:
    """The step from dense Jacobians, the deviations from runs of the layers one by one.

    Args:
        model: a :func:`chain`.
        x: its inputs.
        y: the targets.
        stages: numbers of the layers of every stage.
        anticipate: whether the remainder is anticipated.
    """

    def __init__(
        self, model: nn.Sequential, x: Tensor, y: Tensor, stages: Sequence[Sequence[int]], anticipate: bool
    ) -> None:
        self.model, self.x = model, x
        self.stages, self.anticipate = stages, anticipate
        self.names = {name: p.shape for name, p in model.named_parameters()}
        start, self.columns = 0, []
        for a, b in itertools.pairwise(SIZES):
            self.columns.append(slice(start, start + a * b + b))
            start += a * b + b
        self.w = weights(model)
        self.scale = (2 / y.numel()) ** 0.5
        *self.inputs, self.z = (h.detach() for h in self.run(self.w))
        self.U = jacrev(lambda w: self.rows(self.run(w)[-1]))(self.w)
        self.S = [jacrev(lambda h, k=k: self.rows(model[2 * k :](h)))(h).detach() for k, h in enumerate(self.inputs)]
        self.e0 = self.rows(self.z - y)

    def rows(self, z: Tensor) -> Tensor:
        return (self.scale * z).T.reshape(-1)

    def run(self, w: Tensor) -> list[Tensor]:
        """Inputs of the layers, and the prediction."""
        parts = w.split([shape.numel() for shape in self.names.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(self.names.items(), parts, strict=True)}
        found, h = [], self.x
        for k, layer in enumerate(self.model):
            if k % 2 == 0:
                found.append(h)
            own = {name.split(".")[1]: p for name, p in named.items() if name.split(".")[0] == str(k)}
            h = functional_call(layer, own, (h,)) if own else layer(h)
        return [*found, h]

    def deviation(self, layer: int, s: Tensor) -> Tensor:
        """What arrives in front of a layer (3: the end), with decided steps s in their columns, zero elsewhere."""
        new = self.run(self.w + s)
        if layer == 3:
            return self.rows(new[-1] - self.z)
        later = sum(self.U[:, c] @ s[c] for c in self.columns[layer:])
        return torch.einsum("rnd,nd->r", self.S[layer], new[layer] - self.inputs[layer]) + later

    def linear(self, layers: Sequence[int], s: Tensor) -> Tensor:
        out = torch.zeros_like(self.e0)
        for k in layers:
            out = out + self.U[:, self.columns[k]] @ s[self.columns[k]]
        return out

    def step(
        self,
        mu: float,
        g: Tensor,
        lr: float = 1.0,
        D: Tensor | None = None,
        shift: Tensor | None = None,
        alpha: float = 1.0,
    ) -> Tensor:
        """The step at a damping, for the gradient g, towards the shift; alpha is how far along the arc."""
        root = torch.ones_like(g) if D is None else D.rsqrt()
        p = torch.zeros_like(g) if shift is None else shift / root
        U, G = self.U * root, g * root
        short = float(G @ (U.T @ self.e0)) / float((U.T @ self.e0).square().sum())
        e0 = short * self.e0
        h = G - U.T @ e0
        if float(h.norm()) > 1e-9 * float(G.norm()):
            e0, h = self.e0, G - U.T @ self.e0
        else:
            h = torch.zeros_like(G)
        stages = sorted(self.stages, key=min)

        def answer(k: int, v: Tensor, far: float) -> Tensor:
            tail = sorted(layer for stage in stages[k:] for layer in stage)
            index = torch.cat([torch.arange(len(g))[self.columns[layer]] for layer in tail])
            M = mu * torch.eye(len(index), dtype=g.dtype) + U[:, index].T @ U[:, index]
            b = U[:, index].T @ (v + far * U[:, index] @ p[index]) + far * h[index]
            out = torch.zeros_like(g)
            out[index] = root[index] * (far * p[index] - torch.linalg.solve(M, b))
            return out

        far = [torch.zeros_like(self.e0) for _ in stages]
        if self.anticipate:
            d = LOOK * lr * answer(0, e0, 1.0)
            bent, seen = [], []
            for stage in [*stages, [3]]:
                done = torch.zeros_like(d)
                before = [layer for other in stages[: len(bent)] for layer in other]
                for layer in before:
                    done[self.columns[layer]] = d[self.columns[layer]]
                seen = before
                bent.append((self.deviation(min(stage), done) - self.linear(seen, done)) / LOOK**2)
            far = [bent[-1] - own for own in bent[:-1]]
        s = torch.zeros_like(g)
        for k, stage in enumerate(stages):
            v = alpha * lr * e0 + (self.deviation(min(stage), s) if k else 0) + alpha**2 * far[k]
            found = answer(k, v, alpha * lr)
            for layer in stage:
                s[self.columns[layer]] = found[self.columns[layer]]
        return s.detach()


FIXED = Damping(control="fixed", initial=3.0)

PARTITIONS = {
    "layerwise": ("layerwise", [[0], [1], [2]]),
    "ends together": ([["0.*", "4.*"]], [[0, 2], [1]]),
    "last two together": ([["0.*"], ["2.*", "4.*"]], [[0], [1, 2]]),
    "first two together": ([["0.*", "2.*"]], [[0, 1], [2]]),
    "global": ("global", [[0, 1, 2]]),
}


def compare(
    count: int = 1, *, anticipate: bool = True, geodesic: bool = False, partition: str = "layerwise", lr: float = 1.0,
    decay: float = 0.0, clip: float | None = None, penalty: float = 0.0, alpha: float = 1.0, tolerance: float = 1e-8,
    **options: Any,
) -> pullback.optim.PullbackOptimizer:  # fmt: skip
    """A few steps, each the twin's."""
    named, stages = PARTITIONS[partition]
    model, x, y = chain()
    criterion = nn.MSELoss()
    options |= {"damping": FIXED, "partition": named, "lr": lr, "weight_decay": decay, "sweep": "loop"}
    if geodesic:
        opt = pullback.GaussNewton(model, criterion, geodesic=True, **options)
    else:
        opt = pullback.FeedbackGaussNewton(model, criterion, anticipate=anticipate, **options)
    previous, largest = None, None
    for _ in range(count):
        opt.zero_grad()
        loss = criterion(model(x), y) + penalty * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        before = weights(model)
        opt._tape.recorder.enabled = False
        twin = Twin(model, x, y, stages, anticipate)
        opt._tape.recorder.enabled = True
        opt.step()
        D, own = None, twin.U.square().sum(0)
        if options.get("mass") == "marquardt":
            D = largest = own if largest is None else torch.maximum(largest, own)
        elif options.get("mass") == "module":
            D = torch.cat([own[c].mean().expand(own[c].shape) for c in twin.columns])
        momentum = options.get("momentum")
        shift = None if previous is None or momentum is None else momentum.decay * previous
        s = twin.step(opt.last.mu, g, lr, D, shift, alpha)
        assert_close(weights(model), (before + s) * (1 - lr * decay), tolerance)
        assert_close(weights(model) - before, (before + s) * (1 - lr * decay) - before, 100 * tolerance)
        previous = s
    return opt


def train(opt: torch.optim.Optimizer, loss: Callable[[], Tensor], count: int) -> list[float]:
    """The plain loop."""
    found = []
    for _ in range(count):
        opt.zero_grad()
        value = loss()
        value.backward()
        opt.step()
        found.append(value.item())
    return found
