"""One linearisation of the model at a batch: who was called with what, costates and factors at every call."""

from pullback.tape.call import Entry, Region, region_of, without_autocast
from pullback.tape.nest import tensors
from pullback.tape.passage import Passage
from pullback.tape.recorder import Wiring
from pullback.tape.replay import ClosureReplay, as_loss, in_time, inputs_finite, replay, replayable, rerun
from pullback.tape.rules import DenseRows, OuterRows, Rows
from pullback.tape.tape import Tape
from pullback.tape.term import LossUse, Term

__all__ = [
    "ClosureReplay",
    "DenseRows",
    "Entry",
    "LossUse",
    "OuterRows",
    "Passage",
    "Region",
    "Rows",
    "Tape",
    "Term",
    "Wiring",
    "as_loss",
    "in_time",
    "inputs_finite",
    "region_of",
    "replay",
    "replayable",
    "rerun",
    "tensors",
    "without_autocast",
]
