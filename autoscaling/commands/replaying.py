"""What `simulate`, `compare`, `tune` and `trace` have in common: options, traces, fleets, progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoscaling.commands import options, times
from autoscaling.commands.failures import WRONG, CommandError

if TYPE_CHECKING:
    from autoscaling.core.types import Spec
    from autoscaling.sim.compare import Base
    from autoscaling.sim.profile import Profile
    from autoscaling.sim.report import Report
    from autoscaling.traces import Trace

TraceFile = Annotated[
    Path | None, typer.Argument(metavar="TRACE", help="A trace or an access log; .gz is unpacked.")
]
FromStore = Annotated[
    str | None,
    typer.Option("--from-store", help="Instead of a trace: the history in Relight's own store, by its URL."),
]
Fleet = Annotated[
    Path | None,
    typer.Option("--fleet", help="A fleet file: its models, policies and bounds, and its GPU budget."),
]
ProfileFile = Annotated[
    Path | None, typer.Option("--profile", help="A JSON file of the engine, its starts, GPUs and prices.")
]
ColdStart = Annotated[
    str | None,
    typer.Option("--cold-start", help=f"Dark or lit, with this start time: {times.DURATIONS}."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="NAME=NUMBER: a parameter of the policy, or wait_cost, keep_alive_s, max_replicas…"
    ),
]
MeasureFrom = Annotated[
    str | None,
    typer.Option(
        "--measure-from", help=f"Learn on what comes before, score what comes after: {times.DURATIONS}."
    ),
]
Seed = Annotated[int, typer.Option(help="The same seed draws the same traffic and starts.", min=0)]
Scale = Annotated[
    float, typer.Option(help="Share of the requests that come; above 1, windows hold more.", min=1e-9)
]
WindowLength = Annotated[
    str | None, typer.Option("--window", help=f"How long the trace's windows are: {times.DURATIONS}.")
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="What requests are counted as where the format names no model.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Pass over bad rows, and say how many.")]
Gpu = Annotated[str | None, typer.Option(help="The GPU type whose price is reckoned with.")]
Out = Annotated[
    Path | None, typer.Option("--json", help="Write the report as JSON; - is the standard output.")
]


def settings(given: Sequence[str] | None) -> dict[str, float]:
    """Raises CommandError."""
    try:
        return options.params(list(given)) or {} if given else {}
    except CommandError as error:
        raise CommandError(error.message.replace("--param", "--set"), WRONG) from None


def trace_of(
    file: Path | None,
    store: str | None,
    *,
    window: str | None = None,
    model: str | None = None,
    skip_bad: bool = False,
) -> Trace | list[Any]:
    """The trace, or the rows of a store. Raises CommandError."""
    from autoscaling.traces import TraceError, open_trace

    if (file is None) == (store is None):
        raise CommandError("Give either a TRACE or --from-store", WRONG)
    if store is not None:
        return _stored(store)
    assert file is not None
    try:
        return open_trace(file, window_s=options.duration(window, "--window"), model=model, skip_bad=skip_bad)
    except TraceError as error:
        raise CommandError(str(error), WRONG) from None


def _stored(url: str) -> list[Any]:
    """The whole history, in buckets of a minute, as windows."""
    from autoscaling.live.clock import SystemClock
    from autoscaling.live.store import Store
    from autoscaling.traces import Row

    clock = SystemClock()
    store = Store.open(url, clock=clock)
    now_s, rows = clock.now_s(), []
    try:
        for name in store.models_with_traffic():
            for row in store.history(name, 0.0, now_s, 60.0):
                count = int(row["arrivals"])
                if count:
                    rows.append(
                        Row(
                            row["start_s"],
                            name,
                            count,
                            60.0,
                            int(row["input_tokens"] / count),
                            int(row["output_tokens"] / count),
                            row["busy_s"] / count,
                        )
                    )
    finally:
        store.close()
    if not rows:
        raise CommandError(f"--from-store {url}: it holds no traffic", WRONG)
    return sorted(rows)


def base_of(
    trace: Trace | list[Any],
    fleet: Path | None,
    profile: Path | None,
    cold_start: str | None,
    gpu: str | None,
    *,
    seed: int,
    scale: float,
    measure_from: str | None,
    sample_s: float | None = None,
) -> Base:
    """All that does not differ between policies. Raises CommandError."""
    from autoscaling.core.types import Spec
    from autoscaling.sim.compare import Base
    from autoscaling.sim.replay import Setup

    specs, made = _fleet(fleet), _profile(profile, cold_start, gpu)
    if fleet is not None:
        from deployments.fleet import load_fleet

        budget = load_fleet(fleet).controller.gpu_budget
        if budget is not None and made.gpus is None:
            made = replace(made, gpus=budget)
    setup = Setup(
        profile=made,
        seed=seed,
        scale=scale,
        measure_from_s=options.duration(measure_from, "--measure-from") or 0.0,
        sample_s=sample_s,
    )
    spec = Spec("", wait_cost=10.0, max_replicas=64, target_ongoing_requests=float(made.engine.concurrency))
    if specs is None and (made.gpus is not None or made.parked_engines is not None):
        # Models that share something are named before the replay.
        specs = dict.fromkeys(sorted({row.model for row in _rows(trace)}), spec)
        specs = {name: replace(each, model=name) for name, each in specs.items()}
    return Base(trace=trace, setup=setup, specs=specs, spec=spec)


def _rows(trace: Trace | list[Any]) -> Iterator[Any]:
    from autoscaling.traces import Trace, TraceError

    try:
        yield from trace.rows() if isinstance(trace, Trace) else trace
    except TraceError as error:
        raise CommandError(str(error), WRONG) from None


def _fleet(file: Path | None) -> dict[str, Spec] | None:
    if file is None:
        return None
    from deployments.fleet import load_fleet
    from deployments.scaling import scaling_spec

    return {model.id: scaling_spec(model) for model in load_fleet(file).models}


def _profile(file: Path | None, cold_start: str | None, gpu: str | None) -> Profile:
    from autoscaling.sim.profile import GPU_PRICES_PER_H, Profile, ProfileError, load_profile

    try:
        made = Profile() if file is None else load_profile(file)
    except ProfileError as error:
        raise CommandError(str(error), WRONG) from None
    if cold_start is not None:
        made = made.two_states(options.duration(cold_start, "--cold-start") or 0.0)
    if gpu is not None:
        if gpu not in GPU_PRICES_PER_H:
            raise CommandError(
                f"--gpu: {gpu!r} is unknown; there are {', '.join(GPU_PRICES_PER_H)}, or set price_per_gpu_h in a "
                "--profile",
                WRONG,
            )
        made = replace(made, price_per_gpu_h=GPU_PRICES_PER_H[gpu])
    return made


@contextmanager
def wrong() -> Iterator[None]:
    """What is wrong with a trace or a setting becomes one message."""
    from autoscaling.sim.compare import SettingError
    from autoscaling.sim.generate import PatternError
    from autoscaling.traces import TraceError

    try:
        yield
    except (TraceError, SettingError, PatternError) as error:
        raise CommandError(str(error), WRONG) from None


@contextmanager
def progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


TABLE = {
    "cold_starts": "cold",
    "wait_mean_s": "wait",
    "wait_p95_s": "p95",
    "wait_p99_s": "p99",
    "slo_attainment": "in SLO",
    "gpu_s": "GPU-s",
    "idle_gpu_s": "idle",
    "cost": "cost",
    "total_cost_gpu_s": "total",
    "prewarms": "prewarm",
    "prewarm_hits": "hit",
}


def figures_table(first: str, reports: Sequence[tuple[str, Any]]) -> None:
    """A row for each (label, Figures)."""
    wide_table(
        (first, "requests", *TABLE.values()),
        [
            (label, f"{each.requests:,}", *(cell(getattr(each, name)) for name in TABLE))
            for label, each in reports
        ],
    )


def wide_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A name and numbers; as wide as it is where nobody's terminal is to be fitted."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)


def cell(value: float) -> str:
    """Whole numbers with their thousands, others with three digits."""
    if isinstance(value, float) and not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def said(report: Report) -> None:
    """What the reader should know beside the figures."""
    from autoscaling.commands import output

    if report.skipped_rows:
        output.say(f"{report.skipped_rows} bad rows were skipped.", style="yellow")
    for note in report.notes:
        output.say(note, style="yellow")
