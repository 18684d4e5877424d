"""`relight trace`: what a trace is like, traces in other formats, and synthetic ones."""

from __future__ import annotations

import csv
import gzip
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from autoscaling.commands import options, output, replaying, times
from autoscaling.commands.failures import FAILED, WRONG, CommandError

if TYPE_CHECKING:
    from autoscaling.traces import Source

trace_app = typer.Typer(help="Look at, convert and make traces of requests.", no_args_is_help=True)
MOST_MODELS = 30
NEARLY_S = 5e-5
"""So much before a window's beginning is at it: a minute that was written with six digits is as far off."""

Target = Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; - is the standard output.")]


def register(app: typer.Typer) -> None:
    app.add_typer(trace_app, name="trace")


@trace_app.command("describe")
def describe(
    *,
    trace: replaying.TraceFile = None,
    as_json: options.Json = False,
    seed: replaying.Seed = 0,
    scale: replaying.Scale = 1.0,
    window: replaying.WindowLength = None,
    until: replaying.Until = None,
    model: replaying.ModelName = None,
    mapping: replaying.Mapping = None,
    skip_bad: replaying.SkipBad = False,
    from_store: replaying.FromStore = None,
) -> None:
    """Its shape: how bursty, how seasonal, how long models are idle, and how often they would have to wake.

    Example: relight trace describe last-month.csv.gz
    """
    from autoscaling.sim.shape import WAKES_AFTER_S
    from autoscaling.sim.shape import describe as shape_of
    from autoscaling.traces import until as cut

    source = replaying.source_of(
        trace, from_store, window=window, model=model, mapping=mapping, skip_bad=skip_bad
    )
    until_s = options.duration(until, "--until")
    with replaying.wrong(), replaying.progress("reading"):
        shape = shape_of(cut(source.rows(), until_s), seed, scale)
    if not shape.requests:
        raise _nothing(source, scale)
    if as_json:
        options.print_json(shape.to_plain())
        return
    ranked = sorted(shape.models, key=lambda each: -each.requests)
    wakes = [f"wakes {output.lasting(after_s)}" for after_s in WAKES_AFTER_S]
    columns = ("requests", "a day", "gap cv", "median gap", "daily", "active hours", *wakes)
    replaying.wide_table(
        ("model", *columns),
        [
            (
                each.model,
                f"{each.requests:,}",
                *("-" if math.isnan(value) else f"{value:,.1f}" for value in (each.per_day, each.gap_cv)),
                "-" if math.isnan(each.median_gap_s) else output.lasting(each.median_gap_s),
                f"{each.daily:.2f}",
                f"{100 * each.active_hours:.0f} %",
                *(f"{count:,}" for count in each.wakes),
            )
            for each in ranked[:MOST_MODELS]
        ],
        spare=("active hours", "a day", wakes[1], wakes[3], "median gap", wakes[4]),
        last=(wakes[2], "daily", wakes[0]),
    )
    output.say(
        f"{_counted(shape.requests, 'request')} of {_counted(len(shape.models), 'model')} over "
        f"{output.lasting(shape.ends_s - shape.begins_s)}. "
        f"daily: share of the hourly variance that the hour "
        "of the day explains; wakes: requests after so long a silence.",
        style="dim",
    )
    if source.bad:
        output.say(f"{output.count(source.bad, 'bad row')} skipped.", style="yellow")
    for note in source.notes:
        output.say(note, style="yellow")
    if len(ranked) > MOST_MODELS:
        output.say(f"The {MOST_MODELS} busiest of them are shown; --json has all.", style="dim")


def _nothing(source: Source, scale: float = 1.0) -> CommandError:
    nothing = "it holds no requests" if scale == 1 else f"no requests are left of it at a scale of {scale:g}"
    return CommandError(f"{source.name}: " + "; ".join([nothing, *source.notes]), WRONG)


@trace_app.command("convert")
def convert(
    trace: Annotated[
        str,
        typer.Argument(metavar="TRACE", help="A trace, an access log (.gz is unpacked) or a store's URL."),
    ],
    out: Target,
    *,
    sort: Annotated[
        bool, typer.Option("--sort", help="Put rows in the order of time; needs memory for all.")
    ] = False,
    per_window: Annotated[
        str | None,
        typer.Option(
            "--per-window", help=f"Counts in windows so long instead of requests: {times.DURATIONS}."
        ),
    ] = None,
    window: replaying.WindowLength = None,
    until: replaying.Until = None,
    model: replaying.ModelName = None,
    mapping: replaying.Mapping = None,
    skip_bad: replaying.SkipBad = False,
) -> None:
    """Write any known format as CSV: timestamp_s,model,… or, of windows, minute,model,count,…

    Example: relight trace convert access.log.gz chat.csv --map '/v1/chat*=llama'
    """
    from autoscaling.sources import LogSource
    from autoscaling.traces import Trace
    from autoscaling.traces import until as cut

    file, store = (None, trace) if "://" in trace else (Path(trace), None)
    source = replaying.source_of(file, store, window=window, model=model, mapping=mapping, skip_bad=skip_bad)
    length_s = options.duration(per_window, "--per-window")
    until_s = options.duration(until, "--until")
    replaying.writable({"OUT": out}, replaying.inputs(file, store))
    with replaying.wrong(), _written(out) as target, replaying.progress("converting"):
        read = sorted(source.unordered()) if sort and isinstance(source, Trace | LogSource) else source.rows()
        rows = cut(read, until_s)
        count = _write(rows if length_s is None else _windows(rows, length_s), target)
        if not count:
            raise _nothing(source)
    _told(_counted(count, "row") + (f", {source.bad:,} bad ones skipped" if source.bad else ""))
    for note in source.notes:
        _told(note)


@trace_app.command("generate")
def generate(
    streams: Annotated[
        list[str],
        typer.Argument(metavar="MODEL=PATTERN,name=value,…", help="Models and their traffic, as above."),
    ],
    *,
    lasts: Annotated[str, typer.Option("--for", help=f"How long the trace is: {times.DURATIONS}.")] = "1d",
    out: Annotated[Path, typer.Option("--out", help="The file to write; - is the standard output.")] = Path(
        "-"
    ),
    seed: replaying.Seed = 0,
) -> None:
    """Synthetic traffic, the same for the same seed. Patterns and their parameters:

    poisson: rate_per_h. gamma (bursts): rate_per_h, cv. diurnal: rate_per_h, swing, peak_hour, weekend. flash (a
    crowd): rate_per_h, at_h, crowd, lasts_s. timer: every_s, offset_s, jitter_s, missed, burst. on-off: on_s,
    off_s, rate_per_s. All: input_tokens, output_tokens.

    Example: relight trace generate chat=diurnal,rate_per_h=120 report=timer,every_s=3600 --for 7d --out week.csv.gz
    """
    from autoscaling.sim import generate as synthetic

    replaying.writable({"--out": out}, {})
    with replaying.wrong():
        made = [synthetic.stream(text) for text in streams]
        names = [each.model for each in made]
        if len(set(names)) < len(names):
            raise CommandError("every model can be named once only", WRONG)
        duration_s = options.duration(lasts, "--for")
        assert duration_s is not None
        with _written(out) as file:
            count = _write(synthetic.generate(made, duration_s, seed), file)
            if not count:
                raise CommandError(
                    f"these streams have no requests in {lasts} of --for; it must be longer", WRONG
                )
    _told(_counted(count, "request"))


@contextmanager
def _written(path: Path) -> Iterator[TextIO]:
    """A file that is there as a whole or not at all."""
    if str(path) == "-":
        yield sys.stdout
        return
    try:
        with _opened(replaying.part_of(path), packed=path.suffix == ".gz") as file:
            yield file
        replaying.whole(path)
    except OSError as error:
        raise CommandError(f"{path}: can't be written: {error.strerror or error}", FAILED) from None


def _opened(path: Path, *, packed: bool) -> TextIO:
    if packed:
        return gzip.open(path, "wt", encoding="utf-8", newline="")
    return path.open("w", encoding="utf-8", newline="")


def _write(rows: Iterable[Any], file: TextIO) -> int:
    writer = csv.writer(file, lineterminator="\n")
    count, windows = 0, False
    for row in rows:
        if count == 0:
            windows = row.window_s > 0
            head = ["minute", "model", "count"] if windows else ["timestamp_s", "model"]
            tail = ["cv", "window_s"] if windows else []
            writer.writerow([*head, "input_tokens", "output_tokens", "exec_s", *tail])
        count += 1
        tokens = (row.input_tokens, row.output_tokens, _short(row.exec_s))
        if windows:
            # All its digits: a third of a minute that is rounded lies in the window before.
            at = _shortest(round(row.time_s, 6) / 60)
            writer.writerow([at, row.model, row.requests, *tokens, _shortest(row.cv), _short(row.window_s)])
        else:
            writer.writerow([_short(row.time_s), row.model, *tokens])
    return count


def _counted(number: int, one: str) -> str:
    return f"{number:,} {one}" if number == 1 else f"{number:,} {one}s"


def _told(text: str) -> None:
    typer.echo(text, err=True)


def _short(value: float) -> str:
    return _shortest(round(value, 6))


def _shortest(value: float) -> str:
    return repr(int(value)) if value == int(value) else repr(value)


def _windows(rows: Iterable[Any], length_s: float) -> Iterator[Any]:
    """Rows added up by window and model; of what they tell, the means. Rows come in the order of time."""
    from autoscaling.traces import Row, TraceError

    begins_s, sums = float("-inf"), dict[str, list[float]]()

    def closed() -> Iterator[Any]:
        for name, (count, tokens_in, tokens_out, exec_s, cv) in sorted(sums.items()):
            if not count:
                continue
            yield Row(
                begins_s,
                name,
                int(count),
                length_s,
                round(tokens_in / count),
                round(tokens_out / count),
                exec_s / count,
                cv / count,
            )
        sums.clear()

    for row in rows:
        at_s = math.floor((row.time_s + NEARLY_S) / length_s) * length_s
        if row.time_s + row.window_s > at_s + length_s + NEARLY_S:
            raise TraceError(
                f"--per-window: a window of {row.window_s:g} s that begins at {row.time_s:.10g} s is in none of "
                f"{length_s:g} s, which begin at multiples of that"
            )
        if at_s != begins_s:
            yield from closed()
            begins_s = at_s
        amounts = sums.setdefault(row.model, [0.0] * 5)
        for column, each in enumerate((1, row.input_tokens, row.output_tokens, row.exec_s, row.cv)):
            amounts[column] += row.requests * each
    yield from closed()


__all__ = ["register"]
