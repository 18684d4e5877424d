"""`hybrid-histogram`: each model's own idle times, as a histogram by the minute."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autoscaling.core.policies.base import Context, Param, Proposal, carried, rest
from autoscaling.core.policies.following import TARGET, per_replica
from autoscaling.core.series import alike, need_of, peak, peak_until_s, push_peak
from autoscaling.core.survival import curve_of
from autoscaling.core.types import Observation, Reason, Spec

BIN_S = 60.0
BINS = 240
"""Four hours by the minute. One more cell counts the idle times that were longer."""

HEAD = Param("head_percentile", 5, 0, 50, "%", "Idle times are rarely shorter: until then it may be dark.")
TAIL = Param("tail_percentile", 99, 50, 100, "%", "Idle times are rarely longer: until then it is kept.")
MARGIN = Param("margin", 0.1, 0, 1, "share", "By how much both windows are widened.")
CV = Param("cv_threshold", 2, 0, 100, "ratio", "The histogram counts if its cells vary at least by so much.")
OUTSIDE = Param(
    "outside_share", 0.5, 0, 1, "share", "With more idle times beyond four hours, the forecast decides."
)
SAMPLES = Param("least_samples", 5, 1, 1e6, "idle times", "With fewer the histogram does not count.")
FORECAST_MARGIN = Param("forecast_margin", 0.15, 0, 1, "share", "The window around the forecast's idle time.")


class HybridHistogram:
    """Prewarm window and keep-alive window after each last request.

    The paper forecasts with ARIMA what is out of the histogram's bounds; here it is the median of the forecast's next
    arrival. Without either: kept for the histogram's whole range, as in the paper. The start begins its own measured
    time before the prewarm window ends, which the paper leaves out. Nor has it several replicas: of those one goes
    when fewer have sufficed for a minute.
    """

    name = "hybrid-histogram"
    source = "Shahrad et al., Serverless in the Wild, USENIX ATC 2020, section 4.2"
    params = (TARGET, HEAD, TAIL, MARGIN, CV, OUTSIDE, SAMPLES, FORECAST_MARGIN)

    def at_once(self, spec: Spec, observation: Observation) -> float:
        return per_replica(spec)

    def propose(self, context: Context) -> Proposal:
        seen, state = context.seen, context.state
        now_s = seen.now_s
        histogram = state.histogram if len(state.histogram) == BINS + 1 else (0.0,) * (BINS + 1)
        values: dict[str, float] = {}
        idle_from_s = state.values.get("idle_from_s")
        came_s = seen.last_arrival_s if seen.last_arrival_s is not None else (now_s if seen.load else None)
        if (
            idle_from_s is not None
            and came_s is not None
            and came_s > idle_from_s
            and (seen.load > 0 or seen.idle_since_s != idle_from_s)
        ):
            cell = min(BINS, int((came_s - idle_from_s) / BIN_S))
            histogram = (*histogram[:cell], histogram[cell] + 1, *histogram[cell + 1 :])
        unit = per_replica(context.spec)
        need = need_of(seen.load, unit)
        held = state.series or ((now_s, float(context.before)),)
        series = push_peak(held, now_s, max(1, need), BIN_S)
        replicas, falls_s = int(peak(series)), peak_until_s(series, BIN_S)
        if seen.idle_since_s is None:
            numbers = {"load": float(seen.load), "need_replicas": float(need)}
            return Proposal(
                replicas,
                seen.rung,
                carried(context, replicas, need),
                falls_s,
                numbers,
                values,
                series,
                histogram,
                loads=alike(seen.load, unit),
            )
        since_s = seen.idle_since_s
        values["idle_from_s"] = since_s
        from_s, to_s, kind = self._window(context, histogram, since_s)
        numbers = {
            "idle_s": seen.idle_s,
            "prewarm_window_s": from_s - since_s,
            "keep_alive_until_idle_s": to_s - since_s,
            "histogram_used": float(kind == "histogram"),
            "forecast_used": float(kind == "forecast"),
            "idle_times": sum(histogram),
        }
        kept = from_s <= since_s
        begin_s = since_s if kept else from_s - seen.lead_s
        begun = state.values.get("begun_for_s") == since_s
        if now_s < to_s and (now_s >= begin_s or begun):
            # A model that was never lit since its last request has nothing to keep.
            if not kept or context.before > 0 or seen.present > 0:
                if not kept:
                    values["begun_for_s"] = since_s
                reason = Reason.KEEP_ALIVE if kept or now_s >= from_s else Reason.PREWARM
                until_s = from_s if from_s > now_s else to_s
                if kept and replicas > 1:
                    reason, until_s = Reason.SCALE_DOWN_DELAY, min(until_s, falls_s)
                    return Proposal(replicas, seen.rung, reason, until_s, numbers, values, series, histogram)
                return Proposal(1, seen.rung, reason, until_s, numbers, values, (), histogram)
            begin_s = to_s
        rung, reason = rest(context)
        until_s = begin_s if now_s < begin_s < to_s else math.inf
        return Proposal(0, rung, reason, until_s, numbers, values, (), histogram)

    def _window(
        self, context: Context, histogram: Sequence[float], since_s: float
    ) -> tuple[float, float, str]:
        """[from, to) in which a replica is to be there, and what it was taken from."""
        inside = histogram[:BINS]
        count, outside = sum(inside), histogram[BINS]
        margin = context.param(MARGIN)
        if count + outside >= context.param(SAMPLES):
            if outside > context.param(OUTSIDE) * (count + outside):
                window = self._forecast_window(context, since_s)
                if window is not None:
                    return (*window, "forecast")
            elif _variation(inside) >= context.param(CV):
                head_s = _cell(inside, count * context.param(HEAD) / 100) * BIN_S
                tail_s = (_cell(inside, count * context.param(TAIL) / 100) + 1) * BIN_S
                return since_s + head_s * (1 - margin), since_s + tail_s * (1 + margin), "histogram"
        return since_s, since_s + BINS * BIN_S, "range"

    def _forecast_window(self, context: Context, since_s: float) -> tuple[float, float] | None:
        forecast = context.forecast
        if forecast is None or forecast.next_arrival is None:
            return None
        curve = curve_of(forecast, max(since_s, forecast.next_arrival.made_s))
        if curve is None:
            return None
        median_s = curve.quantile_s(0.5, max(since_s, forecast.next_arrival.made_s))
        if median_s is None:
            return None
        margin = context.param(FORECAST_MARGIN)
        idle_s = median_s - since_s
        return since_s + idle_s * (1 - margin), since_s + idle_s * (1 + margin)


def _variation(cells: Sequence[float]) -> float:
    """The coefficient of variation of the cells' counts; 0 of an empty histogram."""
    mean = sum(cells) / len(cells)
    if mean == 0:
        return 0.0
    return math.sqrt(sum((cell - mean) ** 2 for cell in cells) / len(cells)) / mean


def _cell(cells: Sequence[float], wanted: float) -> int:
    """The cell in which the running count reaches `wanted`."""
    total = 0.0
    for i, cell in enumerate(cells):
        total += cell
        if cell > 0 and total >= wanted:
            return i
    return len(cells) - 1


__all__ = ["BINS", "BIN_S", "HybridHistogram"]
