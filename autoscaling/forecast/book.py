"""Each model between its fits: its latest arrivals, and a forecast that is worked out only when it has moved."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autoscaling.core.types import Forecast
from autoscaling.forecast.arrivals import MIN_SILENCE_S
from autoscaling.forecast.fit import FittedModel, Seen
from autoscaling.forecast.gap_record import MOST, Silence, silence_from
from autoscaling.forecast.history import THETAS_S, Recent, arrived, by_now

STALE_SHARE = 0.1
"""A forecast is worked out anew when the silence has become longer by this share."""
STALE_S = 1.0
MAX_STALE_S = 30.0
DEMAND_STALE_S = 10.0
"""A forecast of how much comes holds for so long, whatever has come: it is made from rates of a minute and more, and
what is in progress is weighed against it each time."""
LOG_S = 3600
SILENCE = next(i for i, theta in enumerate(THETAS_S) if theta >= 10.0)


@dataclass(slots=True)
class Page:
    """One model."""

    fitted: FittedModel | None = None
    recent: Recent | None = None
    log: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=LOG_S))
    """Arrivals before the first fit, to be added to what that fit knows."""
    shown: Forecast | None = None
    shown_for: Recent | None = None
    arrivals: float = 0.0
    """Since the last fit began."""
    silences: int = 0
    """That ended since the last fit began."""
    ended: deque[Silence] = field(default_factory=lambda: deque(maxlen=MOST))
    """Those silences, to the second."""
    given: tuple[Silence, ...] = ()
    """Earlier ones, which no fit that was installed has learned from: one that failed had them, or one has them now."""
    given_arrivals: float = 0.0
    """Requests, in the same way."""
    error: str = ""


class Book:
    """Thread-safe. Holds some twenty kilobytes a model."""

    def __init__(self, *, later: bool = False) -> None:
        """`later`: forecasts are worked out as far as they are looked at (see `FittedModel.forecast`)."""
        self._later = later
        self._pages: dict[str, Page] = {}
        self._lock = threading.Lock()

    def arrived(self, model: str, time_s: float, count: float) -> None:
        """Tell of arrivals. What is no number, or not positive, changes nothing."""
        with self._lock:
            page = self._pages.get(model)
            if page is None:
                page = self._pages[model] = Page()
            before = page.recent
            page.recent = arrived(before, time_s, count)
            if page.recent is before:
                return
            if page.fitted is None:
                page.log.append((time_s, count))
            page.arrivals += count
            if before is not None and page.recent is not None:
                page.silences += page.recent.onsets_s[SILENCE] != before.onsets_s[SILENCE]
                if time_s - before.last_s >= MIN_SILENCE_S:
                    page.ended.append(silence_from(before, time_s))

    def install(self, model: str, fitted: FittedModel) -> None:
        """Forecast with this from now on."""
        with self._lock:
            page = self._pages.setdefault(model, Page())
            if page.fitted is None:
                recent: Recent | None = fitted.recent
                for time_s, count in page.log:
                    if time_s > fitted.recent.last_s + 0.5:
                        recent = arrived(recent, time_s, count)
                page.recent = recent
                page.log.clear()
            page.fitted, page.shown, page.error = fitted, None, ""
            page.given, page.given_arrivals = (), 0.0

    def begin_fit(self, model: str) -> Seen:
        """Count what comes from here on as not yet learned from.

        What is handed out is handed out again until a fit is installed: one that fails has learned nothing.
        """
        with self._lock:
            page = self._pages.setdefault(model, Page())
            page.given = (*page.given, *page.ended)[-MOST:]
            page.given_arrivals += page.arrivals
            seen = Seen(page.fitted, page.given, page.recent, page.given_arrivals)
            page.arrivals, page.silences = 0.0, 0
            page.ended.clear()
            return seen

    def choose_again(self) -> None:
        """Have each model's next fit choose its forecaster anew, though little has come: what they go by is another."""
        with self._lock:
            for page in self._pages.values():
                if page.fitted is not None:
                    page.fitted = replace(page.fitted, chosen_at=0)

    def forecast(self, model: str, now_s: float) -> Forecast | None:
        """None where nothing was learned. May be up to MAX_STALE_S old; its `made_s` says so."""
        with self._lock:
            page = self._pages.get(model)
            if page is None or page.fitted is None or page.recent is None:
                return None
            # For good, or each request would seem to have just come for as long as the clock was set back.
            page.recent = by_now(page.recent, now_s)
            shown, recent = page.shown, page.recent
            if shown is not None and page.shown_for is recent:
                aged_s = now_s - shown.made_s
                silence_s = shown.made_s - recent.last_s
                if 0 <= aged_s < min(max(STALE_S, STALE_SHARE * silence_s), MAX_STALE_S):
                    return shown
            fitted = page.fitted
            said = None if shown is None else shown.demand
            demand = said if said is not None and 0 <= now_s - said.made_s < DEMAND_STALE_S else None
        try:
            made = fitted.forecast(now_s, recent, later=self._later, demand=demand)
        except Exception as error:  # noqa: BLE001 - a tick must not fail for one model; it is told and fitted anew
            self.forget(model, f"{fitted.name} raised {type(error).__name__}: {error}")
            return None
        with self._lock:
            page.shown, page.shown_for = made, recent
        return made

    def forget(self, model: str, error: str) -> None:
        """Drop what was learned of it."""
        with self._lock:
            page = self._pages.setdefault(model, Page())
            page.fitted, page.shown, page.error = None, None, error

    def keep_only(self, models: set[str]) -> None:
        """Drop the others altogether."""
        with self._lock:
            for model in self._pages.keys() - models:
                del self._pages[model]

    def page(self, model: str) -> Page:
        """A copy of what is known; empty for a model that is unknown."""
        with self._lock:
            return replace(self._pages.get(model) or Page())

    def since_fit(self, model: str) -> tuple[FittedModel | None, int, float]:
        """(the fit, silences that ended and requests that came since it began)."""
        with self._lock:
            page = self._pages.get(model)
            return (None, 0, 0.0) if page is None else (page.fitted, page.silences, page.arrivals)

    def fits(self) -> Mapping[str, FittedModel]:
        with self._lock:
            return {model: page.fitted for model, page in self._pages.items() if page.fitted is not None}

    def scores(self, model: str) -> Mapping[str, Any]:
        """What the rolling backtest said of each forecaster: {"next_arrival": {name: score}, "demand": {…}}."""
        fitted = self.page(model).fitted
        return {} if fitted is None else fitted.scores
