"""What waits to be written: bounded, and what can be added up is."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from autoscaling.core.types import Decision, State
from autoscaling.live.records import ColdStartRow, PrewarmRow, UsageRow
from autoscaling.live.store.mirror import STEPS, Amounts, Entry


@dataclass(slots=True)
class Batch:
    """What goes into one transaction. `seq` ascends within a writer, so that a batch that is tried again is known."""

    seq: int = 0
    traffic: dict[tuple[str, int, int], Amounts] = field(default_factory=dict)
    """(model, time_s, step_s) -> amounts."""
    since: dict[tuple[str, int], float] = field(default_factory=dict)
    """(model, step_s) -> since when that level is known; of WATCHED: since when the model is watched."""
    decisions: deque[tuple[str, Decision]] = field(default_factory=deque)
    """(source, decision), oldest first."""
    cold_starts: dict[tuple[str, float], ColdStartRow] = field(default_factory=dict)
    prewarms: dict[str, PrewarmRow] = field(default_factory=dict)
    usage: dict[tuple[str, str, str], UsageRow] = field(default_factory=dict)
    """(day, source, model) -> what is to be added."""
    states: dict[str, State] = field(default_factory=dict)
    plan: str | None = None

    def __len__(self) -> int:
        """Records that wait. States and the plan replace what waits of their kind, so they are bounded anyway."""
        return (
            len(self.traffic)
            + len(self.decisions)
            + len(self.cold_starts)
            + len(self.prewarms)
            + len(self.usage)
        )

    def __bool__(self) -> bool:
        return bool(len(self) or self.since or self.states or self.plan is not None)

    def add_traffic(self, model: str, entry: Entry) -> None:
        time_s, step_s, amounts = entry
        key = (model, time_s, step_s)
        there = self.traffic.get(key)
        self.traffic[key] = amounts if there is None else _sum(there, amounts)

    def add_usage(self, row: UsageRow) -> None:
        key = (row.day, row.source, row.model)
        there = self.usage.get(key)
        self.usage[key] = row if there is None else add_usage(there, row)

    def entries(self, model: str) -> Iterator[Entry]:
        for (name, time_s, step_s), amounts in self.traffic.items():
            if name == model:
                yield time_s, step_s, amounts

    def copy(self) -> Batch:
        """Another one with the same records, which goes on unchanged while this one grows."""
        return Batch(
            seq=self.seq,
            traffic=dict(self.traffic),
            since=dict(self.since),
            decisions=deque(self.decisions),
            cold_starts=dict(self.cold_starts),
            prewarms=dict(self.prewarms),
            usage=dict(self.usage),
            states=dict(self.states),
            plan=self.plan,
        )

    def shrink(self, limit: int) -> Counter[str]:
        """Makes it fit: the oldest decisions go first; then traffic loses its resolution; then other records go.

        Returns:
            How many records were dropped, by kind. Traffic that is only coarser counts as none.
        """
        dropped: Counter[str] = Counter()
        if len(self) <= limit:
            return dropped
        # Well below the limit, so that not every record that comes starts this anew.
        goal = limit * 9 // 10
        while self.decisions and len(self) > goal:
            self.decisions.popleft()
            dropped["decisions"] += 1
        for step_s in STEPS[1:]:
            if len(self) > goal:
                self._coarsen(step_s)
        queues: tuple[tuple[str, dict], ...] = (  # type: ignore[type-arg]
            ("cold starts", self.cold_starts),
            ("prewarms", self.prewarms),
            ("usage", self.usage),
            ("traffic", self.traffic),
        )
        for name, records in queues:
            while records and len(self) > goal:
                del records[next(iter(records))]
                dropped[name] += 1
        return dropped

    def _coarsen(self, step_s: int) -> None:
        coarse: dict[tuple[str, int, int], Amounts] = {}
        for (model, time_s, old_step_s), amounts in self.traffic.items():
            longer_s = max(step_s, old_step_s)
            key = (model, time_s // longer_s * longer_s, longer_s)
            there = coarse.get(key)
            coarse[key] = amounts if there is None else _sum(there, amounts)
        self.traffic = coarse


def add_usage(one: UsageRow, other: UsageRow) -> UsageRow:
    """Two rows of the same model, day and source as one."""
    gpu_s = dict(one.gpu_s)
    for rung, seconds in other.gpu_s.items():
        gpu_s[rung] = gpu_s.get(rung, 0.0) + seconds
    return UsageRow(
        model=one.model,
        day=one.day,
        source=one.source,
        gpu_s=gpu_s,
        requests=one.requests + other.requests,
        cold_requests=one.cold_requests + other.cold_requests,
        waited_s=one.waited_s + other.waited_s,
        cold_starts=one.cold_starts + other.cold_starts,
    )


def _sum(one: Amounts, other: Amounts) -> Amounts:
    return (
        one[0] + other[0],
        one[1] + other[1],
        one[2] + other[2],
        one[3] + other[3],
        one[4] + other[4],
    )
