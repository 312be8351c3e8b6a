"""Problems outside deep learning: the chain, the circuit, the network, and their notebooks."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.func import jacrev, vmap

import pullback
from pullback.contraction import Ball, ContractionError, rate_at
from pullback.problems import SpecError, load_problem
from pullback.problems.gene_circuit import LEAK, Circuit
from pullback.problems.mass_spring import Chain, ControlledChain
from pullback.problems.skew_network import Network, bounded, oscillator, skew_matrix

F64 = torch.float64
ROOT = Path(__file__).parent.parent.parent


def chain_model(text: str = "mass-spring:steps=4,states=3") -> ControlledChain:
    model = load_problem(text).build_model(0)
    assert isinstance(model, ControlledChain)
    return model


def circuit(seed: int = 1) -> Circuit:
    model = load_problem("gene-circuit").build_model(seed)
    assert isinstance(model, Circuit)
    return model


def network(coupling: str = "skew") -> Network:
    model = load_problem(f"skew-network:coupling={coupling},steps=8,inputs=4,modules=4,size=2").build_model(0)
    assert isinstance(model, Network)
    return model


# -- the chain ---------------------------------------------------------------------------------------


def drift(step: float, damping: float) -> tuple[float, float]:
    """Largest deviation of the energy from where it began and its change over 10 s, without control."""
    chain = Chain(damping=damping, step=step)
    x = torch.tensor([[0.3, -0.2, 0.1, 0.0, 0.2, -0.1]], dtype=F64)
    force = -chain.springs(chain.reference)  # what holds the reference does work too: elastic energy less r's
    energies = []
    for _ in range(round(10 / step)):
        energies.append(float(chain.energy(x) - x[:, :3] @ force))
        x = chain.advance(torch.cat([x, x.new_zeros(1, 3)], 1))
    return max(abs(e - energies[0]) for e in energies), energies[-1] - energies[0]


def test_the_chain_keeps_its_energy_and_damping_takes_it() -> None:
    errors = [drift(step, 0.0)[0] for step in (0.08, 0.04, 0.02)]
    assert all(0.8 < math.log2(a / b) < 1.2 for a, b in pairwise(errors))
    # d/dt energy = -c |v|^2: over 10 s with c = 0.1 a large share of what is there is gone.
    assert drift(0.05, 0.1)[1] < -0.1
    chain = Chain()
    x = 0.3 * torch.randn(5, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    slope = torch.cat(chain.slope(x, torch.zeros(5, 3, dtype=F64)), 1)
    gradient = vmap(jacrev(chain.energy))(x)
    gradient[:, :3] += chain.springs(chain.reference)
    power = (gradient * slope).sum(1)
    torch.testing.assert_close(power, -chain.damping * x[:, 3:].square().sum(1))


def test_the_controlled_chain_is_its_rollout_by_hand() -> None:
    problem = load_problem("mass-spring:steps=4,states=3")
    model = chain_model()
    x, seen = problem.train[0], []
    n, chain = model.chain.n, model.chain
    nets = [leaf.module for leaf in model.leaves() if any(True for _ in leaf.parameters())][:n]
    assert len({id(net) for net in nets}) == n
    for k in range(5):
        z, v = x[:, :n], x[:, n:]
        forces = []
        for i, net in enumerate(nets):
            near = [w[:, j] if 0 <= j < n else 0 * w[:, 0] for w in (z, v) for j in (i - 1, i, i + 1)]
            forces.append(net(torch.stack(near, 1)))
        u = torch.cat(forces, 1)
        seen.append(torch.cat([z, 0.5 * v, 0.2 * u], 1))
        if k < 4:
            q = chain.reference + z
            e = torch.diff(q, dim=1, prepend=torch.zeros(3, 1, dtype=F64))
            s = torch.cat([e + chain.hardening * e**3, torch.zeros(3, 1, dtype=F64)], 1)
            hold = torch.zeros(n, dtype=F64)
            hold[-1] = chain.stretch + chain.hardening * chain.stretch**3  # equal tensions: the last mass alone
            v = v + chain.step * (s[:, 1:] - s[:, :-1] - chain.damping * v + u + hold)
            x = torch.cat([z + chain.step * v, v], 1)
    torch.testing.assert_close(model(problem.train[0]), torch.cat(seen, 1), rtol=1e-12, atol=1e-12)
    masses = model.masses()
    assert sorted({float(value) for value in masses.values()}) == pytest.approx([1.0, 2.0, 4.0])
    assert len(model.partition()) == n


def test_the_free_chain_contracts_at_half_its_damping() -> None:
    chain = Chain()
    J = jacrev(lambda x: torch.cat(chain.slope(x, x.new_zeros(3))))(torch.zeros(6, dtype=F64))
    assert -torch.linalg.eigvals(J).real.max().item() == pytest.approx(chain.damping / 2, abs=1e-12)
    field = chain_model().closed_loop()
    assert field(torch.zeros(6, dtype=F64)).abs().max() < 1e-15  # the reference is an equilibrium


def test_the_controllers_learn() -> None:
    problem = load_problem("mass-spring:steps=4,states=6")
    model = problem.build_model(0)
    assert isinstance(model, ControlledChain)
    losses = []
    opt = pullback.FeedbackGaussNewton(model, problem.criterion, mass=model.masses(), partition=model.partition())
    for _ in range(4):
        opt.zero_grad()
        loss = problem.criterion(model(problem.train[0]), problem.train[1])
        loss.backward()
        opt.step()
        losses.append(loss.item())
    opt.close()
    assert losses[-1] < losses[0]


# -- the circuit -------------------------------------------------------------------------------------


def test_the_circuit_settles_at_its_steady_state() -> None:
    model = circuit()
    inducer = torch.tensor(0.3, dtype=F64)
    with torch.no_grad():
        end = model.simulate(inducer, torch.full((6,), 50.0, dtype=F64), minutes=400.0, step=1.0)[-1]
        said = float(model(inducer.reshape(1, 1)).exp())
        slopes = model.dynamics(inducer)(end)
    assert float(end[5]) == pytest.approx(said, rel=1e-6)
    assert float(slopes.abs().max()) < 1e-3 * float(end.max()) * 1e-3
    logs = {gene: {k: v.exp() for k, v in model.logs(gene).items()} for gene in "XYZ"}
    p = float(inducer.exp())
    hill = [p ** float(logs["X"]["n"]), float(logs["X"]["K"] ** logs["X"]["n"])]
    on = hill[0] / (hill[0] + hill[1])
    x = logs["X"]
    level = x["alpha"] * (LEAK + (1 - LEAK) * on) * x["beta"] / (x["decay_m"] * x["decay_p"])
    assert float(end[1]) == pytest.approx(float(level), rel=1e-6)


def test_mutations_share_what_outputs_cannot_tell_apart() -> None:
    """D d is the same for alpha and beta, and minus that for decays: outputs depend on their sum alone."""
    problem, model = load_problem("gene-circuit"), circuit()
    before = {gene: model.logs(gene) for gene in "XYZ"}
    before = {gene: {k: v.clone() for k, v in logs.items()} for gene, logs in before.items()}
    opt = pullback.GaussNewton(model, problem.criterion, mass=model.masses())
    for _ in range(3):
        opt.zero_grad()
        problem.criterion(model(problem.train[0]), problem.train[1]).backward()
        opt.step()
    opt.close()
    for gene in "XYZ":
        d = {k: float((v - before[gene][k]).sum()) for k, v in model.logs(gene).items()}
        assert abs(d["alpha"]) > 1e-3
        assert d["alpha"] == pytest.approx(4 * d["beta"], rel=1e-6)
        assert d["beta"] == pytest.approx(-d["decay_m"], rel=1e-6)
        assert d["beta"] == pytest.approx(-d["decay_p"], rel=1e-6)


# -- the network -------------------------------------------------------------------------------------


def dense(model: Network, samples: int = 100) -> float:
    """Least rate in diag(w_i M_i) over drawn states, from dense Jacobians and eigenvalues."""
    n = len(model.weights)
    points = Ball(torch.zeros(n, dtype=F64), 2.0).draw(samples, torch.Generator().manual_seed(0))
    J = vmap(jacrev(model.flow(torch.tensor(0.3, dtype=F64))))(points).detach()
    M = torch.diag(model.weights)
    S = (M @ J + J.mT @ M) / 2
    theta = model.weights.rsqrt()
    return -float(torch.linalg.eigvalsh(theta[:, None] * S * theta)[:, -1].max())


def test_the_guarantee_holds_all_along_the_training() -> None:
    problem = load_problem("skew-network:steps=8,inputs=4,modules=4,size=2")
    model = network()
    opt = pullback.GaussNewton(model, problem.criterion)
    losses = []
    for _ in range(6):
        found = model.guarantee()
        torch.testing.assert_close(found.metric / found.metric[0, 0], torch.diag(model.weights / model.weights[0]))
        assert found.rate == pytest.approx(min(model.cell_rates()))
        assert found.rate >= model.least
        assert found.rate <= dense(model) + 1e-10
        opt.zero_grad()
        loss = problem.criterion(model(problem.train[0]), problem.train[1])
        loss.backward()
        opt.step()
        losses.append(loss.item())
    opt.close()
    assert losses[-1] < 0.3 * losses[0]
    assert model.guarantee().rate <= dense(model) + 1e-10


def test_free_couplings_begin_the_same_and_lose_it() -> None:
    skew, free = network(), network("free")
    torch.testing.assert_close(skew.couplings, free.couplings)
    x = torch.linspace(-1, 1, 8, dtype=F64)
    u = torch.tensor(0.3, dtype=F64)
    torch.testing.assert_close(skew.flow(u)(x), free.flow(u)(x))
    problem = load_problem("skew-network:coupling=free,steps=8,inputs=4,modules=4,size=2")
    opt = pullback.GaussNewton(free, problem.criterion)
    for _ in range(6):
        opt.zero_grad()
        problem.criterion(free(problem.train[0]), problem.train[1]).backward()
        opt.step()
    opt.close()
    assert dense(free) < 0
    with pytest.raises(ContractionError, match="No rule applies"):
        free.guarantee()


def test_couplings_are_skew_and_modules_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = 0.5 + torch.rand(6, dtype=F64, generator=generator)
    G = skew_matrix(weights, 2, torch.randn(6, 6, dtype=F64, generator=generator))
    M = torch.diag(weights)
    assert (M @ G + (M @ G).T).abs().max() < 1e-14
    assert not G[:2, :2].any()
    for scale in (0.1, 1.0, 100.0):
        V = bounded(scale * torch.randn(3, 3, dtype=F64, generator=generator), 0.1)
        assert torch.linalg.matrix_norm(V, 2) < 0.9
    model = network()
    x = torch.zeros(8, dtype=F64)
    assert rate_at(model.flow(torch.tensor(0.0, dtype=F64)), x, metric=torch.diag(model.weights)).value > 0.1


def test_the_oscillator_solves_its_equation() -> None:
    u, times = torch.tensor([[0.4]], dtype=F64), torch.linspace(0, 5, 5001, dtype=F64)
    y = oscillator(u, times)[0]
    h = times[1]
    second = (y[2:] - 2 * y[1:-1] + y[:-2]) / h**2
    assert (second + 4 * y[1:-1] - 4 * math.sin(0.8)).abs().max() < 1e-5


# -- all three ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("mass-spring:masses=0", "masses of mass-spring is 0"),
        ("mass-spring:damping=-1", "damping of mass-spring is -1"),
        ("mass-spring:mass_ratio=0", "mass_ratio of mass-spring"),
        ("gene-circuit:levels=1", "levels of gene-circuit is 1; give 2 or more"),
        ("gene-circuit:product_mass=0", "product_mass of gene-circuit"),
        ("gene-circuit:spread=-1", "spread of gene-circuit"),
        ("skew-network:least=1", "least of skew-network is 1"),
        ("skew-network:coupling=sqew", "Did you mean 'skew'"),
        ("skew-network:steps=1", "steps of skew-network is 1; give 2 or more"),
        ("skew-network:step=3", "step of skew-network"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, part: str) -> None:
    with pytest.raises(SpecError, match=part):
        load_problem(text)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.setenv("PULLBACK_QUICK", "1")
    space: dict[str, object] = {"__name__": "__main__"}
    for k, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {k}", "exec"), space)
    import matplotlib.pyplot as plt

    assert plt.get_fignums()
    plt.close("all")
