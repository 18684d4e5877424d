"""Which forecaster of the next arrival a model gets: the one that gave past silences' ends the highest likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from scipy.special import stdtrit  # type: ignore[import-untyped]

from autoscaling.forecast.arrivals import ArrivalFitted, Poisson, Renewal, silent_from
from autoscaling.forecast.base import Forecaster, NotApplicable
from autoscaling.forecast.calibration import Calibrated, learn
from autoscaling.forecast.fleet import FittedFleet, Fleet
from autoscaling.forecast.gap_record import Record, rates_at
from autoscaling.forecast.history import Floats, History, Recent, onset_times
from autoscaling.forecast.prior import Prior
from autoscaling.forecast.timer import Timer
from autoscaling.forecast.timetable import Timetable

FORECASTERS: tuple[Forecaster, ...] = (
    Renewal(),
    Renewal("seasonal-renewal", seasonal=True),
    Renewal("recent-renewal", by_gaps=8),
    Timer(),
    Timetable(),
    Poisson(),
)
FLEET_FORECASTERS: tuple[Forecaster, ...] = (
    Fleet(),
    Renewal(),
    Renewal("recent-renewal", by_gaps=8),
    Timer(),
    Timetable(),
)
"""Where the fleet's silences are enough for a regression. Not the rate alone: of a model that has just begun with a few
requests it foretells more of the same, and nobody is as wrong about the first long silence."""
STEADY = ("fleet", "renewal")
"""Apply to whatever is known."""
PSEUDO_MODELS = 20.0
"""How many models the default forecaster is taken to be right for before any was judged, and each other one for one."""
LEARNING_RATE = 0.1
"""Of a posterior among forecasters none of which is quite right, beside the regression (generalized Bayes: Grünwald and
van Ommen 2017, Bayesian Analysis 12). The regression goes by the model's own silences too, so that what others seem to
be better by in a few of them is mostly chance. What can't be chance counts whole: see `_sure`."""
SURE, FEWEST = 0.99, 2.5
"""One-sided, and from how many silences on: two may agree by chance."""
LOOK_BACK = 48
FOLDS = 4
SCORE_HALF_LIFE = 16.0
MARGIN = 3.0
"""In summed log-likelihood: the most that a forecaster must be better by, so that chance does not choose."""
EARLY_MARGIN = 0.75
"""For each silence that was scored, while that is less: a rhythm must be learned in a few beats."""
MIN_CALIBRATION = 8
POOLED = frozenset({"fleet"})
"""Corrected over the whole fleet (hazard.Regression.correction). A model's own few silences, most of them short, would
correct the long ones by what is wrong with the short ones."""
SHARP = 0.1
MIN_SHARP = 12
NOTHING: Floats = np.zeros((0, 3))


@dataclass(frozen=True, slots=True)
class ArrivalScore:
    """Of one forecaster on the same silences as the others."""

    log_score: float
    """Mean log-likelihood of the bucket in which a silence ended; higher is better (Good 1952: proper)."""
    silences: int
    coverage: float
    """Share of the ends within the forecast's 5 % to 95 % quantiles; a bucket across one counts in part.
    NaN, as the next, where it was not asked for."""
    width_s: float
    """Median width of that band, cut at 48 h."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class ArrivalChoice:
    fitted: ArrivalFitted
    scores: dict[str, ArrivalScore]
    failures: dict[str, str] = field(default_factory=dict)
    odds: dict[str, float] = field(default_factory=dict)
    """How likely each is the right one, of those that were scored."""


@dataclass(frozen=True, slots=True)
class Silence:
    """A past silence, as it would have been forecast when it was first known to be one.

    Only then: to score what was forecast earlier on silences alone would leave out the bursts that went on."""

    made_s: float
    recent: Recent
    lo_s: float
    hi_s: float
    """Where the next arrival came, in seconds from made_s.

    Wider on each side by half of what the last arrival is blurred by, since that is taken to have come in the middle.
    """


def silences_of(history: History, most: int = LOOK_BACK) -> list[Silence]:
    """The latest ones, oldest first; only the sharply known ones where there are enough of them.

    Who asks for a forecast knows the last arrival to the second. To judge on silences whose beginning is known to
    within a minute would punish those forecasters that are precise.
    """
    events = history.events
    # Those that outlasted a bucket as long as their own. Of shorter ones some are seen and some are not, and where they
    # are many they would leave no room for the long ones, on which more depends.
    made_s = np.maximum(silent_from(events), events.end_s + events.step_s)
    where = np.flatnonzero(events.lo_s[1:] >= made_s[:-1])[-most:]
    first_s, last_s = events.first_s, events.last_s
    blur = events.blur_s[where] + events.blur_s[where + 1]
    if not len(where):
        return []
    # Against the usual length, not against each one's own: that would pick the long ones.
    sharp = blur < SHARP * np.median(first_s[where + 1] - last_s[where])
    if sharp.sum() >= MIN_SHARP:
        where = where[sharp]
    first = max(0, int(where[0]) - 500)
    half = events.blur_s / 2
    late = events.part(slice(first, None))
    onsets = onset_times(late)
    rates = rates_at(late, where - first)
    return [
        Silence(
            made_s=float(made_s[i]),
            recent=Recent(
                last_s=float(last_s[i]),
                onsets_s=tuple(onsets[:, i - first].tolist()),
                rates=tuple(rate.tolist()),
                rates_s=float(last_s[i]),
            ),
            lo_s=max(0.0, float(events.lo_s[i + 1] - made_s[i] - half[i])),
            hi_s=float(events.lo_s[i + 1] + events.blur_s[i + 1] - made_s[i] + half[i]),
        )
        for i, rate in zip(where, rates, strict=True)
    ]


def forecasters_for(prior: Prior) -> tuple[Forecaster, ...]:
    """First the default one, which always applies.

    The regression where there is one: it alone has seen how many models never come back. What the fleet's idle times
    say of that is said by those that did.
    """
    return FLEET_FORECASTERS if prior.hazard.knows else FORECASTERS


def _weight(prior: Prior, name: str) -> float:
    """Over how many models this forecaster is thought to be the right one."""
    default = forecasters_for(prior)[0].name
    return (PSEUDO_MODELS if name == default else 1.0) + prior.odds.get(name, 0.0)


def again(
    before: ArrivalFitted, scores: Mapping[str, ArrivalScore], history: History, prior: Prior
) -> ArrivalFitted | None:
    """The forecaster that was chosen before by those scores, with what is known by now; None: choose anew."""
    known = {forecaster.name: forecaster for forecaster in forecasters_for(prior)}
    inner = before.inner if isinstance(before, Calibrated) else before
    if inner.name not in known or any(name in known and name not in scores for name in STEADY):
        return None
    try:
        fitted: ArrivalFitted = known[inner.name].fit(history, prior)  # type: ignore[assignment]
    except NotApplicable:
        return None
    return replace(before, inner=fitted) if isinstance(before, Calibrated) else fitted


def with_record(fitted: ArrivalFitted, record: Record) -> ArrivalFitted:
    """The same, with a better record of the model's silences where it goes by that."""
    if isinstance(fitted, Calibrated):
        return replace(fitted, inner=with_record(fitted.inner, record))
    return fitted.knowing(record) if isinstance(fitted, FittedFleet) else fitted


def choose(
    history: History, prior: Prior, forecasters: Sequence[Forecaster] | None = None, *, bands: bool = True
) -> ArrivalChoice:
    """Fit each on what was known, score it on the silences that came after, several times over; then fit the best anew.

    `bands`: the scores tell of the forecasts' bands too. Nothing is decided by those.

    The best has the highest posterior probability, whose prior is how many of the fleet's models each is right for
    (the mixing proportions of a mixture by expectation-maximization, Dempster et al. 1977), bounded by MARGIN. The
    first of `forecasters` must always apply.
    """
    forecasters = forecasters_for(prior) if forecasters is None else forecasters
    silences = silences_of(history)
    scores: dict[str, ArrivalScore] = {}
    failures: dict[str, str] = {}
    weight = 0.5 ** (np.arange(len(silences))[::-1] / SCORE_HALF_LIFE)
    totals: dict[str, float] = {}
    rolled: dict[str, Floats] = {}
    sure: dict[str, float] = {}
    for forecaster in forecasters if len(silences) >= 3 else ():
        try:
            results, spread = _rolling(forecaster, history, prior, silences, bands=bands)
        except NotApplicable as reason:
            failures[forecaster.name] = str(reason)
            continue
        except Exception as error:  # noqa: BLE001 - one that fails must not take the others with it; it is told
            failures[forecaster.name] = f"{type(error).__name__}: {error}"
            continue
        asked = ~np.isnan(results[:, 0])
        if not asked.any():
            failures[forecaster.name] = "did not apply to any of the past silences"
            continue
        if rolled:
            # Where it did not apply yet, the default one would have been taken.
            default = rolled[forecasters[0].name]
            better = results[asked, 0] - default[asked, 0]
            sure[forecaster.name] = _sure(better, weight[-len(results) :][asked])
            results = np.where(asked[:, None], results, default)
        rolled[forecaster.name] = results
        totals[forecaster.name] = float((results[:, 0] * weight[-len(results) :]).sum())
        scores[forecaster.name] = ArrivalScore(
            log_score=float(results[asked, 0].mean()),
            silences=int(asked.sum()),
            coverage=float(spread[asked, 0].mean()) if bands else np.nan,
            width_s=float(np.median(spread[asked, 1])) if bands else np.nan,
        )
    posterior = _posterior(totals, sure, prior, max((len(results) for results in rolled.values()), default=0))
    order = sorted(posterior, key=lambda name: -posterior[name])
    by_name = {forecaster.name: forecaster for forecaster in forecasters}
    for name in [*order, *(forecaster.name for forecaster in forecasters)]:
        try:
            fitted: ArrivalFitted = by_name[name].fit(history, prior)  # type: ignore[assignment]
            results = rolled.get(name, NOTHING)
            if len(results) >= MIN_CALIBRATION and name not in POOLED:
                fitted = Calibrated(fitted, *learn(results[:, 1:], weight[-len(results) :]))
            return ArrivalChoice(fitted, scores, failures, posterior)
        except NotApplicable as reason:
            failures[name] = str(reason)
        except Exception as error:  # noqa: BLE001 - as above
            failures[name] = f"{type(error).__name__}: {error}"
    raise RuntimeError(f"no forecaster of the next arrival could be fitted: {failures}")


def _sure(better: Floats, weight: Floats) -> float:
    """What a forecaster is better by in sum, as far as that can't be chance: the lower bound of Student's interval.

    The differences are taken to be independent of each other, as by Diebold and Mariano 1995 (JBES 13).
    """
    known = weight.sum()
    effective = known**2 / (weight**2).sum()
    if effective < FEWEST:
        return 0.0
    mean = (weight * better).sum() / known
    variance = (weight * (better - mean) ** 2).sum() / known * effective / (effective - 1.0)
    return max(0.0, float(known * (mean - stdtrit(effective - 1.0, SURE) * np.sqrt(variance / effective))))


def _posterior(
    totals: Mapping[str, float], sure: Mapping[str, float], prior: Prior, silences: int
) -> dict[str, float]:
    """Of each forecaster, from the summed log-likelihoods that it gave to so many silences, and LEARNING_RATE."""
    if not totals:
        return {}
    weights = np.log([_weight(prior, name) for name in totals])
    bounded = np.maximum(weights - weights.max(), -min(MARGIN, EARLY_MARGIN * silences))
    rate = LEARNING_RATE if prior.hazard.knows else 1.0
    whole = np.asarray([sure.get(name, 0.0) for name in totals])
    logs = rate * np.asarray(list(totals.values())) + (1.0 - rate) * whole + bounded
    odds = np.exp(logs - logs.max())
    return dict(zip(totals, (odds / odds.sum()).tolist(), strict=True))


def _rolling(
    forecaster: Forecaster, history: History, prior: Prior, silences: list[Silence], *, bands: bool
) -> tuple[Floats, Floats]:
    """For the latest two thirds of the silences, what `judged` gives, shape (n, 3), and `band`, shape (n, 2).

    NaN while the forecaster did not apply, and for bands that were not asked for.
    """
    folds = min(len(silences) - 2, FOLDS)
    edges = np.unique(np.linspace(max(2, len(silences) // 3), len(silences), folds + 1).astype(int))
    first = int(edges[0])
    results, spread = np.full((len(silences) - first, 3), np.nan), np.full((len(silences) - first, 2), np.nan)
    for begin, end in pairwise(edges):
        try:
            fitted: ArrivalFitted = forecaster.fit(history.before(silences[begin].made_s), prior)  # type: ignore[assignment]
        except NotApplicable:
            continue
        for i in range(begin, end):
            results[i - first] = judged(fitted, silences[i])
            if bands:
                spread[i - first] = band(fitted, silences[i], results[i - first, 1:])
    return results, spread


PROBE_S: Floats = np.geomspace(1.0, 48 * 3600.0, 180)


def judged(fitted: ArrivalFitted, silence: Silence) -> tuple[float, float, float]:
    """(log score, log survival at the beginning of the bucket in which the silence ended, and at its end)."""
    at = np.asarray([silence.lo_s, silence.hi_s])
    ends = np.exp(fitted.log_survival(silence.made_s, silence.recent, at))
    mass = float(ends[0] - ends[1])
    begins, over = np.log(np.maximum(ends, 1e-300)).tolist()
    return float(np.log(max(mass, 1e-9))), begins, over


def band(fitted: ArrivalFitted, silence: Silence, ends: Sequence[float] | Floats) -> tuple[float, float]:
    """(share of the end's bucket within the 90 % band by probability, width of the band in seconds).

    `ends`: the log survivals that `judged` gives.
    """
    extra = fitted.extra_times(silence.made_s, silence.recent)
    extra = extra[(extra > 0) & (extra < PROBE_S[-1])]
    times = np.sort(np.concatenate([PROBE_S, extra])) if len(extra) else PROBE_S
    survival = np.exp(fitted.log_survival(silence.made_s, silence.recent, times))
    begins, over = np.exp(ends).tolist()
    mass = begins - over
    inside = min(begins, 0.95) - max(over, 0.05)
    covered = float(np.clip(inside / mass, 0, 1)) if mass > 1e-12 else float(0.05 <= over <= 0.95)
    low, high = np.interp([-0.95, -0.05], -survival, times, left=0.0).tolist()
    return covered, high - low
