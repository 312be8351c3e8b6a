"""nn.LayerNorm: scale and shift of a normalised input, few parameters, so dense rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from pullback.tape.call import CallFactor
from pullback.tape.rules.base import DenseRows


def layer_norm_rows(module: nn.LayerNorm, calls: Sequence[CallFactor], wanted: frozenset[str], N: int) -> DenseRows:
    r"""Rows :math:`(\sum_p s_{anp} \odot \hat x_{np},\ \sum_p s_{anp})`.

    Args:
        module: the layer.
        calls: its calls in one term.
        wanted: names of its parameters that take part.
        N: samples.
    """
    k = len(module.normalized_shape)
    weight = bias = None
    for call in calls:
        s = call.factor()
        s = s.reshape(s.shape[0], N, -1, *module.normalized_shape)
        if "weight" in wanted:
            x = F.layer_norm(call.input(), module.normalized_shape, None, None, module.eps)
            part = (s * x.reshape(N, -1, *module.normalized_shape)).sum(2)
            weight = part if weight is None else weight + part
        if "bias" in wanted:
            bias = s.sum(2) if bias is None else bias + s.sum(2)
    pieces = [(module.weight, weight), (module.bias, bias)]
    kept = [(p, u) for p, u in pieces if u is not None]
    U = torch.cat([u.flatten(-k) for _, u in kept], -1)
    return DenseRows([p for p, _ in kept], U, "layer norm")
