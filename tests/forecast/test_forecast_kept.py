"""What the fleet has learned outlives a restart: through what the store keeps, and without counting anything twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from made_traffic import DAY_S, START_S, Floats, traffic

from autoscaling.core.codec import from_json, to_json
from autoscaling.core.types import State
from autoscaling.forecast.book import Book
from autoscaling.forecast.fit import FittedModel, Job, Seen, fit_standard
from autoscaling.forecast.hazard import LEAST_SILENCES, ROUNDS, Rows, Told, bands, design, offset
from autoscaling.forecast.kept import OLDEST_S, UnusableError, to_prior, to_state
from autoscaling.forecast.pool import KEPT_EVERY_S, Pool
from autoscaling.forecast.prior import NO_FLEET, Prior, pooled
from autoscaling.forecast.schedule import Next, Schedule

NOW_S = START_S + 5 * DAY_S
MODELS = 8


def times(seed: int) -> Floats:
    """A session every few hours, of some requests half a minute apart."""
    random = np.random.default_rng(seed)
    begins = START_S + np.cumsum(random.exponential(3 * 3600, 60))
    found = np.concatenate([begin + np.cumsum(15 + random.exponential(20, 6)) for begin in begins])
    return np.sort(found[found < NOW_S])


def first_fits(prior: Prior, now_s: float = NOW_S) -> list[FittedModel]:
    """As right after a start: of all that history tells."""
    found = [fit_standard(Job(traffic(times(i), now_s), now_s, 60.0, prior)) for i in range(MODELS)]
    return [each for each in found if each is not None]


def fleet() -> Prior:
    """Of a process that has run for a while: the regression has settled, and has seen how well it foretells."""
    prior = NO_FLEET
    for _ in range(ROUNDS + 4):
        prior = pooled((each.share for each in first_fits(prior)), prior)
    told = Told(prior.hazard.told.foretold + 30.0, prior.hazard.told.came + 90.0, NOW_S)
    return replace(prior, hazard=replace(prior.hazard, told=told, correction=told.correction))


@pytest.fixture(scope="module")
def prior() -> Prior:
    found = fleet()
    assert found.hazard.knows
    return found


@pytest.fixture
def state(prior: Prior) -> State:
    return to_state(prior)


def changed(state: State, numbers: Sequence[float] | None = None, **values: float) -> State:
    return replace(
        state,
        values={**state.values, **values},
        histogram=state.histogram if numbers is None else tuple(numbers),
    )


def test_it_comes_back_as_it_was(prior: Prior, state: State) -> None:
    """Through JSON of some kilobytes; the regression rests on what it rested on."""
    text = to_json(state)
    assert len(text) < 14_000
    back = to_prior(from_json(State, text), NOW_S)
    assert (back.models, back.hazard.round, back.odds) == (prior.models, prior.hazard.round, prior.odds)
    assert back.hazard.silences == prior.hazard.silences
    assert back.service_s == prior.service_s
    assert back.season is not None and prior.season is not None
    for one, other in (
        (back.hazard.coefficients, prior.hazard.coefficients),
        (back.hazard.correction, prior.hazard.correction),
        (back.gaps, prior.gaps),
        (back.season, prior.season),
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_a_fleet_without_a_season_or_service_times_has_comes_back(prior: Prior) -> None:
    thin = replace(prior, season=None, service_s=None, odds={})
    back = to_prior(to_state(thin), NOW_S)
    assert (back.season, back.service_s, back.odds) == (None, None, {})


def test_it_counts_less_with_its_age(state: State, prior: Prior) -> None:
    """As all that is learned does; its correction, which is about the present, fades first."""
    later = to_prior(state, NOW_S + OLDEST_S / 4)
    assert later.hazard.silences == pytest.approx(prior.hazard.silences * 0.5**0.25)
    assert (abs(later.hazard.correction) < 0.99 * abs(prior.hazard.correction)).all()
    assert (abs(later.hazard.correction) > 0).all()


@pytest.mark.parametrize(
    ("later_s", "said"), [(OLDEST_S + 60, "14.0 days old"), (-3600.0, "days old"), (30 * DAY_S, "30.0 days")]
)
def test_what_is_of_another_time_is_not_used(state: State, later_s: float, said: str) -> None:
    """Of a fleet that may be another by now, or of a clock that was ahead: it would outweigh all that is to come."""
    with pytest.raises(UnusableError, match=said):
        to_prior(state, NOW_S + later_s)


def test_clocks_of_two_machines_may_differ_a_little(state: State) -> None:
    assert to_prior(state, NOW_S - 5).hazard.told.until_s == NOW_S - 5


@pytest.mark.parametrize("name", ["version", "features", "bands", "bins"])
def test_another_versions_is_not_used(state: State, name: str) -> None:
    with pytest.raises(UnusableError, match="another version"):
        to_prior(changed(state, **{name: state.values[name] + 1}), NOW_S)


def test_what_is_broken_is_not_used(state: State) -> None:
    numbers = state.histogram
    broken = [
        State(),
        changed(state, numbers[:-1]),
        changed(state, ()),
        changed(state, [float("nan"), *numbers[1:]]),
        changed(state, [*numbers[:-1], float("inf")]),
        changed(state, [*numbers[:-1], -1.0]),
        changed(state, [1e300, *numbers[1:]]),
        changed(state, [*numbers[:-200], *[1e308] * 200]),
        changed(state, [*numbers[:150], *[0.0] * (len(numbers) - 150)]),
        *(changed(state, **{name: -1.0}) for name in ("round", "silences", "models", "service_s")),
        *(changed(state, **{name: float("nan")}) for name in ("until_s", "round", "odds:fleet")),
        replace(state, values={k: v for k, v in state.values.items() if k != "round"}),
    ]
    for each in broken:
        with pytest.raises(UnusableError):
            to_prior(each, NOW_S)


def test_features_of_another_meaning_are_of_another_version() -> None:
    """If this fails, `kept.VERSION` must be raised: coefficients are kept by their place."""
    n = 40
    at = np.linspace(0.0, 1.0, n)
    rows = Rows(
        counts=np.outer(at, [1.0, 2.0, 3.0, 4.0, 5.0]) * 4,
        onsets_s=np.exp(np.outer(1 + at, [3.0, 4.0, 5.0])),
        age_s=np.geomspace(10.0, 1e5, n),
        time_s=START_S + at * 2e5,
        own=np.stack([-3 + 2 * at, at * 3, at, at**2], axis=1),
        typical=4 + 5 * at,
        known=100 * at,
        day=np.outer(at, [1.0, 2.0, 1.5]),
    )
    found = design(rows)
    mark = float((found @ np.sin(np.arange(found.shape[1]))) @ np.cos(np.arange(n)))
    by_band = float(bands(rows.age_s, np.linspace(-10.0, 0.0, n)) @ np.cos(np.arange(n)))
    assert (mark, by_band, float(offset(rows.age_s).sum())) == pytest.approx(MARK)


MARK = (7.5347174527772856, 20.611004290684544, -312.95491673045086)


# After a restart


def test_the_first_fit_after_a_restart_goes_by_the_fleet(state: State) -> None:
    """For each model, whichever comes first; and from nothing, none does."""
    pool = Pool()
    pool.restore(state, NOW_S)
    known, unknown = first_fits(pool.prior), first_fits(NO_FLEET)
    assert all("fleet" in each.scores["next_arrival"] for each in known)
    assert sum(each.arrivals.name == "fleet" for each in known) > MODELS / 2
    assert not any(each.arrivals.name == "fleet" for each in unknown)


def test_the_first_models_do_not_outvote_what_all_had_told(state: State, prior: Prior) -> None:
    """Nothing moves until each had its turn; then it goes a step on, from what history tells alone."""
    pool = Pool()
    pool.restore(state, NOW_S)
    fits = first_fits(pool.prior)
    begun = pool.prior
    pool.next([each.share for each in fits[:1]], 0.0, complete=False)
    assert pool.prior is begun
    assert pool.kept is None
    pool.next([each.share for each in fits], 30.0, complete=True)
    hazard = pool.prior.hazard
    assert hazard.knows
    assert hazard.round == begun.hazard.round + 1
    assert hazard.silences == pytest.approx(sum(each.learned.hazard.silences for each in fits), rel=1e-6)
    # The same history, so the same as what was kept, but for what is not yet settled.
    assert abs(hazard.coefficients - prior.hazard.coefficients).max() < 0.1


def test_how_well_it_foretold_is_told_once(state: State, prior: Prior) -> None:
    """What the coefficients were learned from says nothing of that, and it is not known from history."""
    pool = Pool()
    pool.restore(state, NOW_S)
    fits = first_fits(pool.prior)
    assert not any(each.learned.hazard.foretold.any() or each.learned.hazard.came.any() for each in fits)
    pool.next([each.share for each in fits], 0.0, complete=True)
    np.testing.assert_allclose(pool.prior.hazard.correction, prior.hazard.correction, rtol=1e-4, atol=1e-4)
    # What comes from now on is.
    later_s = NOW_S + DAY_S / 2
    quiet = [
        fit_standard(Job(traffic(times(i), later_s), later_s, 60.0, pool.prior, Seen(fit, (), fit.recent)))
        for i, fit in enumerate(fits)
    ]
    shares = [each.share for each in quiet if each is not None]
    assert all(each.hazard is not None and each.hazard.foretold.sum() > 0 for each in shares)
    before = pool.prior.hazard.told
    pool.next(shares, 900.0, complete=True)
    told = pool.prior.hazard.told
    assert told.until_s == later_s
    assert told.came.sum() < before.came.sum()
    # And through another restart, no more than that.
    assert pool.kept is not None
    again = to_prior(pool.kept, later_s).hazard
    np.testing.assert_allclose(again.correction, pool.prior.hazard.correction, rtol=1e-4, atol=1e-4)


def test_what_is_kept_is_made_anew_only_when_that_is_worth_writing() -> None:
    """At each step of the regression, and else every quarter of an hour."""
    pool = Pool()
    fits = first_fits(NO_FLEET)
    pool.next([], 0.0, complete=True)
    assert pool.kept is None
    pool.next([each.share for each in fits], 0.0, complete=True)
    first = pool.kept
    assert first is not None and first.values["round"] == 1
    pool.next([each.share for each in fits], 30.0, complete=True)
    assert pool.kept is first
    pool.next([each.share for each in fits], KEPT_EVERY_S, complete=True)
    assert pool.kept == first
    pool.next([each.share for each in first_fits(pool.prior)], KEPT_EVERY_S + 30, complete=True)
    assert pool.kept is not None and pool.kept.values["round"] == 2


def test_what_comes_late_is_used_where_less_is_known(state: State, prior: Prior) -> None:
    """A store that could not be reached at the start."""
    pool = Pool()
    pool.next([each.share for each in first_fits(NO_FLEET)], 0.0, complete=True)
    pool.restore(changed(state, silences=LEAST_SILENCES / 2), NOW_S)
    assert pool.prior.hazard.round == 1
    pool.restore(state, NOW_S)
    assert pool.prior.hazard.knows
    # The fits before it tell nothing of where it goes from there, and are to be made again.
    assert pool.next([each.share for each in first_fits(NO_FLEET)], 30.0, complete=True)
    assert not pool.next([each.share for each in first_fits(NO_FLEET)], 60.0, complete=True)
    assert pool.prior.hazard.round == prior.hazard.round
    assert pool.prior.hazard.knows
    pool.restore(changed(state, round=99.0), NOW_S)
    assert pool.prior.hazard.round == prior.hazard.round


def test_a_fleet_with_history_takes_its_first_steps_one_after_the_other() -> None:
    """Each asks for fits around it, up to the first around what is known; then they are made as they come.

    One that knows little waits for more.
    """
    pool = Pool()
    asked = []
    for step in range(ROUNDS + 2):
        shares = [each.share for each in first_fits(pool.prior)]
        asked.append(pool.next(shares, 30.0 * step, complete=True))
        assert pool.prior.hazard.round == step + 1
        assert not pool.next(shares, 30.0 * step + 15, complete=True)
    assert asked == [True] * (ROUNDS + 1) + [False]
    assert pool.prior.hazard.knows
    young = Pool()
    assert not young.next([fit.share for fit in first_fits(NO_FLEET)[:1]], 0.0, complete=True)
    assert young.prior.hazard.round == 1


def test_whose_regression_is_another_chooses_anew_though_little_has_come() -> None:
    """What was chosen by its first coefficients would stand until there are half as many silences more."""
    book = Book()
    first, *_ = first_fits(NO_FLEET)
    book.install("m", first)
    later_s = NOW_S + 900
    again, anew = [], []
    for found in (again, anew):
        fit = fit_standard(Job(traffic(times(0), later_s), later_s, 60.0, NO_FLEET, book.begin_fit("m")))
        assert fit is not None
        found.append(fit)
        book.choose_again()
    assert again[0].scores["next_arrival"] is first.scores["next_arrival"]
    assert anew[0].scores["next_arrival"] is not first.scores["next_arrival"]
    assert anew[0].chosen_at == first.known_silences


def test_after_a_restart_nothing_is_hurried(state: State) -> None:
    pool = Pool()
    pool.restore(state, NOW_S)
    assert not pool.next([each.share for each in first_fits(pool.prior)], 0.0, complete=True)


def test_who_is_hurried_comes_after_the_new_ones_and_not_thoroughly() -> None:
    schedule = Schedule(3)
    schedule.watch(["a", "b"])
    for model in ("a", "b"):
        schedule.next(0.0)
        schedule.done(model, 0.0, wants_full=True, sticky=False, effort=1, cost_s=0.01)
    schedule.watch(["a", "b", "new"])
    schedule.hurry(30.0)
    assert [schedule.next(30.0) for _ in range(4)] == [Next("new", 1), Next("a", 1), Next("b", 1), None]
    schedule.hurry(31.0)
    assert schedule.next(31.0) is None  # all of them are being fitted


def test_each_model_has_had_its_turn_whatever_came_of_it() -> None:
    schedule = Schedule(2)
    schedule.watch(["fitted", "new", "away", "failing"])
    for _ in range(4):
        schedule.next(0.0)
    schedule.done("fitted", 0.0, wants_full=False, sticky=False, effort=1, cost_s=0.0)
    schedule.nothing("new", 0.0)
    schedule.put_off("away", 0.0, "the store is away")
    assert schedule.failed("failing", 0.0, 0, "hung")
    assert not schedule.all_tried
    assert not schedule.failed("failing", 0.0, 1, "hung too")
    assert schedule.all_tried
