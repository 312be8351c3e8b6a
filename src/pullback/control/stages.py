"""Which modules are the players of one stage: by name, or read off a call of the model.

Two modules are parallel if neither's output enters the other. A model's graph says how many players a tensor passes at
most on its way to the loss: the *height* of the module that made it. Modules of one height are parallel, for whoever
comes first on a way has the larger height; counted from the loss, branches are aligned where they meet.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from pullback.curvature.stage import LARGEST, Stage
from pullback.tape import Term, tensors
from pullback.tape.recorder import Recorder, notes

#: Modules whose rows have two sides that others can share.
PLAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def named_stages(model: nn.Module, stages: Sequence[Sequence[str]], trained: Container[int]) -> list[Stage]:
    """Stages by name patterns.

    A module plays in a stage if one of its patterns (``*`` and ``?`` as in file names) matches its name or that of
    its weight, such as ``block.left`` or ``block.left.weight``.

    Args:
        model: the model.
        stages: name patterns, stage by stage.
        trained: ids of the parameters that are trained.

    Raises:
        ValueError: if a pattern matches nothing, a module cannot play or plays twice, or a stage has one player.
    """
    modules = {name: m for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    out: list[Stage] = []
    owner: dict[str, int] = {}
    for k, patterns in enumerate(stages):
        names: list[str] = []
        for pattern in patterns:
            hits = [name for name in modules if fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern)]
            if not hits:
                close = difflib.get_close_matches(pattern, modules, 1) or difflib.get_close_matches(
                    pattern, [f"{name}.weight" for name in modules], 1
                )
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(f"The pattern {pattern!r} of a stage matches no module with parameters{hint}.")
            for name in hits:
                why = _unfit(model, modules[name], trained)
                if why:
                    raise ValueError(
                        f"The pattern {pattern!r} makes a player of '{name}' ({type(modules[name]).__name__}), {why}; "
                        "name the modules that are to play."
                    )
                if owner.setdefault(name, k) != k:
                    raise ValueError(f"'{name}' plays in two stages, {owner[name] + 1} and {k + 1}; leave it in one.")
            names += [name for name in hits if name not in names]
        if len(names) < 2:
            raise ValueError(f"Stage {k + 1} has one player, '{names[0]}'; a game needs two, or leave the stage out.")
        out.append(_stage(modules, names))
    return out


def _stage(modules: Mapping[str, nn.Module], names: Sequence[str]) -> Stage:
    return Stage(tuple(names), tuple(modules[name].get_parameter("weight") for name in names))


def _unfit(model: nn.Module, module: nn.Module, trained: Container[int]) -> str:
    """Why a module cannot play; '' if it can."""
    if not isinstance(module, PLAYERS):
        return "whose rows have no two sides to share: only Linear and convolutions can play"
    if getattr(module, "groups", 1) > 1:
        return f"a convolution in {module.groups} groups: only those in one can play"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "whose weight is computed from other parameters"
    if not module.weight.requires_grad or id(module.weight) not in trained:
        return "whose weight is not trained by this optimizer"
    if sum(p is module.weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
        return "whose weight is that of another module too"
    return ""


def observed_stages(model: nn.Module, terms: Sequence[Term], key: str, trained: Container[int]) -> list[Stage]:
    """The stages of the model as it was called for a loss.

    Args:
        model: the model.
        terms: terms of the loss, after the backward pass.
        key: of the recorder.
        trained: ids of the parameters that are trained.
    """
    first = {root.serial for root in terms[0].roots}
    own = [term for term in terms if first & {root.serial for root in term.roots}]
    positions: dict[int, int] = {}
    for term in own:
        for module, factors in term.factors.items():
            if len(factors) == 1 and len(factors[0].parts) == 1 and factors[0].parts[0] is not None:
                positions[module] = factors[0].parts[0][0].numel()
    return _stages(model, [term.use.edge for term in own], key, positions, trained)


def stages_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[list[str]]:
    """The stages that ``Game(stages="auto")`` would find, as names to choose from.

    The model is called once, in the mode it is in: what it draws is drawn, and running statistics move.

    Args:
        model: the model.
        *args: a batch, as it is called with.
        **kwargs: likewise.

    Returns:
        For every stage the names of its players, the stage furthest from the output first.

    Example:
        >>> import torch, pullback
        >>> from torch import nn
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner, self.outer, self.skip = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(3, 4)
        ...     def forward(self, x):
        ...         return self.outer(self.inner(x).tanh()) + self.skip(x)
        >>> pullback.stages_of(Residual(), torch.randn(2, 3))
        [['outer', 'skip']]
    """
    recorder = Recorder(model)
    positions: dict[int, int] = {}

    def left(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            positions[id(module)] = output.numel()

    for module in model.modules():
        if isinstance(module, PLAYERS):
            recorder.hold(module.register_forward_hook(left))
    try:
        with torch.enable_grad():
            out = model(*args, **kwargs)
        edges = [get_gradient_edge(t) for t in tensors(out) if t.requires_grad]
        trained = {id(p) for p in model.parameters()}
        return [list(stage.names) for stage in _stages(model, edges, recorder.key, positions, trained)]
    finally:
        recorder.close()


def _stages(
    model: nn.Module,
    edges: Sequence[GradientEdge],
    key: str,
    numbers: Mapping[int, int],
    trained: Container[int],
) -> list[Stage]:
    """Players of one height with as many positions, at least two of them.

    Args:
        model: the model.
        edges: where predictions come from.
        key: of the recorder.
        numbers: numbers in a module's output, by id.
        trained: ids of the parameters that are trained.
    """
    modules = dict(model.named_modules())
    players = {
        id(m): name
        for name, m in modules.items()
        if not _unfit(model, m, trained) and max(len(m.weight), m.weight[0].numel() + 1) <= LARGEST
    }
    found: dict[tuple[int, int], list[str]] = {}
    for module, own in heights(edges, key, players).items():
        if len(own) == 1 and module in numbers:  # one call
            name = players[module]
            width = len(modules[name].get_parameter("weight"))
            found.setdefault((own[0], numbers[module] // width), []).append(name)
    order = list(players.values())
    return [
        _stage(modules, sorted(names, key=order.index))
        for _, names in sorted(found.items(), key=lambda item: -item[0][0])
        if len(names) > 1
    ]


def heights(edges: Sequence[GradientEdge], key: str, players: Container[int]) -> dict[int, list[int]]:
    """How many players lie at most between a player's output and the predictions, for each of its calls.

    Args:
        edges: where predictions come from.
        key: of the recorder.
        players: ids of modules.
    """
    waiting: Counter[Node] = Counter()
    seen = {edge.node for edge in edges}
    stack = list(seen)
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                waiting[child] += 1
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
    height = dict.fromkeys(seen, 0)
    ready = [node for node in seen if not waiting[node]]
    found: dict[int, list[int]] = {}
    while ready:
        node = ready.pop()
        own = [call for call, _, _ in notes(node).get(key, ()) if id(call.module) in players]
        for call in own:
            found.setdefault(id(call.module), []).append(height[node])
        for child, _ in node.next_functions:
            if child is not None:
                height[child] = max(height[child], height[node] + bool(own))
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)
    return found
