"""The write-behind thread, and everything else that talks to the database.

What a failure does: the batch that was being written stays as it is and is tried again, while new records gather
behind it. Its number is committed with it, so that a batch whose COMMIT was heard but not answered isn't written twice.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypeVar

from sqlalchemy import Connection, select
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, StatementError

from autoscaling.live.clock import EARLIEST_S
from autoscaling.live.records import Override
from autoscaling.live.store import bulk, journal, logs, schema
from autoscaling.live.store.buffer import Batch
from autoscaling.live.store.database import FAILURES, Database, NewerSchema
from autoscaling.live.store.errors import StoreUnavailable
from autoscaling.live.store.memory import Memory, Snapshot, amounts_of
from autoscaling.live.store.mirror import KEPT_S
from autoscaling.ports import Clock

logger = logging.getLogger(__name__)

CALL_WAIT_S = 5.0
"""How long a call of a reader waits for the database to be free of the writer."""
HOUSEKEEPING_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
JUMP_S = 60.0
"""A clock that moves by this much against the monotonic one has jumped."""
PRUNING_SPEED = 24.0
"""Pruning moves on by so many seconds a second at most: a clock that is a year ahead can't cost a year of history."""
PRUNED_MODELS = 50

T = TypeVar("T")

_WRITES: tuple[tuple[str, Callable[[Connection, Batch], None]], ...] = (
    ("decisions", logs.write_decisions),
    ("cold starts", logs.write_cold_starts),
    ("prewarms", logs.write_prewarms),
    ("usage", logs.write_usage),
    ("states", logs.write_states),
    ("plan", logs.write_plan),
)


class Writer:
    """One writer of one database. Whoever uses the database holds `_busy`; `memory.lock` is only ever taken inside."""

    def __init__(
        self,
        database: Database,
        memory: Memory,
        clock: Clock,
        *,
        commit_every_s: float,
        max_decisions: int,
    ) -> None:
        self.database = database
        self.id = uuid.uuid4().hex
        self.error: str | None = "the database was not reached yet"
        self.last_commit_s: float | None = None
        self.clock_jumps = 0
        self.newer: NewerSchema | None = None
        """Set when the database turned out to be a newer Relight's; then nothing is ever written."""
        self._memory = memory
        self._clock = clock
        self._commit_every_s = commit_every_s
        self._max_decisions = max_decisions
        self._busy = threading.RLock()
        self._attached = False
        self._retried_seq = 0
        self._rolled_seq = 0
        self._revision: str | None = None
        self._snapshot: Snapshot | None = None
        self._offset_s = clock.now_s() - clock.monotonic_s()
        self._housekeeping_s: float | None = None
        self._next_pruned = 0
        self._failures = 0
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    # -- the thread

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def attached(self) -> bool:
        """Whether the database was reached, and what readers are served from is in memory."""
        return self._attached

    @property
    def is_stuck(self) -> bool:
        """Whether the thread was started and has ended without being told to."""
        return self._thread is not None and not self._thread.is_alive() and not self._stop.is_set()

    def _run(self) -> None:
        while not self._stop.wait(self._pause_s()):
            self.turn()

    def _pause_s(self) -> float:
        if self._failures:
            return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(10, self._failures - 1)))
        return self._commit_every_s

    def turn(self) -> bool:
        """Does everything that is due.

        Returns:
            Whether it was done; `error` says why not.
        """
        with self._busy:
            try:
                self._do_turn()
            except NewerSchema as error:
                self.newer = error
                self._fail(error.message)
            except Exception as error:  # the thread must outlive whatever a driver raises
                self._fail(_describe(error))
                if not isinstance(error, FAILURES):
                    logger.exception("the store's writer failed in an unforeseen way")
            else:
                if self._failures:
                    logger.warning("the store is back: %s", self.database.shown_url)
                self._failures = 0
                self.error = None
            return self.error is None

    def _fail(self, error: str) -> None:
        if error != self.error:
            logger.error("the store can't be written, and is tried again: %s", error)
        self.error = error
        self._failures += 1

    def _do_turn(self) -> None:
        stale = self._clock_jumped()
        if self.database.is_gone():
            self._replaced()
        try:
            if self._snapshot is not None:
                self._restore(self._snapshot)
            elif not self._attached:
                self._attach()
            self._commit()
            if stale or self._changed_elsewhere():
                self._reload()
            now = self._clock.monotonic_s()
            if self._housekeeping_s is None or now - self._housekeeping_s >= HOUSEKEEPING_S:
                self._keep_house()
                self._housekeeping_s = now
        except FAILURES as error:
            if not self.database.is_damaged(error):
                raise
            self._begin_anew(self.database.move_aside(_describe(error)))

    # -- connecting, and beginning anew

    def _attach(self) -> None:
        said = self.database.prepare()
        salvaged: list[Override] = []
        if said is not None:
            salvaged, about = self._salvage()
            with self._memory.lock:
                self._memory.notices.append(
                    f"{said} History, decisions and accounts before it are gone; {about}"
                )
        now_s = self._clock.now_s()
        with self.database.write() as connection:
            for row in salvaged:
                logs.put_override(connection, row)
            for writer in connection.scalars(select(schema.writers.c.id)).all():
                while journal.roll_up(connection, writer):
                    pass
            journal.mend_since(connection)
        with self.database.read() as connection:
            since = journal.read_since(connection)
            seconds = list(journal.read_seconds(connection, now_s - KEPT_S[1]))
            states = logs.read_states(connection)
            plan = logs.read_meta(connection, "plan")
            overrides = logs.read_overrides(connection)
            self._revision = logs.read_meta(connection, "revision")
        with self._memory.lock:
            for model, step_s, since_s in since:
                self._memory.mirror.know_since(model, step_s, since_s)
            self._memory.replay(seconds, now_s)
            self._memory.states = {**states, **self._memory.states}
            self._memory.plan = plan if self._memory.plan is None else self._memory.plan
            self._memory.overrides = {row.id: row for row in overrides}
        self._attached = True

    def _salvage(self) -> tuple[list[Override], str]:
        """What people said at run time, as far as it can be read from the damaged file."""
        damaged = Database(f"sqlite:///{self.database.aside}", self._clock)
        try:
            with damaged.read() as connection:
                overrides = logs.read_overrides(connection)
        except (*FAILURES, ValueError, KeyError, TypeError):
            return [], "its overrides could not be read either."
        finally:
            damaged.dispose()
        return overrides, f"{len(overrides)} overrides were read from it."

    def _replaced(self) -> None:
        assert self.database.path is not None
        self._attached = False
        if self.database.path.exists():
            self.database.dispose()
            self._note(f"{self.database.path} was replaced by another file, which is used from now on.")
            return
        self.database.clear_leftovers()
        self._begin_anew(f"{self.database.path} was removed while it was in use. A new database was begun.")

    def _begin_anew(self, said: str) -> None:
        self._note(f"{said} It begins with what was in memory; older decisions and accounts are gone.")
        with self._memory.lock:
            self._snapshot = self._memory.snapshot(self._clock.now_s())
        self._attached = False
        self._restore(self._snapshot)

    def _note(self, said: str) -> None:
        with self._memory.lock:
            # It is found again at each attempt, for as long as a file that can't be used is in its place.
            if said in self._memory.notices[-1:]:
                return
            self._memory.notices.append(said)
        logger.error(said)

    def _restore(self, snapshot: Snapshot) -> None:
        self.database.prepare()
        with self.database.write() as connection:
            for row in snapshot.overrides:
                logs.put_override(connection, row)
            journal.put_since(connection, snapshot.since)
            logs.write_states(connection, Batch(states=dict(snapshot.states)))
            logs.write_plan(connection, Batch(plan=snapshot.plan))
            for model, levels in snapshot.levels.items():
                rows = {
                    (model, step_s, bucket): [*amounts, *silent]
                    for step_s, arrays in levels.items()
                    if step_s > 1
                    for (bucket, amounts), silent in zip(
                        amounts_of(arrays), arrays.silent.T.tolist(), strict=True
                    )
                }
                journal.add_levels(connection, rows)
            seconds = (
                ((model, second, 1), amounts)
                for model, levels in snapshot.levels.items()
                for second, amounts in amounts_of(levels[1])
            )
            journal.append_rolled(connection, f"snapshot-{uuid.uuid4().hex}", seconds, self._clock.now_s())
        self._snapshot = None
        self._revision = None
        self._rolled_seq = 0
        self._attached = True

    # -- committing

    def _commit(self) -> None:
        batch = self._memory.take()
        if batch is None:
            return
        try:
            self._write(batch, careful=False)
        except (DataError, IntegrityError, OverflowError, TypeError, ValueError) as error:
            logger.error("a record can't be stored: %s", _describe(error))
            self._write(batch, careful=True)
        self._memory.written()
        self.last_commit_s = self._clock.now_s()

    def _write(self, batch: Batch, *, careful: bool) -> None:
        """Writes a batch in one transaction. Being careful, it leaves out what the database refuses."""
        dropped: dict[str, int] = {}
        with self.database.write() as connection:
            if self._retried_seq == batch.seq and journal.committed_seq(connection, self.id) >= batch.seq:
                return
            self._retried_seq = batch.seq
            journal.append(connection, self.id, batch.seq, batch.traffic)
            journal.put_since(connection, batch.since)
            for kind, write in _WRITES:
                if not careful:
                    write(connection, batch)
                    continue
                try:
                    with connection.begin_nested():
                        write(connection, batch)
                except (DataError, IntegrityError, OverflowError, TypeError, ValueError):
                    dropped[kind] = max(1, len(getattr(batch, kind.replace(" ", "_"))))
            journal.commit_seq(connection, self.id, batch.seq, self._clock.now_s())
        with self._memory.lock:
            self._memory.dropped.update(dropped)

    # -- what others changed, and housekeeping

    def _changed_elsewhere(self) -> bool:
        with self.database.read() as connection:
            return logs.read_meta(connection, "revision") != self._revision

    def _reload(self) -> None:
        now_s = self._clock.now_s()
        with self.database.read() as connection:
            revision = logs.read_meta(connection, "revision")
            since = journal.read_since(connection)
            seconds = list(journal.read_seconds(connection, now_s - KEPT_S[1]))
            overrides = logs.read_overrides(connection)
        with self._memory.lock:
            for model, step_s, since_s in since:
                self._memory.mirror.know_since(model, step_s, since_s)
            self._memory.replay(seconds, now_s)
            self._memory.overrides = {row.id: row for row in overrides}
        self._revision = revision

    def _clock_jumped(self) -> bool:
        offset_s = self._clock.now_s() - self._clock.monotonic_s()
        if abs(offset_s - self._offset_s) <= JUMP_S:
            return False
        logger.warning("the clock jumped by %.0f s", offset_s - self._offset_s)
        self._offset_s = offset_s
        self.clock_jumps += 1
        return True

    def _keep_house(self) -> None:
        self._roll_up()
        first = self._housekeeping_s is None
        with self.database.write() as connection:
            now_s = self._pruning_time_s(connection, first)
            journal.prune_journal(connection, now_s)
        day = datetime.fromtimestamp(max(0.0, now_s - logs.KEPT_DAYS["usage"] * logs.DAY_S), UTC)
        more = True
        while more:
            with self.database.write() as connection:
                more = logs.prune(connection, now_s, day.strftime("%Y-%m-%d"), self._max_decisions)
        with self._memory.lock:
            models = sorted(self._memory.mirror.models)
        for _ in range(min(PRUNED_MODELS, len(models))):
            self._next_pruned = (self._next_pruned + 1) % len(models)
            with self.database.write() as connection:
                journal.prune_levels(connection, models[self._next_pruned], now_s)

    def _pruning_time_s(self, connection: Connection, first: bool) -> float:
        """The present as pruning may see it."""
        now_s = self._clock.now_s()
        reached_s = float(logs.read_meta(connection, "pruned_s") or now_s)
        if now_s < EARLIEST_S:
            return now_s  # nothing is as old as that
        if reached_s < EARLIEST_S:
            reached_s = now_s
        passed_s = (
            logs.DAY_S if first else PRUNING_SPEED * (self._clock.monotonic_s() - (self._housekeeping_s or 0))
        )
        now_s = min(now_s, reached_s + passed_s)
        logs.put_meta(connection, "pruned_s", repr(now_s))
        return now_s

    def _roll_up(self) -> None:
        more = self._rolled_seq < self._memory.last_seq
        while more:
            with self.database.write() as connection:
                more = journal.roll_up(connection, self.id)
        self._rolled_seq = (
            self._memory.last_seq if self._memory.inflight is None else self._memory.last_seq - 1
        )

    # -- on behalf of callers

    @contextmanager
    def hold(self) -> Iterator[Database]:
        """The database, for a call that needs it now.

        Raises:
            StoreUnavailable: it is busy for long, was not reached, or fails within the block.
        """
        if not self._busy.acquire(timeout=CALL_WAIT_S):
            raise StoreUnavailable(f"store: {self.database.shown_url} does not answer. Try again.")
        try:
            if not self._attached and not self.turn():
                raise StoreUnavailable(f"store: {self.database.shown_url} can't be reached: {self.error}")
            yield self.database
        except FAILURES as error:
            # Damage is dealt with by the next turn, which meets it again.
            raise StoreUnavailable(f"store: {self.database.shown_url} failed: {_describe(error)}") from error
        finally:
            self._busy.release()

    @contextmanager
    def unlocked(self) -> Iterator[Database]:
        """The database, for a long call beside the writer. Raises as `hold` does."""
        with self.hold():
            pass
        try:
            yield self.database
        except FAILURES as error:
            raise StoreUnavailable(f"store: {self.database.shown_url} failed: {_describe(error)}") from error

    def merge(self, connection: Connection, staged: bulk.Staged, source: str) -> int:
        """Brings a gathered import in, and reads history anew. Returns how many rows were taken."""
        with self.hold():
            connection.execution_options(relight_begin="BEGIN IMMEDIATE")
            with connection.begin():
                taken = bulk.merge(connection, staged, source)
                if taken:
                    self.bump(connection)
            self.turn()  # which sees that history changed
            return taken

    def load(self, model: str) -> None:
        """Brings the coarse levels of a model into memory. While the database is away nothing changes."""
        if self.error is not None or not self._busy.acquire(timeout=CALL_WAIT_S):
            return
        try:
            if self._memory.inflight is not None:
                self._commit()  # it may be in already, and must not be added to itself
            self._roll_up()
            now_s = self._clock.now_s()
            with self.database.read() as connection:
                levels = journal.read_levels(connection, model, now_s)
            with self._memory.lock:
                waiting = [entry for batch in self._memory.waiting() for entry in batch.entries(model)]
                self._memory.mirror.models[model].load(levels, waiting, now_s)
        except FAILURES as error:
            self._fail(_describe(error))
        finally:
            self._busy.release()

    def put_override(self, row: Override) -> None:
        """Durable at return; StoreUnavailable otherwise."""
        with self.hold() as database:
            with database.write() as connection:
                logs.put_override(connection, row)
                revision, changed = self.bump(connection)
            if not changed:
                self._revision = revision
            with self._memory.lock:
                self._memory.overrides[row.id] = row

    def bump(self, connection: Connection) -> tuple[str, bool]:
        """Tells other processes that history or overrides changed.

        Returns:
            The new revision, and whether there was one that this process hasn't seen.
        """
        key = schema.meta.c.key
        before = connection.scalar(select(schema.meta.c.value).where(key == "revision").with_for_update())
        revision = str(int(before or 0) + 1)
        logs.put_meta(connection, "revision", revision)
        return revision, before != self._revision

    def finish(self) -> None:
        """Leaves the database as a next process likes it: everything rolled up, and others told."""
        with self._busy:
            if self._attached and self.error is None and self._memory.last_seq:
                self._roll_up()
                with self.database.write() as connection:
                    self.bump(connection)
            self.database.dispose()


def _describe(error: BaseException) -> str:
    """The driver's own words, on one line."""
    original = error.orig if isinstance(error, (DBAPIError, StatementError)) and error.orig else error
    words = " ".join(str(original).split())
    return words or type(original).__name__
