from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pullback
from pullback.problems import (
    MissingExtraError,
    OptimizerSpec,
    SpecError,
    optimizers,
    parse_optimizer,
    parse_optimizers,
)
from pullback.problems.muon import MuonWithAdamW
from pullback.problems.optimizers import optimizer_entries, optimizer_entry

rates = st.floats(1e-6, 1.0)
specs = st.one_of(
    st.builds(lambda lr: OptimizerSpec("adam", {"lr": lr}), rates),
    st.builds(lambda lr, m: OptimizerSpec("sgd", {"lr": lr, "momentum": m}), rates, rates),
    st.builds(lambda b: OptimizerSpec("adamw", {"betas": (b, 0.99)}), rates),
    st.builds(lambda m: OptimizerSpec("layerwise-metric", {"samples": m}), st.integers(1, 9)),
    st.just(OptimizerSpec("lbfgs")),
    st.builds(lambda h: OptimizerSpec("lbfgs", {"history_size": h, "line_search_fn": None}), st.integers(1, 9)),
)


def test_commas_part_options_and_optimizers() -> None:
    found = parse_optimizers("layerwise-metric:samples=1,damping=0.1,adam:lr=3e-3,lbfgs, sgd:lr=0.1 , momentum=0.9")
    assert [(spec.name, spec.options) for spec in found] == [
        ("layerwise-metric", {"samples": 1, "damping": 0.1}),
        ("adam", {"lr": 0.003}),
        ("lbfgs", {}),
        ("sgd", {"lr": 0.1, "momentum": 0.9}),
    ]


def test_an_option_continues_a_bare_name() -> None:
    assert parse_optimizers("adam,lr=3e-3") == [OptimizerSpec("adam", {"lr": 0.003})]


@given(st.lists(specs, min_size=1, max_size=5, unique_by=lambda spec: spec.label))
def test_what_is_written_is_read_back(chosen: list[OptimizerSpec]) -> None:
    assert parse_optimizers(",".join(spec.label for spec in chosen)) == chosen


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("adma", "Did you mean 'adam'"),
        ("layerwise", "Did you mean 'layerwise-metric'"),
        ("adam:lrr=1", "Did you mean 'lr'"),
        ("layerwise-metric:sample=1", "Did you mean 'samples'"),
        ("lr=1,adam", "before any optimizer"),
        ("adam,,sgd", "between two commas"),
        ("", "between two commas"),
        ("adam,sgd,adam", "listed twice"),
        ("adam:lr=fast", "lr of adam must be a number"),
        ("adam:maximize=true", "no option 'maximize'"),
        ("adam:", "ends with a colon"),
    ],
)
def test_typos_are_refused_with_the_remedy(text: str, part: str) -> None:
    with pytest.raises(SpecError, match=part):
        parse_optimizers(text)


def test_one_optimizer_means_one() -> None:
    assert parse_optimizer("adam:lr=1").label == "adam:lr=1"
    with pytest.raises(SpecError, match="names 2"):
        parse_optimizer("adam,sgd")


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def make(text: str, criterion: nn.Module | None = None) -> Any:
    spec = parse_optimizer(text)
    return optimizer_entry(spec.name).make(spec.options, model(), criterion or nn.MSELoss())


@pytest.mark.parametrize("entry", list(optimizer_entries()), ids=lambda entry: entry.name)
def test_every_optimizer_is_built_and_lists_its_options(entry: Any) -> None:
    assert make(entry.name) is not None
    assert ("lr" in entry.options()) != (entry.name in {"least-squares", "e-msa"})
    assert entry.summary


def test_options_arrive() -> None:
    assert make("adam:lr=3e-3,betas=0.8/0.9").defaults["betas"] == (0.8, 0.9)
    assert make("lbfgs:history_size=7").defaults["history_size"] == 7
    assert make("lbfgs").defaults["line_search_fn"] == "strong_wolfe"
    assert make("lbfgs:line_search_fn=none").defaults["line_search_fn"] is None


def test_our_options_become_objects() -> None:
    torch.manual_seed(5)
    optimizer = make("layerwise-metric:samples=2,damping=0.5,lr=0.25")
    assert isinstance(optimizer, pullback.LayerwiseMetric)
    assert isinstance(optimizer.metric, pullback.Sampled)
    assert (optimizer.metric.m, optimizer.metric.seed) == (2, 5)
    assert optimizer.damping == pullback.Damping(initial=0.5)
    assert optimizer.defaults["lr"] == 0.25
    assert isinstance(make("gauss-newton"), pullback.GaussNewton)


def test_the_options_of_a_game_are_parted_from_those_of_kronecker() -> None:
    torch.manual_seed(5)
    optimizer = make("kronecker-game:structure=cooperative,hold=3,cut=0,refresh=4,damping=0.3,trust=false")
    assert isinstance(optimizer, pullback.KroneckerGame)
    assert optimizer.game.game == pullback.Game(structure="cooperative", hold=3, cut=0, seed=5)
    assert optimizer.schedule == pullback.Refresh(every=4)
    assert optimizer._stride.agreement is None
    assert make("kronecker-game").game.game.structure == "bandit"
    with pytest.raises(SpecError, match=r"kronecker-game refuses: Game.*got .alone."):
        make("kronecker-game:structure=alone")
    with pytest.raises(SpecError, match="kronecker-game refuses: Players share Kronecker factors"):
        make("kronecker-game:form=ekfac")
    with pytest.raises(SpecError, match=r"kronecker-game refuses: Game\(cut"):
        make("kronecker-game:cut=2")


@pytest.mark.parametrize("name", ["feedback", "gauss-newton:geodesic=true", "gauss-newton"])
def test_what_is_not_chosen_of_the_damping_stays_the_default(name: str) -> None:
    default = make(name)
    changed = make(f"{name}{',' if ':' in name else ':'}arc=false")
    assert changed.damping == dataclasses.replace(default.damping, arc=False)


def test_the_options_of_ocnopt_reach_the_host_and_the_policies() -> None:
    torch.manual_seed(5)
    optimizer = make("ocnopt:host=rmsprop,lr=3e-3,momentum=0.5,rank=2")
    assert isinstance(optimizer, pullback.OCNOpt)
    assert isinstance(optimizer.host.optimizer, torch.optim.RMSprop)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.003, 0.5)
    assert isinstance(optimizer.metric, pullback.Sampled)
    assert (optimizer.metric.m, optimizer.metric.seed) == (2, 5)
    assert make("ocnopt:feedback=false,rank=none").feedback is False
    assert isinstance(make("ocnopt:host=kronecker,lr=0.5,momentum=0.8").host.optimizer, pullback.Kronecker)
    assert make("ocnopt:form=positive,bound=none").form == "positive"
    assert isinstance(make("ocnopt:host=adam,weight_decay=1e-2").host.optimizer, torch.optim.Adam)


class Accelerated(pullback.GaussNewton):
    """An optimizer with options of its own that hands the others on."""

    def __init__(
        self,
        model: Any,
        criterion: Any,
        *,
        geodesic: bool = False,
        tails: str = "auto",
        h: float | str = "auto",
        **others: Any,
    ) -> None:
        super().__init__(model, criterion, **others)
        self.chosen = (geodesic, tails, h)


def test_words_and_truth_values_reach_a_class_that_hands_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = optimizers._our_entry("accelerated", Accelerated, "a fake")
    monkeypatch.setitem(optimizers._ENTRIES, "accelerated", entry)
    assert {"geodesic", "tails", "h", "lr", "solver", "sweep", "damping"} <= set(entry.options())
    assert not {"self", "model", "criterion", "others"} & set(entry.options())
    made = make("accelerated:geodesic=true,tails=dual,h=0.1,solver=primal,lr=0.5,damping=2")
    assert made.chosen == (True, "dual", 0.1)
    assert (made.solver, made.defaults["lr"], made.damping.initial) == ("primal", 0.5, 2.0)
    assert make("accelerated:geodesic=false,h=auto").chosen == (False, "auto", "auto")
    first, second = parse_optimizers("accelerated:geodesic=true,accelerated")
    assert (first.label, second.label) == ("accelerated:geodesic=true", "accelerated")
    with pytest.raises(SpecError, match="geodesic of accelerated must be true or false, not 'yes'"):
        parse_optimizers("accelerated:geodesic=yes")


@pytest.mark.parametrize("text", ["adam:lr=-1", "muon:lr=-1", "layerwise-metric:samples=0", "gauss-newton:damping=-1",
                                  "ocnopt:host=lbfgs", "ocnopt:host=adam,momentum=0.9", "ocnopt:eps=-1"])  # fmt: skip
def test_a_refused_value_is_one_sentence(text: str) -> None:
    with pytest.raises(SpecError, match="refuses"):
        make(text)


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    both = MuonWithAdamW(net, lr=0.1, adamw_lr=0.2)
    muon, adamw = both.parts
    assert [p.ndim for p in muon.param_groups[0]["params"]] == [2]
    assert [p.ndim for p in adamw.param_groups[0]["params"]] == [4, 1, 1]
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.1, 0.2)
    before = [p.detach().clone() for p in net.parameters()]
    loss = both.step(lambda: _backward(net))
    assert loss is not None
    assert all(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    both.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def _backward(net: nn.Module) -> torch.Tensor:
    loss = net(torch.randn(5, 1, 4, 4)).square().mean()
    loss.backward()
    return loss


def test_muon_wants_a_matrix() -> None:
    with pytest.raises(ValueError, match="no weight matrix"):
        MuonWithAdamW(nn.LayerNorm(3))


def test_muon_of_matrices_alone_has_one_part() -> None:
    assert len(MuonWithAdamW(nn.Linear(2, 2, bias=False)).parts) == 1


def test_a_missing_peer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(MissingExtraError, match=r'pip install "pullback\[peers\]"'):
        parse_optimizer("soap")
