"""What must hold of every forecast, whatever the traffic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_traffic import DAY_S, START_S, poisson, traffic

from autoscaling.core.types import Forecast
from autoscaling.forecast.arrivals import FittedRenewal
from autoscaling.forecast.calibration import SHAPES, Calibrated, corrected
from autoscaling.forecast.fit import FittedModel, Job, fit_standard
from autoscaling.forecast.gaps import BINS, EDGES_S, GapSample, default_prior, gap_mass, log_survival
from autoscaling.forecast.history import THETAS_S, Recent, arrived, history_of, recent_of
from autoscaling.forecast.prior import NO_FLEET
from autoscaling.forecast.season import FLAT, Season
from autoscaling.traffic import Buckets, Traffic

MAX_S = 3 * DAY_S


def check(shown: Forecast) -> None:
    assert shown.next_arrival is not None
    times, survival = np.asarray(shown.next_arrival.times_s), np.asarray(shown.next_arrival.survival)
    assert times[0] == 0 and survival[0] == 1
    assert (np.diff(times) > 0).all()
    assert (np.diff(survival) <= 0).all()
    assert np.isfinite(survival).all() and (survival >= 0).all()
    assert shown.batch_size >= 1
    if shown.demand is not None:
        for table in (shown.demand.rate_per_s, shown.demand.concurrency):
            values = np.asarray(table)
            assert values.shape[1] == len(shown.demand.quantiles)
            assert np.isfinite(values).all() and (values >= 0).all()
            assert (np.diff(values, axis=1) >= 0).all()


@st.composite
def histories(draw: st.DrawFn) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Of any mixture of bursts, beats and silences."""
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    parts = [START_S + random.uniform(0, MAX_S, draw(st.integers(1, 50)))]
    for _ in range(draw(st.integers(0, 3))):
        begin, period = random.uniform(0, MAX_S), 10 ** random.uniform(0, 5)
        beats = START_S + begin + period * np.arange(draw(st.integers(1, 300)))
        parts.append(np.repeat(beats, draw(st.integers(1, 20))) + random.normal(0, period / 50))
    times = np.sort(np.concatenate(parts))
    return times[(times >= START_S) & (times < START_S + MAX_S)]


@settings(max_examples=40)
@given(histories(), st.floats(0, 10 * DAY_S))
def test_forecasts_are_distributions(
    times: np.ndarray[tuple[int], np.dtype[np.float64]], after_s: float
) -> None:
    now_s = START_S + MAX_S
    found = fit_standard(Job(traffic(times, now_s), now_s, 30.0, NO_FLEET))
    assert found is not None
    check(found.forecast(now_s))
    check(found.forecast(now_s + after_s))
    check(found.forecast(now_s + after_s, arrived(found.recent, now_s + after_s, 5)))
    check(found.forecast(START_S))  # a clock that jumped back


@settings(max_examples=30)
@given(histories(), st.floats(1.0, 3600.0))
def test_waiting_is_conditioning(times: np.ndarray[tuple[int], np.dtype[np.float64]], wait_s: float) -> None:
    """P(nothing until t | nothing until s) from the forecast at s is what the forecast before said."""
    now_s = START_S + MAX_S
    found = fit_standard(Job(traffic(times, now_s), now_s, 30.0, NO_FLEET))
    assert found is not None
    recent = found.recent
    before = found.arrivals.log_survival(now_s, recent, np.asarray([wait_s, wait_s + 600.0]))
    after = found.arrivals.log_survival(now_s + wait_s, recent, np.asarray([600.0]))
    if before[1] > -15:
        assert after[0] == pytest.approx(before[1] - before[0], abs=1e-3)


@given(
    st.floats(0.0, 30.0),
    st.floats(0.0, 60.0),
    st.floats(1.0, 3600.0),
    *[st.sampled_from(SHAPES.tolist())] * 2,
)
def test_so_where_it_is_corrected(age_s: float, wait_s: float, then_s: float, a: float, b: float) -> None:
    """Also while a silence can't be told yet from a burst that goes on, and across that moment."""
    fitted = Calibrated(FittedRenewal("renewal", log_survival(default_prior()), FLAT), a, b)
    recent = arrived(None, START_S, 1.0)
    assert recent is not None
    now_s = START_S + age_s
    before = fitted.log_survival(now_s, recent, np.asarray([0.0, wait_s, wait_s + then_s]))
    after = fitted.log_survival(now_s + wait_s, recent, np.asarray([then_s]))
    assert before[0] == pytest.approx(0.0, abs=1e-9)
    assert after[0] == pytest.approx(before[2] - before[1], abs=1e-6)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(0.5, 1e5), st.floats(0, 10)), max_size=60),
    st.one_of(st.none(), st.floats(0, 1e8)),
)
def test_gap_masses_are_probabilities(gaps: list[tuple[float, float, float]], open_s: float | None) -> None:
    table = np.asarray(gaps).reshape(-1, 3)
    sample = GapSample(table[:, 0], table[:, 0] + table[:, 1], table[:, 2])
    mass = gap_mass(sample, default_prior(), 2.0, open_s)
    assert mass.shape == (BINS + 1,) and len(EDGES_S) == BINS + 1
    assert (mass >= 0).all()
    assert mass.sum() == pytest.approx(1.0)
    assert (np.diff(log_survival(mass)) <= 1e-12).all()


def test_censored_gaps_follow_what_the_exact_ones_say() -> None:
    """Gaps that are known to a minute only go to where those known to a second are (Turnbull's self-consistency)."""
    exact = np.full(20, 170.0)
    blurred = np.full(500, 120.0)
    sample = GapSample(
        np.concatenate([exact, blurred]),
        np.concatenate([exact + 1, blurred + 120]),
        np.ones(520),
    )
    mass = gap_mass(sample, default_prior(), 2.0, None)
    near = (EDGES_S > 150) & (EDGES_S < 195)
    assert mass[near].sum() > 0.75


@given(st.lists(st.floats(-700, 0), min_size=2, max_size=50), st.floats(0.3, 3), st.floats(0.3, 3))
def test_a_correction_keeps_a_survival_a_survival(values: list[float], a: float, b: float) -> None:
    ordered = np.sort(np.asarray([0.0, *values]))[::-1]
    result = corrected(ordered, a, b)
    assert result[0] == pytest.approx(0.0, abs=1e-9)
    assert np.isfinite(result).all()
    assert (np.diff(result) <= 1e-6).all()


@given(st.lists(st.floats(0, 100), min_size=168, max_size=168), st.floats(0, 4e9), st.floats(0, 1e6))
def test_the_seasons_clock_never_goes_back(weights: list[float], begin: float, more: float) -> None:
    season = Season.of(np.asarray(weights) + 1e-6)
    times = season.elapsed(np.asarray([begin, begin + more]))
    assert times[1] >= times[0] - 1e-3
    week = season.elapsed(np.asarray([begin, begin + 7 * DAY_S]))
    assert week[1] - week[0] == pytest.approx(7 * DAY_S, rel=1e-6)
    assert FLAT.elapsed(np.asarray([begin + more]))[0] == pytest.approx(begin + more, abs=1e-3)


@given(st.lists(st.tuples(st.floats(0, 4000), st.integers(1, 5)), min_size=1, max_size=60))
def test_recent_arrivals_are_what_the_history_would_tell(gaps: list[tuple[float, int]]) -> None:
    times = START_S + np.floor(np.cumsum([gap for gap, _ in gaps])) + 0.5
    told: Recent | None = None
    for time_s, (_, count) in zip(times, gaps, strict=True):
        told = arrived(told, float(time_s), count)
    assert told is not None
    counts = [count for _, count in gaps]
    now_s = float(times[-1])
    level = traffic(np.repeat(times, counts), now_s + 1, since_s=START_S - 10).levels[0]
    whole = Traffic("m", now_s + 1, (replace(level, start_s=START_S - 10),))
    if now_s - times[0] > 3590:
        return  # the finest level would not know it all
    known = recent_of(history_of(whole, now_s + 0.5).events, now_s + 0.5)
    assert known is not None
    assert known.last_s == pytest.approx(told.last_s)
    assert np.allclose(known.onsets_s, told.onsets_s)
    assert np.allclose(known.rates, told.rates_at(now_s + 0.5), rtol=1e-6)
    assert len(told.onsets_s) == len(THETAS_S)


def _damaged(column: str, values: list[float], now_s: float) -> FittedModel | None:
    clean = traffic(poisson(0.01, 1), now_s)
    level = clean.levels[1]
    damage = np.asarray(getattr(level, column)).copy()
    damage[: len(values)] = values
    levels = (clean.levels[0], replace(level, **{column: damage}), *clean.levels[2:])
    return fit_standard(Job(replace(clean, levels=levels), now_s, 10.0, NO_FLEET))


@pytest.mark.parametrize("column", ["arrivals", "busy_s"])
def test_rows_that_cannot_be_are_left_out_and_counted(column: str) -> None:
    now_s = START_S + DAY_S
    found = _damaged(column, [np.nan, -5.0, np.inf], now_s)
    assert found is not None
    check(found.forecast(now_s))
    assert found.details.get("ignored_rows", 0) == (3 if column == "arrivals" else 0)


def test_rows_from_the_future_are_left_out() -> None:
    """The clock jumped back after they were written."""
    now_s = START_S + DAY_S
    ahead = traffic(poisson(0.01, 2), START_S + 2 * DAY_S)
    found = fit_standard(Job(ahead, now_s, 10.0, NO_FLEET))
    assert found is not None
    assert found.recent.last_s <= now_s
    assert found.details["ignored_rows"] > 0
    check(found.forecast(now_s))


def test_unsorted_and_repeated_buckets_are_put_in_order() -> None:
    level = Buckets(
        60.0,
        START_S,
        START_S + 3600,
        np.asarray([START_S // 60 + 9, START_S // 60 + 1, START_S // 60 + 9], np.int64),
        *(np.asarray([1, 2, 3], np.float32) for _ in range(4)),
    )
    history = history_of(Traffic("m", START_S + 3600, (level,)), START_S + 3600)
    assert history.events.count.tolist() == [2, 4]
    assert (np.diff(history.events.lo_s) > 0).all()


def test_no_arrival_counts_twice_where_levels_overlap() -> None:
    times = poisson(0.02, 40)
    now_s = START_S + 40 * DAY_S
    history = history_of(traffic(times, now_s), now_s)
    assert history.events.count.sum() == len(times)
    assert (history.events.lo_s[1:] >= history.events.hi_s[:-1]).all()


def test_old_events_begin_and_end_in_the_seconds_of_their_requests() -> None:
    """However long their buckets have become; and no request came from there until the bucket ended."""
    times = np.floor(poisson(0.002, 40))
    now_s = START_S + 40 * DAY_S
    events = history_of(traffic(times, now_s), now_s).events
    assert (np.isin(events.lo_s, times) & np.isin(events.hi_s - 1, times)).all()
    within = [
        ((times >= lo) & (times < end)).sum() for lo, end in zip(events.lo_s, events.end_s, strict=True)
    ]
    assert within == events.count.tolist()
    assert [
        ((times >= hi) & (times < end)).sum() for hi, end in zip(events.hi_s, events.end_s, strict=True)
    ] == [0] * len(events)
    assert (events.blur_s <= 1).mean() > 0.95


def test_a_bucket_that_comes_twice_is_as_long_as_both_and_what_cannot_be_says_nothing() -> None:
    at = START_S // 300
    level = Buckets(
        300.0,
        START_S,
        START_S + 3600,
        np.asarray([at, at, at + 1, at + 2], np.int64),
        *(np.ones(4, np.float32) for _ in range(4)),
        lead_s=np.asarray([100, 40, 200, 7], np.uint16),
        trail_s=np.asarray([60, 200, 100, 292], np.uint16),
    )
    events = history_of(Traffic("m", START_S + 3600, (level,)), START_S + 3600).events
    spans = list(zip((events.lo_s - START_S).tolist(), (events.hi_s - START_S).tolist(), strict=True))
    assert spans == [(40, 240), (300, 600), (607, 608)]
    assert events.blur_s.tolist() == [1, 300, 1]
    assert (events.end_s - START_S).tolist() == [300, 600, 900]


def test_a_time_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="now_s is nan"):
        history_of(traffic([START_S], START_S + 1), float("nan"))
