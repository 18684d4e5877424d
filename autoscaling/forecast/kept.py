"""What a fleet's models have in common, as the store keeps it: a restart goes on from it."""

from __future__ import annotations

import numpy as np

from autoscaling.core.types import State
from autoscaling.forecast.gaps import BINS
from autoscaling.forecast.hazard import BANDS, FEATURES, HALF_LIFE_S, Regression, Told
from autoscaling.forecast.history import Floats
from autoscaling.forecast.prior import Prior
from autoscaling.forecast.season import HOURS

VERSION = 1
"""Raised where a feature, a band or an age bin comes to mean something else though there are as many as before."""
OLDEST_S = HALF_LIFE_S
"""What is older is not used: the fleet may be another by then, and its history tells anew within minutes."""
AHEAD_S = 60.0
"""By how much two machines' clocks may differ. What is from later than that would outweigh all that is to come."""
DIGITS = 7
MOST = 1e12
"""No number is larger; what is was not counted but broken, and would overflow a sum."""
_ODDS = "odds:"
_SHAPE = {"version": VERSION, "features": FEATURES, "bands": BANDS, "bins": BINS}


class UnusableError(ValueError):
    """What is kept is another version's, broken or of another time; says which."""


def to_state(prior: Prior) -> State:
    """Some nine kilobytes of JSON. `prior` must be of at least one model."""
    hazard = prior.hazard
    parts = [hazard.coefficients, hazard.told.foretold, hazard.told.came, prior.gaps]
    values: dict[str, float] = {
        **_SHAPE,
        "until_s": hazard.told.until_s,
        "round": hazard.round,
        "silences": hazard.silences,
        "models": prior.models,
        **{_ODDS + name: models for name, models in sorted(prior.odds.items())},
    }
    if prior.season is not None:
        parts.append(prior.season)
    if prior.service_s is not None:
        values["service_s"] = prior.service_s
    numbers = np.concatenate(parts).tolist()
    return State(
        policy="fleet",
        values={name: float(value) for name, value in values.items()},
        histogram=tuple(float(f"{number:.{DIGITS}g}") for number in numbers),
    )


def to_prior(state: State, now_s: float) -> Prior:
    """What `to_state` was given, as it counts now.

    The regression is only where fits begin. Each model's history is learned from as a whole at its first fit, so that
    what was known of it is not added once more; how well the regression foretold is, since history can't tell that.

    Raises:
        UnusableError: it is best forgotten.
    """
    values, numbers = state.values, np.asarray(state.histogram)
    if any(values.get(name) != wanted for name, wanted in _SHAPE.items()):
        raise UnusableError("it is another version's")
    parts = _parted(numbers)
    if parts is None or not np.isfinite([*numbers, *values.values()]).all():
        raise UnusableError("it is broken: numbers are missing, or not finite")
    if np.abs([*numbers, *values.values()]).max() > MOST:
        raise UnusableError("it is broken: a number is larger than any can be")
    coefficients, foretold, came, gaps, season = parts
    until_s, round_, silences, models = (
        values.get(name, -1.0) for name in ("until_s", "round", "silences", "models")
    )
    odds = {name.removeprefix(_ODDS): value for name, value in values.items() if name.startswith(_ODDS)}
    service_s = values.get("service_s")
    amounts = [round_, silences, models - 1.0, service_s or 0.0, *odds.values(), *numbers[FEATURES:]]
    if min(amounts) < 0 or gaps.sum() <= 0 or (len(season) and season.sum() <= 0):
        raise UnusableError("it is broken: what can't be negative is")
    age_s = now_s - until_s
    if not -AHEAD_S <= age_s <= OLDEST_S:
        raise UnusableError(f"it is {age_s / 86400.0:.1f} days old")
    told = Told(foretold, came, min(until_s, now_s))
    return Prior(
        gaps=gaps / gaps.sum(),
        season=season if len(season) else None,
        service_s=service_s,
        models=int(models),
        hazard=Regression(
            coefficients,
            int(round_),
            silences * 0.5 ** (max(0.0, age_s) / HALF_LIFE_S),
            told.faded(now_s).correction,
            told,
            earlier=told,
        ),
        odds=odds,
    )


def _parted(numbers: Floats) -> list[Floats] | None:
    """Coefficients, foretold, came, gaps and season, which may be empty; None where the lengths are wrong."""
    ends = np.cumsum([FEATURES, BANDS, BANDS, BINS + 1])
    return np.split(numbers, ends) if len(numbers) - ends[-1] in {0, HOURS} else None
