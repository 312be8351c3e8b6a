"""How U acts for each kind of layer. A new kind is one file here and one line in the table below."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pullback.tape.call import Call, CallFactor
from pullback.tape.rules.attention import PROJECTION, attended, attention_axis, attention_rows, undropped
from pullback.tape.rules.bag import bag_rows, bags
from pullback.tape.rules.base import DenseRows, Rows
from pullback.tape.rules.conv import conv_rows
from pullback.tape.rules.embedding import embedding_rows
from pullback.tape.rules.generic import generic_rows
from pullback.tape.rules.linear import linear_rows
from pullback.tape.rules.norm import norm_rows
from pullback.tape.rules.outer import OuterRows
from pullback.tape.rules.prelu import prelu_rows
from pullback.tape.rules.recurrent import batch_axis, recurrent_rows, repeatable, sequences

Rule = Callable[[Any, Sequence[CallFactor], frozenset[str], int], Rows]


def _always(module: Any) -> bool:
    return True


def _first(module: nn.Module, output: int) -> int:
    return 0


@dataclass(frozen=True)
class Kind:
    """A kind of layer and its rule.

    Attributes:
        layer: class of the layer.
        rule: its rule.
        fits: which of its instances the rule is for.
        folds: whether positions may be folded into the batch axis (a Linear on (N * T, d) is a Linear at T
            positions).
        batch: number of samples a call was given, None without a batch.
        axis: axis of the samples in an output, from its index.
        dense: whether it forms its rows one by one.
        inner: names of parameters of its children, never called as modules, that the rule gives rows too.
        whole: whether the rule gives rows to every parameter inside the module, whatever it is called.
    """

    layer: type[nn.Module]
    rule: Rule
    fits: Callable[[Any], bool] = _always
    folds: bool = False
    batch: Callable[[Call], int | None] = Call.batch
    axis: Callable[[nn.Module, int], int] = _first
    dense: bool = False
    inner: frozenset[str] = frozenset()
    whole: bool = False

    def gives(self, wanted: Iterable[str]) -> bool:
        """Whether the rule gives rows to all these parameters, named relative to the module."""
        return self.whole or all("." not in name or name in self.inner for name in wanted)


def _plain_table(module: Any) -> bool:
    return module.max_norm is None and not module.scale_grad_by_freq


#: Names of parameters in torch's layers; weight_orig, weight_g and the like hold computed weights.
_DECLARED = re.compile(r"(weight|bias)(_(ih|hh|hr)(_l\d+(_reverse)?)?)?|(in|q|k|v)_proj_weight|in_proj_bias|bias_[kv]")

RULES: list[Kind] = [
    Kind(nn.Linear, linear_rows, folds=True),
    Kind(nn.Conv1d, conv_rows),
    Kind(nn.Conv2d, conv_rows),
    Kind(nn.Conv3d, conv_rows),
    Kind(nn.ConvTranspose1d, conv_rows),
    Kind(nn.ConvTranspose2d, conv_rows),
    Kind(nn.ConvTranspose3d, conv_rows),
    Kind(nn.Embedding, embedding_rows, _plain_table, folds=True),
    Kind(nn.EmbeddingBag, bag_rows, lambda m: _plain_table(m) and m.mode != "max", batch=bags),
    Kind(nn.LayerNorm, norm_rows, folds=True, dense=True),
    Kind(nn.RMSNorm, norm_rows, folds=True, dense=True),
    Kind(nn.GroupNorm, norm_rows, dense=True),
    Kind(nn.modules.batchnorm._BatchNorm, norm_rows, dense=True),
    Kind(nn.modules.instancenorm._InstanceNorm, norm_rows, dense=True),
    Kind(nn.PReLU, prelu_rows, dense=True),
    Kind(nn.RNN, recurrent_rows, repeatable, False, sequences, batch_axis),
    Kind(nn.GRU, recurrent_rows, repeatable, False, sequences, batch_axis),
    Kind(nn.LSTM, recurrent_rows, repeatable, False, sequences, batch_axis),
    Kind(nn.RNNCell, recurrent_rows, batch=sequences),
    Kind(nn.GRUCell, recurrent_rows, batch=sequences),
    Kind(nn.LSTMCell, recurrent_rows, batch=sequences),
    Kind(nn.MultiheadAttention, attention_rows, undropped, False, attended, attention_axis, inner=PROJECTION),
]


def register(kind: Kind) -> None:
    """Add a kind from a package that stands above the tape; it is asked before those known so far."""
    RULES.insert(0, kind)


def find_rule(module: nn.Module) -> Kind | None:
    """The special rule for a module; None if the generic one must do.

    A subclass counts as its base only if it inherits ``forward`` and holds the base's parameters itself
    (a parametrised weight is computed, not held).
    """
    for kind in RULES:
        if isinstance(module, kind.layer) and type(module).forward is kind.layer.forward and kind.fits(module):
            return kind if kind.whole or _holds_its_own(module) else None
    return None


def sample_axis(module: nn.Module, output: int) -> int:
    """Axis of the samples in an output of a module."""
    kind = find_rule(module)
    return 0 if kind is None else kind.axis(module, output)


def _holds_its_own(module: nn.Module) -> bool:
    """Whether its parameters are those that its class declares, none of them computed or added."""
    names = tuple(name for name, p in module._parameters.items() if p is not None)
    return "parametrizations" not in module._modules and _declared(names)


@functools.lru_cache(maxsize=256)
def _declared(names: tuple[str, ...]) -> bool:
    """Whether parameters of these names are what a layer of torch declares, a weight among them."""
    return all(_DECLARED.fullmatch(name) for name in names) and any("weight" in name for name in names)


__all__ = ["DenseRows", "Kind", "OuterRows", "Rows", "Rule", "find_rule", "generic_rows", "register", "sample_axis"]
