"""The chance of the next request, by the second, as a regression over the whole fleet: features, and its estimation.

log hazard = offset(age) + features · coefficients, constant within cells of the silence's age: a piecewise exponential
model, whose likelihood is that of a Poisson regression with the time at risk as exposure (Holford 1980, Biometrics 36;
Laird and Olivier 1981, JASA 76). Each model of the fleet contributes the second-order expansion of its own log
likelihood around the coefficients that it was given; their sum, with a ridge, gives the next ones. Repeated, that is
Newton's method (iteratively reweighted least squares: McCullagh and Nelder 1989, chapter 2) spread over the fits of the
single models, so that no process ever needs the traffic of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace

import numpy as np

from autoscaling.forecast.history import TAUS_S, Floats, clipped

DAY_S = 86400.0
ONSETS = (4, 7, 11)
"""Which of history.THETAS_S the regression looks at: 32 s, 4 min, 1 h."""
END_S = 2 * DAY_S
"""Silences are followed for so long."""


def _edges() -> Floats:
    found = [10.0, 15.0, 20.0, 25.0, 30.0, 37.0, 45.0, 52.0]
    at = 60.0
    while at < END_S:
        found.append(at)
        at += min(0.25 * at, 3600.0)
    return np.asarray([*found, END_S])


CELLS_S: Floats = _edges()
"""Ages between which the hazard is taken to be constant."""

_KNOTS: Floats = np.log(np.asarray([30.0, 60.0, 120.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0]))
_BENDS: Floats = np.log(np.asarray([60.0, 300.0, 1800.0, 10800.0]))
_RATE_KNOTS = (0.7, 1.8)
_ONSET_KNOTS = (5.5, 7.5, 9.5)
MOVING = 62
"""How many features go by what came lately: see `moving`."""
RIDGE = 30.0
MOST_STEP = 1.0
LEAST_SILENCES, ROUNDS = 200.0, 4
"""With fewer in the whole fleet, or so few steps from nothing, there is no regression."""
HALF_LIFE_S = 14 * DAY_S
LATELY = 4
"""By how many times faster it is forgotten how wrong the regression was: it is about the present."""
CLIP = 6.0
LOG_LEAST, LOG_MOST = -25.0, 1.0
_AGE_EDGES: Floats = np.asarray([30.0, 60.0, 120.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0])
_HAZARD_EDGES: Floats = np.log(np.asarray([1e-3]))
"""Per second."""
BANDS = (len(_AGE_EDGES) + 1) * (len(_HAZARD_EDGES) + 1)
BAND_STRENGTH = 20.0
"""Pseudo-requests that came just as foretold, in each band."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known at so many moments of silences. All arrays have shape (n,) but for the first two."""

    counts: Floats
    """Shape (n, len(TAUS_S)): arrivals lately, with exponentially falling weight."""
    onsets_s: Floats
    """Shape (n, len(ONSETS)): how long ago the bursts began."""
    age_s: Floats
    """How long nothing has come."""
    time_s: Floats
    own: Floats
    """Shape (n, 4): see gap_record.own_hazard."""
    typical: Floats
    """Mean logarithm of the model's own silences."""
    known: Floats
    """How many there were."""
    day: Floats
    """Shape (n, 3): see gap_record.same_time."""


def offset(age_s: Floats) -> Floats:
    """log hazard of the Lomax distribution that a fleet begins with (gaps.default_mass)."""
    return np.asarray(np.log(0.5 / (age_s + 30.0)))


def design(rows: Rows) -> Floats:
    """Features, scaled by hand to about one, shape (n, FEATURES): first those of `still`."""
    lately = moving(rows.time_s, rows.counts, rows.onsets_s, rows.day, bends(rows.age_s))
    return np.concatenate([still(rows.age_s, rows.own, rows.typical, rows.known), lately], axis=1)


def still(age_s: Floats, own: Floats, typical: Floats, known: Floats) -> Floats:
    """Those that go by the model's own silences and this one's age only, shape (n, STILL). See Rows."""
    log_age = np.log1p(age_s)
    age = (log_age - 6.0) / 2.0
    hazard, risk, left, near = own.T
    enough = np.minimum(known, 50.0) / 50.0
    blocks = (
        np.ones((len(age), 1)),
        age[:, None],
        np.maximum(log_age[:, None] - _KNOTS, 0.0) / 2.0,
        np.log1p(known)[:, None] / 3.0,
        enough[:, None],
        ((typical - 6.0) * enough / 2.0)[:, None],
        np.stack([hazard, np.maximum(hazard + 1.0, 0.0), risk, left, hazard * risk / 3.0], axis=1),
        hazard[:, None] * np.maximum(log_age[:, None] - _BENDS, 0.0) / 2.0,
        np.stack([near, np.maximum(near - 0.5, 0.0) * 2.0, near * risk], axis=1),
    )
    return clipped(np.concatenate(blocks, axis=1), -CLIP, CLIP)


def bends(age_s: Floats) -> Floats:
    """What a silence's age is multiplied with other features as, shape (n, 5)."""
    log_age = np.log1p(age_s)
    age = (log_age - 6.0) / 2.0
    return np.concatenate([age[:, None], np.maximum(log_age[:, None] - _BENDS, 0.0) / 2.0], axis=1)


def moving(time_s: Floats, counts: Floats, onsets_s: Floats, day: Floats, shape: Floats) -> Floats:
    """Those that go by what came lately and by the time of day, shape (n, FEATURES - STILL). See Rows.

    `shape`: the `bends` of the silence's age.
    """
    angle = (time_s % DAY_S) / DAY_S * 2 * np.pi
    turns = np.stack([np.sin(angle), np.cos(angle), np.sin(2 * angle), np.cos(2 * angle)], axis=1)
    return arranged(np.log1p(counts), np.log(np.maximum(onsets_s, 1.0)), day, turns, shape)


def _arranged(rates: Floats, onsets: Floats, day: Floats, turns: Floats, shape: Floats) -> Floats:
    """`moving`, from logarithms and `turns` of the day. Column by column: there are many, of few rows."""
    age = shape[:, :1]
    scaled_onsets = (onsets - 7.0) / 2.5
    found = np.empty((len(rates), MOVING))
    found[:, :5] = rates
    for i in range(len(_RATE_KNOTS)):
        found[:, 5 * i + 5 : 5 * i + 10] = np.maximum(rates - _RATE_KNOTS[i], 0.0)
    for i in (1, 2, 3):
        found[:, 10 + 5 * i : 15 + 5 * i] = rates[:, i : i + 1] * shape
    found[:, 30:33] = scaled_onsets
    found[:, 33:36] = scaled_onsets * age
    for i in range(len(_ONSET_KNOTS)):
        found[:, 36 + 3 * i : 39 + 3 * i] = np.maximum(onsets - _ONSET_KNOTS[i], 0.0) / 2.0
    found[:, 45:48] = day
    found[:, 48:52] = day[:, 0:1] * shape[:, :4]
    found[:, 52:54] = day[:, 1:2] * shape[:, :2]
    found[:, 54:56] = day[:, 2:3] * shape[:, :2]
    found[:, 56:60] = turns
    found[:, 60:62] = turns[:, :2] * age
    # By hand, so that it can be compiled.
    bounded: Floats = np.minimum(np.maximum(found, -CLIP), CLIP)
    return bounded


arranged: Callable[[Floats, Floats, Floats, Floats, Floats], Floats] = _arranged
"""The simulator exchanges it for the same, compiled."""


def level(age_s: Floats, own: Floats, typical: Floats, known: Floats, coefficients: Floats) -> Floats:
    """What of the log hazard goes by the model's own silences and this one's age only, shape (n,)."""
    return np.asarray(offset(age_s) + still(age_s, own, typical, known) @ coefficients[:STILL])


def log_hazard(
    of_silences: Floats, lately: Floats, coefficients: Floats, age_s: Floats, correction: Floats
) -> Floats:
    """Per second, shape (n,), from a `level` and the `moving` features of the same moments.

    `correction`: Regression.correction.
    """
    value = clipped(of_silences + lately @ coefficients[STILL:], LOG_LEAST, LOG_MOST)
    return np.asarray(value + correction[bands(age_s, value)])


def bands(age_s: Floats, log_rate: Floats) -> Floats:
    """In which of BANDS, by age and by the foretold hazard, each moment is: shape (n,)."""
    by_age = np.searchsorted(_AGE_EDGES, age_s)
    return np.asarray(by_age * (len(_HAZARD_EDGES) + 1) + np.searchsorted(_HAZARD_EDGES, log_rate))


@dataclass(frozen=True, slots=True)
class Expansion:
    """One model's log likelihood, to the second order: c·b - b'Hb/2 over coefficients b."""

    curvature: Floats
    """H's upper triangle, by rows: shape (FEATURES * (FEATURES + 1) / 2,)."""
    slope: Floats
    """c, shape (FEATURES,)."""
    silences: float
    until_s: float
    """What happened up to then is in."""
    round: int
    """Of the coefficients around which it is."""
    foretold: Floats
    """Requests that the coefficients expected in each of the bands, shape (BANDS,). They had been learned without them,
    so that this is how well the regression foretells what it has not seen."""
    came: Floats
    """Those that did come, shape (BANDS,)."""

    def plus(self, other: Expansion) -> Expansion:
        """Of both together."""
        return Expansion(
            self.curvature + other.curvature,
            self.slope + other.slope,
            self.silences + other.silences,
            max(self.until_s, other.until_s),
            max(self.round, other.round),
            self.foretold + other.foretold,
            self.came + other.came,
        )

    def faded(self, now_s: float) -> Expansion:
        """Weighing less by its age."""
        weight = 0.5 ** (max(0.0, now_s - self.until_s) / HALF_LIFE_S)
        return Expansion(
            self.curvature * np.float32(weight),
            self.slope * np.float32(weight),
            self.silences * weight,
            self.until_s,
            self.round,
            self.foretold * np.float32(weight**LATELY),
            self.came * np.float32(weight**LATELY),
        )


class Deferred(Expansion):
    """The same, worked out when it is looked at: what only the fleet asks for, and whoever sends it elsewhere."""

    __slots__ = ("_found", "_make")
    _found: Expansion | None
    _make: Callable[[], Expansion] | None

    def __init__(self, make: Callable[[], Expansion], until_s: float, round_: int) -> None:
        put = object.__setattr__
        put(self, "until_s", until_s)
        put(self, "round", round_)
        put(self, "_make", make)
        put(self, "_found", None)

    def found(self) -> Expansion:
        """What it stands for."""
        if self._found is None:
            assert self._make is not None
            object.__setattr__(self, "_found", self._make())
            # What it was made from need not be kept.
            object.__setattr__(self, "_make", None)
        assert self._found is not None
        return self._found

    @property
    def curvature(self) -> Floats:
        return self.found().curvature

    @property
    def slope(self) -> Floats:
        return self.found().slope

    @property
    def silences(self) -> float:
        return self.found().silences

    @property
    def foretold(self) -> Floats:
        return self.found().foretold

    @property
    def came(self) -> Floats:
        return self.found().came

    def __reduce__(self) -> tuple[object, ...]:
        made = self.found()
        return Expansion, tuple(getattr(made, each.name) for each in fields(Expansion))


@dataclass(frozen=True, slots=True)
class Told:
    """How well a regression foretold what it had not seen: see Expansion."""

    foretold: Floats
    """Requests that it expected in each of the bands, shape (BANDS,)."""
    came: Floats
    """Those that did come, shape (BANDS,)."""
    until_s: float
    """What happened up to then is in."""

    def faded(self, now_s: float) -> Told:
        """Weighing less by its age, as in `Expansion.faded`."""
        weight = 0.5 ** (LATELY * max(0.0, now_s - self.until_s) / HALF_LIFE_S)
        return Told(self.foretold * weight, self.came * weight, self.until_s)

    @property
    def correction(self) -> Floats:
        """See Regression.correction."""
        return np.asarray(np.log((self.came + BAND_STRENGTH) / (self.foretold + BAND_STRENGTH)))


UNTOLD = Told(np.zeros(BANDS), np.zeros(BANDS), -np.inf)


@dataclass(frozen=True, slots=True)
class Regression:
    """What the fleet has learned."""

    coefficients: Floats
    """Shape (FEATURES,)."""
    round: int = 0
    """How many steps it took from nothing."""
    silences: float = 0.0
    """That it rests on."""
    correction: Floats = field(default_factory=lambda: np.zeros(BANDS))
    """What is added to the log hazard in each of the bands, shape (BANDS,): by how much the regression was wrong there
    (recalibration; for survival models by groups of predicted risk: Demler et al. 2015, Statistics in Medicine 34)."""
    told: Told = UNTOLD
    """What `correction` is made from."""
    earlier: Told = UNTOLD
    """The part of `told` that the process before this one saw. Its coefficients were learned from what came up to then:
    that they foretell that well says nothing, and is not told again."""

    @property
    def knows(self) -> bool:
        """Whether forecasts can be made with it."""
        return self.round >= ROUNDS and self.silences >= LEAST_SILENCES

    def next(self, parts: Iterable[Expansion]) -> Regression:
        """A Newton step on; itself, while most of the parts are around coefficients before these.

        Not so far where the step is long: the expansions hold near where they were made.
        """
        upper = np.zeros(len(_UPPER[0]))
        slope = np.zeros(FEATURES)
        foretold, came, until_s = np.zeros(BANDS), np.zeros(BANDS), -np.inf
        silences = new = 0.0
        for part in parts:
            upper += part.curvature
            slope += part.slope
            silences += part.silences
            new += part.silences * (part.round == self.round)
            foretold += part.foretold
            came += part.came
            until_s = max(until_s, part.until_s)
        earlier = self.earlier.faded(until_s)
        told = Told(foretold + earlier.foretold, came + earlier.came, until_s)
        correction = told.correction
        if new < silences / 2 or silences <= 0:
            same = np.array_equal(correction, self.correction)
            return self if same else replace(self, correction=correction, told=told)
        curvature = np.zeros((FEATURES, FEATURES))
        curvature[_UPPER] = upper
        curvature += np.triu(curvature, 1).T + RIDGE * np.eye(FEATURES)
        step = np.linalg.solve(curvature, slope) - self.coefficients
        step *= min(1.0, MOST_STEP / max(float(np.abs(step).max()), 1e-9))
        return Regression(
            self.coefficients + step, self.round + 1, silences, correction, told, earlier=self.earlier
        )


def expand(
    rows: Rows, ended: Floats, exposure_s: Floats, regression: Regression, until_s: float, *, begin_s: Floats
) -> Expansion:
    """Of rows, whether a request ended each, for how long each was at risk, and from when on. Shape (n,) each."""
    x = design(rows)
    log_rate = clipped(offset(rows.age_s) + x @ regression.coefficients, LOG_LEAST, LOG_MOST)
    expected = exposure_s * np.exp(log_rate)
    curvature = (x * expected[:, None]).T @ x
    slope = x.T @ (ended - expected) + curvature @ regression.coefficients
    return Expansion(
        curvature[_UPPER].astype(np.float32),
        slope.astype(np.float32),
        float(ended.sum()),
        until_s,
        regression.round,
        *_told(bands(rows.age_s, log_rate), ended, expected, begin_s, regression),
    )


def _told(
    where: Floats, ended: Floats, expected: Floats, begin_s: Floats, regression: Regression
) -> tuple[Floats, Floats]:
    """By bands: what was expected, and what came. Of a regression that knows nothing yet, nothing."""
    if not regression.knows:
        return np.zeros(BANDS, np.float32), np.zeros(BANDS, np.float32)
    unseen = begin_s >= regression.earlier.until_s
    foretold, came = (np.bincount(where, each * unseen, BANDS) for each in (expected, ended))
    return foretold.astype(np.float32), came.astype(np.float32)


_ONE = Rows(
    np.zeros((1, len(TAUS_S))),
    np.ones((1, len(ONSETS))),
    *(np.ones(1), np.zeros(1)),
    np.zeros((1, 4)),
    *(np.zeros(1), np.zeros(1)),
    np.zeros((1, 3)),
)
FEATURES = design(_ONE).shape[1]
STILL = still(_ONE.age_s, _ONE.own, _ONE.typical, _ONE.known).shape[1]
_UPPER = np.triu_indices(FEATURES)
NOTHING = Regression(np.zeros(FEATURES))
