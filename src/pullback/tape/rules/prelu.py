"""nn.PReLU: slopes of the negative parts, few parameters, so dense rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pullback.tape.call import CallFactor
from pullback.tape.rules.base import DenseRows
from pullback.tape.rules.outer import held


def prelu_rows(module: nn.PReLU, calls: Sequence[CallFactor], wanted: frozenset[str], N: int) -> DenseRows:
    r"""Rows :math:`\sum_p s_{anp} \min(x_{np}, 0)`, per channel (axis 1) or over all of them.

    Args:
        module: the layer.
        calls: its calls in one term, each with a batch of N along the first axis.
        wanted: names of its parameters that take part (its weight).
        N: samples.
    """
    del wanted
    channels = module.num_parameters
    total: Tensor | None = None
    for call in calls:
        s = call.factor()
        part = (s * call.input().clamp_max(0)).reshape(s.shape[0], N, channels, -1).sum(-1)
        total = part if total is None else total + part
    weight = held(module, "weight")
    assert total is not None
    assert isinstance(weight, torch.nn.Parameter)
    return DenseRows([weight], total, "prelu")
