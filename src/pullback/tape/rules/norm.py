"""Every layer that normalises and then scales and shifts: few parameters, so dense rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.tape.call import CallFactor
from pullback.tape.recorder import uses_batch_statistics
from pullback.tape.rules.base import DenseRows

Norm = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """The module's output before scale and shift.

    A BatchNorm in training mode normalises by the batch's own statistics; the sweep has then held them constant
    (``batch_norm="frozen"``), or was refused.
    """
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    assert isinstance(module, nn.modules.batchnorm._NormBase)
    mean, var = module.running_mean, module.running_var
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        if module.training or mean is None:
            return F.instance_norm(x, None, None, None, None, True, 0.0, module.eps)
        return F.instance_norm(x, mean, var, None, None, False, 0.0, module.eps)
    if uses_batch_statistics(module):
        return F.batch_norm(x, None, None, None, None, True, 0.0, module.eps)
    return F.batch_norm(x, mean, var, None, None, False, 0.0, module.eps)


def norm_rows(module: Norm, calls: Sequence[CallFactor], wanted: frozenset[str], N: int) -> DenseRows:
    r"""Rows :math:`(\sum_p s_{anp} \odot \hat x_{np},\ \sum_p s_{anp})` of scale and shift.

    Scale and shift belong either to the last axes of the input (LayerNorm, RMSNorm), and p runs over what is
    between them and the samples, or to its axis 1 (channels), and p runs over the axes after it.

    Args:
        module: the layer.
        calls: its calls in one term.
        wanted: names of its parameters that take part.
        N: samples.
    """
    trailing = isinstance(module, nn.LayerNorm | nn.RMSNorm)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    scaled: Tensor | None = None
    shifted: Tensor | None = None

    def summed(t: Tensor, n: int) -> Tensor:
        """Over positions: (r, N, n)."""
        return t.reshape(t.shape[0], N, -1, n).sum(2) if trailing else t.reshape(t.shape[0], N, n, -1).sum(3)

    for call in calls:
        s = call.factor()
        if "weight" in wanted:
            assert weight is not None
            part = summed(s * _normalised(module, call.input()), weight.numel())
            scaled = part if scaled is None else scaled + part
        if "bias" in wanted:
            assert bias is not None
            part = summed(s, bias.numel())
            shifted = part if shifted is None else shifted + part
    kept = [(p, u) for p, u in ((weight, scaled), (bias, shifted)) if u is not None]
    params = [p for p, _ in kept if p is not None]
    return DenseRows(params, torch.cat([u for _, u in kept], 2), f"norm ({type(module).__name__})")
