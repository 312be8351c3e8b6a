"""Convolutions of any shape: windows, groups, chunks and both ways to a Gram against autograd's own rows."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from oracle import assert_close, dense, jacobian, linearise
from pullback.tape.rules import conv
from pullback.tape.rules.conv import ConvRows
from pullback.tape.rules.geometry import Geometry

KINDS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


def rows_of(module: nn.Module, x: torch.Tensor, s: torch.Tensor, weight: bool = True, bias: bool = True) -> ConvRows:
    geometry = Geometry.of(module)
    w = module.weight if weight else None
    return ConvRows(geometry, module.weight.shape, w, module.bias if bias else None, [x], [s])


def by_autograd(module: nn.Module, x: torch.Tensor, s: torch.Tensor, params: list[nn.Parameter]) -> torch.Tensor:
    rows = []
    for column in s:
        for n in range(len(x)):
            y = module(x[n : n + 1])
            grads = torch.autograd.grad(y, params, column[n : n + 1])
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


@given(
    axes=st.integers(1, 3), transposed=st.booleans(), r=st.integers(1, 3), n=st.integers(1, 3),
    groups=st.integers(1, 3), i=st.integers(1, 2), o=st.integers(1, 2), kernel=st.integers(1, 3),
    stride=st.integers(1, 2), padding=st.integers(0, 1), dilation=st.integers(1, 2), size=st.integers(1, 5),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]), extra=st.integers(0, 1),
    kinds=st.sampled_from([(True, True), (True, False), (False, True)]), seed=st.integers(0, 9),
    chunk=st.sampled_from([1, 50, 1 << 24]), way=st.sampled_from(["pairwise", "summed", "cheaper"]),
)  # fmt: skip
def test_convolutions_of_any_shape(
    axes,
    transposed,
    r,
    n,
    groups,
    i,
    o,
    kernel,
    stride,
    padding,
    dilation,
    size,
    mode,
    extra,
    kinds,
    seed,
    chunk,
    way,
):
    torch.manual_seed(seed)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        assume(extra < max(stride, dilation))
        assume((size - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra >= 0)
        options["output_padding"] = extra
    else:
        assume(size + 2 * padding >= dilation * (kernel - 1) + 1)
        assume(mode != "reflect" or padding < size)
        options["padding_mode"] = mode
    module = KINDS[axes, transposed](groups * i, groups * o, kernel, **options).double()
    x = torch.randn(n, groups * i, *(size + k for k in range(axes)), dtype=torch.float64)
    s = torch.randn(r, *module(x).shape, dtype=torch.float64)
    rows = rows_of(module, x, s, *kinds)
    U = by_autograd(module, x, s, list(rows.params))
    before = conv.CHUNK_NUMBERS
    conv.CHUNK_NUMBERS = chunk
    try:
        if way == "pairwise" and kinds[0]:
            K = rows._pairwise(rows) + rows_bias(rows)
        elif way == "summed":
            K = conv.square(rows._slabs())
        else:
            K = rows.gram()
        assert_close(K, U @ U.T)
        assert_close(rows.dense().reshape(r * n, -1), U)
        assert_close(rows.cross(rows), U @ U.T)
    finally:
        conv.CHUNK_NUMBERS = before
    assert_close(rows.primal(), U.T @ U)
    assert_close(rows.diagonal(), U.square().sum(0))
    v, d = torch.randn(r * n, dtype=U.dtype), torch.randn(U.shape[1], dtype=U.dtype)
    assert_close(rows.matvec(d), U @ d)
    assert_close(rows.rmatvec(v), U.T @ v)
    assert rows.to(torch.float32).dense().dtype == torch.float32


def rows_bias(rows: ConvRows) -> torch.Tensor:
    if rows.bias is None:
        return torch.zeros(rows.R, rows.R, dtype=torch.float64)
    b = rows._bias_rows().flatten(0, 1)
    return b @ b.T


def test_same_padding_of_an_even_window_is_longer_on_the_right():
    model = nn.Sequential(nn.Conv2d(2, 3, (2, 4), padding="same"), nn.Flatten(), nn.Linear(60, 2)).double()
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that it copies the input
        lin = linearise(model, nn.MSELoss(), [((x,), {}, torch.zeros(3, 2, dtype=torch.float64))])
        J = jacobian(model, (x,), {}).reshape(6, -1)
    U = dense(model, lin.blocks)
    assert_close(U.T @ U, J.T @ J * (2 / 6))


def test_one_image_without_a_batch_axis():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 3, 2)

        def forward(self, x):
            return self.conv(x[:, 0]).mean(1)[None]

    model = Single().double()
    x = torch.randn(1, 1, 4, dtype=torch.float64)
    lin = linearise(model, nn.MSELoss(), [((x,), {}, torch.zeros(1, 3, dtype=torch.float64))])
    J = jacobian(model, (x,), {}).reshape(3, -1)
    U = dense(model, lin.blocks)
    assert_close(U.T @ U, J.T @ J * (2 / 3))


@pytest.mark.parametrize(("size", "pairwise"), [(3, True), (28, False)])
def test_the_cheaper_gram_is_chosen(size, pairwise):
    module = nn.Conv2d(8, 16, 3)
    x = torch.randn(4, 8, size, size)
    s = torch.randn(2, 4, 16, size - 2, size - 2)
    rows = rows_of(module, x, s)
    assert (rows._pairwise_flops() < rows._summed_flops()) is pairwise
