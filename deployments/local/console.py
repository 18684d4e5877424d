"""Progress of long steps in plain lines: a terminal sees the seconds run, a log gets a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

_HEARTBEAT_S = 15.0


class Step:
    """`with Step("Starting Ray"):` prints the step, its seconds while it runs, and how it ended."""

    def __init__(self, title: str, *, live: bool | None = None) -> None:
        self._title = title
        # False where the step itself writes to the terminal, so that two writers do not share a line.
        self._live = sys.stdout.isatty() if live is None else live
        self._detail = ""
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._began = 0.0

    def __enter__(self) -> Step:
        self._began = time.monotonic()
        if not self._live:
            print(f"{self._title} ...", flush=True)
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._ticker.join()
        end = "done" if kind is None else "FAILED"
        self._line(f"{self._title}: {end} ({self._elapsed()})", last=True)

    def note(self, detail: str) -> None:
        """What the step waits for just now."""
        self._detail = detail

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._began:.1f} s"

    def _tick(self) -> None:
        while not self._over.wait(0.5 if self._live else _HEARTBEAT_S):
            detail = f" - {self._detail}" if self._detail else ""
            self._line(f"{self._title} ... {self._elapsed()}{detail}", last=False)

    def _line(self, text: str, *, last: bool) -> None:
        if self._live:
            sys.stdout.write(f"\r\033[2K{text}" + ("\n" if last else ""))
            sys.stdout.flush()
        else:
            print(text, flush=True)
