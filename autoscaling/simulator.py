"""The simulator from Python: what `relight simulate`, `compare`, `tune` and `trace` do.

A source gives requests: a file (`open_source`), a store (`StoredSource`), synthetic streams (`generate`), or any list
of `Row`s in the order of their times. A `Base` is what all policies have in common: the source, how it is replayed
(`Setup`, with the virtual cluster's `Profile`), and a `Spec` for every model or one for each. A `Variant` is a policy
and what is set for it.

>>> from autoscaling import simulator as sim
>>> hourly = list(sim.generate([sim.stream("report=timer,every_s=3600,jitter_s=0")], 7 * 86400, seed=1))
>>> base = sim.Base(hourly, sim.Setup(profile=sim.Profile().two_states(30.0), measure_from_s=86400.0))
>>> kept = sim.simulate(base, sim.Variant("keep-alive", {"keep_alive_s": 60.0}))
>>> kept.total.requests, kept.total.cold_starts, round(kept.total.wait_mean_s)
(144, 144, 30)

Several at once, each in its own process; reports come in the order of the variants:

>>> variants = [sim.Variant("keep-alive", {"keep_alive_s": idle_s}) for idle_s in (60.0, 7200.0)]
>>> [report.total.cold_starts for report in sim.compare(base, variants, processes=1)]
[144, 0]

What JSON has, and its schema; what kind of traffic it is; parameters that are searched on the first five days:

>>> sorted(kept.to_plain()) == sorted(sim.report_schema()["properties"])
True
>>> sim.describe(hourly).models[0].gap_cv
0.0
>>> tuned = sim.tune(base, "keep-alive", 5 * 86400, trials=4, names=["keep_alive_s"], processes=1)
>>> tuned.policy_file()["policy"], tuned.scored.total.requests
('keep-alive', 48)

`document` makes the HTML report of a comparison whose base was `sampled`. `commands.setups.base_of` makes a `Base`
from a fleet file, with its models' policies, bounds, schedules and GPU types.
"""

from __future__ import annotations

from autoscaling.sim.compare import (
    Base,
    SettingError,
    Variant,
    as_given,
    compare,
    sampled,
    simulate,
)
from autoscaling.sim.generate import PATTERNS, PatternError, Stream, generate, stream
from autoscaling.sim.group import Limits
from autoscaling.sim.html import document
from autoscaling.sim.prices import GPU_PRICES_PER_H
from autoscaling.sim.profile import Engine, Profile, ProfileError, Start, load_profile, parse_profile
from autoscaling.sim.replay import Setup, replay
from autoscaling.sim.report import Figures, ModelReport, Report
from autoscaling.sim.schema import comparison_schema, report_schema
from autoscaling.sim.shape import ModelShape, Shape, describe
from autoscaling.sim.tune import Tuned, tune
from autoscaling.sources import StoredSource, open_source
from autoscaling.traces import Row, Source, TraceError

__all__ = [
    "GPU_PRICES_PER_H",
    "PATTERNS",
    "Base",
    "Engine",
    "Figures",
    "Limits",
    "ModelReport",
    "ModelShape",
    "PatternError",
    "Profile",
    "ProfileError",
    "Report",
    "Row",
    "SettingError",
    "Setup",
    "Shape",
    "Source",
    "Start",
    "StoredSource",
    "Stream",
    "TraceError",
    "Tuned",
    "Variant",
    "as_given",
    "compare",
    "comparison_schema",
    "describe",
    "document",
    "generate",
    "load_profile",
    "open_source",
    "parse_profile",
    "replay",
    "report_schema",
    "sampled",
    "simulate",
    "stream",
    "tune",
]
