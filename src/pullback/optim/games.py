"""Kronecker metrics in which the modules of a stage play a game."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pullback.control.games import Game, Play
from pullback.control.stages import named_stages, observed_stages
from pullback.curvature.stage import Stage
from pullback.errors import StepError
from pullback.metric import Criteria
from pullback.optim.kronecker import Kronecker
from pullback.tape import Term


class KroneckerGame(Kronecker):
    r"""K-FAC whose parallel modules may move jointly: branches, projections beside skips, heads.

    .. math:: \sum_v B_{uv}\, D_v\, A_{uv}^\top = G_u \qquad\text{for all players u, v of a coalition}

    with :math:`A_{uv} = E[x_u x_v^\top]` and :math:`B_{uv} = \sum s_u s_v^\top` averaged as in
    :class:`~pullback.optim.kronecker.Kronecker`, the diagonal blocks damped as there. Modules that do not play, and
    players who are alone, take their K-FAC steps. See docs/games.md.

    Args:
        model: the model.
        criterion: the loss module used in the loop.
        game: who plays and who moves with whom; None lets a bandit choose among the stages the model shows.
        **options: those of :class:`~pullback.optim.kronecker.Kronecker`.

    Attributes:
        game: the game as it is played; print its ``report()``.

    Raises:
        ValueError: if a pattern fits no module or one that cannot play, a module plays twice, a stage has one player,
            or the form is not ``"kfac"``.

    Example:
        >>> import torch, pullback
        >>> from torch import nn
        >>> class Two(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(3, 4), nn.Linear(10, 2)
        ...     def forward(self, x):
        ...         return self.out(torch.cat([self.a(x).tanh(), self.b(x).relu()], 1))
        >>> _ = torch.manual_seed(0)
        >>> model, criterion = Two(), nn.CrossEntropyLoss()
        >>> opt = pullback.KroneckerGame(model, criterion, game=pullback.Game(structure="cooperative"))
        >>> x = torch.randn(64, 3)
        >>> y = (x.sum(1) > 0).long()
        >>> for _ in range(30):
        ...     opt.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     _ = opt.step()
        >>> bool(loss < 0.1), opt.game.stages
        (True, [('a', 'b')])
    """

    def __init__(self, model: nn.Module, criterion: Criteria, *, game: Game | None = None, **options: Any) -> None:
        form = options.get("form", "kfac")
        if form != "kfac":
            raise ValueError(f"Players share Kronecker factors, not a basis: form must be 'kfac' here, got {form!r}.")
        self.game = Play(game or Game())
        self._stages: list[Stage] | None = None
        super().__init__(model, criterion, **options)
        stages = self.game.game.stages
        if not isinstance(stages, str):
            self._begin(named_stages(model, stages, set(self._order())))

    def _begin(self, stages: list[Stage]) -> None:
        self._stages = stages
        self.game.begin([stage.names for stage in stages])

    def _advance(self, terms: list[Term], loss: float, finite: bool, closure: Callable[[], Any] | None) -> None:
        if terms and finite:
            self._look(terms, loss)
        try:
            super()._advance(terms, loss, finite, closure)
        except StepError:
            self.game.failed()
            raise

    def _put_back(self, kept: object) -> None:
        super()._put_back(kept)
        self.game.failed()

    def _look(self, terms: list[Term], loss: float) -> None:
        if self._stages is None:
            self._begin(observed_stages(self.model, terms, self._tape.recorder.key, set(self._order())))
            if not self._stages:
                raise StepError(
                    "No two modules of this model are parallel, so nobody can play (those in the field of an ODE block "
                    "have to be named); name stages in Game(stages=...), or take Kronecker."
                )
        assert self._stages is not None
        structures = self.game.look(self._count, loss)
        game = self.game.game
        if game.structure != "open-loop":
            self._averages.play(self._stages, structures, game.cut, game.renew)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "game": self.game.state()}

    def _load(self, own: dict[str, Any]) -> None:
        if "game" in own:
            self.game.load(own["game"])
            names = self.game.stages
            if names is not None and self._stages is None:
                self._stages = [
                    Stage(players, tuple(self.model.get_parameter(f"{name}.weight") for name in players))
                    for players in names
                ]
        super()._load(own)
