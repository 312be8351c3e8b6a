"""The tape: one linearisation of the model, taken inside the user's own backward pass.

Nothing happens in a forward pass but remembering calls. When the backward pass reaches the prediction, its
costate is known, the factor of the output metric is formed there, and its columns are pulled back through
the same graph to the outputs of the recorded calls (autograd is re-entrant). Then the user's pass goes on.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from pullback.errors import CoverageError, MetricError
from pullback.metric import OutputMetric, cell_weights
from pullback.tape import sweep
from pullback.tape.call import tensors, wide
from pullback.tape.checks import missed, mixed_calls, refuse_mixing
from pullback.tape.graph import Reached, path_to, reach
from pullback.tape.plan import Names, Plan, assign, usable_calls
from pullback.tape.recorder import Hook, Recorder
from pullback.tape.term import LossUse, Term, gather


class NotFiniteError(ArithmeticError):
    """A loss that is not finite met a structure of calls that has not been checked yet."""


class Tape:
    """Captures terms of a loss on a model.

    Args:
        model: the model, held weakly.
        criterion: the loss module, or None: then the model's output is the prediction.
        metric: the output metric.
        strategy: how to sweep columns; ``"auto"`` times the ways once per structure of calls.
        batch_norm: ``"refuse"`` BatchNorm on batch statistics, or hold them constant: ``"frozen"``.
        mine: ids of the parameters to give rows to; None for all that require grad.
        lenient: whether parameters that cannot be given rows are collected in ``strays`` or refused.

    Attributes:
        strays: why parameters were given no rows, by id.
        terms: the swept uses of the loss since :meth:`clear`, in order of backward.
        finite: False if a use could not be swept because its numbers are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None,
        metric: OutputMetric,
        strategy: sweep.Strategy | str = "auto",
        *,
        batch_norm: str = "refuse",
        mine: Callable[[], Set[int]] | None = None,
        lenient: bool = False,
    ) -> None:
        if strategy not in ("auto", *sweep.STRATEGIES):
            raise ValueError(f"sweep must be 'auto', 'loop', 'vmap' or 'fold', got {strategy!r}.")
        if batch_norm not in ("refuse", "frozen"):
            raise ValueError(f"batch_norm must be 'refuse' or 'frozen', got {batch_norm!r}.")
        self.metric = metric
        self.strays: dict[int, str] = {}
        self._mine = mine
        self._lenient = lenient
        self.strategy = strategy
        self.terms: list[Term] = []
        self.finite = True
        self.plans: dict[Any, Plan] = {}
        self.recorder = Recorder(model, freeze=batch_norm == "frozen")
        self.names = Names(model)
        self._model = weakref.ref(model)
        self._busy = False
        if criterion is None:
            handle = model.register_forward_hook(Hook(self, "_model_called"))
            self.recorder.hold(handle)
        else:
            pre, post = Hook(self, "_loss_enters"), Hook(self, "_loss_called")
            self.recorder.hold(criterion.register_forward_pre_hook(pre, with_kwargs=True))
            self.recorder.hold(criterion.register_forward_hook(post, with_kwargs=True))

    def clear(self) -> None:
        """Forget the terms."""
        self.terms = []
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
                f"The target of {type(criterion).__name__} requires grad; detach it, the metric is of the "
                "prediction alone."
            )
        (node, number), *_ = alias.grad_fn.next_functions
        assert node is not None
        use = LossUse(GradientEdge(node, number), alias.detach(), criterion, others, rest, output.detach())
        device = alias.device.type
        if torch.is_autocast_enabled(device):
            use.autocast = (device, torch.get_autocast_dtype(device))
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
        replaced = [alias if t is z else t for t in pytree.tree_leaves(output)]
        return pytree.tree_unflatten(replaced, pytree.tree_structure(output))

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
            with self.recorder.paused(), torch.no_grad():
                found = reach(use.edge, self.recorder.key)
                if found.calls:  # else the criterion was lent to another model
                    self.terms.append(self._pull_back(use, found, costate))
        except NotFiniteError:
            self.finite = False
        finally:
            self._busy = self.recorder.sweeping = False

    def _pull_back(self, use: LossUse, found: Reached, costate: Tensor) -> Term:
        start = time.perf_counter()
        if use.upstream is not None and float(use.upstream.min()) < 0:
            raise MetricError("The loss enters the objective with a negative weight; minimise it instead.")
        N = _samples(use, found)
        # Under autocast predictions are half precision; the metric is formed in float32, swept in half.
        z, costate = wide(use.z), wide(costate)
        weight = cell_weights(use.criterion, self.metric, z, use.target, N)
        if use.upstream is not None:
            weight = weight * use.upstream.to(weight.dtype)
        S = self.metric.factor(z, weight, N)
        e0 = self.metric.coordinates(z, weight, costate, N)
        mine = self._mine() if self._mine is not None else found.params.keys()
        found.params = {
            k: p for k, p in found.params.items() if p.requires_grad and k in mine and k in self.names.places
        }
        structure = _structure(found, use, S.shape[0])
        plan = self.plans.get(structure)
        if plan is None:
            if not (bool(torch.isfinite(costate).all()) and bool(torch.isfinite(S).all())):
                # Nothing can be checked on such numbers, and no step will be taken on them.
                raise NotFiniteError
            plan = self._make_plan(use, found, N, S.to(use.z.dtype), costate.to(use.z.dtype))
            self.plans[structure] = plan
        found = found.only(plan.modules)
        columns = self._columns(plan.strategy, use, found, S.to(use.z.dtype))
        return Term(
            use=use,
            exact=self.metric.exact,
            N=N,
            r=S.shape[0],
            e0=e0.reshape(-1),
            factors=gather(found, columns, S.shape[0]),
            plan=plan,
            roots=found.roots,
            seconds=time.perf_counter() - start,
        )

    def _columns(self, strategy: str, use: LossUse, found: Reached, S: Tensor) -> list[Tensor]:
        if strategy == "fold":
            return self._fold(use, found, S)
        way = sweep.vmap if strategy == "vmap" else sweep.loop
        try:
            return way(use.edge, found.edges, S)
        except RuntimeError as error:
            for (call, _), reached in zip(found.flat, sweep.connected(use.edge, found.edges, S[0]), strict=True):
                if not reached:
                    raise CoverageError(
                        f"No factor arrives at the output of module '{self.recorder.name_of(call.module)}', though "
                        "the prediction depends on it; if the model is compiled, give the optimizer the original."
                    ) from error
            raise

    def _fold(self, use: LossUse, found: Reached, S: Tensor) -> list[Tensor]:
        """Repeat the batch once per column in a new forward pass and sweep it in one backward pass."""
        model, path = self._model(), use.path
        assert model is not None
        assert path is not None
        r, N = S.shape[0], path.root.batch()

        def repeated(t: Any) -> Any:
            if isinstance(t, Tensor) and t.ndim and t.shape[0] == N:
                return t.detach().repeat(r, *(1,) * (t.ndim - 1))
            return t

        args, kwargs = pytree.tree_map(repeated, (path.root.args, dict(path.root.kwargs)))
        self.recorder.enabled = True
        try:
            with torch.enable_grad(), path.root.context():
                z = path.follow(tensors(model(*args, **kwargs)))
        finally:
            self.recorder.enabled = False
        again = reach(get_gradient_edge(z), self.recorder.key).only({id(c.module) for c, _ in found.calls})
        if [c.module for c, _ in again.calls] != [c.module for c, _ in found.calls]:
            raise RuntimeError("the folded batch took another way through the model")
        flat = sweep.loop(get_gradient_edge(z), again.edges, S.flatten(0, 1)[None])
        return [part[0].unflatten(0, (r, -1)) for part in flat]

    # -- decided once per structure ---------------------------------------------------------------------

    def _make_plan(self, use: LossUse, found: Reached, N: int, S: Tensor, costate: Tensor) -> Plan:
        mixed = mixed_calls(use, found, N)
        usable = usable_calls([call for call, _ in found.calls], N, mixed)
        refuse_mixing(found, mixed, self.recorder)
        trained = found.params
        strays = self.strays if self._lenient else None
        units = assign(self.names, usable, trained, strays=strays)
        wrong = missed(units, use, found, N, costate)
        if wrong:
            # A parameter that is also used outside the calls of its module: ask the whole model.
            units = assign(self.names, usable, trained, set(wrong), strays)
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
        plan = Plan(units)
        found = found.only(plan.modules)
        if self.strategy == "auto":
            candidates: dict[sweep.Strategy, Callable[[], list[Tensor]]] = {
                name: (lambda name=name: self._columns(name, use, found, S))  # type: ignore[misc]
                for name in sweep.STRATEGIES
                if name != "fold" or _can_fold(use, found, self._model(), N)
            }
            if S.shape[0] > 1:
                plan.strategy, _, plan.seconds = sweep.choose(candidates)
        else:
            plan.strategy = self.strategy  # type: ignore[assignment]
            if plan.strategy == "fold" and not _can_fold(use, found, self._model(), N):
                raise CoverageError(
                    "sweep='fold' needs one deterministic call of the model per loss, with the loss taken of "
                    "its output; use 'loop'."
                )
        return plan


def _samples(use: LossUse, found: Reached) -> int:
    """Number N of independent samples behind a prediction.

    Raises:
        CoverageError: if the model's calls do not agree on one, or the prediction has another.
    """
    if use.z.ndim == 0 or use.z.numel() == 0:
        raise CoverageError(
            f"The loss was given predictions of shape {tuple(use.z.shape)}; at least one sample along the "
            "first axis is needed."
        )
    batches = {call.batch() for call in found.roots}
    if len(batches) != 1 or None in batches:
        raise CoverageError(
            "The loss depends on " + (f"calls of the model with batches {sorted(map(str, batches))}"
            if batches else "no call of the model that was recorded")
            + "; give it the output of model(inputs), the batch along the first axis."
        )  # fmt: skip
    (N,) = batches
    assert N is not None
    if N == 0 or use.z.shape[0] % N:
        raise CoverageError(
            f"The model took {N} samples and the loss got predictions {tuple(use.z.shape)}; their first axis "
            "must be the batch."
        )
    return N


def _structure(found: Reached, use: LossUse, r: int) -> Any:
    """What must be the same for a plan to hold: modules, shapes, modes, trained parameters."""
    calls = tuple((id(call.module), call.module.training, call.shape) for call, _ in found.calls)
    trained = tuple(found.params)
    # One sample alone has nothing to be mixed with: what was found then says nothing of larger batches.
    return calls, trained, tuple(use.z.shape[1:]), r, use.path is None, use.z.shape[0] > 1


def _can_fold(use: LossUse, found: Reached, model: nn.Module | None, N: int) -> bool:
    alone = len(found.roots) == 1 and use.path is not None and found.roots[0].rng is None
    # A module in training mode may write its buffers; a folded batch must leave no trace.
    pure = model is not None and not any(m.training and m._buffers for m in model.modules())
    return alone and pure and use.z.shape[0] % N == 0
