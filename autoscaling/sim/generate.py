"""Synthetic traffic with a seed: for tests, demonstrations and what-ifs."""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autoscaling.sim.queueing import Floats
from autoscaling.trace_formats import model_name
from autoscaling.traces import Row

DAY_S = 86400.0
MOST = 100_000_000
"""Requests of a stream, all of which are in memory at once."""
MOST_TURNS = 1_000_000
MOST_PARAMS = {"cv": 1000.0, "input_tokens": 1e6, "output_tokens": 1e6}
"""Lengths are drawn around these means, and a trace takes no more than a hundred times as many tokens."""


class PatternError(ValueError):
    """The message names the pattern or its parameter, the value and what would be right."""


@dataclass(frozen=True)
class Pattern:
    """One kind of traffic and its parameters."""

    doc: str
    defaults: Mapping[str, float]
    times: Callable[[Mapping[str, float], float, np.random.Generator], Floats]
    """(parameters, duration_s, generator) -> arrival times in ascending order."""


def _poisson(p: Mapping[str, float], duration_s: float, random: np.random.Generator) -> Floats:
    return _uniform(p["rate_per_h"] * duration_s / 3600, duration_s, random)


def _gamma(p: Mapping[str, float], duration_s: float, random: np.random.Generator) -> Floats:
    mean_s, shape = 3600 / p["rate_per_h"], 1 / p["cv"] ** 2
    _check_count(duration_s / mean_s)
    count = int(duration_s / mean_s * 1.5 + 50 * max(1.0, p["cv"]))
    times = np.cumsum(random.gamma(shape, mean_s / shape, count))
    while times[-1] < duration_s:
        more = np.cumsum(random.gamma(shape, mean_s / shape, count)) + times[-1]
        times = np.concatenate([times, more])
    return times[times < duration_s]


def _diurnal(p: Mapping[str, float], duration_s: float, random: np.random.Generator) -> Floats:
    peak = p["rate_per_h"] * (1 + p["swing"]) / 3600
    times = _uniform(peak * duration_s, duration_s, random)
    phase = 2 * math.pi * (times / DAY_S - p["peak_hour"] / 24)
    weekend = np.where((times // DAY_S) % 7 >= 5, p["weekend"], 1.0)
    keep = random.random(len(times)) * (1 + p["swing"]) < (1 + p["swing"] * np.cos(phase)) * weekend
    return np.asarray(times[keep])


def _flash(p: Mapping[str, float], duration_s: float, random: np.random.Generator) -> Floats:
    base = _uniform(p["rate_per_h"] * duration_s / 3600, duration_s, random)
    at_s = min(p["at_h"] * 3600, duration_s)
    _check_count(p["crowd"])
    crowd = at_s + np.cumsum(random.exponential(p["lasts_s"] / p["crowd"], int(p["crowd"])))
    return np.sort(np.concatenate([base, crowd[crowd < duration_s]]))


def _timer(p: Mapping[str, float], duration_s: float, random: np.random.Generator) -> Floats:
    _check_count(duration_s / p["every_s"] * max(1.0, p["burst"]))
    beats = np.arange(p["offset_s"], duration_s, p["every_s"])
    beats = beats[random.random(len(beats)) >= p["missed"]]
    times = np.repeat(beats, max(1, int(p["burst"])))
    times = times + np.abs(random.normal(0, p["jitter_s"], len(times)))
    return np.sort(times[times < duration_s])


def _on_off(p: Mapping[str, float], duration_s: float, random: np.random.Generator) -> Floats:
    turns = duration_s / (p["on_s"] + p["off_s"])
    if turns > MOST_TURNS:
        raise PatternError(
            f"on_s {p['on_s']:g} and off_s {p['off_s']:g} make {turns:.3g} turns; {MOST_TURNS:,} are the most"
        )
    found: list[Floats] = []
    now_s = float(random.exponential(p["off_s"]))
    while now_s < duration_s:
        on_s = float(random.exponential(p["on_s"]))
        found.append(now_s + _uniform(p["rate_per_s"] * on_s, on_s, random))
        now_s += on_s + float(random.exponential(p["off_s"]))
    times = np.concatenate(found) if found else np.zeros(0)
    return times[times < duration_s]


def _check_count(mean: float) -> None:
    if mean > MOST:
        raise PatternError(f"{mean:.3g} requests of one model are too many; {MOST:,} are the most")


def _uniform(mean: float, duration_s: float, random: np.random.Generator) -> Floats:
    _check_count(mean)
    return np.sort(random.random(int(random.poisson(mean)))) * duration_s


PATTERNS: Mapping[str, Pattern] = {
    "poisson": Pattern("no memory", {"rate_per_h": 60.0}, _poisson),
    "gamma": Pattern("bursts: gamma gaps that vary by cv", {"rate_per_h": 60.0, "cv": 4.0}, _gamma),
    "diurnal": Pattern(
        "a daily cycle, less at weekends (the trace begins on a Monday at midnight)",
        {"rate_per_h": 60.0, "swing": 0.9, "peak_hour": 14.0, "weekend": 0.5},
        _diurnal,
    ),
    "flash": Pattern(
        "a quiet model, and once a crowd",
        {"rate_per_h": 10.0, "at_h": 1.0, "crowd": 500, "lasts_s": 300.0},
        _flash,
    ),
    "timer": Pattern(
        "clockwork",
        {"every_s": 900.0, "offset_s": 5.0, "jitter_s": 1.0, "missed": 0.0, "burst": 1},
        _timer,
    ),
    "on-off": Pattern(
        "active and silent by turns, each exponentially long",
        {"on_s": 300.0, "off_s": 3000.0, "rate_per_s": 0.2},
        _on_off,
    ),
}


@dataclass(frozen=True)
class Stream:
    """One model of a synthetic trace."""

    model: str
    pattern: str
    params: Mapping[str, float]
    input_tokens: int = 512
    output_tokens: int = 128


def stream(text: str) -> Stream:
    """From `MODEL=PATTERN,name=value,…`. Raises PatternError."""
    model, sign, rest = text.partition("=")
    name, *settings = rest.split(",")
    if not sign or not model or name not in PATTERNS:
        raise PatternError(f"{text!r} is not MODEL=PATTERN,name=value,…; patterns are {', '.join(PATTERNS)}")
    try:
        model_name(model)
    except ValueError as error:
        raise PatternError(str(error)) from None
    params = dict(PATTERNS[name].defaults)
    tokens = {"input_tokens": 512, "output_tokens": 128}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if key not in (*params, *tokens):
            raise PatternError(f"{name} has no parameter {key!r}; it has {', '.join((*params, *tokens))}")
        if not math.isfinite(number) or number < 0 or (number == 0 and key in _ABOVE_ZERO):
            raise PatternError(
                f"{key}: {value!r} is not a number {'above' if key in _ABOVE_ZERO else 'from'} 0"
            )
        if key in _SHARES and number > 1:
            raise PatternError(f"{key}: {value!r} is above 1")
        if key in _WHOLE and number != int(number):
            raise PatternError(f"{key}: {value!r} is not a whole number")
        if number > MOST_PARAMS.get(key, math.inf):
            raise PatternError(f"{key}: {value!r} is above {MOST_PARAMS[key]:,.0f}")
        if key in tokens:
            tokens[key] = int(number)
        else:
            params[key] = number
    return Stream(model, name, params, **tokens)


_SHARES = ("swing", "weekend", "missed")
_WHOLE = ("burst", "crowd", "input_tokens", "output_tokens")
_ABOVE_ZERO = ("rate_per_h", "cv", "every_s", "on_s", "off_s", "lasts_s", "rate_per_s", *_WHOLE)


def generate(streams: Sequence[Stream], duration_s: float, seed: int = 0) -> Iterator[Row]:
    """Requests of all models in the order of their times. Token lengths are geometric around their means."""
    return heapq.merge(*(_rows(each, duration_s, seed) for each in streams))


def _rows(each: Stream, duration_s: float, seed: int) -> Iterator[Row]:
    random = np.random.default_rng([seed, zlib.crc32(each.model.encode())])
    for time_s in PATTERNS[each.pattern].times(each.params, duration_s, random).tolist():
        tokens = [int(random.geometric(1 / max(1, mean))) for mean in (each.input_tokens, each.output_tokens)]
        yield Row(round(time_s, 3), each.model, 1, 0.0, *tokens)


__all__ = ["PATTERNS", "Pattern", "PatternError", "Stream", "generate", "stream"]
