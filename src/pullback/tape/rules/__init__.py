"""How U acts for each kind of layer. A new kind is one file here and one line in the table below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pullback.tape.call import CallFactor
from pullback.tape.rules.base import DenseRows, Rows
from pullback.tape.rules.batch_norm import batch_norm_rows
from pullback.tape.rules.conv import conv2d_rows
from pullback.tape.rules.embedding import embedding_rows
from pullback.tape.rules.generic import generic_rows
from pullback.tape.rules.linear import linear_rows
from pullback.tape.rules.norm import layer_norm_rows
from pullback.tape.rules.outer import OuterRows
from pullback.tape.rules.prelu import prelu_rows

Rule = Callable[[Any, Sequence[CallFactor], frozenset[str], int], Rows]


def _always(module: Any) -> bool:
    return True


#: kind of layer, its rule, which of its instances the rule is for, and whether positions may be folded
#: into the batch axis (a Linear on (N * T, d) is a Linear at T positions).
RULES: list[tuple[type[nn.Module], Rule, Callable[[Any], bool], bool]] = [
    (nn.Linear, linear_rows, _always, True),
    (nn.Conv2d, conv2d_rows, lambda m: m.groups == 1, False),
    (nn.Embedding, embedding_rows, lambda m: m.max_norm is None and not m.scale_grad_by_freq, True),
    (nn.LayerNorm, layer_norm_rows, _always, True),
    (nn.modules.batchnorm._BatchNorm, batch_norm_rows, _always, False),
    (nn.PReLU, prelu_rows, _always, False),
]


def find_rule(module: nn.Module) -> tuple[Rule, bool] | None:
    """The special rule for a module and whether it takes folded positions; None if the generic one must do.

    A subclass counts as its base only if it inherits ``forward`` and holds the base's parameters itself
    (a parametrised weight is computed, not held).
    """
    for kind, rule, fits, folds in RULES:
        if isinstance(module, kind) and type(module).forward is kind.forward and fits(module):
            held = all(name in ("weight", "bias") for name in module._parameters)
            if held and module._parameters.get("weight") is not None:
                return rule, folds
    return None


__all__ = ["DenseRows", "OuterRows", "Rows", "Rule", "find_rule", "generic_rows"]
