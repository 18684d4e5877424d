"""The store: traffic history, decisions, states, plan, cold starts, prewarms, usage and overrides.

Readers are served from memory where they are hot (traffic, states, plan, overrides), also while the database is away.
Records go to a bounded buffer that a thread commits about every second. Overrides are written through.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from threading import Event
from typing import Any, Self, TypeVar

from sqlalchemy import Connection

from autoscaling.core.types import Decision, Rung, State
from autoscaling.live.clock import EARLIEST_S
from autoscaling.live.records import ColdStartRow, Override, PrewarmRow, TrafficRow, UsageRow
from autoscaling.live.store import bulk, journal, logs
from autoscaling.live.store.buffer import Batch, add_usage
from autoscaling.live.store.database import Database
from autoscaling.live.store.errors import StoreUnavailable
from autoscaling.live.store.history import history
from autoscaling.live.store.memory import MAX_PENDING, Memory
from autoscaling.live.store.mirror import STEPS, WATCHED
from autoscaling.live.store.values import decision_dict, from_decision
from autoscaling.live.store.writer import Writer
from autoscaling.ports import Clock
from autoscaling.traffic import Traffic

AHEAD_S = 60.0
"""Rows further ahead of the clock than this are refused."""
COMMIT_EVERY_S = 0.75
_RETRY_S = 0.1
_MOST = 1 << 40
"""No second has more of anything; beyond it a row is a mistake, and would overflow a sum."""

T = TypeVar("T")
Reader = Callable[[Connection], T]


class Store:
    """Thread-safe. No call raises because the database is away, except those that say so."""

    def __init__(
        self, database: Database, clock: Clock, *, commit_every_s: float, max_pending: int, max_decisions: int
    ) -> None:
        """Use `open`."""
        self._clock = clock
        self._memory = Memory(max_pending)
        self._writer = Writer(
            database, self._memory, clock, commit_every_s=commit_every_s, max_decisions=max_decisions
        )

    @classmethod
    def open(
        cls,
        url: str,
        *,
        clock: Clock,
        commit_every_s: float = COMMIT_EVERY_S,
        max_pending: int = MAX_PENDING,
        max_decisions: int = logs.MAX_DECISIONS,
    ) -> Self:
        """Connects, creates what tables are missing and reads what readers are served from.

        A database that can't be reached is no error: the store works from memory, and connects when it can.

        Args:
            url: sqlite:///path or postgresql+psycopg://user@host/database.
            commit_every_s: how often the thread commits.
            max_pending: how many records may wait while the database is away.
            max_decisions: how many decisions are kept at most; then the oldest of the models that have the most go.

        Raises:
            ConfigError: the URL is wrong, or the database was written by a newer Relight.
        """
        store = cls(
            Database(url, clock),
            clock,
            commit_every_s=commit_every_s,
            max_pending=max_pending,
            max_decisions=max_decisions,
        )
        store._writer.turn()
        if store._writer.newer is not None:
            store._writer.database.dispose()
            raise store._writer.newer
        return store

    def start(self) -> None:
        """Starts the thread that writes. Without it, `flush` does."""
        self._writer.start()

    def close(self) -> None:
        """Writes what waits, if the database takes it, and lets go of it."""
        self._writer.stop()
        self._writer.turn()
        with suppress(StoreUnavailable), self._writer.hold():
            self._writer.finish()

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Commits what waits now. Whether it is in; False after trying for `timeout_s` seconds."""
        left_s = timeout_s
        while not self._writer.turn():
            if left_s <= 0:
                return False
            Event().wait(min(_RETRY_S, left_s))
            left_s -= _RETRY_S
        return True

    @property
    def attached(self) -> bool:
        """Whether what earlier processes kept is here: False until the database was reached for the first time."""
        return self._writer.attached

    @contextmanager
    def together(self) -> Iterator[int]:
        """What one thread adds and puts within the block is committed in one transaction: a kill leaves all or none.

        Its number is what the block is given; see `committed`. Other threads wait meanwhile, so do nothing else in it.
        """
        with self._memory.lock:
            yield self._memory.last_seq + 1

    @property
    def committed(self) -> int:
        """The number of the last transaction that is in; all before it are."""
        return self._memory.written_seq

    def health(self) -> dict[str, Any]:
        """How the store is.

        Returns:
            ok: what is accepted gets written. error: why not. pending: records that wait; dropped: those that could not
            wait any longer, by kind in dropped_by. last_commit_s: Unix time. refused: records that were not accepted,
            by reason. notices: what happened to the database that people must know. clock_jumps. kind: sqlite or
            postgresql; not where it is, since the status shows this to everybody.
        """
        writer, memory = self._writer, self._memory
        with memory.lock:
            pending = sum(len(batch) for batch in memory.waiting())
            dropped, refused, notices = dict(memory.dropped), dict(memory.refused), list(memory.notices)
        error = "the thread that writes has ended" if writer.is_stuck else writer.error
        return {
            "ok": error is None,
            "error": error,
            "pending": pending,
            "dropped": sum(dropped.values()),
            "dropped_by": dropped,
            "refused": refused,
            "notices": notices,
            "last_commit_s": writer.last_commit_s,
            "clock_jumps": writer.clock_jumps,
            "kind": writer.database.url.get_backend_name(),
        }

    # -- traffic

    def add_traffic(self, rows: Sequence[TrafficRow]) -> None:
        """Adds what came in. A row without amounts says that the model is watched from then on.

        Rows from the future, from a clock that was never set, and with amounts that can't be are refused and counted in
        `health`.
        """
        now_s = self._clock.now_s()
        with self._memory.lock:
            for row in rows:
                reason = _refusal(row, now_s)
                if reason is not None:
                    self._memory.refused[reason] += 1
                    continue
                for step_s in (WATCHED, *STEPS):
                    if self._memory.mirror.know_since(row.model, step_s, row.second):
                        self._memory.buffer.since[row.model, step_s] = row.second
                amounts = (row.arrivals, row.input_tokens, row.output_tokens, row.busy_s, row.waited_s)
                if any(amounts):
                    entry = (row.second, 1, amounts)
                    self._memory.mirror.add(row.model, entry, now_s)
                    self._memory.buffer.add_traffic(row.model, entry)
            self._memory.bound()

    def traffic(self, model: str, now_s: float) -> Traffic:
        """The history of a model as it is known at `now_s`. From memory; the first time, from the database.

        While the database is away, a model that wasn't asked for yet is known since this process began.
        """
        self._load(model)
        with self._memory.lock:
            series = self._memory.mirror.models.get(model)
            if series is None:
                return self._memory.mirror.nothing(model, now_s)
            series.fold(self._clock.now_s())
            return series.traffic(model, now_s)

    def watched_since_s(self, model: str) -> float | None:
        """Since when `add_traffic` tells of a model, in Unix seconds; None if it never did, or an older Relight did."""
        with self._memory.lock:
            series = self._memory.mirror.models.get(model)
            return series.since.get(WATCHED) if series is not None else None

    def has_records(self, model: str) -> bool:
        """Whether anything that came of a model, or was done with it, is on record.

        Raises:
            StoreUnavailable: the database can't be read now.
        """
        return (
            model in self.models_with_traffic()
            or bool(self.usage("", "9999-12-31", model))
            or bool(self.cold_starts(model, 0.0, 1))
            or bool(self.prewarms(model, 0.0, 1))
            or bool(self.decisions(model, 0.0, math.inf, 1, source=None))
        )

    def models_with_traffic(self) -> list[str]:
        """Models of which anything is known, sorted."""
        with self._memory.lock:
            return sorted(model for model, series in self._memory.mirror.models.items() if series.since)

    def import_traffic(
        self,
        rows: Iterable[tuple[str, float, int, int, int, float]],
        bucket_s: float,
        *,
        source: str = "",
    ) -> int:
        """Adds history: all of it, or, when anything fails, none.

        Args:
            rows: (model, time_s, arrivals, input_tokens, output_tokens, busy_s), each for what came in the `bucket_s`
                seconds from `time_s`. Read once, in bounded memory. A row of zeros says that the model was watched.
            bucket_s: levels with shorter buckets than this stay unknown for that time, except that a bucket may be
                spread evenly over two of the level below it. At most LONGEST_WINDOW_S.
            source: a name for what is imported. The same name is never imported twice.

        Returns:
            How many rows were taken. Rows from the future, or older than anything is kept, are refused and counted in
            `health`. 0 if `source` was imported before.

        Raises:
            ConfigError: no level can show what came in `bucket_s` seconds. Nothing was imported.
            StoreUnavailable: nothing was imported.
        """
        staged = bulk.Staged(self._clock.now_s(), bucket_s)
        with self._writer.unlocked() as database, database.connection() as connection:
            bulk.stage(connection, rows, staged)
            taken = self._writer.merge(connection, staged, source)
        with self._memory.lock:
            self._memory.refused.update(staged.refused)
        return taken

    def imported(self, source: str) -> float | None:
        """When `source` was imported, in Unix seconds; None if it was not. StoreUnavailable if that can't be told."""
        return self._read(lambda connection: bulk.imported(connection, source))

    def history(
        self, model: str | None, since_s: float, until_s: float, step_s: float
    ) -> list[dict[str, Any]]:
        """Traffic for plots and tables, one dict for each step, quiet ones too, oldest first.

        Args:
            model: None adds up all models.
            step_s: what is wanted. Coarser where only coarser buckets reach back to `since_s`.

        Returns:
            {"start_s", "step_s", "arrivals", "input_tokens", "output_tokens", "busy_s", "waited_s"}; none before the
            traffic is known.

        Raises:
            ConfigError: the step is not positive, or so short that the answer would be too long.
        """
        models = self.models_with_traffic() if model is None else [model]
        for name in models:
            self._load(name)
        with self._memory.lock:
            series = [
                self._memory.mirror.models[name] for name in models if name in self._memory.mirror.models
            ]
            now_s = self._clock.now_s()
            for one in series:
                one.fold(now_s)
            return history(series, since_s, min(until_s, now_s), step_s, now_s)

    def _load(self, model: str) -> None:
        with self._memory.lock:
            series = self._memory.mirror.models.get(model)
            missing = series is not None and not series.loaded
        if missing:
            self._writer.load(model)

    # -- decisions, states, plan

    def add_decisions(self, decisions: Sequence[Decision], *, source: str = "active") -> None:
        """Records decisions. All that are given are kept, so give those that changed, not every tick's."""
        with self._memory.lock:
            for decision in decisions:
                if math.isfinite(decision.made_s):
                    self._memory.buffer.decisions.append((source, decision))
                else:
                    self._memory.refused["decision: time is not finite"] += 1
            self._memory.bound()

    def decisions(
        self,
        model: str | None,
        since_s: float,
        until_s: float,
        limit: int = 1000,
        source: str | None = "active",
    ) -> list[dict[str, Any]]:
        """The newest `limit` decisions made in [since_s, until_s], oldest first, of one model or all.

        Returns:
            The fields of `Decision` as plain values: rung and reason by name, `until_s` None for no end; and `source`.

        Raises:
            StoreUnavailable: the database can't be read now.
        """

        def wanted(one: str, decision: Decision) -> bool:
            return (
                since_s <= decision.made_s <= until_s
                and (model is None or decision.model == model)
                and (source is None or one == source)
            )

        rows, waiting = self._read_with_waiting(
            lambda connection: logs.read_decisions(
                connection, model, since_s, until_s, limit=limit, source=source
            )
        )
        rows += [
            decision_dict(from_decision(decision, one))
            for batch in waiting
            for one, decision in batch.decisions
            if wanted(one, decision)
        ]
        return sorted(rows, key=lambda row: float(row["made_s"]))[-limit:] if limit > 0 else []

    def put_states(self, states: Mapping[str, State]) -> None:
        """Replaces what policies remember of these models. What has not changed costs nothing."""
        with self._memory.lock:
            changed = {
                model: state for model, state in states.items() if self._memory.states.get(model) != state
            }
            self._memory.states.update(changed)
            self._memory.buffer.states.update(changed)

    def states(self) -> dict[str, State]:
        """What policies remember, by model. From memory."""
        with self._memory.lock:
            return dict(self._memory.states)

    def put_plan(self, plan_json: str) -> None:
        """Replaces the plan."""
        with self._memory.lock:
            self._memory.plan = self._memory.buffer.plan = plan_json

    def plan(self) -> str | None:
        """The plan that was put last, by this process or one before it. From memory."""
        with self._memory.lock:
            return self._memory.plan

    # -- cold starts, prewarms, usage

    def add_cold_start(self, row: ColdStartRow) -> None:
        """Records a cold start; the same engine and time again replace what was said."""
        with self._memory.lock:
            if all(map(math.isfinite, (row.begun_s, row.ready_s, row.total_s))):
                self._memory.buffer.cold_starts[row.engine_id, row.ready_s] = row
            else:
                self._memory.refused["cold start: time is not finite"] += 1
            self._memory.bound()

    def cold_starts(
        self, model: str | None, since_s: float, limit: int = 1000, *, until_s: float = math.inf
    ) -> list[ColdStartRow]:
        """The newest `limit` cold starts ready in [since_s, until_s], oldest first. StoreUnavailable as `decisions`."""
        rows, waiting = self._read_with_waiting(
            lambda connection: logs.read_cold_starts(connection, model, since_s, until_s, limit=limit)
        )
        by_key = {(row.engine_id, row.ready_s): row for row in rows}
        for batch in waiting:
            by_key.update(batch.cold_starts)
        wanted = (
            row for row in by_key.values() if since_s <= row.ready_s <= until_s and model in {None, row.model}
        )
        return heapq.nlargest(limit, wanted, key=lambda row: row.ready_s)[::-1]

    def newest_starts(self, since_s: float, each: int) -> list[ColdStartRow]:
        """Of every model and every rung the newest `each` cold starts that were ready since then, oldest first.

        A model that starts often leaves those of the others their place.

        Raises:
            StoreUnavailable: the database can't be read now.
        """
        rows, waiting = self._read_with_waiting(
            lambda connection: logs.read_newest_starts(connection, since_s, each)
        )
        by_key = {(row.engine_id, row.ready_s): row for row in rows}
        for batch in waiting:
            by_key.update(batch.cold_starts)
        found: list[ColdStartRow] = []
        taken: Counter[tuple[str, Rung]] = Counter()
        for row in sorted(by_key.values(), key=lambda row: row.ready_s, reverse=True):
            taken[row.model, row.rung] += 1
            if row.ready_s >= since_s and taken[row.model, row.rung] <= each:
                found.append(row)
        return found[::-1]

    def put_prewarm(self, row: PrewarmRow) -> None:
        """Records a prewarm, or how it goes on: the same id replaces what was said."""
        with self._memory.lock:
            if all(map(math.isfinite, (row.begun_s, row.cost_gpu_s, row.spared_wait_s))):
                self._memory.buffer.prewarms[row.id] = row
            else:
                self._memory.refused["prewarm: a number is not finite"] += 1
            self._memory.bound()

    def prewarms(
        self, model: str | None, since_s: float, limit: int = 1000, *, until_s: float = math.inf
    ) -> list[PrewarmRow]:
        """The newest `limit` prewarms begun in [since_s, until_s], oldest first. StoreUnavailable as `decisions`."""
        rows, waiting = self._read_with_waiting(
            lambda connection: logs.read_prewarms(connection, model, since_s, until_s, limit=limit)
        )
        by_id = {row.id: row for row in rows}
        for batch in waiting:
            by_id.update(batch.prewarms)
        wanted = (
            row for row in by_id.values() if since_s <= row.begun_s <= until_s and model in {None, row.model}
        )
        return heapq.nlargest(limit, wanted, key=lambda row: row.begun_s)[::-1]

    def add_usage(self, rows: Sequence[UsageRow]) -> None:
        """Adds to the accounts of a model's day. A row with a number that can't be is refused and counted."""
        with self._memory.lock:
            for row in rows:
                numbers = (
                    *row.gpu_s.values(),
                    row.requests,
                    row.cold_requests,
                    row.waited_s,
                    row.cold_starts,
                )
                if all(0 <= number < _MOST for number in numbers) and _is_day(row.day):
                    self._memory.buffer.add_usage(row)
                else:
                    self._memory.refused["usage: negative, not finite, or no day"] += 1
            self._memory.bound()

    def usage(
        self, since_day: str, until_day: str, model: str | None = None, source: str | None = None
    ) -> list[UsageRow]:
        """Accounts of the days since_day..until_day (YYYY-MM-DD, both included), ordered by day, source and model.

        Raises:
            StoreUnavailable: the database can't be read now.
        """
        rows, waiting = self._read_with_waiting(
            lambda connection: logs.read_usage(connection, since_day, until_day, model, source)
        )
        by_key = {(row.day, row.source, row.model): row for row in rows}
        for batch in waiting:
            for key, row in batch.usage.items():
                if (
                    since_day <= row.day <= until_day
                    and model in {None, row.model}
                    and source in {None, row.source}
                ):
                    by_key[key] = add_usage(by_key[key], row) if key in by_key else row
        return [by_key[key] for key in sorted(by_key)]

    # -- overrides

    def put_override(self, override: Override) -> None:
        """Records an override; the same id replaces what was said. Durable at return.

        Raises:
            StoreUnavailable: it may not be in. To say it again with the same id does no harm.
        """
        self._writer.put_override(override)

    def overrides(self, now_s: float) -> list[Override]:
        """Those in force at `now_s`, oldest first: a later one is to win. From memory."""
        with self._memory.lock:
            rows = list(self._memory.overrides.values())
        in_force = (
            row for row in rows if row.undone_s is None and (row.until_s is None or row.until_s > now_s)
        )
        return sorted(in_force, key=lambda row: (row.made_s, row.id))

    def override_history(self, limit: int = 1000) -> list[Override]:
        """The newest `limit` overrides, in force or not, oldest first. From memory."""
        with self._memory.lock:
            rows = list(self._memory.overrides.values())
        return heapq.nlargest(limit, rows, key=lambda row: (row.made_s, row.id))[::-1]

    def undo_override(self, id: str, who: str, now_s: float) -> Override | None:
        """Ends an override. Durable at return.

        Returns:
            It as it is now, unchanged if it was undone before; None if there is none of that id.

        Raises:
            StoreUnavailable: it may still be in force.
        """
        with self._memory.lock:
            row = self._memory.overrides.get(id)
        if row is None or row.undone_s is not None:
            return row
        undone = replace(row, undone_s=now_s, undone_by=who)
        self._writer.put_override(undone)
        return undone

    # -- reading what is not in memory

    def _read(self, read: Reader[T]) -> T:
        with self._writer.hold() as database, database.read() as connection:
            return read(connection)

    def _read_with_waiting(self, read: Reader[T]) -> tuple[T, list[Batch]]:
        """What the database says, and the batches that are not in it."""
        with self._writer.hold() as database, database.read() as connection:
            result = read(connection)
            seq = journal.committed_seq(connection, self._writer.id)
            with self._memory.lock:
                waiting = [batch.copy() for batch in self._memory.waiting() if not 0 < batch.seq <= seq]
        return result, waiting

    @property
    def memory_bytes(self) -> int:
        """What the history in memory takes, without the rows of the last seconds."""
        with self._memory.lock:
            return self._memory.mirror.nbytes


def _refusal(row: TrafficRow, now_s: float) -> str | None:
    if not (isinstance(row.model, str) and row.model and "\0" not in row.model and row.model.isprintable()):
        return "traffic: no model's name"
    if 0 <= row.second < EARLIEST_S:
        return "traffic: from a clock that was never set"
    if not 0 <= row.second <= now_s + AHEAD_S:
        return "traffic: from the future" if row.second > 0 else "traffic: negative or not finite"
    amounts = (row.arrivals, row.input_tokens, row.output_tokens, row.busy_s, row.waited_s)
    if not all(0 <= amount < _MOST for amount in amounts):
        return "traffic: negative or not finite"
    return None


def _is_day(day: str) -> bool:
    try:
        return datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC).strftime("%Y-%m-%d") == day
    except ValueError:
        return False
