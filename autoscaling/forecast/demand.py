"""How much comes in the next steps: a seasonal profile, scaled by the recent rate, with conformal quantiles."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from autoscaling.core.types import Demand, Forecast
from autoscaling.forecast import profile as profiles
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.conformal import QUANTILES, Residuals, calibrate, interval_coverage, pinball
from autoscaling.forecast.history import TAUS_S, Floats, History, Recent
from autoscaling.forecast.profile import Profile, decayed_sums
from autoscaling.forecast.service_time import NORMAL

STEP_S = 60.0
AHEAD = (1, 2, 3, 5, 8, 13, 21, 34, 60)
"""Steps ahead at which the errors are measured; between them the quantiles are interpolated."""
POWERS = (0.0, 0.5, 1.0)
MAX_STEPS = 2880
MIN_STEPS = 60
FOLDS = 3
MAX_RATIO = 100.0
STRETCH = (0.9, 2.5)

Kind = Callable[[History], Profile]
CHEAP: Mapping[str, Kind] = {
    "level": profiles.flat,
    "hourly": profiles.hourly,
    "daily": profiles.daily,
    "weekly": profiles.weekly,
}
"""Seasonal parts that cost milliseconds."""
PAYS = 1.02
"""One that costs more must be better by this factor."""


@dataclass(frozen=True, slots=True)
class Model:
    """mean(t) = profile(t) * (recent rate / the profile's own recent mean) ** power, a count of one smoothing both."""

    profile: Profile
    tau: int
    """Index into TAUS_S: over how long the recent rate is taken."""
    power: float


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
class FittedDemand:
    name: str
    model: Model
    step_s: float
    ahead: Floats
    dispersion: float
    residuals: Residuals
    known_since_s: float
    service_s: float | None
    smoothed: Profile

    def counts(self, now_s: float, recent: Recent, steps: int) -> Floats:
        """Quantiles of the arrivals in each step as a continuous variable (the count plus a uniform one in ±1/2, which
        makes the quantiles of counts exact: Machado and Santos Silva 2005, JASA 100): shape (steps, len(QUANTILES))."""
        tau_s = TAUS_S[self.model.tau]
        rate = recent.rates_at(now_s)[self.model.tau]
        rate /= -np.expm1(-max(now_s - self.known_since_s, self.step_s) / tau_s)
        expected = float(self.smoothed.at(np.asarray([now_s]))[0])
        ratio = min(max((rate * tau_s + 1) / (expected * tau_s + 1), 1 / MAX_RATIO), MAX_RATIO)
        ahead = np.arange(1, steps + 1)
        middle = now_s + (ahead - 0.5) * self.step_s
        season = self.model.profile.at(np.concatenate([middle, now_s + (self.ahead - 0.5) * self.step_s]))
        means = season * self.step_s * ratio**self.model.power
        errors = self.residuals.of(means[steps:])
        if steps > 1 or len(self.ahead) > 1:
            place = np.clip(np.interp(ahead, self.ahead, np.arange(len(self.ahead))), 0, None)
            low = np.floor(place).astype(int)
            high = np.minimum(low + 1, len(self.ahead) - 1)
            part = (place - low)[:, None]
            errors = (1 - part) * errors[low] + part * errors[high]
        mean = means[:steps, None]
        return np.asarray(mean + errors * spread(mean, self.dispersion))

    def forecast(self, now_s: float, recent: Recent | None, horizon_s: float | None = None) -> Forecast:
        if recent is None or self.service_s is None:
            return Forecast(now_s, self.name)
        steps = len(AHEAD) if horizon_s is None else steps_of(horizon_s, self.step_s)
        counts = self.counts(now_s, recent, steps)
        return Forecast(now_s, self.name, demand=demand_of(now_s, self.step_s, counts, self.service_s))


def steps_of(horizon_s: float, step_s: float) -> int:
    """Enough to see a prewarm's lead time and as much again; at least five."""
    return int(np.clip(np.ceil(2 * horizon_s / step_s), 5, AHEAD[-1]))


def spread(mean: Floats, dispersion: float) -> Floats:
    """The standard deviation of a negative binomial count, plus what rounding adds."""
    return np.asarray(np.sqrt(mean + dispersion * mean**2 + 1 / 12))


def demand_of(now_s: float, step_s: float, counts: Floats, service_s: float) -> Demand:
    """Whole counts become rates; with the mean service time they become requests in progress (Little's law).

    At an instant, M/G/inf holds a Poisson number around that: the two spreads are added as those of independent
    variables are, quantile by quantile.
    """
    whole = np.maximum(np.ceil(counts - 0.5), 0.0)
    rates = np.maximum.accumulate(whole, axis=1) / step_s
    busy = np.maximum(counts, 0.0) / step_s * service_s
    middle = busy[:, QUANTILES.index(0.5)][:, None]
    off = np.sqrt((busy - middle) ** 2 + NORMAL**2 * middle)
    concurrency = np.maximum.accumulate(np.maximum(middle + np.sign(NORMAL) * off, 0.0), axis=1)
    return Demand(
        now_s,
        step_s,
        QUANTILES,
        tuple(map(tuple, rates.tolist())),
        tuple(map(tuple, concurrency.tolist())),
    )


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


@dataclass(frozen=True, slots=True)
class _Target:
    """What a backtest forecasts."""

    actual: Floats
    """actual[t, h]: what came in the step `ahead[h]` after step t, blurred by a uniform ±1/2; NaN if not known yet."""
    ahead: Floats
    edges: Floats
    """Steps at which it learns anew; it begins with the first."""


def series_of(history: History) -> _Series:
    """Raises NotApplicable where fewer than MIN_STEPS steps are known."""
    level = history.level(STEP_S)
    if level is None:
        raise NotApplicable("nothing is known in steps of a minute or more")
    step_s = level.step_s
    last = int(history.now_s // step_s)
    first = max(int(np.ceil(level.start_s / step_s)), last - MAX_STEPS)
    if last - first < MIN_STEPS:
        raise NotApplicable(f"fewer than {MIN_STEPS} steps of {step_s:g} s are known")
    counts = np.zeros(last - first)
    keep = (level.index >= first) & (level.index < last)
    counts[level.index[keep] - first] = level.arrivals[keep]
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


def choose(
    history: History,
    horizon_s: float,
    service_s: float | None,
    kinds: Mapping[str, Kind] = CHEAP,
) -> DemandChoice:
    """A rolling backtest over the last half of the series, for each kind of profile, each time learned only from what
    was known; the lowest pinball loss wins. Raises NotApplicable where the history is too short for any."""
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
    found: dict[str, tuple[Floats, float, float, Model]] = {}
    pasts = [history.before(float(series.ends_s[edge - 1])) for edge in edges[:-1]]
    for name, kind in kinds.items():
        try:
            learned = [kind(past) for past in pasts]
            model, means = _best_model(kind(history), learned, series, target)
            scores[name], dispersion, stretch = _score(means, actual[edges[0] :], edges - edges[0])
            found[name] = (means, dispersion, stretch, model)
        except NotApplicable as reason:
            failures[name] = str(reason)
        except Exception as error:  # noqa: BLE001 - one that fails must not take the others with it; it is told
            failures[name] = f"{type(error).__name__}: {error}"
    if not found:
        raise NotApplicable(f"no demand forecaster could be fitted: {failures}")
    best = min(found, key=lambda name: scores[name].pinball * (1.0 if name in CHEAP else PAYS))
    means, dispersion, stretch, model = found[best]
    known = ~np.isnan(actual[edges[0] :]).any(axis=1)
    means, errors = means[known], actual[edges[0] :][known]
    errors = (errors - means) / spread(means, dispersion)
    fitted = FittedDemand(
        name=best,
        model=model,
        step_s=series.step_s,
        ahead=ahead,
        dispersion=dispersion,
        residuals=calibrate(errors, means, half_life=len(means) / 2).stretched(stretch),
        known_since_s=history.since_s,
        service_s=service_s,
        smoothed=model.profile.smoothed(TAUS_S[model.tau]),
    )
    return DemandChoice(fitted, scores, failures)


def _ahead(counts: Floats, ahead: Floats) -> Floats:
    """actual[t, h]: what came in the step `ahead[h]` after step t; NaN where that is not known yet."""
    padded = np.concatenate([counts, np.full(int(ahead[-1]), np.nan)])
    return np.asarray(padded[np.arange(len(counts))[:, None] + ahead[None, :].astype(int)])


def _best_model(
    full: Profile, learned: list[Profile], series: _Series, target: _Target
) -> tuple[Model, Floats]:
    """The recent rate's time constant and power by Poisson deviance; with the means of the rolling backtest."""
    edges, ahead = target.edges, target.ahead
    begin = int(edges[0])
    usable = [i for i, tau in enumerate(TAUS_S) if tau >= series.step_s / 2]
    best: tuple[float, Model, Floats] | None = None
    seen = np.maximum(np.round(target.actual[begin:]), 0.0)
    folds = [(profile, slice(lo, hi)) for profile, (lo, hi) in zip(learned, pairwise(edges), strict=True)]
    season = np.concatenate(
        [_season(profile, series.ends_s[fold], ahead, series.step_s) for profile, fold in folds]
    )
    for tau in usable:
        tau_s = TAUS_S[tau]
        expected = np.concatenate(
            [profile.smoothed(tau_s).at(series.ends_s[fold]) for profile, fold in folds]
        )
        ratio = _ratio(series.rates[tau, begin:], expected, tau_s)
        for power in POWERS:
            if power == 0 and tau != usable[0]:
                continue
            means = season * ratio[:, None] ** power
            loss = float(np.nanmean(means - seen * np.log(np.maximum(means, 1e-9))))
            if best is None or loss < best[0]:
                best = (loss, Model(full, tau, power), means)
    assert best is not None
    return best[1], best[2]


def _season(profile: Profile, now_s: Floats, ahead: Floats, step_s: float) -> Floats:
    """Arrivals in the steps that begin at now_s + (ahead - 1) * step_s: shape (len(now_s), len(ahead))."""
    return np.asarray(profile.at(now_s[:, None] + (ahead[None, :] - 0.5) * step_s) * step_s)


def _ratio(rate: Floats, expected: Floats, tau_s: float) -> Floats:
    return np.asarray(np.clip((rate * tau_s + 1) / (expected * tau_s + 1), 1 / MAX_RATIO, MAX_RATIO))


def _score(means: Floats, actual: Floats, edges: Floats) -> tuple[DemandScore, float, float]:
    """Calibrated on the folds before, scored on each next one; with the dispersion over all of them, and the factor by
    which the bands would have had to be wider."""
    losses, covered, widths, steps = [], [], [], 0
    stretches: list[Floats] = []
    for lo, hi in pairwise(edges[1:]):
        dispersion = _dispersion(means[:lo], actual[:lo])
        past = ~np.isnan(actual[:lo]).any(axis=1)
        errors = (actual[:lo][past] - means[:lo][past]) / spread(means[:lo][past], dispersion)
        # What was not over yet when the fold began was not known.
        reach = 1 + int(np.isnan(actual).any(axis=1).sum())
        residuals = calibrate(
            errors[: len(errors) - reach or None],
            means[:lo][past][: len(errors) - reach or None],
            len(errors) / 2,
        )
        now = ~np.isnan(actual[lo:hi]).any(axis=1)
        mean, seen = means[lo:hi][now], actual[lo:hi][now]
        if not len(mean):
            continue
        group = np.searchsorted(residuals.edges, mean, side="right")
        picked = residuals.table[np.arange(mean.shape[1])[None, :], group]
        quantiles = mean[..., None] + picked * spread(mean, dispersion)[..., None]
        stretches.append(_stretch(seen, quantiles))
        losses.append(pinball(seen, quantiles))
        covered.append(interval_coverage(seen, quantiles))
        widths.append(float(np.median(quantiles[..., QUANTILES.index(0.95)] - quantiles[..., 0])))
        steps += seen.size
    if not losses:
        raise NotApplicable("the series is too short to be scored")
    score = DemandScore(float(np.mean(losses)), float(np.mean(covered)), float(np.mean(widths)), steps)
    stretch = np.quantile(np.concatenate(stretches), 0.9)
    return score, _dispersion(means, actual), float(np.clip(stretch, *STRETCH))


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
