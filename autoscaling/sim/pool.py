"""GPUs and memory that models share."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Protocol


class Sharer(Protocol):
    """A model, as whoever shares out sees it."""

    name: str
    gpus: float
    """What each of its replicas is charged as."""
    devices: float
    """GPUs that each of them holds."""

    def granted(self, now_s: float) -> None:
        """GPUs for a start that waited for them."""
        ...

    def evict(self, now_s: float) -> None:
        """Its parked engine makes room."""
        ...


@dataclass(slots=True)
class Pool:
    """What the models of a cluster share. One writer at a time."""

    gpus: float | None = None
    parked_engines: int | None = None
    used: float = 0.0
    waiting: list[Sharer] = field(default_factory=list)
    """Models with a start that has no GPUs yet, one entry for each start, oldest first."""
    parked: OrderedDict[str, Sharer] = field(default_factory=OrderedDict)
    """The one that was used longest ago first."""

    def take(self, gpus: float) -> bool:
        if self.gpus is not None and self.used + gpus > self.gpus + 1e-9:
            return False
        self.used += gpus
        return True

    def give(self, gpus: float) -> None:
        self.used -= gpus

    def grant(self, now_s: float) -> None:
        """Starts that waited for GPUs begin where there are some now."""
        left: list[Sharer] = []
        for model in self.waiting:
            if self.take(model.devices):
                model.granted(now_s)
            else:
                left.append(model)
        self.waiting = left

    def park(self, model: Sharer, now_s: float) -> None:
        self.parked[model.name] = model
        self.parked.move_to_end(model.name)
        while self.parked_engines is not None and len(self.parked) > self.parked_engines:
            _, oldest = self.parked.popitem(last=False)
            oldest.evict(now_s)

    def unpark(self, model: Sharer) -> None:
        self.parked.pop(model.name, None)


__all__ = ["Pool", "Sharer"]
