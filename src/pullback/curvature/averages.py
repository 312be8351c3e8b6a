"""The running metrics of all layers of a model, followed from terms of its loss."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from pullback.curvature.eigen import EigenBlock
from pullback.curvature.kronecker import Averaged, KroneckerBlock, Shared, SmallBlock
from pullback.curvature.moments import restored
from pullback.curvature.stage import Stage, StageBlock, Structure
from pullback.errors import CoverageError
from pullback.tape import Rows, Term

Form = Literal["kfac", "ekfac"]


class Averages:
    """Running metrics, one per weight with its bias; one per stage where several weights play a game.

    Args:
        form: ``"kfac"`` or ``"ekfac"``.
        shared: what positions are taken for, ``"expand"`` or ``"reduce"``.
        damping: relative to the mean of each metric.
        decay: what is kept of an average at most.
        basis: looks from one eigenbasis to the next.

    Attributes:
        blocks: the running metrics, in the order in which they were met; stages first.
    """

    def __init__(self, form: Form, shared: Shared, damping: float, decay: float, basis: int) -> None:
        if form not in ("kfac", "ekfac"):
            raise ValueError(f"form must be 'kfac' or 'ekfac', got {form!r}.")
        if shared not in ("expand", "reduce"):
            raise ValueError(f"shared must be 'expand' or 'reduce', got {shared!r}.")
        self.form: Form = form
        self.shared: Shared = shared
        self.damping = damping
        self.decay = decay
        self.basis = basis
        self.blocks: list[Averaged] = []
        self._by_weight: dict[int, Averaged] = {}
        self._stages: list[Stage] = []
        self._structures: list[Structure] = []
        self._cut, self._renew = 0.0, 1

    def clear(self) -> None:
        """Forget everything but who plays."""
        self.blocks.clear()
        self._by_weight.clear()

    def play(self, stages: Sequence[Stage], structures: Sequence[Structure], cut: float, renew: int) -> None:
        """Say who plays a game, and who moves with whom from the next look on.

        Args:
            stages: the players of every stage.
            structures: coalitions of every stage.
            cut: couplings below it are left out.
            renew: looks from one set-up of a coalition to the next.
        """
        self._stages, self._structures = list(stages), list(structures)
        self._cut, self._renew = cut, renew
        for stage, structure in zip(stages, structures, strict=True):
            block = self._by_weight.get(id(stage.weights[0]))
            if isinstance(block, StageBlock):
                block.structure = [tuple(group) for group in structure]

    def follow(self, terms: Sequence[Term]) -> None:
        """Average in the rows of one step.

        Args:
            terms: its terms.

        Raises:
            StepError: if a metric cannot be inverted, or players of a stage do not fit together.
        """
        found = rows_by_weight(terms)
        for stage, structure in zip(self._stages, self._structures, strict=True):
            rows = [own for weight in stage.weights for own in found.pop(id(weight), [])]
            if rows:
                self._follow_stage(stage, structure, rows)
        for key, rows in found.items():
            block = self._by_weight.get(key)
            if block is None:
                block = self._made(rows)
                self._add(block)
            block.follow(rows, self.decay, self.damping)

    def _follow_stage(self, stage: Stage, structure: Structure, rows: Sequence[Rows]) -> None:
        block = self._by_weight.get(id(stage.weights[0]))
        if block is None:
            block = StageBlock.of(stage, rows, self.shared, structure, self._renew, self._cut)
        block.follow(rows, self.decay, self.damping)
        if block not in self.blocks:
            self._add(block)

    def restore(self, params: Sequence[nn.Parameter], state: dict[str, Any]) -> Averaged:
        """Make and add a block from its state."""
        # A copy, for moments are averaged in place and the state may live on.
        state = copy.deepcopy({key: value for key, value in state.items() if key != "form"})
        state["params"] = params
        block: Averaged
        if "side" in state:
            block = SmallBlock(**{**state, "side": restored(state["side"])})
        else:
            state |= {"left": restored(state["left"]), "right": restored(state["right"])}
            if "solvers" in state:
                block = StageBlock.restored(state)
            else:
                block = EigenBlock(**state) if "D" in state else KroneckerBlock(**state)
        self._add(block)
        return block

    def _add(self, block: Averaged) -> None:
        self.blocks.append(block)
        self._by_weight.update((id(p), block) for p in block.params)

    def _made(self, rows: Sequence[Rows]) -> Averaged:
        if any(own.sides() is None for own in rows):
            if any(own.params != rows[0].params for own in rows):
                raise CoverageError(
                    f"A weight of shape {tuple(rows[0].params[0].shape)} is shared by modules that read it in "
                    "different ways, and has no Kronecker form; leave it out of params= and give it another optimizer."
                )
            return SmallBlock.of(rows[0])
        block = KroneckerBlock.of(rows, self.shared)
        if self.form == "kfac" or not EigenBlock.fits(block, rows):
            return block
        both = block.left, block.right
        return EigenBlock(block.params, block.rule, block.shape, *both, self.shared, basis=self.basis)


def rows_by_weight(terms: Sequence[Term]) -> dict[int, list[Rows]]:
    """Rows over all terms by id of their first parameter; those of a tied weight together.

    Args:
        terms: swept terms.
    """
    found: dict[int, list[Rows]] = {}
    for term in terms:
        for unit in term.plan.units:
            calls = term.factors[id(unit.module)]
            for call in calls:
                call.call.check_inputs(unit.name)
            for rows in unit.rows(calls, term.N).parts():
                found.setdefault(id(rows.params[0]), []).append(rows)
    return found
