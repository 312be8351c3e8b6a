"""Who reacts to whom: open loop, where all solve at once, and feedback, where each answers to what was done."""

from pullback.control.bandit import ArmReport, Bandit, structures
from pullback.control.bellman import BellmanStage, bellman
from pullback.control.feedback import Loop, Packed, Sweep
from pullback.control.games import Game, GameReport, Play, StageReport
from pullback.control.host import Host, TorchHost, host_of
from pullback.control.open_loop import Direction, mix, solve
from pullback.control.realised import Course
from pullback.control.route import Route, key_of
from pullback.control.samplewise import Policy, recursion
from pullback.control.stages import named_stages, observed_stages, stages_of

__all__ = [
    "ArmReport",
    "Bandit",
    "BellmanStage",
    "Course",
    "Direction",
    "Game",
    "GameReport",
    "Host",
    "Loop",
    "Packed",
    "Play",
    "Policy",
    "Route",
    "StageReport",
    "Sweep",
    "TorchHost",
    "bellman",
    "host_of",
    "key_of",
    "mix",
    "named_stages",
    "observed_stages",
    "recursion",
    "solve",
    "stages_of",
    "structures",
]
