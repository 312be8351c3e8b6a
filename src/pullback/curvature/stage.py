r"""The running metric of the players of one stage, who move alone or in coalitions.

Vectors of all players lie side by side, so that one moment on each side holds all pairs,

.. math:: A_{uv} = E[x_u x_v^\top], \qquad B_{uv} = \textstyle\sum_{a,n,p} s_{u,anp}\, s_{v,anp}^\top,

averaged like those of a single layer. Any coalition finds its blocks in them, hence who moves with whom can change
from one look to the next, and nothing that is averaged is lost. The diagonal blocks and their damping are those of
:class:`~pullback.curvature.kronecker.KroneckerBlock`: a player who is alone takes its K-FAC step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.curvature.coalition import Alone, Coalition
from pullback.curvature.coalition import restored as coalition_of
from pullback.curvature.cooperation import Cooperation
from pullback.curvature.joint import Joint
from pullback.curvature.kronecker import Averaged, Shared, finite, samples
from pullback.curvature.moments import MatrixMoment, positive
from pullback.errors import StepError
from pullback.tape import Rows
from pullback.tape.rules.sides import Sides

#: Entries a side of a player may have: its blocks are held as matrices, and factorised in float64.
LARGEST = 1024

#: Who moves with whom: coalitions of players by number, each player in exactly one.
Structure = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Stage:
    """The players of one stage.

    Attributes:
        names: of the modules.
        weights: their weights.
    """

    names: tuple[str, ...]
    weights: tuple[nn.Parameter, ...]


class StageBlock(Averaged):
    """All players of one stage.

    Args:
        params: of all players, weight first, player by player.
        names: of the players.
        counts: parameters of each: 2 with a bias.
        rule: for the coverage report.
        left, right: moments of the factors and of the inputs of all players.
        structure: who moves with whom.
        shared: what positions are taken for.
        renew: looks from one set-up of a coalition to the next.
        cut: couplings below it are left out (:class:`~pullback.curvature.cooperation.Cooperation`).
        solvers: coalitions that are set up.
        made: at which look they were.

    Attributes:
        structure: may be changed at any time; it counts from the next look on.
        playing: the structure as of the last look.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        names: Sequence[str],
        counts: Sequence[int],
        rule: str,
        left: MatrixMoment,
        right: MatrixMoment,
        structure: Structure,
        shared: Shared,
        *,
        renew: int,
        cut: float,
        playing: Structure | None = None,
        solvers: dict[tuple[int, ...], Coalition] | None = None,
        made: dict[tuple[int, ...], int] | None = None,
        seen: int = 0,
        failures: int = 0,
    ) -> None:
        super().__init__(params)
        self.names, self.counts, self.rule = tuple(names), tuple(counts), rule
        self.left, self.right = left, right
        self.shared: Shared = shared
        self.renew, self.cut = renew, cut
        self.structure = self.playing = [tuple(group) for group in structure]
        if playing is not None:
            self.playing = [tuple(group) for group in playing]
        self.solvers = solvers or {}
        self.made = made or {}
        self.seen, self.failures = seen, failures
        starts = [sum(self.counts[:u]) for u in range(len(self.counts))]
        self.players = [self.params[k : k + n] for k, n in zip(starts, self.counts, strict=True)]
        outs = [len(own[0]) for own in self.players]
        ins = [own[0].numel() // len(own[0]) + (len(own) > 1) for own in self.players]
        self.shapes = list(zip(outs, ins, strict=True))

    @classmethod
    def of(
        cls, stage: Stage, rows: Sequence[Rows], shared: Shared, structure: Structure, renew: int, cut: float
    ) -> StageBlock:
        """An empty one for such rows.

        Args:
            stage: its players.
            rows: theirs.
            shared: see the class.
            structure: see the class.
            renew: see the class.
            cut: see the class.

        Raises:
            StepError: if a player has no rows, or a side that is too wide.
        """
        met = {id(own.params[0]): own.params for own in rows}
        unmet = [name for name, weight in zip(stage.names, stage.weights, strict=True) if id(weight) not in met]
        if unmet:
            raise StepError(
                f"Player '{unmet[0]}' has no rows of its own in this loss, while others of its stage have; the module "
                "must be called as a module whenever they are. Take it out of the game."
            )
        sets = [met[id(weight)] for weight in stage.weights]
        rule = " + ".join(dict.fromkeys(own.rule for own in rows)) + f", in a stage of {len(sets)}"
        params, counts = [p for own in sets for p in own], [len(own) for own in sets]
        nothing = MatrixMoment(params[0].new_zeros(1, 0, 0))
        block = cls(params, stage.names, counts, rule, nothing, nothing, structure, shared, renew=renew, cut=cut)
        for name, (o, i) in zip(stage.names, block.shapes, strict=True):
            if max(o, i) > LARGEST:
                raise StepError(
                    f"Player '{name}' has sides of {o} and {i} entries; a player may have {LARGEST} at most, for "
                    "stages hold matrices of that size. Take it out of the game."
                )
        o, i = (sum(sizes) for sizes in zip(*block.shapes, strict=True))
        block.left, block.right = (MatrixMoment.empty(1, n, params[0]) for n in (o, i))
        return block

    # -- following ----------------------------------------------------------------------------------------

    def _follow(self, rows: Sequence[Rows], keep: float) -> bool:
        left, right = samples(self._joined(rows), "expand")
        if not (finite(left) and finite(right)):
            return False
        self.left.follow(left, keep)
        self.right.follow(right, keep)
        if not self.seen:
            self._tell_apart()
        return True

    def _joined(self, rows: Sequence[Rows]) -> list[Sides]:
        """Sides of all players next to each other, term by term."""
        found: dict[int, list[Rows]] = {id(own[0]): [] for own in self.players}
        for own in rows:
            found[id(own.params[0])].append(own)
        lengths = {name: len(own) for name, own in zip(self.names, found.values(), strict=True)}
        if len(set(lengths.values())) > 1 or not all(lengths.values()):
            raise StepError(
                f"The players of a stage must all take part in every loss, but they have rows in {lengths} of them; "
                "take those that are left out at times out of the game."
            )
        return [self._side_by_side(own) for own in zip(*found.values(), strict=True)]

    def _side_by_side(self, rows: Sequence[Rows]) -> Sides:
        """One term: what the players were given in one vector, and their factors in another."""
        # Of the same samples, as many as the most demanding of them needs.
        keep = slice(None, None, min(own.kept().step or 1 for own in rows))
        given, factors, nodes = [], [], 1
        times: list[Tensor | None] = []
        for name, own in zip(self.names, rows, strict=True):
            sides = own.sides(keep)
            two = sides is not None and sides.factor_left and sides.factor.shape[0] == 1
            if sides is None or sides.table or not two:
                raise StepError(
                    f"Player '{name}' has rows by the rule '{own.rule}', which have no two sides to share with "
                    "others; only Linear and convolutions in one group can play. Take it out of the game."
                )
            if self.shared == "reduce":
                given.append(sides.averaged_vectors().unsqueeze(2))
                factors.append(sides.summed_factor().unsqueeze(3))
                times.append(None)
            else:
                given.append(sides.given_vectors())
                factors.append(sides.factor)
                times.append(sides.times)
                nodes = sides.nodes
        positions = {name: x.shape[2] for name, x in zip(self.names, given, strict=True)}
        if len(set(positions.values())) > 1:
            raise StepError(
                f"The players of a stage are applied at different numbers of positions, {positions}, so none can be "
                "matched; take shared='reduce', or put them into stages of their own."
            )
        time = times[0]
        if any(own is not time and (own is None or time is None or not torch.equal(own, time)) for own in times):
            raise StepError(
                f"The players {', '.join(self.names)} are called at different times of an ODE, or some of them outside "
                "of it, so their positions do not match; take shared='reduce', or put them into stages of their own."
            )
        x, s = torch.cat(given, 3), torch.cat(factors, 4)
        return Sides(self.players[0][0], None, x, s, True, x.shape[3], times=time, nodes=nodes)

    def _tell_apart(self) -> None:
        everyone = range(len(self.players))
        A, B = (Joint(self.blocks(side, everyone), "", side.C.dtype) for side in (self.right, self.left))
        for u, v in sorted(A.identical() & B.identical()):
            raise StepError(
                f"Players '{self.names[u]}' and '{self.names[v]}' cannot be told apart: they are given the same and "
                "send the same back, so that only their sum matters. Take one of them out of the game."
            )

    def blocks(self, side: MatrixMoment, players: Sequence[int]) -> list[list[Tensor]]:
        """The blocks of a moment that some players share, for every ordered pair."""
        which = 0 if side is self.left else 1
        sizes = [shape[which] for shape in self.shapes]
        cuts = [slice(sum(sizes[:u]), sum(sizes[: u + 1])) for u in players]
        C = side.C[0]
        # Transposes of one another to the last bit.
        upper = [[C[a, b] for b in cuts] for a in cuts]
        return [[upper[u][v] if u < v else upper[v][u].mT for v in range(len(cuts))] for u in range(len(cuts))]

    # -- inverting ----------------------------------------------------------------------------------------

    def _invert(self, damping: float) -> bool:
        stale = [group for group, look in self.made.items() if self.seen - look >= self.renew]
        for group in {*self.solvers, *stale} - {*self.structure}:
            # Would be set up anew before it is used again.
            if group in stale:
                del self.solvers[group], self.made[group]
        for group in self.structure:
            # Alone at every look, as elsewhere; jointly while the metric changes fast, then now and then.
            fresh = group in self.solvers and group not in stale
            if len(group) > 1 and fresh and self.seen >= self.renew:
                continue
            try:
                solver = self._set_up(group, damping)
            except StepError:
                if group not in self.solvers:
                    raise
                return False
            self.solvers[group], self.made[group] = solver, self.seen
        self.playing = self.structure
        return True

    def _set_up(self, group: Sequence[int], damping: float) -> Coalition:
        inputs, outputs = self.blocks(self.right, group), self.blocks(self.left, group)
        if len(group) == 1:
            sides = [MatrixMoment(F[0][0][None]) for F in (outputs, inputs)]
            if not all(side.invert(damping**0.5) for side in sides):
                raise StepError(
                    f"The metric of '{self.names[group[0]]}' could not be inverted; look for inputs or a loss that are "
                    "not finite, or raise damping."
                )
            left, right = (side.inverse for side in sides)
            assert left is not None
            assert right is not None
            return Alone((left[0], right[0]))
        # One mu per player makes the damped diagonal blocks those of a player alone.
        means = [[float(positive(F[u][u].diagonal().mean())) for u in range(len(group))] for F in (inputs, outputs)]
        mu = [damping * a * b for a, b in zip(*means, strict=True)]
        tolerance = max(0.1 * self.cut, 100 * torch.finfo(self.left.C.dtype).eps)
        return Cooperation(inputs, outputs, mu, tolerance=tolerance, cut=self.cut).solver

    # -- stepping -----------------------------------------------------------------------------------------

    def describe(self) -> str:
        """Who plays with whom."""
        return " | ".join("+".join(self.names[u] for u in group) for group in self.playing)

    def gathered(self, gradients: Sequence[Tensor]) -> Tensor:
        """One vector: player by player its weight with the bias as the last column. See the base class."""
        pieces, k = [], 0
        for (o, _), count in zip(self.shapes, self.counts, strict=True):
            W = gradients[k].reshape(o, -1)
            pieces.append((W if count == 1 else torch.cat([W, gradients[k + 1][:, None]], 1)).reshape(-1))
            k += count
        return torch.cat(pieces)

    def parted(self, D: Tensor) -> list[Tensor]:
        """See the base class."""
        out: list[Tensor] = []
        for own, step in zip(self.players, self._steps(D), strict=True):
            weight = own[0].shape
            wide = weight[1:].numel()
            inner = step[:, :wide]
            # The axes of one row of the weight are next to each other, whatever follows it.
            out.append(inner.unflatten(1, weight[1:]) if len(weight) > 2 else inner)
            out += [step[:, wide]] if len(own) > 1 else []
        return out

    def _steps(self, D: Tensor) -> list[Tensor]:
        pieces = D.split([o * i for o, i in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def solve(self, G: Tensor) -> Tensor:
        """See the base class."""
        gradients = self._steps(G)
        steps = list(gradients)
        for group in self.playing:
            found, _ = self.solvers[group].solve([gradients[u] for u in group])
            for u, step in zip(group, found, strict=True):
                steps[u] = step
        return torch.cat([step.reshape(-1) for step in steps])

    def state(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "names": self.names, "counts": self.counts, "rule": self.rule, "left": self.left.state(),
            "right": self.right.state(), "structure": self.structure, "playing": self.playing, "shared": self.shared,
            "renew": self.renew, "cut": self.cut, "made": dict(self.made), "seen": self.seen, "failures": self.failures,
            "solvers": {group: solver.state() for group, solver in self.solvers.items()},
        }  # fmt: skip

    @classmethod
    def restored(cls, state: dict[str, Any]) -> StageBlock:
        """From its :meth:`state`, with params, moments and all else made."""
        solvers = {group: coalition_of(own) for group, own in state["solvers"].items()}
        return cls(**{**state, "solvers": solvers})
