"""nn.BatchNorm: scale and shift of an input normalised by statistics that are constants in the metric."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from pullback.tape.call import CallFactor
from pullback.tape.recorder import uses_batch_statistics
from pullback.tape.rules.base import DenseRows


def batch_norm_rows(
    module: nn.modules.batchnorm._BatchNorm, calls: Sequence[CallFactor], wanted: frozenset[str], N: int
) -> DenseRows:
    r"""Rows :math:`(\sum_p s_{anp} \odot \hat x_{np},\ \sum_p s_{anp})`, channels on axis 1.

    :math:`\hat x` is normalised by the running statistics in evaluation mode, by the batch's own where the layer
    uses those; the sweep has then held them constant (``batch_norm="frozen"``), or was refused.

    Args:
        module: the layer.
        calls: its calls in one term, each with a batch of N.
        wanted: names of its parameters that take part.
        N: samples.
    """
    parts: dict[str, torch.Tensor] = {}
    for call in calls:
        s, x = call.factor(), call.input()
        if uses_batch_statistics(module):
            x = F.batch_norm(x, None, None, training=True, eps=module.eps)
        else:
            x = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
        for name in ("weight", "bias"):
            if name in wanted:
                product = s * x if name == "weight" else s
                rows = product.reshape(s.shape[0], N, x.shape[1], -1).sum(-1)
                parts[name] = parts[name] + rows if name in parts else rows
    params = [module._parameters[name] for name in parts]
    return DenseRows([p for p in params if p is not None], torch.cat(list(parts.values()), -1), "batch norm")
