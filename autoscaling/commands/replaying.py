"""What `simulate`, `compare`, `tune` and `trace` have in common: options, sources, progress, tables."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoscaling.commands import options, times
from autoscaling.commands.failures import AFTERWARDS, FAILED, WRONG, CommandError

if TYPE_CHECKING:
    from autoscaling.sim.report import Report
    from autoscaling.traces import Source

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
    typer.Option(
        "--cold-start",
        help=f"How long a start takes: {times.DURATIONS}; or a file of measured ones, as `relight coldstarts --json` "
        "prints them or CSV with total_s. Default: those that the profile names, else the store's own.",
    ),
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
Until = Annotated[
    str | None,
    typer.Option("--until", help=f"Leave out what comes so long after its beginning: {times.DURATIONS}."),
]
Seed = Annotated[int, typer.Option(help="The same seed draws the same traffic and starts.", min=0)]
Scale = Annotated[
    float,
    typer.Option(
        help="Share of the requests that come; above 1, windows hold more.", min=1e-9, callback=options.finite
    ),
]
WindowLength = Annotated[
    str | None,
    typer.Option(
        "--window", help=f"How long the trace's windows are, where its rows don't say: {times.DURATIONS}."
    ),
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="What requests are counted as where the format names no model.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Pass over bad rows, and say how many.")]
Mapping = Annotated[
    list[str] | None,
    typer.Option(
        "--map", help="NAME=MODEL: what a path or name of a log (* and ? match) stands for. May be repeated."
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(help="The GPU type whose price is reckoned with (default: the fleet's own, else H100)."),
]
Prices = Annotated[
    list[str] | None,
    typer.Option(
        "--price", help="TYPE=NUMBER: what a GPU of a type costs an hour. May be repeated; see --gpu."
    ),
]
Jobs = Annotated[int | None, typer.Option(help="Processes (default: one a core).", min=1)]
Out = Annotated[
    Path | None, typer.Option("--json", help="Write the report as JSON; - is the standard output.")
]


def settings(given: Sequence[str] | None) -> dict[str, float]:
    """Raises CommandError."""
    try:
        return options.params(list(given)) or {} if given else {}
    except CommandError as error:
        raise CommandError(error.message.replace("--param", "--set"), WRONG) from None


def source_of(
    file: Path | None,
    store: str | None = None,
    *,
    window: str | None = None,
    model: str | None = None,
    mapping: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> Source:
    """Raises CommandError, ConfigError."""
    from autoscaling.sources import StoredSource, open_source

    if (file is None) == (store is None):
        raise CommandError("Give either a TRACE or --from-store", WRONG)
    window_s = options.duration(window, "--window")
    of_files = {"--window": window, "--model": model, "--map": mapping, "--skip-bad": skip_bad}
    unfit = [option for option, value in of_files.items() if value]
    if store is not None and unfit:
        raise CommandError(f"{unfit[0]}: it is for a TRACE; a store knows its models and its windows", WRONG)
    with wrong():
        if store is not None:
            return StoredSource(store)
        assert file is not None
        return open_source(file, window_s=window_s, model=model, mapping=_pairs(mapping), skip_bad=skip_bad)


def _pairs(mapping: Sequence[str] | None) -> list[tuple[str, str]]:
    found = []
    for text in mapping or ():
        pattern, _, model = text.rpartition("=")
        if not pattern or not model:
            raise CommandError(f"--map: {text!r} is not NAME=MODEL, like '/v1/chat*=llama'", WRONG)
        found.append((pattern, model))
    return found


@contextmanager
def wrong() -> Iterator[None]:
    """What is wrong with a trace or a setting becomes one message."""
    from autoscaling.sim.compare import SettingError
    from autoscaling.sim.generate import PatternError
    from autoscaling.sim.peers import Killed
    from autoscaling.traces import TraceError

    try:
        yield
    except Killed as error:
        raise CommandError(str(error), FAILED) from None
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
    "rejected": "turned away",
    "gpu_s": "GPU-s",
    "idle_gpu_s": "idle",
    "cost": "cost",
    "total_cost_gpu_s": "total",
    "prewarms": "prewarm",
    "prewarm_hits": "hit",
}


def writable(outputs: dict[str, Path | None], inputs: dict[str, Path | None]) -> None:
    """That files can be written there is known before hours of work, for they are begun. Raises CommandError.

    Args:
        outputs: by the option that names each; what is None is not asked for.
        inputs: what the command reads, none of which it may write over.
    """
    for option, path in outputs.items():
        if path is not None:
            for other, known in {**inputs, **outputs}.items():
                if other != option and known is not None and _same(path, known):
                    raise CommandError(
                        f"{option}: {path} is what {other} names too; name another file", WRONG
                    )
            _begun(path, option)


def _same(one: Path, other: Path) -> bool:
    """Whether both are one file. What is no plain file, as /dev/null, may be written twice, but not the output."""
    if "-" in (str(one), str(other)):
        return str(one) == str(other)
    try:
        one, other = one.resolve(), other.resolve()
        if not (one.exists() and other.exists()):
            return one == other
        return one.samefile(other) and one.is_file()
    except (OSError, RuntimeError):
        return False


def inputs(
    trace: Path | None,
    store: str | None = None,
    fleet: Path | None = None,
    profile: Path | None = None,
    cold_start: str | None = None,
) -> dict[str, Path | None]:
    """The files that a command reads, by the option that names each. Raises ConfigError for what is no store's URL."""
    database = None
    if store is not None:
        from autoscaling.live.store.database import parse_url

        _, database = parse_url(store)
    return {
        "TRACE": trace,
        "--from-store": database,
        "--fleet": fleet,
        "--profile": profile,
        "--cold-start": Path(cold_start) if cold_start is not None and Path(cold_start).is_file() else None,
    }


def _begun(path: Path, option: str) -> None:
    if str(path) == "-":
        return
    if path.is_dir() or not path.parent.is_dir():
        what = "a folder" if path.is_dir() else f"in no folder: there is no {path.parent}"
        raise CommandError(f"{option}: {path} is {what}", WRONG)
    part = part_of(path)
    try:
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if part != path:
            part.touch()
            AFTERWARDS.callback(part.unlink, missing_ok=True)
            if path.exists():
                shutil.copymode(path, part)
    except OSError as error:
        raise CommandError(f"{option}: {path} can't be written: {error.strerror}", WRONG) from None


def part_of(path: Path) -> Path:
    """Where it is written until it is whole: beside it, but for what is no plain file, as a pipe or /dev/null."""
    if path.exists() and not path.is_file():
        return path
    path = path.resolve()
    return path.with_name(f".{path.name[:40]}.{os.getpid()}.part")


def whole(path: Path) -> None:
    """Its part is all of it. Raises OSError."""
    part = part_of(path)
    if part == path:
        return
    try:
        part.replace(path.resolve())
    except OSError:
        # A file that is mounted by itself, as into a container, can be written but not exchanged.
        shutil.copyfile(part, path)


def write(path: Path, text: str) -> None:
    """- is the standard output. Raises CommandError."""
    if str(path) == "-":
        typer.echo(text)
        return
    try:
        part_of(path).write_text(text + "\n", encoding="utf-8")
        whole(path)
    except OSError as error:
        raise CommandError(f"{path}: can't be written: {error.strerror}", FAILED) from None


def write_json(path: Path, data: object) -> None:
    """Raises CommandError."""
    write(path, json.dumps(data, indent=2, allow_nan=False))


def figures_table(first: str, reports: Sequence[tuple[str, Any]]) -> None:
    """A row for each (label, Figures)."""
    # Mostly nobody is.
    shown = [name for name in TABLE if name != "rejected" or any(each.rejected for _, each in reports)]
    wide_table(
        (first, "requests", *(TABLE[name] for name in shown)),
        [
            (label, f"{each.requests:,}", *(cell(name, getattr(each, name)) for name in shown))
            for label, each in reports
        ],
        spare=("hit", "prewarm", "p95", "idle", "requests", "cost", "wait"),
        last=("turned away", "p99", "GPU-s", "in SLO"),
    )


LEAST_NAME = 12
"""Columns of the terminal that names have at least, if they are so long."""


def wide_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, spare: Sequence[str], last: Sequence[str]
) -> None:
    """A name and numbers. On a terminal, columns of `spare` are left out, one after the other, until it fits.

    Where that is not enough, names longer than LEAST_NAME are broken, and columns of `last` are left out too.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from autoscaling.commands import output

    console = Console(highlight=False)
    left_out: list[str] = []
    widths = {
        name: max(len(cell) for cell in column)
        for name, *column in zip(columns, *([columns, *rows]), strict=True)
    }
    if console.is_terminal:
        least = min(widths[columns[0]], LEAST_NAME)
        for name in (each for each in (*spare, *last) if each in columns):
            first = least if name in last else widths[columns[0]]
            if first + sum(list(widths.values())[1:]) + 2 * (len(widths) - 1) <= console.width:
                break
            del widths[name]
            left_out.append(name)
    else:
        console = Console(highlight=False, width=max(80, sum(widths.values()) + 2 * len(widths)))
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in widths:
        first = name == columns[0]
        shown.add_column(name, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for name, cell in zip(columns, row, strict=True) if name in widths))
    console.print(shown)
    if left_out:
        output.say(f"A wider terminal shows also: {', '.join(left_out)}.", style="dim")


def cell(name: str, value: float) -> str:
    """Whole numbers with their thousands, shares in per cent, others with three digits."""
    if isinstance(value, float) and not math.isfinite(value):
        return "-"
    if name == "slo_attainment":
        # 100 % is said only of all of them.
        return f"{math.floor(1000 * value + 1e-9) / 10:.1f} %"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def reckoned(report: Report) -> str:
    """What `in SLO` and `cost` of a table mean."""
    prices = {
        report.price_per_gpu_h if each.price_per_gpu_h is None else each.price_per_gpu_h
        for each in report.models
    }
    price = f"{prices.pop():g} for a GPU-hour" if len(prices) == 1 else "the price of each model's GPU type"
    return f"in SLO: waited {report.slo_s:g} s at most. cost: at {price}, in US dollars unless the price was given."


def said(reports: Sequence[Report]) -> None:
    """What the reader should know beside the figures, once."""
    from autoscaling.commands import output

    skipped = max((report.skipped_rows for report in reports), default=0)
    if skipped:
        output.say(f"{output.count(skipped, 'bad row')} skipped.", style="yellow")
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        output.say(note, style="yellow")
