"""Server-sent events: comments while an engine is lit, errors in each API's own style."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

from deployments.gateway.engines import Progress

CONTENT_TYPE = b"text/event-stream"

_EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")

# An event larger than this is passed on in pieces, so that a body without event ends can't fill the memory.
_MAX_HELD_BYTES = 1 << 20


class Style(Enum):
    """How a route's own clients expect an error inside a stream."""

    CHAT = "chat"  # OpenAI's chat and completions: data lines, then [DONE]
    RESPONSES = "responses"  # OpenAI's Responses: named events
    MESSAGES = "messages"  # Anthropic's Messages: named events


def is_event_stream(content_type: bytes) -> bool:
    """Whether a content type, with or without parameters, is that of server-sent events."""
    return content_type.split(b";", 1)[0].strip().lower() == CONTENT_TYPE


def comment(progress: Progress | None, waited_s: float) -> bytes:
    """One comment, which clients of server-sent events ignore: how far the wake of the model has come."""
    if progress is None:
        return f": relight waiting elapsed={waited_s:.1f}s\n\n".encode()
    phase = "".join(c for c in progress.phase if c.isprintable()) or "unknown"
    estimate = "unknown" if progress.estimate_s is None else f"{progress.estimate_s:.1f}s"
    detail = "".join(c for c in progress.detail or "" if c.isprintable())
    line = f": relight lighting phase={phase} elapsed={progress.elapsed_s:.1f}s estimate={estimate}"
    return (f"{line} ({detail})" if detail else line).encode() + b"\n\n"


def data_event(document: Any) -> bytes:
    """One unnamed event that holds a JSON document, and the end that chat clients wait for."""
    return b"data: " + json.dumps(document).encode() + b"\n\ndata: [DONE]\n\n"


def error_event(style: Style, error: dict[str, Any]) -> bytes:
    """An error inside a stream, and the stream's end, as the route's own clients read them.

    `error` has OpenAI's fields: message, type, param, code.
    """
    match style:
        case Style.CHAT:
            return data_event({"error": error})
        case Style.RESPONSES:
            # The fields on top are those of the API's own error event; `error` is what OpenAI's client
            # raises on.
            document = {
                "type": "error",
                "code": error.get("code"),
                "message": error.get("message"),
                "param": error.get("param"),
                "sequence_number": 0,
                "error": error,
            }
        case Style.MESSAGES:
            document = {"type": "error", "error": error}
    return b"event: error\ndata: " + json.dumps(document).encode() + b"\n\n"


def split_events(data: bytes) -> tuple[bytes, bytes]:
    """(whole events, the beginning of the next one). Either may be empty; together they are `data`.

    Only whole events are passed on, so that an error event after an engine's death is never glued to half an
    event.
    """
    end = max((at + len(mark) for mark in _EVENT_ENDS if (at := data.rfind(mark)) >= 0), default=0)
    if len(data) - end > _MAX_HELD_BYTES:
        return data, b""
    return data[:end], data[end:]
