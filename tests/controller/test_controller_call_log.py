"""What of Serve's log is left out."""

from __future__ import annotations

import logging

from ray.serve._private.constants import SERVE_LOGGER_NAME
from ray.serve._private.logging_utils import log_access_log_filter

from autoscaling.live.call_log import log_no_calls


def test_serves_line_for_each_call_is_left_out_and_no_other() -> None:
    """By the mark that Serve itself puts on it."""
    serve = logging.getLogger(SERVE_LOGGER_NAME)
    mark = {"serve_access_log": True}
    assert not log_access_log_filter(logging.makeLogRecord(mark))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before = [*serve.filters]
    serve.addHandler(handler)
    try:
        log_no_calls()
        log_no_calls()
        assert len(serve.filters) == len(before) + 1
        serve.warning("CALL lease OK", extra=mark)
        serve.warning("Finished initializing replica.")
    finally:
        serve.filters = before
        serve.removeHandler(handler)
    assert said == ["Finished initializing replica."]
