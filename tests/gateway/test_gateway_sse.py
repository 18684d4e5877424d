"""Server-sent events."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.gateway import sse
from deployments.gateway.engines import Progress

ERROR = {"message": "a\nb\r\n\nc ü", "type": "server_error", "param": None, "code": "engine_interrupted"}


def test_a_comment_tells_phase_time_and_estimate() -> None:
    """The comment has the documented form."""
    text = sse.comment(Progress("weights", 2.1, 4.0), 3.0)
    assert text == b": relight lighting phase=weights elapsed=2.1s estimate=4.0s\n\n"
    text = sse.comment(Progress("node", 2.1, None, "waits for a node (L4)\n"), 3.0)
    assert text.endswith(b"estimate=unknown (waits for a node (L4))\n\n")
    assert b"estimate=unknown" in sse.comment(Progress("weights", 2.1, None), 3.0)


def test_a_comment_cannot_break_out_of_its_line() -> None:
    """Line ends in a phase's name would begin an event of their own."""
    assert sse.comment(Progress("a\ndata: x\r\r", 1, None), 1).count(b"\n") == 2


@pytest.mark.parametrize("style", list(sse.Style))
def test_an_error_event_is_one_line_of_json(style: sse.Style) -> None:
    """Each style carries message and code in one data line, whatever the message holds."""
    text = sse.error_event(style, ERROR).decode()
    line = next(line for line in text.split("\n") if line.startswith("data: "))
    document = json.loads(line.removeprefix("data: "))
    assert document["error"] == ERROR
    assert ("[DONE]" in text) == (style is sse.Style.CHAT)
    assert text.startswith("event: error\n") == (style is not sse.Style.CHAT)
    assert text.endswith("\n\n")


@given(st.lists(st.sampled_from([b"data: x", b"\n\n", b"\n", b"\r\n\r\n", b"\r", b"y"]), max_size=30))
def test_splitting_keeps_every_byte_in_order(pieces: list[bytes]) -> None:
    """However a stream is cut, the whole events and the tail together are the stream."""
    passed, tail = b"", b""
    for piece in pieces:
        whole, tail = sse.split_events(tail + piece)
        assert not whole or whole.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))
        passed += whole
    assert passed + tail == b"".join(pieces)


def test_a_body_without_event_ends_is_not_held_for_ever() -> None:
    """More than a megabyte without an end passes in pieces."""
    data = b"x" * ((1 << 20) + 1)
    assert sse.split_events(data) == (data, b"")


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        (b"text/event-stream", True),
        (b"Text/Event-Stream; charset=utf-8", True),
        (b"text/plain", False),
        (b"", False),
    ],
)
def test_event_streams_are_told_by_their_content_type(content_type: bytes, expected: bool) -> None:
    """Parameters and case don't matter."""
    assert sse.is_event_stream(content_type) is expected
