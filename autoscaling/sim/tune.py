"""Finds a policy's parameters on the first part of a trace, and says on the rest what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoscaling.core.policies import POLICIES
from autoscaling.sim.compare import SPEC_FIELDS, Base, SettingError, Variant, compare, simulate
from autoscaling.sim.report import Report

RESAMPLES = 2000
MEASURES: Mapping[str, str] = {
    "total_cost_gpu_s": "GPU-seconds, and wait_cost for each second of waiting",
    "gpu_s": "GPU-seconds; use it with a bound on what users see",
    "waited_s": "request-seconds of waiting",
    "cold_starts": "starts from zero that somebody waited for",
}
LOGARITHMIC = 20.0
"""A parameter whose bounds are so many times apart is searched by its logarithm."""


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
    learned: float
    """The measure on the part that was learned from, with the parameters found; with the defaults."""
    learned_default: float
    scored: Report
    """On the rest."""
    scored_default: Report
    saving: float
    """Share of the measure that is saved on the rest; negative if it is lost."""
    saving_low: float
    saving_high: float
    """A 90 % interval, by resampling the models (Efron 1979: bootstrap); of one model, equal to the saving."""

    def to_plain(self) -> dict[str, object]:
        """The policy file: what `relight policy set` and a fleet's `scaling` take, and how sure it is."""
        fields = {name: value for name, value in self.variant.settings.items() if name in SPEC_FIELDS}
        params = {name: value for name, value in self.variant.settings.items() if name not in SPEC_FIELDS}
        return {
            "policy": self.variant.policy,
            "params": params,
            **fields,
            "evidence": {
                "measure": self.measure,
                "trials": self.trials,
                "learned": self.learned,
                "learned_default": self.learned_default,
                "scored": getattr(self.scored.total, self.measure),
                "scored_default": getattr(self.scored_default.total, self.measure),
                "saving": self.saving,
                "saving_90": [self.saving_low, self.saving_high],
                "slo_attainment": self.scored.total.slo_attainment,
                "trace": self.scored.trace,
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
    known = {param.name: param for param in POLICIES[policy].params}
    found = [
        Range(
            name, *_bounds(param.low, param.high, param.default), whole=param.unit in ("replicas", "0 or 1")
        )
        for name, param in known.items()
        if names is None or name in names
    ]
    if names is not None and (missing := set(names) - known.keys()):
        raise SettingError(
            f"policy {policy} has no parameter {sorted(missing)[0]!r}; it has {', '.join(known)}"
        )
    if policy in ("keep-alive", "reactive") and names is None:
        # The spec's own field is what people set; idle_s would say the same twice.
        found = [each for each in found if each.name != "idle_s"]
        found.append(Range("keep_alive_s", 1.0, 7200.0))
    return found


def _bounds(low: float, high: float, default: float | None) -> tuple[float, float]:
    """A search that tries what nobody means finds nothing: within a factor of thirty of the default."""
    if default is None or default <= 0:
        return low, min(high, max(low + 1, 100.0))
    return max(low, default / 30), min(high, default * 30)


def tune(
    base: Base,
    policy: str,
    learn_until_s: float,
    *,
    measure: str = "total_cost_gpu_s",
    least_slo: float | None = None,
    trials: int = 40,
    names: Sequence[str] | None = None,
    fixed: Mapping[str, float] | None = None,
    done: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Search by tree-structured Parzen estimators (optuna's TPE; Bergstra et al. 2011, NeurIPS).

    What is scored is never looked at: the search replays the trace only up to `learn_until_s`.

    Args:
        learn_until_s: seconds from the trace's beginning.
        least_slo: parameters count only if so large a share of the requests keeps to the SLO.
        fixed: settings that stay as they are.

    Raises:
        TraceError, SettingError.
    """
    import optuna

    if measure not in MEASURES:
        raise SettingError(f"objective {measure!r} is unknown; there are {', '.join(MEASURES)}")
    searched = ranges(policy, names)
    kept = dict(fixed or {})
    searched = [each for each in searched if each.name not in kept]
    if not searched:
        raise SettingError(f"policy {policy} has no parameter to be tuned")
    learn = replace(base, setup=replace(base.setup, measure_from_s=0.0, until_s=learn_until_s))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=base.setup.seed))
    worth: dict[int, float] = {}

    def value(report: Report) -> float:
        found = float(getattr(report.total, measure))
        short = 0.0 if least_slo is None else max(0.0, least_slo - report.total.slo_attainment)
        # Behind everything that keeps to the SLO, in the order of what is missing.
        return found if short == 0.0 else 1e15 * (1 + short)

    def attempt(trial: optuna.Trial) -> float:
        settings = dict(kept)
        for each in searched:
            if each.whole:
                settings[each.name] = float(trial.suggest_int(each.name, int(each.low), int(each.high)))
            else:
                log = each.low > 0 and each.high / each.low > LOGARITHMIC
                settings[each.name] = trial.suggest_float(each.name, each.low, each.high, log=log)
        worth[trial.number] = value(simulate(learn, Variant(policy, settings)))
        if done is not None:
            done(trial.number + 1, trials)
        return worth[trial.number]

    default = value(simulate(learn, Variant(policy, kept)))
    study.optimize(attempt, n_trials=trials)
    best = Variant(policy, {**kept, **study.best_params})
    if study.best_value >= default:
        best = Variant(policy, kept)
    score = replace(base, setup=replace(base.setup, measure_from_s=learn_until_s))
    scored, scored_default = compare(score, [best, Variant(policy, kept)], processes=1)
    saving, low, high = savings(scored, scored_default, measure, base.setup.seed)
    return Tuned(
        variant=best,
        measure=measure,
        trials=trials,
        learned=min(study.best_value, default),
        learned_default=default,
        scored=scored,
        scored_default=scored_default,
        saving=saving,
        saving_low=low,
        saving_high=high,
    )


def savings(report: Report, other: Report, measure: str, seed: int = 0) -> tuple[float, float, float]:
    """(share of `other`'s measure that `report` saves, and a 90 % interval by resampling models)."""
    theirs = {each.model: getattr(each.figures, measure) for each in other.models}
    pairs = np.asarray(
        [(getattr(e.figures, measure), theirs.get(e.model, 0.0)) for e in report.models], np.float64
    )
    if not len(pairs) or pairs[:, 1].sum() == 0:
        return 0.0, 0.0, 0.0
    saving = 1 - pairs[:, 0].sum() / pairs[:, 1].sum()
    random = np.random.default_rng(seed)
    drawn = random.integers(len(pairs), size=(RESAMPLES, len(pairs)))
    sums = pairs[drawn].sum(axis=1)
    shares = 1 - sums[:, 0] / np.maximum(sums[:, 1], 1e-9)
    low, high = np.quantile(shares, [0.05, 0.95])
    return float(saving), float(low), float(high)


__all__ = ["MEASURES", "Range", "Tuned", "ranges", "savings", "tune"]
