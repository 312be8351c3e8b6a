"""Who reacts to whom: open loop, where all solve at once, and feedback, where each answers to what was done."""

from pullback.control.bellman import BellmanStage, bellman
from pullback.control.feedback import Loop, Packed, Sweep
from pullback.control.open_loop import Direction, mix, solve
from pullback.control.realised import Course
from pullback.control.route import Route, key_of

__all__ = [
    "BellmanStage",
    "Course",
    "Direction",
    "Loop",
    "Packed",
    "Route",
    "Sweep",
    "bellman",
    "key_of",
    "mix",
    "solve",
]
