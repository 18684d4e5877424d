"""Every value of the core through JSON and back, and nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaling.core.codec import CodecError, from_json, from_plain, to_json, to_plain
from autoscaling.core.types import (
    Capacity,
    Decision,
    Forecast,
    Observation,
    Reason,
    Rung,
    Spec,
    State,
    Window,
)
from tests.core.lab import RUNGS, T0, demand, lit, poisson, spec

SPEC = spec(params={"stable_s": 3.5}, windows=(Window(T0, T0 + 1, 2, Rung.PARKED, "prewarm", "id"),))
FORECAST = replace(
    poisson(0.1), demand=demand(1, 2), fitted_s=T0 - 5, details={"score": {"crps": 0.5}, "why": ["x", None]}
)
OBSERVATION = lit(capacity=Capacity(3.5, tokens_per_s=100.0))
DECISION = Decision(
    "m", T0, None, Rung.COLD, Reason.UNKNOWN_HOLD, math.inf, "kpa", {"a": 1.5}, (Reason.MAX_REPLICAS,)
)
STATE = State("kpa", {"x": 1.0}, ((T0, 1.0), (T0 + 1, 2.0)), (0.0, 3.0))
VALUES = [
    SPEC,
    FORECAST,
    OBSERVATION,
    DECISION,
    STATE,
    Spec("m"),
    Observation(T0),
    State(),
    Forecast(T0, "x"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_there_and_back(value: object) -> None:
    text = to_json(value)
    back = from_json(type(value), text)
    assert back == value
    assert type(back) is type(value)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_rungs_and_reasons_are_words() -> None:
    plain = to_plain(DECISION)
    assert (plain["rung"], plain["reason"], plain["clamps"], plain["until_s"]) == (
        "cold",
        "unknown-hold",
        ["max-replicas"],
        "inf",
    )


def test_what_is_not_finite_survives() -> None:
    back = from_json(Observation, to_json(replace(OBSERVATION, queued=math.nan, now_s=-math.inf)))
    assert back.queued is not None and math.isnan(back.queued)
    assert back.now_s == -math.inf


@settings(max_examples=200)
@given(
    st.dictionaries(st.text(max_size=5), st.floats()),
    st.lists(st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)), max_size=4),
)
def test_any_memory_goes_through(values: dict[str, float], series: list[tuple[float, float]]) -> None:
    state = State("p", values, tuple(series))
    back = from_json(State, to_json(state))
    assert back.series == state.series
    assert repr(back.values) == repr(state.values)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (Spec, {"wait_cost": None}, ["Spec.wait_cost", "None", "number"]),
        (Spec, {"min_replicas": 1.5}, ["Spec.min_replicas", "1.5", "whole"]),
        (Spec, {"park": 1}, ["Spec.park", "1", "true or false"]),
        (Spec, {"params": {"x": "y"}}, ["Spec.params.x", "'y'"]),
        (Spec, {"windows": [{"start_s": 1}]}, ["windows", "end_s", "missing"]),
        (Spec, {"model": 3}, ["Spec.model", "3", "string"]),
        (Spec, {"modle": "x"}, ["'modle'", "model"]),
    ],
)
def test_what_is_wrong_is_named(kind: type, changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(CodecError) as caught:
        from_plain(kind, {"model": "m", **changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_what_is_no_object_is_no_value(data: object) -> None:
    with pytest.raises(CodecError):
        from_plain(State, data)


def test_pairs_are_pairs() -> None:
    with pytest.raises(CodecError, match="list of 2"):
        from_plain(State, {"series": [[1.0, 2.0, 3.0]]})


def test_what_people_are_told_may_be_anything() -> None:
    odd = Forecast(T0, "x", details={"rung": Rung.PARKED, "set": {1}, "nan": math.nan})
    plain = to_plain(odd)
    json.dumps(plain, allow_nan=False)
    assert plain["details"]["nan"] == "nan"


def test_profiles_keep_their_order() -> None:
    assert from_json(Observation, to_json(OBSERVATION)).rungs == RUNGS
