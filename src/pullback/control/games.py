r"""Games between the modules of one stage: who knows what, and who moves with whom.

==============  ===================================================================================================
``open-loop``   every player answers to its own costate alone: a Nash equilibrium of the quadratic model in which
                nobody sees the others, and what layerwise optimizers do
``cooperative``  the players of a stage solve for all their steps at once
``bandit``      coalitions are chosen online, :class:`~pullback.control.bandit.Bandit` by bandit
==============  ===================================================================================================

(Liu, Chen & Theodorou, arXiv 2510.14168, who choose alignments of layers with a bandit.) The third structure of
game theory, feedback, where a player answers to the realised deviation dx of what reaches it, changes the gradients
that enter: :math:`G_u + Q_{ux}\,dx` in place of :math:`G_u`. A coalition solves for whatever gradients it is given
(:meth:`pullback.curvature.stage.StageBlock.solve`), so that is where feedback joins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pullback.control.bandit import ENUMERATED, ArmReport, Bandit, structures
from pullback.errors import StepError

Information = Literal["open-loop", "cooperative", "bandit"]


@dataclass(frozen=True, kw_only=True)
class Game:
    """Which modules play, and how.

    Attributes:
        stages: name patterns of the players, stage by stage, as in ``[["mixed.*"], ["block.conv2", "block.skip"]]``;
            or ``"auto"``: parallel modules of the model as it is called for the first loss
            (:func:`pullback.stages_of` tells them beforehand).
        structure: ``"open-loop"``, ``"cooperative"`` or ``"bandit"``.
        hold: looks at the metric for which an arm is kept.
        exploration: of the bandit.
        share: of the bandit.
        window: of the bandit.
        seed: of the bandit of the first stage; the others have the next ones.
        cut: couplings (products of canonical correlations, between 0 and 1) below it are left out, which makes joint
            solves cheaper; 0 keeps all.
        renew: looks at the metric from one set-up of a coalition to the next. More is cheaper, and the joint step
            falls behind a metric that moves.
    """

    stages: Literal["auto"] | Sequence[Sequence[str]] = "auto"
    structure: Information = "bandit"
    hold: int = 1
    exploration: float = 0.2
    share: float = 1e-4
    window: int = 100
    seed: int = 0
    cut: float = 0.01
    renew: int = 1

    def __post_init__(self) -> None:
        if self.structure not in get_args(Information):
            raise ValueError(
                f"Game(structure=...) must be 'open-loop', 'cooperative' or 'bandit', got {self.structure!r}."
            )
        if self.stages != "auto":
            named = not isinstance(self.stages, str) and all(
                not isinstance(own, str) and own and all(isinstance(p, str) for p in own) for own in self.stages
            )
            if not named or not self.stages:
                raise ValueError(
                    "Game(stages=...) must be 'auto' or lists of name patterns such as [['left.*', 'right.*']], got "
                    f"{self.stages!r}."
                )
        if self.hold < 1 or self.renew < 1:
            raise ValueError(f"Game(hold=..., renew=...) must be at least 1, got {self.hold} and {self.renew}.")
        if not 0 <= self.cut < 1:
            raise ValueError(f"Game(cut=...) must be in [0, 1), got {self.cut}.")
        self.bandit(["any"], 0)

    def bandit(self, arms: Sequence[str], stage: int) -> Bandit:
        """The bandit of a stage, by number."""
        options = {"exploration": self.exploration, "share": self.share}
        return Bandit(arms, **options, window=self.window, seed=self.seed + stage)

    def arms(self, players: Sequence[str]) -> dict[str, list[list[str]]]:
        """Coalition structures that a stage may take: all of up to four players, else alone and together."""
        ends = {"alone": [[player] for player in players], "together": [list(players)]}
        if self.structure == "open-loop":
            return structures(players, {"alone": ends["alone"]})
        if self.structure == "cooperative":
            return structures(players, {"together": ends["together"]})
        return structures(players) if len(players) <= ENUMERATED else structures(players, ends)


@dataclass(frozen=True)
class StageReport:
    """Who played with whom in one stage.

    Attributes:
        players: its modules.
        arms: what is known of every structure.
        playing: the structure at present.
    """

    players: tuple[str, ...]
    arms: tuple[ArmReport, ...]
    playing: str


@dataclass(frozen=True)
class GameReport:
    """All stages; print it."""

    stages: tuple[StageReport, ...]

    def __str__(self) -> str:
        head = ("stage", "structure", "played", "failed", "mean reward", "probability")
        rows = []
        for k, stage in enumerate(self.stages):
            for arm in stage.arms:
                name = arm.name + (" *" if arm.name == stage.playing else "")
                mean = "" if math.isnan(arm.mean) else f"{arm.mean:+.2e}"
                rows.append((str(k + 1), name, str(arm.played), str(arm.failed), mean, f"{arm.probability:.2f}"))
        width = [max(len(row[c]) for row in [head, *rows]) for c in range(6)]
        lines = [f"{r[0]:<{width[0]}}  {r[1]:<{width[1]}}  " + _right(r[2:], width[2:]) for r in [head, *rows]]
        wide = [
            f"stage {k + 1}: {', '.join(stage.players)}"
            for k, stage in enumerate(self.stages)
            if len(stage.arms) < 3 and stage.players
        ]
        return "\n".join([*lines, *wide, "* at present"])


def _right(entries: Sequence[str], width: Sequence[int]) -> str:
    return "  ".join(f"{entry:>{w}}" for entry, w in zip(entries, width, strict=True))


class Play:
    r"""A game as it is played: one bandit per stage, all rewarded alike.

    The loss is known at the steps that look at the metric. An arm drawn at step s with loss :math:`L_s` and kept until
    the look at step t is rewarded with the relative decrease per step,

    .. math:: \frac{L_s - L_t}{|L_s|\,(t - s)},

    on other batches as a rule: rewards are noisy, and which structure is better shows in many of them. A step that
    was refused because its numbers are not finite counts as lowest, whatever else happened while the arm was held.

    Args:
        game: the options.

    Attributes:
        stages: players by stage; None before they are known.
    """

    def __init__(self, game: Game) -> None:
        self.game = game
        self.stages: list[tuple[str, ...]] | None = None
        self._arms: list[dict[str, list[list[str]]]] = []
        self._bandits: list[Bandit] = []
        self._playing: list[str] = []
        self._since: tuple[int, float] | None = None
        self._looks = 0

    def begin(self, stages: Sequence[Sequence[str]]) -> None:
        """Say who plays.

        Args:
            stages: names of the players, stage by stage.
        """
        self.stages = [tuple(players) for players in stages]
        self._arms = [self.game.arms(players) for players in self.stages]
        self._bandits = [self.game.bandit(list(arms), k) for k, arms in enumerate(self._arms)]
        self._playing = [next(iter(arms)) for arms in self._arms]

    def look(self, step: int, loss: float) -> list[list[tuple[int, ...]]]:
        """The metric is looked at: reward what was held long enough, and draw anew.

        Args:
            step: its number.
            loss: before it, finite.

        Returns:
            For every stage the coalitions to play from now on, as numbers of players.

        Raises:
            StepError: if there is a choice to make and the loss is not known.
        """
        assert self.stages is not None
        if not math.isfinite(loss) and any(len(arms) > 1 for arms in self._arms):
            raise StepError(
                "The loss of this step is not known, and the bandit is rewarded by its decrease; give the optimizer "
                "the criterion, pass a closure, or take structure='cooperative'."
            )
        if self._since is not None and self._looks >= self.game.hold:
            start, before = self._since
            self._reward((before - loss) / ((abs(before) or 1.0) * (step - start)))
        if self._since is None:
            self._since, self._looks = (step, loss), 0
            self._playing = [bandit.draw() for bandit in self._bandits]
        self._looks += 1
        return [
            [tuple(players.index(player) for player in group) for group in arms[playing]]
            for players, arms, playing in zip(self.stages, self._arms, self._playing, strict=True)
        ]

    def failed(self) -> None:
        """A step was refused: what is played is rewarded as lowest."""
        if self._since is not None:
            self._reward(math.nan)

    def _reward(self, value: float) -> None:
        for bandit in self._bandits:
            bandit.reward(value)
        self._since = None

    def report(self) -> GameReport:
        """Who played with whom, how often and how well."""
        rows = zip(self.stages or (), self._bandits, self._playing, strict=True)
        return GameReport(
            tuple(StageReport(players, tuple(bandit.report()), playing) for players, bandit, playing in rows)
        )

    def state(self) -> dict[str, Any]:
        """Plain state; a game that loads it goes on bit for bit."""
        return {
            "stages": self.stages,
            "bandits": [bandit.state() for bandit in self._bandits],
            "playing": list(self._playing),
            "since": self._since,
            "looks": self._looks,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`.

        Raises:
            ValueError: if the state is of other players or arms.
        """
        if state["stages"] is None:
            return
        stages = [tuple(players) for players in state["stages"]]
        if self.stages is None:
            self.begin(stages)
        elif stages != self.stages:
            raise ValueError(f"The state is of the stages {stages}, this game has {self.stages}.")
        for bandit, own in zip(self._bandits, state["bandits"], strict=True):
            bandit.load(own)
        self._playing, self._since, self._looks = list(state["playing"]), state["since"], state["looks"]
        if self._since is not None:
            self._since = (self._since[0], self._since[1])
