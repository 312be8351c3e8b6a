"""One linearisation of the model at a batch: who was called with what, costates and factors at every call."""

from pullback.tape.nest import tensors
from pullback.tape.replay import ClosureReplay, as_loss, inputs_finite, replay, replayable
from pullback.tape.rules import DenseRows, OuterRows, Rows
from pullback.tape.tape import Tape
from pullback.tape.term import LossUse, Term

__all__ = [
    "ClosureReplay",
    "DenseRows",
    "LossUse",
    "OuterRows",
    "Rows",
    "Tape",
    "Term",
    "as_loss",
    "inputs_finite",
    "replay",
    "replayable",
    "tensors",
]
