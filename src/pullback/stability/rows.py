"""The rows U of a model at packed weights, for metrics ``mu I + U^T U`` outside of a training loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.curvature import Block, Linearisation, Partition, check_partition, divide
from pullback.metric import Metrics
from pullback.stability.errors import StabilityError
from pullback.stability.objective import Data, Objective
from pullback.tape import Tape


class PulledRows:
    """U of an objective's model, by group of modules that move jointly.

    Args:
        objective: model, criterion and packing.
        metric: overrides the output metric that the criterion resolves to.
        partition: who moves with whom; layerwise or global as a rule.
    """

    def __init__(self, objective: Objective, metric: Metrics = None, partition: Partition = "layerwise") -> None:
        # A copy of its own, so that the tape stays on it and sees nothing else.
        self.objective = Objective(objective.model, objective.criterion)
        self.partition = check_partition(partition)
        self._tape = Tape(self.objective.model, self.objective.criterion, metric, "loop")
        own, start = dict(self.objective.model.named_parameters()), 0
        self._where: dict[int, Tensor] = {}
        for name, n in zip(objective.names, objective.sizes, strict=True):
            self._where[id(own[name])] = torch.arange(start, start + n)
            start += n

    def at(self, theta: Tensor, data: Data) -> list[list[Block]]:
        """The groups at packed weights.

        Raises:
            StabilityError: if predictions there are not finite, or a trained parameter has no rows.
        """
        model, criterion = self.objective.moved(theta), self.objective.criterion
        tape = self._tape
        try:
            with torch.enable_grad():
                criterion(model(data[0]), data[1]).backward()
            if not tape.finite or not tape.terms:
                raise StabilityError("The model could not be linearised there; look for numbers that are not finite.")
            groups = divide(Linearisation(tape.terms).blocks, self.partition, tape.names.full)
        finally:
            for p in model.parameters():
                p.grad = None
            tape.clear()
        if sum(block.n for blocks in groups for block in blocks) != self.objective.size:
            raise StabilityError("A trained parameter does not reach the loss; freeze it (requires_grad_(False)).")
        return groups

    def columns(self, block: Block) -> Tensor:
        """Where a block's numbers lie in the packed vector, (block.n,)."""
        return torch.cat([self._where[id(p)] for p in block.params])


def largest_share(groups: Sequence[Sequence[Block]], n: int) -> float:
    r"""B^2: the largest :math:`|u_i|^2` of one sample in :math:`\mu I + \tfrac1n \sum_i u_i u_i^\top`.

    Where a sample has several columns u_i is a matrix and the norm the spectral one; groups are blocks of the metric's
    diagonal, so the largest counts.

    Args:
        groups: rows by group, in which the factor 1/sqrt(n) is contained.
        n: samples.
    """
    best = 0.0
    for blocks in groups:
        K = blocks[0].gram()
        for block in blocks[1:]:
            K = K + block.gram()
        r = K.shape[0] // n
        own = torch.diagonal(K.view(r, n, r, n), dim1=1, dim2=3).permute(2, 0, 1)  # rows go by column, then sample
        best = max(best, n * float(torch.linalg.eigvalsh(own).max()))
    return best
