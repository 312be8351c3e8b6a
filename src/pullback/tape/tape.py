"""The tape: one linearisation of the model, taken inside the user's own backward pass.

Nothing happens in a forward pass but remembering calls. When the backward pass reaches the prediction, its
costate is known, the factor of the output metric is formed there, and its columns are pulled back through
the same graph to the outputs of the recorded calls (autograd is re-entrant). Then the user's pass goes on.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pullback.errors import CoverageError, MetricError, PullbackError
from pullback.metric import Criteria, Heads, Metrics, cell_weights, resolve_all
from pullback.tape import sweep
from pullback.tape.call import Gate, region_of, wide, without_autocast
from pullback.tape.checks import NotFiniteError, missed, mixed_calls, refuse_mixing
from pullback.tape.fold import can_fold, folded
from pullback.tape.gates import gates_of, through, weights_of
from pullback.tape.graph import Reached, path_to, reach
from pullback.tape.memory import Room, Sizes, memory_budget
from pullback.tape.nest import mapped, tensors
from pullback.tape.plan import Names, Plan, Unit, assign, formed, usable_calls
from pullback.tape.ports import ports_of
from pullback.tape.prior import priors_of
from pullback.tape.recorder import Hook, Recorder, Wiring
from pullback.tape.structure import samples, structure
from pullback.tape.term import LossUse, Term, gather
from pullback.tape.wires import Wires, wires_of


class Tape:
    """Captures terms of a loss on a model.

    Args:
        model: the model, held weakly.
        criterion: the loss module, or None: then the model's output is the prediction; or several modules,
            one per head of the model, in a list or dict.
        metric: the output metric; for several criteria None or as many in the same form. None takes the
            criterion's own.
        strategy: how to sweep columns; ``"auto"`` times the ways once per structure of calls.
        batch_norm: ``"refuse"`` BatchNorm on batch statistics, or hold them constant: ``"frozen"``.
        mine: ids of the parameters to give rows to; None for all that require grad.
        lenient: whether parameters that cannot be given rows are collected in ``strays`` or refused.
        wiring: which tensors between modules get their factors too, for feedback.
        memory: bytes that the factors of a step may take; None for half of the machine's.

    Attributes:
        losses: every criterion with its metric.
        metric: the metric, or the metrics of several criteria.
        strays: why parameters were given no rows, by id.
        finite: False if a use could not be swept because its numbers are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criteria,
        metric: Metrics = None,
        strategy: sweep.Strategy | str = "auto",
        *,
        batch_norm: str = "refuse",
        mine: Callable[[], Set[int]] | None = None,
        lenient: bool = False,
        wiring: Wiring = "none",
        memory: float | None = None,
    ) -> None:
        if strategy not in ("auto", *sweep.STRATEGIES):
            raise ValueError(f"sweep must be 'auto', 'loop', 'vmap' or 'fold', got {strategy!r}.")
        if batch_norm not in ("refuse", "frozen"):
            raise ValueError(f"batch_norm must be 'refuse' or 'frozen', got {batch_norm!r}.")
        self.losses = resolve_all(criterion, metric)
        metrics = tuple(own for _, own in self.losses)
        self.metric = metrics[0] if len(metrics) == 1 else Heads(metrics)
        self._metrics = {id(one): own for one, own in self.losses}
        self.strays: dict[int, str] = {}
        self._mine = mine
        self._lenient = lenient
        self.memory = memory
        self.strategy = strategy
        self._uses: list[Term] = []
        self._priors: list[Term] = []
        self._prior_plans: dict[tuple[int, int], Plan] = {}
        self.finite = True
        self.plans: dict[Any, Plan] = {}
        self.recorder = Recorder(model, batch_norm == "frozen", wiring)
        self.names = Names(model)
        self._model = weakref.ref(model)
        self._busy = False
        for one, _ in self.losses:
            if one is None:
                self.recorder.hold(model.register_forward_hook(Hook(self, "_model_called")))
            else:
                pre, post = Hook(self, "_loss_enters"), Hook(self, "_loss_called")
                self.recorder.hold(one.register_forward_pre_hook(pre, with_kwargs=True))
                self.recorder.hold(one.register_forward_hook(post, with_kwargs=True))

    @property
    def terms(self) -> list[Term]:
        """The swept uses of the loss since :meth:`clear`, in order of backward; after them the costs of parameters."""
        return [*self._uses, *self._priors]

    def clear(self) -> None:
        """Forget the terms."""
        self._uses, self._priors = [], []
        self.finite = True

    def close(self) -> None:
        """Remove every hook and forget everything."""
        self.recorder.close()
        self.clear()

    # -- the loss is called ----------------------------------------------------------------------------

    def _loss_enters(self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the criterion an alias of the prediction, so that its own costate can be told apart."""
        if not self.recorder.active:
            return None
        if args and isinstance(args[0], Tensor) and args[0].requires_grad:
            return (args[0].view_as(args[0]), *args[1:]), kwargs
        if "input" in kwargs and isinstance(kwargs["input"], Tensor) and kwargs["input"].requires_grad:
            return args, {**kwargs, "input": kwargs["input"].view_as(kwargs["input"])}
        return None

    def _loss_called(self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.recorder.active or not isinstance(output, Tensor) or not output.requires_grad:
            return
        rest = dict(kwargs)
        alias, others = (args[0], args[1:]) if args else (rest.pop("input"), ())
        if not isinstance(alias, Tensor) or alias.grad_fn is None:
            return
        if any(t.requires_grad for t in tensors((others, rest))):
            raise MetricError(
                f"The target of {type(criterion).__name__}, or another argument after the prediction, requires "
                "grad; detach it, the metric is of the prediction alone. (A predicted variance belongs into the "
                "prediction: one output with both, and a loss of it with metric=LossHessian(loss, project=True).)"
            )
        (node, number), *_ = alias.grad_fn.next_functions
        assert node is not None
        use = LossUse(GradientEdge(node, number), alias.detach(), criterion, others, rest, output.detach())
        use.autocast = region_of(alias.device.type)
        self._await(use, alias, output)

    def _model_called(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Without a criterion the model's own output is the prediction."""
        if not self.recorder.active:
            return None
        found = [t for t in tensors(output) if t.requires_grad and t.grad_fn is not None]
        if not found:
            return None
        if len(found) > 1:
            raise MetricError(
                f"The model returned {len(found)} tensors; without a criterion module exactly one prediction is needed."
            )
        z = found[0]
        alias = z.view_as(z)
        edge = get_gradient_edge(z)
        self._await(LossUse(edge, z.detach()), alias, None)
        # Only the alias leads to the loss: its hook sees the whole costate of the prediction.
        return mapped(lambda t: alias if t is z else t, output)

    def _await(self, use: LossUse, alias: Tensor, output: Tensor | None) -> None:
        use.path = path_to(alias, self.recorder.key)
        tape = weakref.ref(self)
        if output is not None:

            def upstream(g: Tensor) -> None:
                use.upstream = g.detach()

            output.register_hook(upstream)

        def arrived(costate: Tensor) -> None:
            if use.criterion is None and torch.is_grad_enabled():
                raise CoverageError(
                    "The model's output was differentiated (create_graph=True) on its way to the loss, which the tape "
                    "cannot follow; compute that residual inside the model's forward."
                )
            owner = tape()
            if owner is not None:
                owner._sweep(use, costate.detach())

        alias.register_hook(arrived)

    # -- the backward pass has reached the prediction --------------------------------------------------

    def _sweep(self, use: LossUse, costate: Tensor) -> None:
        if self._busy or not self.recorder.enabled:
            return
        self._busy = self.recorder.sweeping = True
        try:
            with self.recorder.paused(), torch.no_grad(), without_autocast(use.z.device.type):
                found = reach(use.edge, self.recorder.key)
                if found.calls:  # else the criterion was lent to another model
                    term = self._pull_back(use, found, costate)
                    self._priors += priors_of(term, self._priors, self._prior_plans)
                    self._uses.append(term)
        except NotFiniteError:
            self.finite = False
        finally:
            self._busy = self.recorder.sweeping = False

    def _pull_back(self, use: LossUse, found: Reached, costate: Tensor) -> Term:
        start = time.perf_counter()
        up = use.upstream
        if up is not None and up.numel() and float(up if up.ndim == 0 else up.min()) < 0:
            raise MetricError("The loss enters the objective with a negative weight; minimise it instead.")
        N = samples(use, found)
        metric = self._metrics[id(use.criterion)]
        # Under autocast predictions are half precision; the metric is formed in float32, swept in half.
        z, costate = wide(use.z), wide(costate)
        weight = cell_weights(use.criterion, metric, z, use.target, N, *use.rest)
        if use.upstream is not None:
            weight = weight * use.upstream.to(weight.dtype)
        self._room().allow_factor(z, metric.columns(z, N), N)
        S = metric.factor_at(z, weight, costate, N, use.target)
        e0 = metric.coordinates(z, weight, costate, N, use.target)
        mine = self._mine() if self._mine is not None else found.params.keys()
        found.params = {
            k: p for k, p in found.params.items() if p.requires_grad and k in mine and k in self.names.places
        }
        key = structure(found, use, S.shape[0], N)
        plan = self.plans.get(key)
        if plan is None:
            if not all(bool(torch.isfinite(t).all()) for t in (z, costate, S)):
                # Nothing can be checked on such numbers, and no step will be taken on them. (A loss that is linear
                # far out has a finite slope and no curvature at infinity: the prediction tells.)
                raise NotFiniteError
            plan = self._make_plan(use, found, N, S.to(use.z.dtype), costate.to(use.z.dtype))
            self.plans[key] = plan
        every, found = found, found.only(plan.modules)
        between = [] if plan.wires is None else plan.wires.edges(every)
        strategy = self._room().affordable(plan.sizes, S, N, plan.strategy, self.strategy == "auto")
        gates = gates_of(every)
        weights = weights_of(S, costate, e0, N) if gates else None
        columns = self._columns(strategy, use, found, S.to(use.z.dtype), between, gates, weights)
        return Term(
            use=use,
            exact=metric.exact,
            N=N,
            r=S.shape[0],
            e0=e0.reshape(-1),
            factors=gather(found, columns, S.shape[0]),
            plan=plan,
            roots=found.roots,
            ports=ports_of(plan.wires, every, N, columns[len(found.edges) :]),
            seconds=time.perf_counter() - start,
            held=plan.sizes.held(S.shape[0] * N, S.dtype),
        )

    def _columns(
        self,
        strategy: str,
        use: LossUse,
        found: Reached,
        S: Tensor,
        between: Sequence[GradientEdge] = (),
        gates: Sequence[tuple[Gate, GradientEdge]] = (),
        weights: Tensor | None = None,
    ) -> list[Tensor]:
        if strategy == "fold":
            model = self._model()
            assert model is not None
            return folded(model, self.recorder, use, found, S)
        way = sweep.vmap if strategy == "vmap" else sweep.loop
        try:
            if gates:
                return through(way, use.edge, [*found.edges, *between], S, gates, weights)
            return way(use.edge, [*found.edges, *between], S)
        except PullbackError:
            raise
        except RuntimeError as error:
            for (call, _), reached in zip(found.flat, sweep.connected(use.edge, found.edges, S[0]), strict=True):
                if not reached:
                    raise CoverageError(
                        f"No factor arrives at the output of module '{self.recorder.name_of(call.module)}', though "
                        "the prediction depends on it; if the model is compiled, give the optimizer the original."
                    ) from error
            raise

    # -- memory ----------------------------------------------------------------------------------------

    def _room(self) -> Room:
        budget = memory_budget() if self.memory is None else self.memory
        return Room(budget, sum(term.held for term in self._uses))

    def _sized(
        self, units: list[Unit], use: LossUse, found: Reached, S: Tensor, N: int, wires: Wires | None = None
    ) -> Plan:
        """A plan, if what it holds fits."""
        modules = {id(unit.module) for unit in units}
        between = [] if wires is None else wires.edges(found)
        edges = [*found.only(modules).edges, *between]
        plan = Plan(units, Sizes.of(use.edge, edges, formed(units), N), wires=wires)
        self._room().affordable(plan.sizes, S, N, "loop", True)
        return plan

    # -- decided once per structure ---------------------------------------------------------------------

    def _make_plan(self, use: LossUse, found: Reached, N: int, S: Tensor, costate: Tensor) -> Plan:
        mixed = mixed_calls(use, found, N)
        usable = usable_calls([call for call, _ in found.calls], N, mixed)
        refuse_mixing(found, mixed, self.recorder)
        trained = found.params
        strays = self.strays if self._lenient else None
        units = assign(self.names, usable, trained, strays=strays)
        self._sized(units, use, found, S, N)  # the check itself makes rows
        wrong = missed(units, use, found, N, costate)
        gates = gates_of(found)
        if wrong and gates:
            # An integral that was refined on the way, by a later call of the same module: now all are as fine.
            wrong = missed(units, use, found, N, costate)
        if wrong:
            # A parameter that is also used outside the calls of its module: ask the whole model.
            units = assign(self.names, usable, trained, set(wrong), strays)
            self._sized(units, use, found, S, N)
            wrong = missed(units, use, found, N, costate)
        if wrong and strays is not None:
            strays.update(dict.fromkeys(wrong, "its rows do not reproduce its gradient"))
            kept = {k: p for k, p in trained.items() if k not in wrong}
            units = assign(self.names, usable, kept, strays=strays)
            wrong = {}
        if wrong:
            name, error = next((self.names.full[k], e) for k, e in wrong.items())
            raise CoverageError(
                f"The rows of '{name}' do not reproduce its gradient (relative error {error:.1e}): it is used "
                "in a way that mixes samples or that the forward hides; freeze it or change that use."
            )
        wiring = self.recorder.wiring
        wires = None if wiring == "none" else wires_of(use, found, N, {id(unit.module) for unit in units})
        plan = self._sized(units, use, found, S, N, wires)
        found = found.only(plan.modules)
        if self.strategy == "auto":
            room = self._room()
            columns = S.shape[0]
            tried = {"loop": S[sweep.probes(columns)]}
            candidates: dict[sweep.Strategy, Callable[[], list[Tensor]]] = {
                name: (lambda name=name: self._columns(name, use, found, tried.get(name, S), (), gates))  # type: ignore[misc]
                for name in sweep.STRATEGIES
                if name == "loop" or (room.spare(plan.sizes, S, N, name) and (
                    name != "fold" or (wiring == "none" and not gates and can_fold(use, found, self._model(), N))))
            }  # fmt: skip
            if columns > 1:
                plan.strategy, _, plan.seconds = sweep.choose(candidates, columns=columns)
        else:
            plan.strategy = self.strategy  # type: ignore[assignment]
            if plan.strategy == "fold" and (wiring != "none" or gates or not can_fold(use, found, self._model(), N)):
                raise CoverageError(
                    "sweep='fold' needs one deterministic call of the model per loss, with the loss taken of "
                    "its output, no feedback, and no module solved by its adjoint; use 'loop'."
                )
        return plan
