"""Attention: who gets structured rows, what its Kronecker factors are, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from cases import by_name
from oracle import assert_close, dense, jacobian, linearise
from pullback.curvature import Averages
from pullback.curvature.averages import rows_by_weight
from pullback.tape.rules.stacked import StackedRows


def step(model, *args, criterion=None, **options):
    """Coverage after one step of exact layerwise metrics."""
    opt = pullback.LayerwiseMetric(model, criterion or nn.MSELoss(), **options)
    z = model(*args)
    opt.criterion(z, torch.zeros_like(z)).backward()
    opt.step()
    return opt


@pytest.mark.parametrize("case", [case for name, case in by_name.items() if "attention" in name], ids=lambda c: c.name)
def test_every_parameter_has_rows_by_projections(case):
    model, args, kwargs = case.build()
    opt = pullback.LayerwiseMetric(model, nn.MSELoss())
    opt.criterion(model(*args, **kwargs), torch.zeros(4, 2, dtype=torch.float64)).backward()
    opt.step()
    why = {entry.name: entry.why for entry in opt.coverage.parameters}
    assert {why[name] for name in why if name.startswith("attend")} == {"attention (MultiheadAttention)"}


class Plain(nn.Module):
    """Self-attention and nothing else to train."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x, **options):
        return self.attend(x, x, x, need_weights=False, **options)[0].sum(1)


def test_the_gram_of_a_wide_attention_forms_no_rows(monkeypatch):
    """64 x 64 projections on 16 samples: 16 K numbers a row, never together."""
    torch.manual_seed(0)
    model = Plain()
    model.attend = nn.MultiheadAttention(64, 4, batch_first=True)
    lin = linearise(model, nn.MSELoss(), [((torch.randn(16, 3, 64),), {}, torch.zeros(16, 64))],
                    metric=pullback.Sampled(m=1))  # fmt: skip
    (block,) = lin.blocks
    U = block.dense()
    (rows,) = block.rows.values()
    for part in rows.parts():
        monkeypatch.setattr(type(part), "dense", None)
    assert_close(block.gram(), U @ U.T, 1e-4)


def test_hint_of_a_causal_mask():
    """Without weights and padding torch takes the hint, whatever mask stands beside it."""
    model = Plain().double()
    x, hide = torch.randn(3, 3, 4).double(), torch.zeros(3, 3, dtype=torch.bool)
    kwargs = {"attn_mask": hide, "is_causal": True}
    lin = linearise(model, nn.MSELoss(), [((x,), kwargs, torch.zeros(3, 4).double())])
    assert lin.blocks[0].name == "attend"
    J = jacobian(model, (x,), kwargs).reshape(12, -1)
    U = dense(model, lin.blocks)
    assert_close(U.T @ U, J.T @ J * (2 / 12))


def test_a_query_that_may_see_nothing():
    model = Plain().double()
    x, hide = torch.randn(3, 3, 4).double(), torch.eye(3, dtype=torch.bool)
    hide[0] = True
    lin = linearise(model, nn.MSELoss(), [((x,), {"attn_mask": hide}, torch.zeros(3, 4).double())])
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert_close(dense(model, lin.blocks).T @ lin.e0, g, 1e-9)
    assert float(g.abs().max()) > 0


def test_frozen_parts_have_no_columns():
    model, args, kwargs = by_name["attention cross"].build()
    for name in ("in_proj_weight", "out_proj.bias"):
        model.attend.get_parameter(name).requires_grad_(False)
    lin = linearise(model, nn.MSELoss(), [(args, kwargs, torch.zeros(4, 2, dtype=torch.float64))])
    J = jacobian(model, args, kwargs).reshape(8, -1)
    U = dense(model, lin.blocks)
    assert_close(U.T @ U, J.T @ J * (2 / 8))


def test_samples_without_a_batch_are_given_to_the_model_around_them():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            return torch.stack([self.attend(one, one, one)[0].mean(0) for one in x])

    model, x = Loop().double(), torch.randn(3, 2, 4).double()
    lin = linearise(model, nn.MSELoss(), [((x,), {}, torch.zeros(3, 4).double())])
    assert lin.blocks[0].name == "(model)"
    J = jacobian(model, (x,), {}).reshape(12, -1)
    U = dense(model, lin.blocks)
    assert_close(U.T @ U, J.T @ J * (2 / 12))


def test_dropout_of_attention_weights_is_refused_in_training_alone():
    model, x = Plain(dropout=0.5), torch.randn(4, 3, 4)
    with pytest.raises(pullback.CoverageError):
        step(model, x)
    model.eval()
    assert step(model, x).coverage["attend.in_proj_weight"].why == "attention (MultiheadAttention)"


@pytest.mark.parametrize("train", [True, False])
def test_encoder_layer(train):
    """In evaluation mode torch has a fused kernel for passes without gradients, trial losses among them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1 if not train else 0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2)).train(train)
    opt = step(model, torch.randn(8, 3, 4))
    assert opt.last.accepted
    assert {entry.status for entry in opt.coverage.parameters} == {"exact"}
    assert opt.coverage["0.self_attn.out_proj.weight"].why == "attention (MultiheadAttention)"


def test_an_encoder_layer_trains_in_kronecker_form():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, criterion = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 2)), nn.CrossEntropyLoss()
    x = torch.randn(64, 3, 8)
    y = (x[:, 0, 0] * x[:, 1, 0] > 0).long()
    opt = pullback.Kronecker(model, criterion)
    for _ in range(40):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
    assert loss.item() < 0.1
    rules = {entry.name: entry.why for entry in opt.coverage.parameters}
    assert rules["0.self_attn.in_proj_weight"] == rules["0.linear1.weight"]


@pytest.mark.parametrize("shared", ["expand", "reduce"])
@pytest.mark.parametrize("length", [2, 3])
def test_kronecker_factors_of_every_projection(shared, length):
    """Queries, keys and values are layers of their own, with as many positions as each has."""
    torch.manual_seed(0)
    case = by_name["attention cross" if length == 2 else "attention cross alike"]
    model, args, kwargs = case.build(n=5)
    terms = linearise(model, nn.MSELoss(), [(args, kwargs, torch.zeros(5, 2).double())]).terms
    averages = Averages("kfac", shared, 0.1, 0.95, 5)
    averages.follow(terms)
    block = next(b for b in averages.blocks if b.params[0] is model.attend.in_proj_weight)
    (stacked,) = next(rows for rows in rows_by_weight(terms).values() if isinstance(rows[0], StackedRows))
    for g, own in enumerate(stacked.blocks):
        x, s = own.x, own.s
        if own.bias is not None:
            x = torch.cat([x, torch.ones_like(x[..., :1])], 2)
        if shared == "reduce":
            x, s = x.mean(1, keepdim=True), s.sum(2, keepdim=True)
        A = torch.einsum("npi,npj->ij", x, x) / (x.shape[0] * x.shape[1])
        B = torch.einsum("anpo,anpq->oq", s, s)
        assert_close(block.right.dense()[g], A)
        assert_close(block.left.dense()[g], B)
        A = A + 0.1**0.5 * A.diagonal().mean() * torch.eye(len(A)).double()
        B = B + 0.1**0.5 * B.diagonal().mean() * torch.eye(len(B)).double()
        G = torch.randn(3, len(B), len(A)).double()
        assert_close(block.solve(G)[g], torch.linalg.solve(B, G[g]) @ torch.linalg.inv(A))


def test_micro_batches_of_other_lengths_are_averaged_by_positions():
    torch.manual_seed(0)
    model, _, _ = by_name["attention cross"].build()
    uses = [((torch.randn(2, T, 4).double(),), {}, torch.zeros(2, 2).double()) for T in (3, 5)]
    terms = linearise(model, nn.MSELoss(), uses).terms
    averages = Averages("kfac", "expand", 0.1, 0.95, 5)
    averages.follow(terms)
    block = next(b for b in averages.blocks if b.params[0] is model.attend.in_proj_weight)
    queries = torch.cat([x.reshape(-1, 4) for (x,), _, _ in uses])
    queries = torch.cat([queries, torch.ones(len(queries), 1).double()], 1)
    assert_close(block.right.dense()[0], queries.T @ queries / len(queries))


def test_self_attention_in_turn_with_another_is_refused_in_kronecker_form():
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"attend": nn.MultiheadAttention(4, 2, batch_first=True)}), torch.randn(3, 2, 4)
    model.forward = lambda x, y: model["attend"](x, y, y, need_weights=False)[0][:, 0]
    opt = pullback.Kronecker(model, nn.MSELoss())
    opt.criterion(model(x, x), torch.zeros(3, 4)).backward()
    opt.step()
    opt.refresh()
    opt.criterion(model(x, torch.randn(3, 2, 4)), torch.zeros(3, 4)).backward()
    with pytest.raises(pullback.StepError, match="the same always or never"):
        opt.step()
