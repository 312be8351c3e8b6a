"""Who moves with whom: blocks sorted into groups by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from pullback.curvature.block import Block

#: "layerwise", "global", or coalitions: lists of name patterns; what no pattern matches stays alone.
Partition = str | Sequence[Sequence[str]]


def check_partition(partition: Partition) -> Partition:
    """A partition of a known form.

    Raises:
        ValueError: if it is neither a known name nor a list of lists of patterns.
    """
    if isinstance(partition, str):
        if partition in ("layerwise", "global"):
            return partition
        raise ValueError(
            f"partition must be 'layerwise', 'global' or lists of name patterns such as [['0.*', '2.*']], got "
            f"{partition!r}."
        )
    groups = [list(patterns) if not isinstance(patterns, str) else None for patterns in partition]
    if any(g is None or not g or not all(isinstance(p, str) for p in g) for g in groups):
        raise ValueError(
            f"partition must hold lists of name patterns, as in [['0.*', '2.*'], ['4.*']], got {partition!r}."
        )
    return [g for g in groups if g]


def divide(blocks: Sequence[Block], partition: Partition, names: Mapping[int, str]) -> list[list[Block]]:
    """Sort blocks into groups.

    A coalition takes every block all of whose parameters match one of its patterns (``*`` and ``?`` as in
    file names, on names such as ``encoder.0.weight``).

    Args:
        blocks: the blocks of a linearisation.
        partition: see :data:`Partition`.
        names: name of every parameter by id.

    Raises:
        ValueError: if a pattern matches nothing, two coalitions claim a block, or one claims half of it.
    """
    if partition == "global":
        return [list(blocks)]
    if partition == "layerwise":
        return [[block] for block in blocks]
    every = [names[id(p)] for block in blocks for p in block.params]
    for pattern in (p for patterns in partition for p in patterns):
        if not any(fnmatchcase(name, pattern) for name in every):
            close = difflib.get_close_matches(pattern, every, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"The pattern {pattern!r} of the partition matches no trained parameter{hint}.")
    groups: list[list[Block]] = [[] for _ in partition]
    alone: list[list[Block]] = []
    for block in blocks:
        own = [names[id(p)] for p in block.params]
        claims = [[any(fnmatchcase(name, pattern) for pattern in patterns) for name in own] for patterns in partition]
        takers = [k for k, hits in enumerate(claims) if any(hits)]
        if not takers:
            alone.append([block])
            continue
        if len(takers) > 1 or not all(claims[takers[0]]):
            raise ValueError(
                f"The parameters {', '.join(own)} move as one block but the partition divides them; match all of "
                "them in one coalition."
            )
        groups[takers[0]].append(block)
    return [group for group in [*groups, *alone] if group]
