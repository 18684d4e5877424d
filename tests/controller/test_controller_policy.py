"""The policy inside Serve: follows the plan, then the load, and never raises."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from autoscaling.core.codec import to_json
from autoscaling.core.plan import Entry, Plan
from autoscaling.core.plan import to_json as plan_json
from autoscaling.core.types import Reason, Rung, Spec
from autoscaling.live import plan_store, policy
from autoscaling.live.following import Follower
from autoscaling.live.plan_store import PLAN_KEY, SEEN_KEY, PlanReader
from tests.controller.lab import NOW_S, HandClock, spec

GRACE_S = 5.0


class Kv(dict[bytes, bytes]):
    """The GCS's; `fails` makes it unreachable."""

    fails = False

    def read(self, key: bytes) -> bytes | None:
        if self.fails:
            raise ConnectionError("the GCS is away")
        return self.get(key)

    def write(self, key: bytes, value: bytes) -> None:
        if self.fails:
            raise ConnectionError("the GCS is away")
        self[key] = value


class Place:
    """One policy, its reader, and what Serve tells it."""

    def __init__(self, base: Spec | None = None) -> None:
        self.kv = Kv()
        self.clock = HandClock()
        self.reader = PlanReader(get=self.kv.read, put=self.kv.write, clock=self.clock)
        self.base = base or spec(max_replicas=8)
        self.now_s = NOW_S
        self.target = 0
        self.ready = 0
        self.begin()

    def begin(self) -> None:
        """The Serve controller starts."""
        self.follower = Follower("m", to_json(self.base), grace_s=GRACE_S, reader=lambda: self.reader)

    def publish(self, replicas: int | None, spec: Spec | None = None, for_s: float = 10.0) -> None:
        entry = Entry(replicas, Rung.TEMPLATE, Reason.PREWARM, NOW_S + 1e6, spec or self.base)
        self.kv[PLAN_KEY] = plan_json(Plan(self.now_s, self.now_s + for_s, {"m": entry})).encode()
        self.reader.read_once()

    def ask(self, requests: float = 0.0, queued: float = 0.0, after_s: float = 0.1, **changes: Any) -> int:
        """Serve's next call, with its own counts; it does as it is told at once."""
        self.now_s += after_s
        self.clock.go(after_s)
        ctx = SimpleNamespace(
            current_time=self.now_s,
            current_num_replicas=self.ready,
            target_num_replicas=self.target,
            total_num_requests=requests,
            total_queued_requests=queued,
        )
        for name, value in changes.items():
            setattr(ctx, name, value)
        self.target = self.ready = self.follower.replicas(ctx)
        return self.target


@pytest.fixture
def place() -> Place:
    return Place()


def test_the_plan_is_followed_up_and_down(place: Place) -> None:
    """Without a request, and without Serve's delays."""
    place.publish(2)
    assert place.ask() == 2
    place.publish(0)
    assert place.ask() == 0


def test_more_requests_than_planned_for_are_served_at_once(place: Place) -> None:
    """The plan is a second old; the load is now."""
    place = Place(spec(max_replicas=4, target_ongoing_requests=2.0))
    place.publish(1)
    assert place.ask(requests=6.0) == 3
    assert place.ask(requests=100.0) == 4


def test_a_fixed_number_of_replicas_is_fixed() -> None:
    """However many requests come: `fixed` is always as many."""
    place = Place(spec(policy="fixed", params={"replicas": 2.0}, max_replicas=8, target_ongoing_requests=2.0))
    place.publish(2)
    assert place.ask(requests=100.0) == 2


def test_an_expired_plan_is_not_followed(place: Place) -> None:
    """The load decides then; the idle time begins when the plan last wanted a replica."""
    place.publish(1, for_s=10)
    assert place.ask() == 1
    assert place.ask(after_s=9.0) == 1
    assert place.ask(after_s=5.0) == 1
    assert place.follower.health.following == "reactive"
    assert [place.ask(after_s=2.0) for _ in range(10)][-1] == 0


def test_what_was_overridden_holds_after_the_plan_has_expired(place: Place) -> None:
    """Bounds that people set do not fall back to those of the fleet file when the controller is killed."""
    place.publish(1, spec(min_replicas=1, max_replicas=3))
    assert place.ask() == 1
    assert [place.ask(after_s=30.0) for _ in range(10)] == [1] * 10
    assert place.follower.health.following == "reactive"


def test_a_plan_without_an_opinion_leaves_it_to_the_load(place: Place) -> None:
    """As in the modes shadow and off."""
    place.publish(None)
    assert place.ask(after_s=GRACE_S) == 0
    place.publish(None)
    assert place.ask(requests=1.0, queued=1.0) == 1


def test_after_a_restart_of_serve_nothing_goes_before_anything_is_known() -> None:
    """Serve has forgotten its handles' requests; the plan has not been read."""
    place = Place(spec(max_replicas=8, keep_alive_s=1.0))
    place.target = place.ready = 3
    assert [place.ask(after_s=1.0) for _ in range(int(GRACE_S))] == [3] * int(GRACE_S)
    assert place.follower.health.following == "grace"
    assert place.ask(after_s=1.0) == 0


def test_after_a_restart_of_serve_the_plan_goes_on(place: Place) -> None:
    """At once, down too: it was made by one who was not restarted."""
    place.publish(1)
    place.begin()
    place.target = place.ready = 3
    assert place.ask() == 1


def test_one_that_was_busy_when_serve_was_killed_is_kept_for_its_idle_time(place: Place) -> None:
    """When it was last busy nobody knows any more: it counts from the restart."""
    place.target = place.ready = 1
    assert place.ask() == 1
    assert place.ask(after_s=8.0) == 1
    assert place.ask(after_s=8.0) == 0


BROKEN: list[Callable[[Place], Any]] = [
    lambda p: p.ask(current_time=None),
    lambda p: p.ask(current_time=float("nan")),
    lambda p: p.ask(total_num_requests="many"),
    lambda p: p.ask(requests=float("nan")),
    lambda p: p.ask(requests=float("inf")),
]


@pytest.mark.parametrize("breaking", BROKEN)
def test_it_never_raises_and_holds_what_there_is(place: Place, breaking: Callable[[Place], Any]) -> None:
    """An error in a policy stops every application that Serve runs."""
    place.publish(2)
    place.ask()
    assert breaking(place) == 2
    place.publish(2)
    assert place.ask() == 2


def test_its_errors_are_counted_and_told(place: Place) -> None:
    """Through the KV, where the controller shows them."""
    place.ask(current_time=None)
    place.reader.tell_once()
    told = plan_store.json.loads(place.kv[SEEN_KEY])["policies"]["m"]
    assert told["errors"] == 1
    assert "TypeError" in told["last_error"]
    assert told["following"] == "held"


def test_a_spec_that_is_none_holds_until_a_plan_brings_one() -> None:
    """One of another release, say."""
    place = Place()
    place.follower = Follower("m", "{}", grace_s=GRACE_S, reader=lambda: place.reader)
    place.target = place.ready = 2
    assert place.ask(after_s=60) == 2
    assert place.follower.health.errors == 1
    place.publish(1)
    assert place.ask() == 1


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"version": 99}', b"\xff"])
def test_a_plan_that_is_none_leaves_the_last_one_until_it_expires(place: Place, text: bytes) -> None:
    """And is told."""
    place.publish(2)
    place.kv[PLAN_KEY] = text
    place.reader.read_once()
    assert place.reader.known.errors == 1
    assert place.reader.known.last_error
    assert place.ask() == 2


def test_while_the_gcs_is_away_the_last_plan_stands(place: Place) -> None:
    """The reader outlives it and goes on."""
    place.publish(2)
    place.kv.fails = True
    place.reader.read_once()
    place.reader.tell_once()
    assert place.reader.known.errors == 1
    assert place.ask() == 2
    place.kv.fails = False
    place.publish(1)
    assert place.ask() == 1


def test_that_there_is_no_plan_is_known_only_once_it_was_looked_for(place: Place) -> None:
    """An empty KV is knowledge; one that can't be reached is not."""
    place.kv.fails = True
    place.reader.read_once()
    assert not place.reader.known.read
    place.kv.fails = False
    place.reader.read_once()
    assert place.reader.known.read
    assert place.reader.known.plan is None


def test_all_policies_of_a_process_share_one_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though Ray pickles the policy's module by value, so that each policy has a copy of its own."""
    started: list[PlanReader] = []
    monkeypatch.setattr(plan_store, "_shared", None)
    monkeypatch.setattr(PlanReader, "start", lambda reader: started.append(reader))  # noqa: PLW0108 - bound
    cloudpickle.register_pickle_by_value(policy)
    try:
        pickled = cloudpickle.dumps(policy.RelightPolicy)
    finally:
        cloudpickle.unregister_pickle_by_value(policy)
    policies = [cloudpickle.loads(pickled)(name, to_json(spec(name))) for name in ("a", "b")]
    (reader,) = started
    assert set(reader.health) == {"a", "b"}
    assert {each._follower._reader for each in policies} == {reader}
