"""Drawn faults: every faulty step is correct or refused with one clear error, and nothing is left behind."""

from __future__ import annotations

import pytest
from draw import KNOWN, draw
from injuries import FAULTS
from play import play

CHUNK = 30


@pytest.mark.parametrize("chunk", range(10))
def test_a_fault_ends_in_a_correct_step_or_in_one_clear_error(chunk):
    wrong = []
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        if seed in KNOWN:
            continue
        case = draw(seed)
        try:
            outcomes = play(case)
        except Exception as error:
            wrong.append(f"seed {seed}: {type(error).__name__}: {error}\n    {case.describe()}")
        else:
            assert len(outcomes) >= 2
    assert not wrong, "\n".join(wrong)


def test_every_fault_is_drawn():
    assert {draw(seed).fault for seed in range(10 * CHUNK)} == set(FAULTS)
