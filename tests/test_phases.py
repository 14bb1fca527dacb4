"""How the time of a run is divided among its phases."""

from __future__ import annotations

import pytest
import torch

from gan import phases


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have gone by; a test moves it."""
    now = [100.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


def test_a_phase_inside_another_interrupts_it_and_what_is_in_none_is_not_counted(clock):
    timed = phases.Phases(torch.device("cpu"))
    clock(7)
    for _ in range(2):
        with timed("step"):
            clock(1)
            with timed("data"):
                clock(2)
            clock(4)
        clock(8)
    assert timed.taken() == {"step": 10.0, "data": 4.0}
    assert timed.taken() == {}


def test_a_phase_that_goes_on_while_times_are_taken_is_counted_in_both_halves(clock):
    timed = phases.Phases(torch.device("cpu"))
    with timed("step"):
        clock(1)
        with timed("log"):
            clock(2)
            assert timed.taken() == {"step": 1.0}
            clock(4)
        clock(8)
    assert timed.taken() == {"log": 6.0, "step": 8.0}


def test_a_phase_that_fails_is_counted(clock):
    timed = phases.Phases(torch.device("cpu"))
    with pytest.raises(TypeError), timed("checkpoint"):
        clock("three")
    clock(5)
    with timed("step"):
        clock(2)
    assert timed.taken() == {"checkpoint": 0.0, "step": 2.0}
