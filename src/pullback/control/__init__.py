"""Who reacts to whom: open loop here; feedback and games build on the same groups."""

from pullback.control.open_loop import Direction, mix, solve

__all__ = ["Direction", "mix", "solve"]
