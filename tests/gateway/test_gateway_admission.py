"""The bounded queue as a value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.errors import QueueFull
from deployments.gateway.admission import Admission, retry_after_s
from deployments.gateway.engines import Progress


def test_the_queue_is_bounded_at_the_door() -> None:
    """One request more than `max_queued` is turned away, with a time to come back."""
    full = Admission(2).arrive("m", None).arrive("m", None)
    with pytest.raises(QueueFull) as caught:
        full.arrive("m", Progress("weights", 2.0, 9.5))
    assert caught.value.retry_after_s == 8


def test_requests_in_flight_take_no_place_in_the_queue() -> None:
    """A lease frees the place of the request that got it."""
    busy = Admission(1).arrive("m", None).lease()
    assert busy.arrive("m", None) == Admission(1, queued=1, in_flight=1)


def test_a_request_that_was_let_in_is_never_turned_away() -> None:
    """Going back to a full queue after an engine's death is allowed."""
    full = Admission(1).arrive("m", None).lease().arrive("m", None)
    assert full.requeue() == Admission(1, queued=2, in_flight=0)


@given(st.lists(st.sampled_from(["arrive", "lease", "requeue", "give_up", "finish"]), max_size=60))
def test_counts_never_go_below_zero(steps: list[str]) -> None:
    """Whatever requests do in the order that their lives allow, both counts stay at zero or above."""
    state = Admission(3)
    for step in steps:
        if step == "arrive":
            state = state.arrive("m", None) if state.queued < 3 else state
        elif step in ("lease", "give_up"):
            state = getattr(state, step)() if state.queued else state
        else:
            state = getattr(state, step)() if state.in_flight else state
        assert state.queued >= 0
        assert state.in_flight >= 0


@pytest.mark.parametrize(
    ("progress", "seconds"),
    [
        (None, 1),
        (Progress("weights", 1.0, 4.2), 4),
        (Progress("weights", 9.0, 4.0), 1),
        (Progress("weights", 1.0, None), 5),
    ],
)
def test_retry_after_is_what_remains_of_the_wake(progress: Progress | None, seconds: int) -> None:
    """The estimate less the time so far, in whole seconds, and never below one."""
    assert retry_after_s(progress) == seconds
