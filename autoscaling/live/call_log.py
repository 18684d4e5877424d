"""Serve's log of each call of a replica."""

from __future__ import annotations

import logging

SERVE = logging.getLogger("ray.serve")


def log_no_calls() -> None:
    """Leave it out. Changes the process; may be called again.

    Serve writes a line to each of two files for every call, and here a call is a lease, so a request of a client, or a
    report, of which each gateway makes one a second: a busy model would write gigabytes a day. By a filter and not by
    Serve's settings for the deployment, which would put aside the `logging_config` that whoever deploys gives to the
    application.
    """
    if _is_no_call not in SERVE.filters:
        SERVE.addFilter(_is_no_call)


def _is_no_call(record: logging.LogRecord) -> bool:
    return not getattr(record, "serve_access_log", False)


__all__ = ["log_no_calls"]
