"""Forecasts for the controller: fitted beside it in other processes, looked up by it in microseconds."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

from autoscaling.core.types import Forecast, State
from autoscaling.forecast.book import Book
from autoscaling.forecast.fit import FittedModel, Job, fit_full, fit_simple, fit_standard
from autoscaling.forecast.kept import UnusableError
from autoscaling.forecast.pool import Pool
from autoscaling.forecast.schedule import REFIT_S, Next, Schedule
from autoscaling.forecast.worker import Answer, Fitter, Task, Worker
from autoscaling.ports import Clock
from autoscaling.traffic import Traffic

FITTERS: tuple[Fitter, ...] = (fit_full, fit_standard, fit_simple)
POOL_S = 30.0
PATIENCE_S = 0.2
RESTART_S = 5.0
"""Between attempts to start a process, where the one before could not be started."""
FULL_DAYS = 4.0


class ForecastService:
    """Thread-safe. Every method but `close` returns at once, and none raises for what a forecaster does.

    A fit that takes longer than `time_budget_s` is killed with its process, one that raises is reported; either way
    the next simpler of `fitters` does it, the forecast's details say so, and the failed one is not tried again on that
    model for six hours. If all fail, the model keeps its last fit, or has none.
    """

    def __init__(
        self,
        store_traffic: Callable[[str], Traffic],
        horizon_s: Callable[[str], float],
        clock: Clock,
        *,
        time_budget_s: float = 20.0,
        processes: int = 1,
        refit_s: float = REFIT_S,
        fitters: Sequence[Fitter] = FITTERS,
    ) -> None:
        """`store_traffic` and `horizon_s` are called on the service's own thread, for one model at a time."""
        if processes < 1 or time_budget_s <= 0 or not fitters:
            raise ValueError(
                f"processes={processes}, time_budget_s={time_budget_s}, fitters={len(fitters)}: all must be positive"
            )
        self._store_traffic, self._horizon_s, self._clock = store_traffic, horizon_s, clock
        self._time_budget_s, self._processes, self._fitters = time_budget_s, processes, tuple(fitters)
        self._book = Book()
        self._lock = threading.Lock()
        self._schedule = Schedule(len(self._fitters), refit_s)
        self._given: dict[int, Next] = {}
        self._workers: list[Worker] = []
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._tasks = self._fits = self._kills = 0
        self._cpu_s = 0.0
        self._restart_s = float("-inf")
        self._error = ""
        self._pool, self._pooled_s = Pool(), -POOL_S
        self._notice = ""

    def start(self) -> None:
        """Begin to fit. Once only."""
        if self._thread is not None:
            raise RuntimeError("the forecast service was started before")
        self._thread = threading.Thread(target=self._run, name="relight-forecasts", daemon=True)
        self._thread.start()

    def restore(self, state: State) -> None:
        """Go on from what `kept` gave another process, best before `start`. Where that can't be, `health` says why."""
        try:
            self._pool.restore(state, self._clock.now_s())
        except UnusableError as error:
            self._notice = f"what the fleet had learned is not used: {error}"

    def kept(self) -> State | None:
        """What a restart is to go on from; the same as before until that is worth writing, None while there is none."""
        return self._pool.kept

    def close(self) -> None:
        """End the processes and wait until they are gone."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def watch(self, models: Sequence[str]) -> None:
        """Fit these, and forget all others."""
        with self._lock:
            if list(self._schedule.turns) == list(models):
                return
            self._schedule.watch(models)
        self._book.keep_only(set(models))

    def forecast(self, model: str, now_s: float) -> Forecast | None:
        """As of about `now_s` (see `made_s`); None where nothing could be learned yet."""
        return self._book.forecast(model, now_s)

    def arrived(self, model: str, time_s: float, count: float = 1) -> None:
        """Requests came: the forecast turns to the next one at once, and a fit follows where that changes much."""
        if model not in self._schedule.turns:
            return
        self._book.arrived(model, time_s, count)
        page = self._book.page(model)
        known = page.fitted
        with self._lock:
            self._schedule.changed(
                model,
                self._clock.monotonic_s(),
                (page.silences, known.known_silences if known else 0),
                (page.arrivals, known.known_arrivals if known else 0.0),
            )

    def scores(self, model: str) -> Mapping[str, Any]:
        """{"next_arrival": {forecaster: ArrivalScore}, "demand": {forecaster: DemandScore}}, from the last fit."""
        return self._book.scores(model)

    def health(self) -> Mapping[str, Any]:
        """`ok` is whether fits are made; `failing` names models that have no fit of the usual kind, and why."""
        fits = self._book.fits()
        now_s = self._clock.now_s()
        with self._lock:
            turns = self._schedule.turns
            failing = {model: "; ".join(turn.failures) for model, turn in turns.items() if turn.failures}
            waiting = sum(turn.fitted_s is None and not turn.running for turn in turns.values())
            alive = self._thread is not None and self._thread.is_alive()
            return {
                "ok": alive and not self._error,
                "error": self._error or None,
                "notice": self._notice or None,
                "models": len(turns),
                "fitted": len(fits),
                "waiting": waiting,
                "fits": self._fits,
                "kills": self._kills,
                "cpu_s": round(self._cpu_s, 3),
                "oldest_fit_s": max((now_s - fit.made_s for fit in fits.values()), default=None),
                "failing": failing,
            }

    # The service's own thread

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._keep_workers()
                self._take_together()
                self._give_out()
                self._take_in()
                self._end_late()
        except Exception as error:  # noqa: BLE001 - the controller lives on without new fits; health says so
            self._error = f"the forecast service has stopped: {type(error).__name__}: {error}"
        finally:
            for worker in self._workers:
                worker.end()

    def _keep_workers(self) -> None:
        now_s = self._clock.monotonic_s()
        for worker in [worker for worker in self._workers if worker.is_spent(now_s)]:
            self._workers.remove(worker)
            worker.end()
        while len(self._workers) < self._processes and now_s >= self._restart_s:
            try:
                self._workers.append(Worker(now_s))
            except OSError as error:
                self._error = f"no process can be started: {error}"
                self._restart_s = now_s + RESTART_S

    def _take_together(self) -> None:
        """What the models have in common by now, every POOL_S."""
        now_s = self._clock.monotonic_s()
        if now_s - self._pooled_s < POOL_S:
            return
        self._pooled_s = now_s
        with self._lock:
            complete = self._schedule.all_tried
        fits = self._book.fits().values()
        if self._pool.next((fit.share for fit in fits), now_s, complete=complete):
            if self._pool.prior.hazard.knows:
                self._book.choose_again()
            with self._lock:
                self._schedule.hurry(now_s)

    def _give_out(self) -> None:
        for worker in self._workers:
            while worker.ready and worker.task is None and not self._closing.is_set():
                now_s = self._clock.monotonic_s()
                with self._lock:
                    following = self._schedule.next(now_s)
                if following is None:
                    return
                job = self._job(following.model)
                if job is None:
                    continue
                self._tasks += 1
                self._given[self._tasks] = following
                job = replace(job, seen=self._book.begin_fit(following.model))
                try:
                    worker.give(
                        Task(self._tasks, self._fitters[following.effort], job, self._time_budget_s), now_s
                    )
                except OSError:
                    self._lose(worker, "its process ended")
                    return

    def _job(self, model: str) -> Job | None:
        try:
            traffic = self._store_traffic(model)
            horizon_s = self._horizon_s(model)
        except Exception as error:  # noqa: BLE001 - a store that is away must not end the service; health says so
            with self._lock:
                reason = f"no traffic to be had: {type(error).__name__}: {error}"
                self._schedule.put_off(model, self._clock.monotonic_s(), reason)
            return None
        return Job(traffic, self._clock.now_s(), horizon_s, self._pool.prior)

    def _take_in(self) -> None:
        connections = {worker.connection: worker for worker in self._workers}
        if not connections:
            self._closing.wait(PATIENCE_S)
            return
        for ready in wait(list(connections), PATIENCE_S):
            worker = connections[ready]  # type: ignore[index]
            try:
                answer: Answer = worker.connection.recv()
            except (EOFError, OSError):
                self._lose(worker, "its process ended")
                continue
            if not worker.ready:
                worker.ready = True
                self._error = ""
                continue
            task, worker.task = worker.task, None
            assert task is not None
            worker.free_since_s = self._clock.monotonic_s()
            worker.heavy = worker.heavy or (self._given[task.id].effort == 0 and len(self._fitters) > 1)
            self._settle(task, answer)

    def _settle(self, task: Task, answer: Answer) -> None:
        given = self._given.pop(task.id)
        fitted: FittedModel | None = None
        error = answer.error
        if not error:
            try:
                fitted = pickle.loads(answer.result)
            except Exception as failure:  # noqa: BLE001 - a result that can't be read is that fitter's failure
                error = f"its result can't be read: {type(failure).__name__}: {failure}"
        if error:
            self._fail(given, error)
            return
        now_s = self._clock.monotonic_s()
        seen, since = task.job.seen, self._book.page(given.model).arrivals
        with self._lock:
            turn = self._schedule.turns.get(given.model)
            if turn is None:
                return
            if fitted is None:
                self._schedule.nothing(given.model, now_s)
                return
            usual = min(1, len(self._fitters) - 1)
            if given.effort <= usual:
                turn.failures = []
            elif turn.failures:
                fallback = {"fallback": f"a simpler forecaster, since {'; '.join(turn.failures)}"}
                fitted = replace(fitted, details={**fitted.details, **fallback})
            dense = fitted.demand is not None and fitted.details.get("known_days", 0) >= FULL_DAYS
            self._schedule.done(
                given.model,
                now_s,
                wants_full=dense,
                sticky=fitted.demand is not None and fitted.demand.name == "mstl",
                effort=given.effort,
                cost_s=answer.cpu_s,
            )
            if seen.fitted is not None and seen.arrivals == since == 0 and fitted.demand is None:
                self._schedule.quiet(given.model)
            self._fits += 1
            self._cpu_s += answer.cpu_s
        self._book.install(given.model, fitted)

    def _fail(self, given: Next, reason: str) -> None:
        name = getattr(self._fitters[given.effort], "__name__", str(given.effort))
        with self._lock:
            self._schedule.failed(given.model, self._clock.monotonic_s(), given.effort, f"{name}: {reason}")

    def _end_late(self) -> None:
        now_s = self._clock.monotonic_s()
        for worker in list(self._workers):
            if (worker.task is not None or not worker.ready) and now_s > worker.deadline_s:
                self._kills += 1
                self._lose(worker, f"killed after {self._time_budget_s:g} s")

    def _lose(self, worker: Worker, reason: str) -> None:
        self._workers.remove(worker)
        worker.end()
        if not worker.ready:
            self._error = f"a process for fits did not start: {reason}"
            self._restart_s = self._clock.monotonic_s() + RESTART_S
        if worker.task is not None:
            self._fail(self._given.pop(worker.task.id), reason)
