"""Finds a policy's parameters on the first part of a trace, and says on the rest what they are worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from autoscaling.core.policies import POLICIES
from autoscaling.sim.compare import (
    KEEPS,
    SAME,
    SPEC_FIELDS,
    Base,
    SettingError,
    Variant,
    check,
    compare,
    rows_of,
    sampled,
)
from autoscaling.sim.evidence import Saving, saving_of
from autoscaling.sim.report import Report
from autoscaling.traces import until

if TYPE_CHECKING:
    import optuna

MEASURES: Mapping[str, str] = {
    "total_cost_gpu_s": "GPU-seconds, and wait_cost for each second of waiting",
    "gpu_s": "GPU-seconds; use it with a bound on what users see",
    "waited_s": "request-seconds of waiting",
    "cold_starts": "starts from zero that somebody waited for",
}
LOGARITHMIC = 20.0
"""A parameter whose bounds are so many times apart is searched by its logarithm."""
BATCH = 4
"""Settings that are tried at once, on however many cores, so that the same seed finds the same everywhere."""
LEARNED = 2 / 3
"""Of the trace, where it is not said how much."""
LIVE_FIELDS = ("wait_cost", "keep_alive_s", "target_ongoing_requests")
"""Of SPEC_FIELDS, what a policy file says. How many replicas a model may have is not the policy's to say."""


@dataclass(frozen=True)
class Range:
    """Where a parameter is looked for."""

    name: str
    low: float
    high: float
    whole: bool = False


@dataclass(frozen=True)
class Tuned:
    """What was found."""

    variant: Variant
    measure: str
    trials: int
    learn_until_s: float
    """Seconds from the trace's beginning; what comes later was not looked at in the search."""
    least_slo: float | None
    """The share of the requests that must keep to the SLO."""
    learned: Report
    """On the part that was learned from, with the parameters found."""
    learned_default: Report
    """The same with the parameters as they were."""
    scored: Report
    """On the rest."""
    scored_default: Report
    found: Saving

    @property
    def saving(self) -> float:
        """Share of the measure that is saved on the rest; negative if it is lost."""
        return self.found.share

    @property
    def saving_low(self) -> float:
        """Lower end of the 90 % interval."""
        return self.found.low

    @property
    def saving_high(self) -> float:
        """Upper end of it."""
        return self.found.high

    @property
    def resampled(self) -> str:
        """Of what the interval is made, in words."""
        return f"resampling {self.found.models} models and {self.found.spans} spans of time"

    @property
    def is_found(self) -> bool:
        """Whether any setting that was tried was better, on what was learned from, than as it was."""
        return self.learned is not self.learned_default

    @property
    def is_sure(self) -> bool:
        """Whether it saves anything with 95 % confidence."""
        return self.found.low > 0

    def keeps(self, report: Report) -> bool:
        """To the SLO, as far as was asked for."""
        return self.least_slo is None or report.total.slo_attainment >= self.least_slo

    @property
    def verdict(self) -> str | None:
        """What speaks against the parameters that were found, or says more for them than what they save; else None."""
        if not self.keeps(self.learned):
            return (
                f"No setting that was tried keeps {100 * (self.least_slo or 0):g} % of the requests to the SLO; "
                f"{'this one' if self.is_found else 'as it was'} comes nearest."
            )
        if not self.is_found:
            return "No setting that was tried was better than as it was: keep the parameters as they are."
        if not self.keeps(self.scored):
            return (
                f"On the rest it keeps {100 * self.scored.total.slo_attainment:.1f} % of the requests to the SLO, less "
                "than was asked for."
            )
        if self.found.share < 0 and not self.keeps(self.scored_default):
            return "As it was, it does not keep to the SLO: what this one takes more is what that costs."
        if self.found.low <= 0 <= self.found.high:
            return "Chance alone may give as much: keep the parameters as they are."
        return "On the rest it takes more: keep the parameters as they are." if self.found.high < 0 else None

    def policy_file(self) -> dict[str, Any]:
        """The policy: what `relight policy set --file` takes, and the fleet file under `scaling`."""
        settings = self.variant.settings
        fields = {name: settings[name] for name in LIVE_FIELDS if name in settings}
        params = {name: value for name, value in settings.items() if name not in SPEC_FIELDS}
        return {"policy": self.variant.policy, "params": params, **fields}

    def to_plain(self) -> dict[str, Any]:
        """The same, with how sure it is. Whoever reads the policy passes over `evidence`."""
        return {
            **self.policy_file(),
            "evidence": {
                "measure": self.measure,
                "trials": self.trials,
                "learn_until_s": self.learn_until_s,
                "learned": getattr(self.learned.total, self.measure),
                "learned_default": getattr(self.learned_default.total, self.measure),
                "scored": getattr(self.scored.total, self.measure),
                "scored_default": getattr(self.scored_default.total, self.measure),
                "saving": self.found.share,
                "saving_90": [self.found.low, self.found.high],
                "resampled_models": self.found.models,
                "resampled_spans": self.found.spans,
                "is_sure": self.is_sure,
                "slo": self.least_slo,
                "slo_kept": self.keeps(self.learned) and self.keeps(self.scored),
                "rejected": self.scored.total.rejected,
                "rejected_default": self.scored_default.total.rejected,
                "slo_attainment": self.scored.total.slo_attainment,
                "slo_attainment_default": self.scored_default.total.slo_attainment,
                "trace": self.scored.trace,
                "seed": self.scored.seed,
                "settings": dict(self.variant.settings),
                "scored_from_s": self.scored.measured_from_s,
                "scored_until_s": self.scored.until_s,
            },
        }


def ranges(policy: str, names: Sequence[str] | None = None) -> list[Range]:
    """Of the policy's own parameters, and keep_alive_s where it holds to it.

    Raises:
        SettingError: for a name that the policy does not have.
    """
    if policy not in POLICIES:
        raise SettingError(f"policy {policy!r} can't be tuned; there are {', '.join(sorted(POLICIES))}")
    known = {
        param.name: Range(
            param.name,
            *_bounds(param.low, param.high, param.default),
            whole=param.unit in ("replicas", "0 or 1"),
        )
        for param in POLICIES[policy].params
    }
    searched = list(known)
    if policy in KEEPS:
        # The spec's own field is what people set; idle_s would say the same twice.
        known["keep_alive_s"] = Range("keep_alive_s", 1.0, 7200.0)
        searched = [name for name in known if name != "idle_s"]
    same = next((name for name in names or () if name in known and SAME.get(name) in (names or ())), None)
    if same is not None:
        raise SettingError(
            f"{same} and {SAME[same]} say the same under {policy}: only one of them can be tuned"
        )
    missing = [name for name in names or () if name not in known]
    if missing:
        raise SettingError(f"policy {policy} has no parameter {missing[0]!r}; it has {', '.join(known)}")
    return [known[name] for name in (searched if names is None else dict.fromkeys(names))]


def _bounds(low: float, high: float, default: float | None) -> tuple[float, float]:
    """A search that tries what nobody means finds nothing: within a factor of thirty of the default."""
    if default is None or default <= 0:
        return low, min(high, max(low + 1, 100.0))
    return max(low, default / 30), min(high, default * 30)


def tune(
    base: Base,
    policy: str,
    learn_until_s: float | None = None,
    *,
    measure: str = "total_cost_gpu_s",
    least_slo: float | None = None,
    trials: int = 40,
    names: Sequence[str] | None = None,
    fixed: Mapping[str, float] | None = None,
    processes: int | None = None,
    done: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Search by tree-structured Parzen estimators (optuna's TPE; Bergstra et al. 2011, NeurIPS).

    What is scored is never looked at: the search replays the trace only up to `learn_until_s`, where it counts what
    comes after the setup's `measure_from_s`, and what is scored begins where the last window of that has ended.

    Args:
        learn_until_s: seconds from the trace's beginning; None: two thirds of it. Windows that begin before it are
            learned from as a whole.
        least_slo: parameters count only if so large a share of the requests keeps to the SLO.
        names: which parameters; None: all that the policy has.
        fixed: settings that stay as they are.
        processes: None: as many as cores. What is found does not depend on it.
        done: called with (how many settings, of how many) were tried.

    Raises:
        TraceError, SettingError.
    """
    import optuna

    if measure not in MEASURES:
        raise SettingError(f"objective {measure!r} is unknown; there are {', '.join(MEASURES)}")
    kept = dict(fixed or {})
    searched = [each for each in ranges(policy, names) if each.name not in kept]
    if not searched:
        raise SettingError(f"policy {policy} has no parameter to be tuned")
    check(Variant(policy, kept))
    # What is searched takes the place of what says the same.
    held = {
        name: value
        for name, value in kept.items()
        if policy not in KEEPS or SAME.get(name) not in {each.name for each in searched}
    }
    length_s = _length_s(base)
    if learn_until_s is None:
        learn_until_s = float(round(LEARNED * length_s))
    score_from_s = _score_from_s(base, learn_until_s)
    if max(learn_until_s, score_from_s) >= length_s:
        raise SettingError(
            f"learn_until_s: {learn_until_s:,.0f} s leave nothing to score: the trace lasts {length_s:,.0f} s"
        )
    if learn_until_s <= base.setup.measure_from_s:
        raise SettingError(
            f"learn_until_s: {learn_until_s:,.0f} s leave nothing to search on: what comes before measure_from_s, "
            f"{base.setup.measure_from_s:,.0f} s, is not counted"
        )
    learn = replace(base, setup=replace(base.setup, until_s=learn_until_s))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=base.setup.seed % 2**32, constant_liar=True)
    study = optuna.create_study(sampler=sampler)
    (as_it_was,) = compare(learn, [Variant(policy, kept)], processes=processes)
    best_report, best_worth = as_it_was, _worth(as_it_was, measure, least_slo)
    for first in range(0, trials, BATCH):
        asked = [study.ask() for _ in range(min(BATCH, trials - first))]
        variants = [Variant(policy, {**held, **_suggested(trial, searched)}) for trial in asked]
        for trial, report in zip(asked, compare(learn, variants, processes=processes), strict=True):
            worth = _worth(report, measure, least_slo)
            study.tell(trial, worth)
            if worth < best_worth:
                best_report, best_worth = report, worth
        if done is not None:
            done(first + len(asked), trials)
    improved = best_report is not as_it_was
    best = Variant(
        policy, {**held, **_short(study.best_params)} if improved else kept, unsaid=frozenset(kept)
    )
    score = sampled(
        replace(base, setup=replace(base.setup, measure_from_s=score_from_s)),
        _span_s(length_s - score_from_s),
    )
    scored, scored_default = compare(score, [best, Variant(policy, kept)], processes=processes)
    wait_costs = {each.model: best.applied(base.spec_of(each.model)).wait_cost for each in scored.models}
    return Tuned(
        variant=best,
        measure=measure,
        trials=trials,
        learn_until_s=learn_until_s,
        least_slo=least_slo,
        learned=best_report,
        learned_default=as_it_was,
        scored=replace(scored, timeline={}),
        scored_default=replace(scored_default, timeline={}),
        found=saving_of(scored, scored_default, measure, wait_costs, base.setup.seed),
    )


def _suggested(trial: optuna.Trial, searched: Iterable[Range]) -> dict[str, float]:
    found = {}
    for each in searched:
        if each.whole:
            found[each.name] = float(trial.suggest_int(each.name, math.ceil(each.low), int(each.high)))
        else:
            log = each.low > 0 and each.high / each.low > LOGARITHMIC
            found[each.name] = trial.suggest_float(each.name, each.low, each.high, log=log)
    return _short(found)


def _short(settings: Mapping[str, float]) -> dict[str, float]:
    """Four digits: what people can read, and what is replayed."""
    return {name: float(f"{value:.4g}") for name, value in settings.items()}


def _worth(report: Report, measure: str, least_slo: float | None) -> float:
    short = 0.0 if least_slo is None else max(0.0, least_slo - report.total.slo_attainment)
    # Behind everything that keeps to the SLO, in the order of what is missing.
    return float(getattr(report.total, measure)) if short == 0.0 else 1e15 * (1 + short)


def _length_s(base: Base) -> float:
    """From the first row to the latest end of any window: a short one may begin within a long one."""
    first_s, last_s = math.inf, 0.0
    for row in until(rows_of(base.trace), base.setup.until_s):
        first_s, last_s = min(first_s, row.time_s), max(last_s, row.time_s + row.window_s)
    return max(0.0, last_s - first_s)


def _score_from_s(base: Base, learn_until_s: float) -> float:
    """To the end of what is learned from, in seconds from the whole second of the first row, as a replay measures."""
    rows = iter(rows_of(base.trace))
    first = next(rows, None)
    if first is None:
        return learn_until_s
    learned = until(chain([first], rows), learn_until_s)
    ends_s = max((row.time_s + row.window_s for row in learned), default=-math.inf)
    return max(first.time_s + learn_until_s, ends_s) - math.floor(first.time_s)


def _span_s(left_s: float) -> float:
    """By days, so that each has all its hours; by eighths of what is scored where that has fewer than four days."""
    return 86400.0 if left_s >= 4 * 86400 else max(60.0, left_s / 8)


__all__ = ["LIVE_FIELDS", "MEASURES", "Range", "Tuned", "ranges", "tune"]
