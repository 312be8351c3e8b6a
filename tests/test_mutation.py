"""Do the oracles see? The library is made wrong in one place at a time, and the check for that place must fail."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback
from cases import by_name, loss_by_name
from oracle import assert_close, dense, jacobian, linearise, loss_hessian
from pullback import Damping, Momentum

# -- the checks: each compares with dense algebra that shares no code with the library -----------------------


def curvature(case: str, loss: str = "mse") -> Callable[[], None]:
    """U^T U is J^T H J, with the Hessian of the criterion itself."""

    def check() -> None:
        spec = loss_by_name[loss]
        model, args, kwargs = by_name[case].build(n=5)
        z = spec.head(model(*args, **kwargs)).detach()
        criterion, y = spec.criterion(z.shape[1]).double(), spec.target(z)
        lin = linearise(model, criterion, [(args, kwargs, y)], head=spec.head)
        J = jacobian(model, args, kwargs, spec.head).reshape(z.numel(), -1)
        U = dense(model, lin.blocks)
        assert_close(U.T @ U, J.T @ loss_hessian(criterion, z, y) @ J)

    return check


def gradient(case: str, loss: str = "mse") -> Callable[[], None]:
    """U^T e_0 is the gradient, with products rather than rows."""

    def check() -> None:
        spec = loss_by_name[loss]
        model, args, kwargs = by_name[case].build(n=5)
        z = model(*args, **kwargs).detach()
        criterion, y = spec.criterion(z.shape[1]).double(), spec.target(z)
        lin = linearise(model, criterion, [(args, kwargs, y)])
        for block in lin.blocks:
            assert_close(block.rmatvec(lin.e0), torch.cat([p.grad.reshape(-1) for p in block.params]), 1e-9)

    return check


def products(case: str, terms: int = 1) -> Callable[[], None]:
    """Gram, primal, diagonal and products of every block are those of its dense rows."""

    def check() -> None:
        model, args, kwargs = by_name[case].build()
        more = [(by_name[case].inputs(3), by_name[case].side(3), torch.sin)] * (terms - 1)
        for block in linearise(model, nn.MSELoss(), [(args, kwargs, torch.sin), *more]).blocks:
            U = block.dense()
            v, d = torch.randn(U.shape[0], dtype=U.dtype), torch.randn(U.shape[1], dtype=U.dtype)
            assert_close(block.gram(), U @ U.T)
            assert_close(block.primal(), U.T @ U)
            assert_close(block.diagonal(), U.square().sum(0))
            assert_close(block.matvec(d), U @ d)
            assert_close(block.rmatvec(v), U.T @ v)

    return check


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def steps(
    count: int = 1,
    loss: str = "mse",
    penalty: float = 0.0,
    decay: float = 0.0,
    partition: str = "global",
    **options: Any,
) -> Callable[[], None]:
    """Every step of a small net is the dense one: any solver, partition, mass, momentum, weight decay."""

    def check() -> None:
        spec = loss_by_name[loss]
        model, args, _ = by_name["mlp"].build(n=6)
        z = model(*args).detach()
        criterion, y = spec.criterion(z.shape[1]).double(), spec.target(z)
        control = Damping(control="fixed", initial=0.3)
        opt = pullback.GaussNewton(
            model, criterion, damping=control, partition=partition, weight_decay=decay, **options
        )
        momentum = options.get("momentum")
        owner = torch.tensor([0] * 16 + [1] * 10)
        mask = (owner[:, None] == owner[None]) | (partition == "global")
        previous = torch.zeros(26, dtype=torch.float64)
        largest = previous
        for k in range(count):
            opt.zero_grad()
            z = model(*args)
            value = criterion(z, y) + penalty * sum(p.square().sum() for p in model.parameters())
            value.backward()
            before = weights(model)
            g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
            J = jacobian(model, args, {}).reshape(z.numel(), -1)
            H = J.T @ loss_hessian(criterion, z, y) @ J
            opt.step()
            largest = torch.maximum(largest, H.diagonal())
            D = largest if options.get("mass") == "marquardt" else torch.ones_like(g)
            M, full = H * mask + opt.last.mu * torch.diag(D), H + opt.last.mu * torch.diag(D)
            shift = momentum.decay * previous if momentum is not None and momentum.kind == "spring" else 0 * g
            d = shift - torch.linalg.solve(M, g + (H * mask) @ shift)
            V = torch.stack([d, previous], 1) if k and momentum == Momentum() else d[:, None]
            if partition == "layerwise" or momentum is not None:
                moved = V @ -torch.linalg.lstsq(V.T @ full @ V, V.T @ g[:, None]).solution[:, 0]
            else:
                moved = d
            assert_close(weights(model), (before + moved) * (1 - decay), 1e-8)
            previous = moved

    return check


def gain() -> None:
    """Actual is predicted decrease on a quadratic."""
    model, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.ones(4, 2).double()
    opt = pullback.GaussNewton(model, nn.MSELoss(), damping=Damping(initial=0.5))
    opt.criterion(model(x), y).backward()
    opt.step()
    assert opt.last.gain == pytest.approx(1.0, abs=1e-8)
    mu = opt.last.mu
    opt.zero_grad()
    opt.criterion(model(x), y).backward()
    opt.step()
    assert opt.last.mu == pytest.approx(mu / 3), "after a gain of 1 mu falls to a third"


def undone() -> None:
    """Steps that raise the loss are undone bit for bit, with mu growing by 2, 4, 8."""

    class Cliff(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            here = torch.equal(self.weight.detach(), self.start)
            return super().forward(x) + (0.0 if here else 1e3)

    model = Cliff(3, 1).double()
    model.start = model.weight.detach().clone()
    opt = pullback.GaussNewton(model, nn.MSELoss(), damping=Damping(trials=3), weight_decay=0.5)
    x = torch.randn(5, 3, dtype=torch.float64)
    opt.criterion(model(x), torch.randn(5, 1, dtype=torch.float64)).backward()
    first = opt.damping.initial * float((x.square().sum() + 5) * (2 / 5)) / 5
    opt.step()
    assert not opt.last.accepted
    assert torch.equal(model.weight, model.start)
    assert opt.last.mu == pytest.approx(first * 2 * 4)


def sketch() -> None:
    """The mean of many random columns is the metric."""
    z, w = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    S = pullback.Sampled(pullback.Gaussian(), 20_000).factor(z, w, 4)
    assert_close(S.square().sum(0), w, 0.05)


def upstream() -> None:
    """A loss of which the mean is taken outside the criterion has the metric of the mean."""
    model, args, kwargs = by_name["mlp"].build()
    inside = linearise(model, nn.MSELoss(), [(args, kwargs, torch.sin)])
    outside = linearise(model, nn.MSELoss(reduction="none"), [(args, kwargs, torch.sin)])
    assert_close(dense(model, outside.blocks), dense(model, inside.blocks))


# -- the mutations -------------------------------------------------------------------------------------------

Change = Callable[[Any], Any]


def times(factor: float) -> Change:
    return lambda true: lambda *a, **k: factor * true(*a, **k)


def then(do: Callable[[Any], Any]) -> Change:
    """What the true function returns, made wrong."""
    return lambda true: lambda *a, **k: do(true(*a, **k))


def instead(value: Any) -> Change:
    return lambda true: value


def last_row_dropped(true: Any) -> Any:
    def rmatvec(self: Any, v: Tensor) -> Tensor:
        v = v.clone()
        v[-1] = 0
        return true(self, v)

    return rmatvec


def shift_doubled(true: Any) -> Any:
    return lambda A, shift, *a, **k: true(A, 2 * shift, *a, **k)


def stride_one(true: Any) -> Any:
    return lambda self, x, size: true(dataclasses.replace(self, stride=(1,) * len(self.stride)), x, size)


def householder(true: Any) -> Any:
    def basis(self: Any, root: Tensor) -> Tensor:
        v = root.clone()
        v[:, 0] -= 1.0
        Q = -v[:, :, None] * v[:, None, 1:] / v[:, :1, None]
        index = torch.arange(root.shape[1] - 1)
        Q[:, index + 1, index] += 1.0
        return Q

    return basis


def unmasked(true: Any) -> Any:
    """The table of rules with an embedding's that forgets its padding row."""

    def rows(module: Any, calls: Any, wanted: Any, N: int) -> Any:
        found = next(kind for kind in true if kind.layer is nn.Embedding).rule(module, calls, wanted, N)
        found.s = torch.cat([call.factor().reshape(call.r, N, -1, module.embedding_dim) for call in calls], 2)
        return found

    return [dataclasses.replace(kind, rule=rows) if kind.layer is nn.Embedding else kind for kind in true]


def same_mass_back(true: Any) -> Any:
    def move(self: Any, *a: Any) -> Any:
        scales, self.scales = self.scales, [None] * len(self.scales)
        try:
            return true(self, *a)
        finally:
            self.scales = scales

    return move


def previous_reversed(true: Any) -> Any:
    def mix(direction: Any, solvers: Any, gradient: Any, previous: Any) -> Any:
        found = true(direction, solvers, gradient, previous)
        plain = direction.d
        return dataclasses.replace(
            found,
            d=[[2 * a - b for a, b in zip(x, y, strict=True)] for x, y in zip(plain, found.d, strict=True)],
        )

    return mix


def without_rest(true: Any) -> Any:
    return lambda self, blocks, *ridge: dataclasses.replace(true(self, blocks, *ridge), rest=None)


def rest_taken_at_mu_one(true: Any) -> Any:
    return lambda self, e0, g, rest, mu: true(self, e0, g, None if rest is None else [h * mu for h in rest], mu)


def with_mass(true: Any) -> Any:
    return lambda e0, Us, slope, mass, exact, whole: true(e0, Us, slope, mass, exact, whole) - 0.5 * mass


def first_call_only(true: Any) -> Any:
    return lambda params, parts: true(params, [parts[0], *(_zero(p) for p in parts[1:])])


def _zero(rows: Any) -> Any:
    from pullback.tape.rules import DenseRows

    return DenseRows(rows.params, torch.zeros_like(rows.dense()), rows.rule)


@dataclass(frozen=True)
class Mutation:
    """One place made wrong.

    Attributes:
        name: what is wrong.
        target: ``module:attribute``, dotted inside a class.
        change: from the true object to the wrong one.
        check: what must fail.
    """

    name: str
    target: str
    change: Change
    check: Callable[[], None]

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        owner = importlib.import_module(f"pullback.{module}")
        for part in owners:
            owner = getattr(owner, part)
        static = vars(owner)[name]
        true = static.fget if isinstance(static, property) else static
        wrong = self.change(true)
        patch.setattr(owner, name, property(wrong) if isinstance(static, property) else wrong)


#: an attribute that is always None
IGNORED = property(lambda self: None, lambda self, value: None)

LINEAR, OUTER, TAPE = "tape.rules.linear:LinearRows", "tape.rules.outer:OuterRows", "tape.tape"
ATTENTION, STACKED = "tape.rules.attention", "tape.rules.stacked:StackedRows"

MUTATIONS = [
    # rows of layers
    Mutation("sign of U^T v", f"{LINEAR}.rmatvec", times(-1.0), products("mlp")),
    Mutation("scale of U d", f"{LINEAR}.matvec", times(1.01), products("mlp")),
    Mutation("sign of U^T v at positions", f"{LINEAR}.pull", times(-1.0), products("linear on sequences")),
    Mutation("scale of U d at positions", f"{LINEAR}.push", times(1.01), products("linear on sequences")),
    Mutation("outer product transposed", f"{LINEAR}.pull", lambda true: lambda self, c:
             (self.x.flatten(0, 1).T @ c.flatten(0, 1)).reshape(-1), products("linear on sequences")),
    Mutation("bias missing in the Gram", f"{LINEAR}.inner", then(lambda x: x - 1.0), products("mlp")),
    Mutation("inputs of the next sample", f"{LINEAR}.input_rows", then(lambda x: x.roll(1, 0)), curvature("mlp")),
    Mutation("U^T v without a row", f"{LINEAR}.rmatvec", last_row_dropped, products("mlp")),
    Mutation("U^T v without a row, at positions", f"{OUTER}.rmatvec", last_row_dropped,
             products("linear on sequences")),
    Mutation("U^T v of dense rows without a row", "tape.rules.base:DenseRows.rmatvec", last_row_dropped,
             products("layer norm")),
    Mutation("primal without the bias", f"{OUTER}.primal", then(lambda H: H * (torch.arange(len(H)) != len(H) - 1)),
             products("mlp")),
    Mutation("diagonal doubled", f"{OUTER}.diagonal", times(2.0), products("mlp")),
    Mutation("cross term dropped", f"{OUTER}.cross", times(0.0), products("mlp", terms=2)),
    Mutation("positions not summed", "tape.rules.outer:pairwise", times(0.5), products("linear on sequences")),
    Mutation("wrong stride", "tape.rules.geometry:Geometry.patches", stride_one, curvature("conv stride padding")),
    Mutation("window reversed", "tape.rules.geometry:Geometry.patches", then(lambda v: v.flip(2)), curvature("conv")),
    Mutation("sign of a convolution's U^T v", "tape.rules.geometry:Geometry.pull", times(-1.0), products("conv")),
    Mutation("padding row not masked", "tape.rules:RULES", unmasked, curvature("positions")),
    Mutation("not normalised", "tape.rules.norm:_normalised", lambda true: lambda module, x: x,
             curvature("layer norm")),
    Mutation("queries taken for keys", f"{ATTENTION}:_Run.projected", then(lambda qkv: (qkv[1], qkv[0], qkv[2])),
             curvature("attention")),
    Mutation("queries taken for keys of other lengths", f"{ATTENTION}:_Run.projected",
             then(lambda qkv: (qkv[1], qkv[0], qkv[2])), curvature("attention cross alike")),
    Mutation("padding mask ignored", f"{ATTENTION}:_masks", instead(lambda *a: []), curvature("attention masked")),
    Mutation("row blocks in the wrong order", f"{STACKED}._by_kind", lambda true: lambda self, packed: packed,
             curvature("attention cross")),
    Mutation("row blocks in the wrong order on the way in", f"{STACKED}._by_block",
             lambda true: lambda self, packed: packed, products("attention cross")),
    Mutation("second use of a tied weight dropped", "curvature.block:_merge", first_call_only, curvature("tied")),
    Mutation("columns of the sweep exchanged", "tape.sweep:loop", then(lambda parts: [p.flip(0) for p in parts]),
             gradient("mlp")),
    # metrics and weights
    Mutation("weight of the mean halved", f"{TAPE}:cell_weights", times(0.5), curvature("mlp")),
    Mutation("mean over samples alone", f"{TAPE}:cell_weights", times(2.0), curvature("mlp", "cross entropy")),
    Mutation("root not taken", "metric.base:ElementwiseMetric.root", then(torch.square), curvature("mlp", "bce")),
    Mutation("sign of the Householder vector", "metric.categorical:Categorical._basis", householder,
             curvature("mlp", "cross entropy smooth")),
    Mutation("basis transposed in its columns", "metric.categorical:Categorical._basis", then(lambda Q: Q.flip(1)),
             curvature("positions", "cross entropy")),
    Mutation("sign of e_0", "metric.base:ElementwiseMetric.coordinates", times(-1.0), gradient("mlp")),
    Mutation("e_0 without the weights", "metric.categorical:Categorical.coordinates", times(2.0),
             gradient("mlp", "cross entropy weights")),
    Mutation("variance of a bit halved", "metric.bernoulli:Bernoulli.variance", times(0.5), curvature("mlp", "bce")),
    Mutation("sqrt(m) missing", "metric.sampled:Sampled.factor", times(20_000**0.5), sketch),
    Mutation("weight from outside ignored", "tape.term:LossUse.upstream", instead(IGNORED), upstream),
    # solvers
    Mutation("mu twice in the dual", "curvature.factored:factorise", shift_doubled, steps(solver="dual")),
    Mutation("mu twice in the primal", "curvature.factored:factorise", shift_doubled, steps(solver="primal")),
    Mutation("remainder dropped", "curvature.linearisation:Linearisation.gradient", without_rest, steps(penalty=0.1)),
    Mutation("remainder not divided by mu", "curvature.dual:Dual.direction", rest_taken_at_mu_one,
             steps(penalty=0.1, solver="dual")),
    Mutation("wrong unpack order", "curvature.block:Block.unpack",
             lambda true: lambda self, vector: true(self, vector.roll(1)), steps()),
    Mutation("one group for all", "optim.system:divide", lambda true: lambda blocks, *a: [list(blocks)],
             steps(partition="layerwise")),
    Mutation("mass not applied on the way back", "optim.system:System.move", same_mass_back, steps(mass="marquardt")),
    Mutation("mass squared", "curvature.mass:ScaledRows.matvec", lambda true: lambda self, d:
             true(self, self.scale * d), steps(mass="marquardt", penalty=0.1, solver="dual")),
    Mutation("largest diagonal forgotten", "optim.base:PullbackOptimizer._largest", lambda true:
             lambda self, block, diagonal: diagonal, steps(4, mass="marquardt")),
    # the step
    Mutation("step scale 1", "control.open_loop:Direction.scale", instead(lambda self: 1.0),
             steps(partition="layerwise")),
    Mutation("momentum with the wrong sign", "optim.attempt:mix", previous_reversed,
             steps(3, momentum=Momentum(), partition="layerwise")),
    Mutation("spring without its decay", "optim.attempt:solve", lambda true: lambda s, g, mu, shift=None:
             true(s, g, mu, None), steps(3, momentum=Momentum(kind="spring", decay=0.7))),
    Mutation("predicted decrease with the mu term", "optim.attempt:decrease", with_mass, gain),
    Mutation("trial loss of another weight", "optim.taped:replay", times(0.99), gain),
    Mutation("mu kept after a good step", "optim.damping:DampingControl._judge", instead(lambda *a: None), gain),
    Mutation("weights not put back", "optim.search:restore", instead(lambda *a: None), undone),
    Mutation("mu not doubled twice", "optim.damping:DampingControl.fail", lambda true: lambda self:
             (setattr(self, "nu", 2.0), true(self))[1], undone),
    Mutation("weight decay twice", "optim.base:PullbackOptimizer._finish", lambda true: lambda self, params:
             (true(self, params), true(self, params))[0], steps(decay=0.1)),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_the_oracle_sees(mutation, monkeypatch):
    """The run-time self check is off, so that the oracle stands alone."""
    mutation.check()
    torch.manual_seed(0)
    monkeypatch.setattr("pullback.tape.tape.missed", lambda *a, **k: {})
    mutation.check()  # nor does the oracle need it
    mutation.apply(monkeypatch)
    with pytest.raises((AssertionError, pullback.PullbackError)):
        mutation.check()


def rule_of(case: str) -> dict[str, str]:
    """How every parameter gets its rows."""
    model, args, kwargs = by_name[case].build()
    opt = pullback.LayerwiseMetric(model, nn.MSELoss(), damping=Damping(control="fixed"))
    opt.criterion(model(*args, **kwargs), torch.zeros_like(model(*args, **kwargs))).backward()
    opt.step()
    return {entry.name: entry.why for entry in opt.coverage.parameters}


REPAIRED = [
    ("mlp", "0.weight", f"{LINEAR}.rmatvec", times(-1.0)),
    ("mlp", "0.weight", f"{LINEAR}.rmatvec", times(1.01)),
    ("linear on sequences", "0.weight", f"{LINEAR}.pull", times(1.01)),
    ("conv stride padding", "0.0.weight", "tape.rules.geometry:Geometry.pull", times(-1.0)),
    ("positions", "tokens.weight", "tape.rules:RULES", unmasked),
    ("layer norm", "1.weight", "tape.rules.norm:_normalised", lambda true: lambda module, x: x),
]


@pytest.mark.parametrize(
    ("case", "name", "target", "change"), REPAIRED, ids=[f"{row[0]} {k}" for k, row in enumerate(REPAIRED)]
)
def test_the_self_check_sees_and_asks_a_module_above(case, name, target, change, monkeypatch):
    """A rule that misses the gradient is not used: per-sample products give the rows, and they are right."""
    assert "per-sample products" not in rule_of(case)[name]
    Mutation("", target, change, lambda: None).apply(monkeypatch)
    assert "per-sample products" in rule_of(case)[name]
    curvature(case)()


@pytest.mark.parametrize("case", ["mlp", "conv", "layer norm"])
def test_the_self_check_refuses_what_nothing_repairs(case, monkeypatch):
    rule_of(case)
    for target in (f"{LINEAR}.rmatvec", "tape.rules.geometry:Geometry.pull"):
        Mutation("scale", target, times(1.01), lambda: None).apply(monkeypatch)
    Mutation("scale", "tape.rules.base:DenseRows.rmatvec", times(1.01), lambda: None).apply(monkeypatch)
    with pytest.raises(pullback.CoverageError, match="do not reproduce its gradient"):
        rule_of(case)


def test_the_self_check_sees_samples_mixed(monkeypatch):
    """Without it a centring over the batch would be given rows that are not there."""

    class Centred(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0)) - x.mean()

    def step() -> None:
        model = nn.Sequential(nn.Linear(3, 3), Centred(nn.Linear(3, 2))).double()
        opt = pullback.GaussNewton(model, nn.MSELoss())
        x = torch.randn(4, 3, dtype=torch.float64)
        opt.criterion(model(x), torch.zeros(4, 2, dtype=torch.float64)).backward()

    with pytest.raises(pullback.CoverageError):
        step()
    monkeypatch.setattr("pullback.tape.tape.mixed_calls", lambda *a, **k: set())
    monkeypatch.setattr("pullback.tape.tape.missed", lambda *a, **k: {})
    step()  # nothing else would have said so
