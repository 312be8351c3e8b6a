r"""A bandit that chooses among coalition structures while training runs.

Which modules move jointly changes the step but not the network, so it can be chosen anew at any step; what a choice is
worth shows in the progress made. Which is best may change during training, hence EXP3.S (Auer, Cesa-Bianchi, Freund &
Schapire, *The nonstochastic multiarmed bandit problem*, SIAM J. Comput. 32, 2002), whose shared weights follow the best
sequence of arms and not only the best single one. With K arms of weight :math:`w_k`

.. math:: p_k = (1 - \gamma) \frac{w_k}{\sum_j w_j} + \frac{\gamma}{K}, \qquad
          w_k \leftarrow w_k \exp\Bigl(\frac{\gamma}{K} \frac{x}{p_k} [k \text{ played}]\Bigr)
          + \frac{e\,\alpha}{K} \sum_j w_j

where the reward x lies in [0, 1]. Weights are kept with sum 1, which changes no probability.

Rewards come in any unit and drift (the relative decrease of the loss per step falls by orders of magnitude), so x is
the *rank* of a reward among the last ones of all arms: the share of them that lie below it, ties counting half. No
scale is estimated, one wild reward moves nothing but its own rank, and rewards in another unit or under any increasing
function lead to the same choices. A reward joins the window after it was ranked, so the map to [0, 1] of a round is
fixed before its arm is drawn. What a rank does not tell is how much better: an arm that is superb now and then and
mostly a little worse is ranked low.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from pullback.errors import StepError

#: Most players of whom all partitions are enumerated: 15 arms. Five would have 52, too many to learn about.
ENUMERATED = 4


@dataclass(frozen=True)
class ArmReport:
    """What is known of one arm.

    Attributes:
        name: the arm.
        played: how often it was played and rewarded.
        failed: how many of its rewards were not finite.
        mean: mean of its finite rewards in their own unit, nan before the first.
        probability: that it is drawn next.
    """

    name: str
    played: int
    failed: int
    mean: float
    probability: float


class Bandit:
    """EXP3.S over named arms: :meth:`draw` one, use it, :meth:`reward` it.

    Args:
        arms: names, each once.
        exploration: gamma, in (0, 1]. No arm is ever less probable than gamma / K.
        share: alpha, in (0, 1): how readily weight flows back to all arms, so that one that lost early can come back.
            It should stay well below gamma / (10 K): above, weight flows back faster than the best arm can earn it.
        window: rewards among which a new one is ranked, at least 2.
        seed: of its own generator; the global random stream is left alone.

    Raises:
        ValueError: if there is no arm, a name occurs twice, or an option is out of range.
    """

    def __init__(
        self, arms: Sequence[str], *, exploration: float = 0.2, share: float = 1e-4, window: int = 100, seed: int = 0
    ) -> None:
        if isinstance(arms, str) or not arms or len(set(arms)) < len(arms):
            raise ValueError(f"arms must be a list of different names, at least one, got {arms!r}.")
        if not 0 < exploration <= 1:
            raise ValueError(f"exploration must be in (0, 1], got {exploration}.")
        if not 0 < share < 1:
            raise ValueError(f"share must be in (0, 1), got {share}.")
        if window < 2:
            raise ValueError(f"window must be at least 2, got {window}.")
        self.arms = tuple(arms)
        self.exploration, self.share = float(exploration), float(share)
        self._weights = [1 / len(self.arms)] * len(self.arms)
        self._recent: deque[float] = deque(maxlen=window)
        self._played = [0] * len(self.arms)
        self._failed = [0] * len(self.arms)
        self._sums = [0.0] * len(self.arms)
        self._drawn: int | None = None
        self._generator = torch.Generator()
        self._generator.manual_seed(seed)

    @staticmethod
    def rates(arms: int, rounds: int, switches: int = 0) -> dict[str, float]:
        """``exploration`` and ``share`` for a known number of rounds and of changes of the best arm.

        The choice under which EXP3.S has its regret bound, of the order sqrt(K T (S ln(K T) + e)) for S segments in T
        rounds (Auer et al. 2002).

        Args:
            arms: K.
            rounds: T, at least 2.
            switches: how often the best arm changes, S - 1.

        Raises:
            ValueError: if a number is out of range.
        """
        if arms < 1 or rounds < 2 or switches < 0:
            raise ValueError(
                f"rates needs arms >= 1, rounds >= 2 and switches >= 0, got {arms}, {rounds} and {switches}."
            )
        inner = arms * ((switches + 1) * math.log(arms * rounds) + math.e) / ((math.e - 1) * rounds)
        return {"exploration": min(1.0, math.sqrt(inner)), "share": 1 / rounds}

    @property
    def probabilities(self) -> dict[str, float]:
        """Of the next draw, by arm."""
        return dict(zip(self.arms, self._probabilities(), strict=True))

    def _probabilities(self) -> list[float]:
        total = sum(self._weights)
        floor = self.exploration / len(self.arms)
        return [(1 - self.exploration) * w / total + floor for w in self._weights]

    def draw(self) -> str:
        """The arm to play now.

        Raises:
            StepError: if the last arm drawn has had no reward.
        """
        if self._drawn is not None:
            raise StepError(
                f"The arm {self.arms[self._drawn]!r} was drawn and not rewarded; reward it before the next draw, with "
                "nan if the step failed."
            )
        u = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        # Round-off may leave the last sum below 1, and u above it.
        self._drawn = min(bisect_right(list(accumulate(self._probabilities())), u), len(self.arms) - 1)
        return self.arms[self._drawn]

    def reward(self, value: float) -> None:
        """Reward the arm drawn last.

        Args:
            value: progress in any unit, larger is better. What is not finite (a step that blew up, whatever its sign)
                counts as worse than all others, and is left out of means and window.

        Raises:
            StepError: if no arm was drawn since the last reward.
        """
        if self._drawn is None:
            raise StepError("There is no arm to reward; draw one first, and reward it once.")
        k, value, arms = self._drawn, float(value), len(self.arms)
        self._drawn = None
        gain = math.exp(self.exploration / arms * self._rank(value) / self._probabilities()[k])
        # The exponent is at most 1, since p >= gamma / K: no weight overflows.
        weights = list(self._weights)
        weights[k] *= gain
        weights = [w + math.e * self.share / arms for w in weights]
        total = sum(weights)
        self._weights = [w / total for w in weights]
        self._played[k] += 1
        if math.isfinite(value):
            self._recent.append(value)
            self._sums[k] += value
        else:
            self._failed[k] += 1

    def _rank(self, value: float) -> float:
        """Share of the recent rewards below a value, ties counting half; 1/2 where there are none yet."""
        if not math.isfinite(value):
            return 0.0
        if not self._recent:
            return 0.5
        ordered = sorted(self._recent)
        return (bisect_left(ordered, value) + bisect_right(ordered, value)) / (2 * len(ordered))

    def report(self) -> list[ArmReport]:
        """What is known of every arm, in the order in which they were given."""
        rows = zip(self.arms, self._played, self._failed, self._sums, self._probabilities(), strict=True)
        return [
            ArmReport(name, played, failed, total / (played - failed) if played > failed else math.nan, p)
            for name, played, failed, total, p in rows
        ]

    def state(self) -> dict[str, Any]:
        """Plain state for a checkpoint; a bandit that loads it goes on bit for bit."""
        return {
            "arms": list(self.arms),
            "weights": list(self._weights),
            "recent": list(self._recent),
            "played": list(self._played),
            "failed": list(self._failed),
            "sums": list(self._sums),
            "drawn": self._drawn,
            "generator": self._generator.get_state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`; the options stay those of this bandit.

        Raises:
            ValueError: if the state is of other arms.
        """
        if list(state["arms"]) != list(self.arms):
            raise ValueError(f"The state is of the arms {state['arms']}, this bandit has {list(self.arms)}.")
        self._weights = list(state["weights"])
        self._recent = deque(state["recent"], maxlen=self._recent.maxlen)
        self._played, self._failed, self._sums = (list(state[key]) for key in ("played", "failed", "sums"))
        self._drawn = state["drawn"]
        self._generator.set_state(state["generator"])


def structures(
    players: Sequence[str], given: Mapping[str, Sequence[Sequence[str]]] | None = None
) -> dict[str, list[list[str]]]:
    """The coalition structures of a stage by name: the arms of a bandit.

    Args:
        players: names of the players, each once.
        given: structures by name, as lists of coalitions; players in none of them stay alone. None enumerates all
            set partitions (of up to four players), named as in ``"a+b | c"``.

    Returns:
        For every arm all its coalitions, each player in exactly one. Where players are name patterns of parameters,
        this is a partition as the optimizers take it.

    Raises:
        ValueError: if players are named twice, are too many to enumerate, or a coalition does not fit them.
    """
    if isinstance(players, str) or not players or len(set(players)) < len(players):
        raise ValueError(f"players must be a list of different names, at least one, got {players!r}.")
    if given is None:
        if len(players) > ENUMERATED:
            raise ValueError(
                f"{len(players)} players have too many partitions to try; give the structures by name, or at most "
                f"{ENUMERATED} players."
            )
        return {" | ".join("+".join(group) for group in groups): groups for groups in _partitions(list(players))}
    if not given:
        raise ValueError("No structures are given; name at least one, or leave `given` out to enumerate them.")
    out = {}
    for name, groups in given.items():
        named = [player for group in groups for player in group]
        unknown = [player for player in named if player not in players]
        if unknown or any(isinstance(group, str) or not group for group in groups):
            raise ValueError(f"The structure {name!r} must hold lists of the players {list(players)}, got {groups!r}.")
        if len(set(named)) < len(named):
            raise ValueError(f"The structure {name!r} names a player twice: {groups!r}; put each into one coalition.")
        out[name] = [list(group) for group in groups] + [[player] for player in players if player not in named]
    return out


def _partitions(players: list[str]) -> list[list[list[str]]]:
    """All set partitions: the last player joins each group of a partition of the others, or stands alone."""
    if not players:
        return [[]]
    out = []
    for groups in _partitions(players[:-1]):
        out += [[*groups[:k], [*groups[k], players[-1]], *groups[k + 1 :]] for k in range(len(groups))]
        out.append([*groups, [players[-1]]])
    return out
