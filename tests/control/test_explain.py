"""Why a model has the replicas that it has, in words."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoscaling.core.decide import decide
from autoscaling.core.policies import POLICIES
from autoscaling.core.types import Decision, Observation, Reason, Rung, Spec, State, Window
from autoscaling.live.api.reasons import _CLAMPS, Facts, clamp_sentence, sentence
from autoscaling.live.api.words import count, duration, gpu_s, moment, percent
from tests.control.lab import NOW_S, RUNGS, SMALL, Lab

SPEC = Spec(SMALL, min_replicas=1, max_replicas=4, wait_cost=10.0)
SEEN = Observation(NOW_S, 1, 0, 1, 0, 2, 0, NOW_S - 9, NOW_S - 9, Rung.TEMPLATE, RUNGS)


def facts(
    reason: Reason, spec: Spec = SPEC, seen: Observation = SEEN, replicas: int | None = 1, **numbers: float
) -> Facts:
    decision = Decision(SMALL, NOW_S, replicas, Rung.TEMPLATE, reason, NOW_S + 60, "predictive", numbers)
    return Facts(spec, seen, decision, NOW_S, UTC)


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_its_sentence(reason: Reason) -> None:
    """Also where no number is known: it begins with a capital, ends with a full stop, names no field of the code."""
    text = sentence(reason, facts(reason))
    text = text[:1].upper() + text[1:]
    assert re.fullmatch(r"[A-Z0-9].*\.", text), text
    assert "None" not in text and "nan" not in text
    assert reason.value == reason.value.lower()
    others = {sentence(other, facts(other)) for other in Reason if other is not reason}
    assert sentence(reason, facts(reason)) not in others or reason in (
        Reason.MIN_REPLICAS,
        Reason.MAX_REPLICAS,
    )


def test_every_bound_has_its_sentence() -> None:
    for reason in _CLAMPS:
        assert clamp_sentence(reason, facts(reason)).endswith(".")


@pytest.mark.parametrize(
    ("reason", "numbers", "said"),
    [
        (
            Reason.DEMAND,
            {"load": 40.0, "per_replica": 16.0, "need_replicas": 3.0},
            "40 requests are in progress or waiting, one replica carries 16, so 3 replicas are needed.",
        ),
        (
            Reason.DEMAND,
            {"load": 1.0, "target": 16.0, "need_replicas": 1.0},
            "1 request is in progress or waiting, one replica carries 16, so 1 replica is needed.",
        ),
        (
            Reason.KEEP_ALIVE,
            {"keep_alive_s": 60.0, "idle_s": 12.0},
            "for 12 s; an idle replica is kept for 1 min.",
        ),
        (
            Reason.KEEP_ALIVE,
            {"break_even_idle_s": 90.0, "idle_s": 12.0},
            "as much as a cold start would: when it has been idle for 1 min 30 s",
        ),
        (Reason.KEEP_ALIVE, {"keep_alive_until_idle_s": 7200.0, "idle_s": 12.0}, "has been idle for 2 h"),
        (
            Reason.PREWARM,
            {"p_arrival_in_lead": 0.42, "lead_s": 2.4, "prewarm_cost_gpu_s": 3.0, "dark_cost_gpu_s": 9.5},
            "within the 2.4 s that a start takes is 42 %. Expected cost from now on, with a second of waiting at "
            "10 GPU-s (wait_cost): starting it now 3 GPU-s, leaving it dark 9.5 GPU-s.",
        ),
        (
            Reason.PREWARM,
            {"prewarm_window_s": 600.0, "idle_s": 500.0},
            "after 10 min or more",
        ),
        (
            Reason.FORECAST_DEMAND,
            {"forecast_replicas": 3.0, "need_replicas": 1.0},
            "3 replicas then, 1 replica now.",
        ),
        (Reason.GPU_BUDGET, {"wanted_replicas": 4.0}, "Without this bound there would be 4 replicas."),
        (Reason.MIN_REPLICAS, {}, "min_replicas is 1"),
        (Reason.MAX_REPLICAS, {"proposed_replicas": 9.0}, "Without this bound there would be 9 replicas."),
    ],
)
def test_a_sentence_has_the_numbers(reason: Reason, numbers: dict[str, float], said: str) -> None:
    assert said in sentence(reason, facts(reason, **numbers))


def test_what_is_unknown_is_named() -> None:
    seen = replace(SEEN, ready=None, queued=None)
    text = sentence(Reason.UNKNOWN_HOLD, facts(Reason.UNKNOWN_HOLD, seen=seen, replicas=None))
    assert "replicas that are ready, requests that wait" in text


def test_a_request_that_waits_is_named() -> None:
    seen = replace(SEEN, ready=0, queued=3, in_flight=0)
    assert sentence(Reason.WAKE, facts(Reason.WAKE, seen=seen)).startswith(
        "3 requests wait and no replica is ready"
    )


def test_a_window_says_what_it_asks_for() -> None:
    spec = replace(
        SPEC,
        windows=(
            Window(NOW_S - 10, NOW_S + 10, 2, source="schedule"),
            Window(NOW_S + 2, NOW_S + 10, 0, Rung.PARKED, source="schedule"),
            Window(NOW_S + 500, NOW_S + 600, 9, source="schedule"),
            Window(NOW_S - 10, NOW_S + 10, 3, source="prewarm"),
        ),
    )
    assert sentence(Reason.SCHEDULE, facts(Reason.SCHEDULE, spec)) == (
        "A schedule asks for 2 replicas and the rung parked to be ready now."
    )
    assert (
        sentence(Reason.MANUAL, facts(Reason.MANUAL, spec))
        == "Somebody asked for 3 replicas to be ready now."
    )


def test_the_whole_explanation(lab: Lab) -> None:
    lab.idle()
    lab.ok("PUT", f"policies/{SMALL}", {"wait_cost": 5.0, "for_s": 600.0})
    answer = lab.ok("GET", f"explain/{SMALL}", timezone="Europe/Berlin")
    override = answer["overrides"][0]["id"]
    assert answer["text"] == [
        "smollm2-135m has 1 replica ready (0 requests in progress, 0 waiting).",
        "It should have 1 replica. The policy `predictive` decides.",
        "It has been idle for 40 s, but a replica is kept for what may come. The chance that one comes within the "
        "2.4 s that a start takes is 12 %. Expected cost from now on, with a second of waiting at 5 GPU-s (wait_cost): "
        "keeping it 20.5 GPU-s, leaving it dark 31.2 GPU-s.",
        "From where it is a start takes 1.8 s, nine of ten within 2.4 s (measured on 12 starts).",
        "If nothing happens, this stands until 07:03:20 (in 3 min 20 s).",
        f"Policy set by ann@lab at 07:00:00 until 07:10:00: wait_cost 5 (`relight undo {override}` takes it back).",
    ]
    assert answer["decision"]["reason"] == "keep-alive"
    assert answer["observation"]["rungs"][0]["rung"] == "template"


def test_a_model_that_is_dark_bounded_or_not_acted_on(lab: Lab) -> None:
    lab.idle(
        replicas=0, rung=Rung.PARKED, reason=Reason.PARK, until_s=float("inf"), clamps=(Reason.GPU_BUDGET,)
    )
    lab.view.seen[SMALL] = replace(lab.view.seen[SMALL], ready=0, target=0, rung=Rung.PARKED)
    lab.ok("PUT", "mode", {"mode": "shadow"})
    text = lab.ok("GET", f"explain/{SMALL}")["text"]
    assert "has no replica; it is parked: its engine waits in host memory" in text[0]
    assert text[1].startswith("It should have no replica, and be kept parked.")
    assert any("GPUs that all models together may hold" in line for line in text)
    assert "This stands until something happens: a request, or a new forecast." in text
    assert any("mode is shadow: it only records this" in line for line in text)


def test_what_people_said_is_told_with_how_to_take_it_back(lab: Lab) -> None:
    lab.idle()
    made = lab.ok("POST", "prewarms", {"model": SMALL, "start_s": NOW_S + 3600, "end_s": NOW_S + 7200})
    text = lab.ok("GET", f"explain/{SMALL}", timezone="Europe/Berlin")["text"]
    assert text[-1] == (
        "Prewarm made by ann@lab at 07:00:00 until 09:00:00: replicas 1, rung serving from 08:00:00 to 09:00:00 "
        f"(`relight undo {made['prewarm']['id']}` takes it back)."
    )
    lab.ok("PUT", "mode", {"mode": "off"})
    text = lab.ok("GET", f"explain/{SMALL}")["text"]
    assert any("mode is off: the replicas follow the requests" in line for line in text)


def test_a_model_that_was_never_seen(lab: Lab) -> None:
    text = lab.ok("GET", f"explain/{SMALL}")["text"]
    assert text == [
        f"{SMALL}: how many replicas are ready is not known.",
        "The controller has not decided on it yet.",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (45, "45 s"),
        (59.6, "1 min"),
        (90, "1 min 30 s"),
        (3600, "1 h"),
        (3661, "1 h 1 min"),
        (90000, "1 d 1 h"),
        (86400 * 3 + 30, "3 d"),
        (float("inf"), "for ever"),
        (-5, "-5 s"),
    ],
)
def test_durations_in_words(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_numbers_in_words() -> None:
    assert [count(1, "replica"), count(2, "replica"), count(0, "is", "are")] == [
        "1 replica",
        "2 replicas",
        "0 are",
    ]
    assert [gpu_s(0.5), gpu_s(340), gpu_s(1234), gpu_s(7200)] == [
        "0.5 GPU-s",
        "340 GPU-s",
        "1234 GPU-s",
        "2.0 GPU-h",
    ]
    assert [percent(0), percent(0.004), percent(0.5), percent(0.999), percent(1)] == [
        "0 %",
        "under 1 %",
        "50 %",
        "over 99 %",
        "100 %",
    ]
    assert moment(NOW_S, NOW_S) == "06:00:00 UTC"
    assert moment(NOW_S + 86400, NOW_S) == "Wed 2026-11-25 06:00 UTC"


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    ready=st.one_of(st.none(), st.integers(0, 3)),
    queued=st.integers(0, 40),
    in_flight=st.integers(0, 40),
    idle_s=st.one_of(st.none(), st.floats(0, 1e6)),
    rung=st.one_of(st.none(), st.sampled_from(Rung)),
    forecast=st.sampled_from(["none", "sparse", "dense"]),
    mode=st.sampled_from(["active", "shadow", "off"]),
    window=st.booleans(),
    steps=st.integers(1, 3),
)
def test_whatever_is_decided_is_explained(  # noqa: PLR0917
    lab: Lab,
    policy: str,
    ready: int | None,
    queued: int,
    in_flight: int,
    idle_s: float | None,
    rung: Rung | None,
    forecast: str,
    mode: str,
    window: bool,
    steps: int,
) -> None:
    """Decisions of the core itself, a few in a row: whole sentences, no number that nobody can read."""
    spec = replace(SPEC, policy=policy, min_replicas=0)
    if window:
        spec = replace(
            spec, windows=(Window(NOW_S - 5, NOW_S + 50, 2), Window(NOW_S, NOW_S + 9, 0, Rung.PARKED))
        )
    lab.view.forecasts.clear()
    if forecast != "none":
        (lab.sparse if forecast == "sparse" else lab.dense)()
    busy_s = None if idle_s is None else NOW_S - idle_s
    state, decision = State(), None
    for step in range(steps):
        lab.clock.time_s = NOW_S + 7 * step
        seen = Observation(
            *(lab.clock.time_s, ready, 0, ready, queued, in_flight, 0, busy_s, busy_s, rung), rungs=RUNGS
        )
        state, decision = decide(spec, state, seen, lab.view.forecast(SMALL))
        lab.view.seen[SMALL], lab.view.decided[SMALL] = seen, decision
    lab.view.base = {SMALL: spec}
    lab.view.fleet_mode = mode
    text = lab.ok("GET", f"explain/{SMALL}")["text"]
    assert len(text) >= 3
    for line in text:
        assert re.match(r"[A-Z0-9]|smollm2", line), line
        assert line.endswith("."), line
        assert not re.search(r"None|\bnan\b|\binf\b|\{|\b1 (replicas|requests|starts)\b", line), line
    lab.clock.time_s = NOW_S
