"""Certificates of a training: what is proved of it, what was only measured, and what is not claimed.

>>> from pullback.certification import Settings, certify
>>> from pullback.problems import load_problem
>>> found = certify(load_problem("wine:width=2"), Settings(steps=4, pairs=1, points=2, sizes=(20,)))
>>> found.ended, found.reports[0].held
('whole', True)
"""

from pullback.certification.certify import certify
from pullback.certification.record import Certificate
from pullback.certification.settings import DescentSpec, Settings
from pullback.certification.statements import Statement

__all__ = ["Certificate", "DescentSpec", "Settings", "Statement", "certify"]
