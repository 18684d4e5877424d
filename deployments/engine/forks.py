"""What forks engines: the host's end of a template process, the node's or a model's."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deployments.engine.protocol import receive_with_fds, send_with_fds

log = logging.getLogger("relight.host")


class StartFailed(Exception):
    """An engine can't start; the message is its own reason."""

    stands: bool = True
    """Whether who asks again at once would meet the same."""


class TemplateGone(StartFailed):
    """The template ended before it had forked: another may do it."""


class AskerGone(StartFailed):
    """Who asked is not there any more, and what Ray granted to it may be another's."""

    stands = False


class Template:
    """A template process, the node's or a model's: forks what it is asked to."""

    def __init__(self, channel: socket.socket, name: str, on_end: Callable[[], None], log: Path) -> None:
        self.name = name
        self.log = log
        self.ready: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.ready.add_done_callback(lambda f: f.cancelled() or f.exception())
        self.pid: int | None = None
        self.flat: str | None = None
        self.device: str | None = None  # the kind that its vLLM found, once it is ready
        self._channel = channel
        self._on_end = on_end
        self._forks: dict[str, asyncio.Future[int]] = {}
        channel.setblocking(False)
        asyncio.get_running_loop().add_reader(channel.fileno(), self._receive)

    def _receive(self) -> None:
        try:
            received = receive_with_fds(self._channel)
        except BlockingIOError:
            return
        except OSError:
            received = None
        if received is None:
            self.close(f"the {self.name} template ended; its log ends with: {_last_line(self.log)}")
            return
        message, _ = received
        match message["event"]:
            case "template_ready":
                if message["threads"] > 1:
                    log.warning("%s template has %d threads before its forks", self.name, message["threads"])
                self.flat, self.device = message.get("flat"), message.get("device")
                if not self.ready.done():
                    self.ready.set_result(message["seconds"])
            case "template_failed":
                if not self.ready.done():
                    self.ready.set_exception(StartFailed(message["reason"]))
            case "forked":
                if (future := self._forks.pop(message["engine_id"], None)) and not future.done():
                    future.set_result(message["pid"])
            case "fork_failed":
                if (future := self._forks.pop(message["engine_id"], None)) and not future.done():
                    future.set_exception(StartFailed(message["reason"]))

    def fork(self, message: Mapping[str, Any], fds: list[int]) -> asyncio.Future[int]:
        """Ask for a fork; the future is its pid. Raises TemplateGone, StartFailed if it doesn't read."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        try:
            send_with_fds(self._channel, message, fds)
        except BlockingIOError as error:
            raise StartFailed(f"the {self.name} template doesn't take its requests") from error
        except OSError as error:
            reason = f"the {self.name} template is gone: {error}"
            # Before its end is read from the channel, or every new attempt would meet the same broken one.
            self.close(reason)
            raise TemplateGone(reason) from error
        self._forks[message["engine_id"]] = future
        return future

    def close(self, reason: str) -> None:
        """Forget the process; it ends when its channel closes. Idempotent."""
        if self._channel.fileno() < 0:
            return
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        self._channel.close()
        if not self.ready.done():
            self.ready.set_exception(TemplateGone(reason))
        for future in self._forks.values():
            if not future.done():
                future.set_exception(TemplateGone(reason))
        self._forks.clear()
        self._on_end()


def _last_line(log_file: Path) -> str:
    try:
        lines = log_file.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "nothing"


__all__ = ["AskerGone", "StartFailed", "Template", "TemplateGone"]
