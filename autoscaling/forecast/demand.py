"""Which demand forecaster a model gets: a rolling backtest over seasonal profiles and weights of the recent rates."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from autoscaling.forecast import profile as profiles
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.conformal import QUANTILES, calibrate, interval_coverage, pinball
from autoscaling.forecast.demand_model import (
    AHEAD,
    STEP_S,
    TAUS,
    FittedDemand,
    Model,
    Smoothed,
    Swing,
    demand_of,
    factors,
    log_ratios,
    spread,
    steps_of,
)
from autoscaling.forecast.history import TAUS_S, Floats, History
from autoscaling.forecast.profile import Profile, decayed_sums

POWERS = (0.0, 0.5, 1.0)
MAX_STEPS = 2880
MIN_STEPS = 60
YOUNG_STEP_S = 10.0
FOLDS = 3
STRETCH = (0.9, 2.5)
WORTH = 5.0
"""Arrivals a step from which on it is worth learning a weight for each of the recent rates."""
NEWTON_STEPS = 3
RIDGE = 2.0

Kind = Callable[[History], Profile]
CHEAP: Mapping[str, Kind] = {
    "level": profiles.flat,
    "hourly": profiles.hourly,
    "daily": profiles.daily,
    "daily-hourly": profiles.daily_hourly,
    "weekly": profiles.weekly,
}
"""Seasonal parts that cost milliseconds."""
PAYS = 1.02
"""One that costs more must be better by this factor."""


@dataclass(frozen=True, slots=True)
class DemandScore:
    pinball: float
    """Mean loss over the quantiles and horizons, in arrivals a step; lower is better."""
    coverage: float
    """Share of the steps within the 5 % to 95 % band."""
    width: float
    """Median width of that band, in arrivals a step."""
    steps: int


@dataclass(frozen=True, slots=True)
class DemandChoice:
    fitted: FittedDemand
    scores: dict[str, DemandScore]
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Series:
    """Counts by step and what was known at the end of each: `rates` has shape (len(TAUS_S), n)."""

    step_s: float
    ends_s: Floats
    counts: Floats
    rates: Floats


def series_of(history: History) -> _Series:
    """In steps of STEP_S, or as short as those known are longer; of YOUNG_STEP_S while fewer than MIN_STEPS are known.

    Raises NotApplicable where fewer than MIN_STEPS steps are known even so.
    """
    level = history.level(STEP_S)
    if level is None:
        raise NotApplicable("nothing is known in steps of a minute or more")
    step_s = level.step_s
    if history.now_s - level.start_s < (MIN_STEPS + 2) * step_s and history.levels[0].step_s < YOUNG_STEP_S:
        level, step_s = history.levels[0], YOUNG_STEP_S
    last = int(history.now_s // step_s)
    first = max(int(np.ceil(level.start_s / step_s)), last - MAX_STEPS)
    if last - first < MIN_STEPS:
        raise NotApplicable(f"fewer than {MIN_STEPS} steps of {step_s:g} s are known")
    steps = (level.index * level.step_s // step_s).astype(np.int64)
    keep = (steps >= first) & (steps < last)
    counts = np.bincount(steps[keep] - first, level.arrivals[keep], last - first)
    age = np.arange(1, len(counts) + 1) * step_s
    rates = recent_rates(counts, step_s) / np.stack([-np.expm1(-age / tau) for tau in TAUS_S])
    return _Series(step_s, (np.arange(first, last) + 1) * step_s, counts, rates)


def recent_rates(counts: Floats, step_s: float) -> Floats:
    """Arrivals a second at each step's end, weighted with each of TAUS_S, those of a step spread over it evenly."""
    return np.stack(
        [
            decayed_sums(counts, float(np.exp(-step_s / tau))) * -np.expm1(-step_s / tau) / step_s
            for tau in TAUS_S
        ]
    )


@dataclass(frozen=True, slots=True)
class _Target:
    """What a backtest forecasts."""

    actual: Floats
    """actual[t, h]: what came in the step `ahead[h]` after step t, blurred by a uniform ±1/2; NaN if not known yet."""
    ahead: Floats
    edges: Floats
    """Steps at which it learns anew; it begins with the first."""

    @property
    def judged(self) -> Floats:
        return self.actual[int(self.edges[0]) :]


@dataclass(frozen=True, slots=True)
class _Rows:
    """What a profile makes of some steps: `ratios` has shape (n, len(TAUS_S)), `season` (n, horizons)."""

    ratios: Floats
    season: Floats

    @staticmethod
    def of(profile: Profile, series: _Series, ahead: Floats, steps: slice) -> _Rows:
        now_s = series.ends_s[steps]
        expected = np.stack([profile.smoothed(tau_s).at(now_s) for tau_s in TAUS_S], axis=1)
        times_s = now_s[:, None] + (ahead[None, :] - 0.5) * series.step_s
        return _Rows(
            log_ratios(series.rates[:, steps].T, expected), np.asarray(profile.at(times_s) * series.step_s)
        )

    def means(self, weights: Floats) -> Floats:
        return np.asarray(self.season * factors(self.ratios, weights))


@dataclass(frozen=True, slots=True)
class _Tried:
    """How a model did in the rolling backtest: rows of all folds, one after the other."""

    model: Model
    means: Floats
    ratios: Floats
    score: DemandScore
    dispersion: float
    stretch: float


def choose(
    history: History,
    horizon_s: float,
    service_s: float | None,
    kinds: Mapping[str, Kind] = CHEAP,
) -> DemandChoice:
    """A rolling backtest over the last half of the series, for each kind of profile, each time learned only from what
    was known; the lowest pinball loss wins. Raises NotApplicable where the history is too short for any.

    Each kind is tried with a single recent rate; the best one then also with a weight for every recent rate and
    horizon.
    """
    series = series_of(history)
    n = len(series.counts)
    steps = steps_of(horizon_s, series.step_s)
    ahead = np.asarray([a for a in AHEAD if a <= max(1, min(steps, n // 6))], float)
    edges = np.linspace(n // 2, n, FOLDS + 1).astype(int)
    random = np.random.default_rng(zlib.crc32(history.model.encode()))
    actual = _ahead(series.counts, ahead) + random.uniform(-0.5, 0.5, (n, len(ahead)))
    target = _Target(actual, ahead, edges)
    scores: dict[str, DemandScore] = {}
    failures: dict[str, str] = {}
    found: dict[str, tuple[_Tried, list[Profile]]] = {}
    pasts = [history.before(float(series.ends_s[edge - 1])) for edge in edges[:-1]]
    for name, kind in kinds.items():
        try:
            learned = [kind(past) for past in pasts]
            tried = _with_one_rate(kind(history), learned, series, target)
            scores[name], found[name] = tried.score, (tried, learned)
        except NotApplicable as reason:
            failures[name] = str(reason)
        except Exception as error:  # noqa: BLE001 - one that fails must not take the others with it; it is told
            failures[name] = f"{type(error).__name__}: {error}"
    if not found:
        raise NotApplicable(f"no demand forecaster could be fitted: {failures}")
    best = min(found, key=lambda name: scores[name].pinball * (1.0 if name in CHEAP else PAYS))
    tried, learned = found[best]
    if series.counts.mean() >= WORTH:
        regressed = _with_every_rate(tried, learned, series, target)
        if regressed.score.pinball < tried.score.pinball:
            tried, scores[best] = regressed, regressed.score
    return DemandChoice(_fitted(best, tried, series, target, history.since_s, service_s), scores, failures)


def _fitted(  # noqa: PLR0917 - what `choose` has found
    name: str, tried: _Tried, series: _Series, target: _Target, since_s: float, service_s: float | None
) -> FittedDemand:
    known = ~np.isnan(target.judged).any(axis=1)
    means, ratios = tried.means[known], tried.ratios[known]
    errors = (target.judged[known] - means) / spread(means, tried.dispersion)
    swing = _swing(errors, ratios, series.step_s)
    errors = errors / swing.of(ratios)[:, None]
    return FittedDemand(
        name=name,
        model=tried.model,
        step_s=series.step_s,
        ahead=target.ahead,
        dispersion=tried.dispersion,
        residuals=calibrate(errors, means, half_life=len(means) / 2).stretched(tried.stretch),
        swing=swing,
        known_since_s=since_s,
        service_s=service_s,
        smoothed=Smoothed.of(tried.model.profile),
    )


def _ahead(counts: Floats, ahead: Floats) -> Floats:
    """actual[t, h]: what came in the step `ahead[h]` after step t; NaN where that is not known yet."""
    padded = np.concatenate([counts, np.full(int(ahead[-1]), np.nan)])
    return np.asarray(padded[np.arange(len(counts))[:, None] + ahead[None, :].astype(int)])


def _first_usable(step_s: float) -> int:
    """Index of the shortest of TAUS_S that steps so long can tell."""
    return next(i for i, tau_s in enumerate(TAUS_S) if tau_s >= step_s / 2)


def _with_one_rate(full: Profile, learned: list[Profile], series: _Series, target: _Target) -> _Tried:
    """The recent rate's time constant and power by Poisson deviance."""
    rows = [
        _Rows.of(profile, series, target.ahead, slice(lo, hi))
        for profile, (lo, hi) in zip(learned, pairwise(target.edges), strict=True)
    ]
    season = np.concatenate([each.season for each in rows])
    ratios = np.concatenate([each.ratios for each in rows])
    seen = np.maximum(np.round(target.judged), 0.0)
    first = _first_usable(series.step_s)
    best: tuple[float, int, float, Floats] | None = None
    for tau in range(first, len(TAUS_S)):
        for power in POWERS:
            if power == 0 and tau != first:
                continue
            means = season * np.exp(ratios[:, tau] * power)[:, None]
            loss = float(np.nanmean(means - seen * np.log(np.maximum(means, 1e-9))))
            if best is None or loss < best[0]:
                best = (loss, tau, power, means)
    assert best is not None
    _, tau, power, means = best
    weights = np.zeros((len(target.ahead), len(TAUS_S) + 1))
    weights[:, tau] = power
    return _tried(Model(full, weights), means, ratios, series, target)


def _with_every_rate(tried: _Tried, learned: list[Profile], series: _Series, target: _Target) -> _Tried:
    """A weight for each recent rate and horizon, for each fold from what was known before it."""
    means, ratios = [], []
    for profile, (lo, hi) in zip(learned, pairwise(target.edges), strict=True):
        rows = _Rows.of(profile, series, target.ahead, slice(0, hi))
        known = target.actual[:lo].copy()
        for h, ahead in enumerate(target.ahead):
            known[lo - int(ahead) :, h] = np.nan
        before = _Rows(rows.ratios[:lo], rows.season[:lo])
        weights = _weights(before, known, tried, series.step_s)
        now = _Rows(rows.ratios[lo:], rows.season[lo:])
        means.append(now.means(weights))
        ratios.append(now.ratios)
    whole = _Rows.of(tried.model.profile, series, target.ahead, slice(None))
    model = Model(tried.model.profile, _weights(whole, target.actual, tried, series.step_s))
    return _tried(model, np.concatenate(means), np.concatenate(ratios), series, target)


def _weights(rows: _Rows, actual: Floats, tried: _Tried, step_s: float) -> Floats:
    """Of a negative binomial regression with a log link, by Newton's steps from the single rate's weights, towards
    which a ridge shrinks them (Hilbe 2011, Negative Binomial Regression). Shape (horizons, len(TAUS_S) + 1)."""
    first = _first_usable(step_s)
    inputs = np.concatenate([rows.ratios[:, first:], np.ones((len(rows.ratios), 1))], axis=1)
    found = tried.model.weights.copy()
    for h in range(actual.shape[1]):
        known = ~np.isnan(actual[:, h])
        if known.sum() < MIN_STEPS:
            continue
        x, season, y = inputs[known], rows.season[known, h], actual[known, h]
        start = found[h, first:].copy()
        weights = start.copy()
        for _ in range(NEWTON_STEPS):
            mean = season * np.exp(np.clip(x @ weights, -3.0, 3.0))
            narrow = 1.0 + tried.dispersion * mean
            worth = mean / narrow
            ridge = RIDGE * float(worth.mean())
            slope = x.T @ ((y - mean) / narrow) - ridge * (weights - start)
            bend = (x * worth[:, None]).T @ x + ridge * np.eye(len(weights))
            weights = weights + np.linalg.solve(bend, slope)
        if np.isfinite(weights).all():
            found[h, first:] = weights
    return found


def _tried(model: Model, means: Floats, ratios: Floats, series: _Series, target: _Target) -> _Tried:
    """Calibrated on the folds before, scored on each next one; with the dispersion over all of them, and the factor by
    which the bands would have had to be wider."""
    actual = target.judged
    losses, covered, widths, steps = [], [], [], 0
    stretches: list[Floats] = []
    for lo, hi in pairwise(target.edges[1:] - target.edges[0]):
        dispersion = _dispersion(means[:lo], actual[:lo])
        # What was not over yet when the fold began was not known.
        past = slice(0, max(1, lo - int(target.ahead[-1])))
        errors = (actual[past] - means[past]) / spread(means[past], dispersion)
        swing = _swing(errors, ratios[past], series.step_s)
        residuals = calibrate(errors / swing.of(ratios[past])[:, None], means[past], len(errors) / 2)
        now = ~np.isnan(actual[lo:hi]).any(axis=1)
        mean, seen = means[lo:hi][now], actual[lo:hi][now]
        if not len(mean):
            continue
        group = np.searchsorted(residuals.edges, mean, side="right")
        picked = residuals.table[np.arange(mean.shape[1])[None, :], group]
        wide = spread(mean, dispersion) * swing.of(ratios[lo:hi][now])[:, None]
        quantiles = mean[..., None] + picked * wide[..., None]
        stretches.append(_stretch(seen, quantiles))
        losses.append(pinball(seen, quantiles))
        covered.append(interval_coverage(seen, quantiles))
        widths.append(float(np.median(quantiles[..., QUANTILES.index(0.95)] - quantiles[..., 0])))
        steps += seen.size
    if not losses:
        raise NotApplicable("the series is too short to be scored")
    score = DemandScore(float(np.mean(losses)), float(np.mean(covered)), float(np.mean(widths)), steps)
    stretch = float(np.clip(np.quantile(np.concatenate(stretches), 0.9), *STRETCH))
    return _Tried(model, means, ratios, score, _dispersion(means, actual), stretch)


def _swing(errors: Floats, ratios: Floats, step_s: float) -> Swing:
    """By least squares of the absolute errors, their mean being 1. Errors have shape (n, horizons)."""
    first = _first_usable(step_s)
    size = np.abs(errors).mean(axis=1)
    apart = Swing(first).apart(ratios)
    away = apart - apart.mean()
    mean = max(float(size.mean()), 1e-12)
    slope = max(0.0, float((away * size).sum()) / max(float((away**2).sum()), 1e-12)) / mean
    return Swing(first, 1.0 - slope * float(apart.mean()), slope)


def _stretch(actual: Floats, quantiles: Floats) -> Floats:
    """By how much the band around the median would have had to be stretched to reach each value: shape (n,)."""
    low, middle, high = (quantiles[..., QUANTILES.index(q)] for q in (0.05, 0.5, 0.95))
    width = np.where(actual > middle, high - middle, middle - low)
    return np.asarray((np.abs(actual - middle) / np.maximum(width, 1e-9)).ravel())


def _dispersion(means: Floats, actual: Floats) -> float:
    """Of a negative binomial, by moments: variance = mean + dispersion * mean^2."""
    known = ~np.isnan(actual)
    mean, seen = means[known], actual[known]
    excess = ((seen - mean) ** 2 - mean).sum() / max((mean**2).sum(), 1e-12)
    return float(np.clip(excess, 0.0, 50.0))


__all__ = [
    "AHEAD",
    "CHEAP",
    "STEP_S",
    "TAUS",
    "DemandChoice",
    "DemandScore",
    "FittedDemand",
    "Kind",
    "Model",
    "choose",
    "demand_of",
    "recent_rates",
    "series_of",
    "spread",
    "steps_of",
]
