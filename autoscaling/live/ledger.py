"""Tokens of answers that did not tell them, from the engines' own counters.

Engines count every token; answers tell of most. The balance of a model is what its engines counted less what was
told. While requests are in progress it holds tokens that will be told later, so that only what is left of it when the
model is idle, or what was left of it at every moment of the last minute, belongs to answers that told nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

from autoscaling.live.readings import LastReadings
from autoscaling.live.records import TrafficRow

WINDOW_S = 60.0


@dataclass(slots=True)
class _Balance:
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    owed: bool = False
    """An answer told nothing since the balance was last settled."""
    read: bool = True
    """An engine was read since then: engines are read seconds after they worked."""
    seen: deque[tuple[float, float, float]] = field(default_factory=deque)  # (monotonic time, input, output)


class TokenLedger:
    """For all models. Not thread-safe."""

    def __init__(self) -> None:
        self._balances: dict[str, _Balance] = {}
        self._readings: LastReadings[tuple[float, float]] = LastReadings()
        self._untold: dict[tuple[str, str], int] = {}

    def read(self, engine_id: str, model: str, counters: Mapping[str, float], *, since_birth: bool) -> None:
        """One reading of an engine. `since_birth`: all that a new one counted came while this ledger was kept."""
        now = counters.get("prompt_tokens", 0.0), counters.get("generation_tokens", 0.0)
        is_news, before = self._readings.take(engine_id, counters["at_s"], now)
        if not is_news:
            return
        if before is None:
            before = (0.0, 0.0) if since_birth else now
        balance = self._balances.setdefault(model, _Balance())
        balance.read = True
        # A counter that went back is another process under the same name.
        if now[0] >= before[0] and now[1] >= before[1]:
            balance.input_tokens += now[0] - before[0]
            balance.output_tokens += now[1] - before[1]

    def told(self, row: TrafficRow) -> None:
        """An answer told these tokens."""
        if row.input_tokens or row.output_tokens:
            balance = self._balances.setdefault(row.model, _Balance())
            balance.input_tokens -= row.input_tokens
            balance.output_tokens -= row.output_tokens

    def untold(self, source: str, model: str, count: int) -> None:
        """How many answers told nothing, as a gateway's counter has counted since it began."""
        before = self._untold.get((source, model), 0)
        self._untold[source, model] = count
        if count > before:
            balance = self._balances.setdefault(model, _Balance())
            balance.owed, balance.read = True, False

    def settle(self, monotonic_s: float, second: int, idle: Callable[[str], bool]) -> list[TrafficRow]:
        """What is now known to belong to answers that told nothing, as rows of this second."""
        rows: list[TrafficRow] = []
        for model, balance in self._balances.items():
            if idle(model):
                if not balance.read:
                    continue
                found = (balance.input_tokens, balance.output_tokens) if balance.owed else (0.0, 0.0)
                balance.input_tokens = balance.output_tokens = 0.0
                balance.owed = False
                balance.seen.clear()
            else:
                found = self._least(balance, monotonic_s)
            tokens = (max(0, int(found[0])), max(0, int(found[1])))
            if any(tokens):
                rows.append(TrafficRow(model, second, input_tokens=tokens[0], output_tokens=tokens[1]))
        return rows

    @staticmethod
    def _least(balance: _Balance, monotonic_s: float) -> tuple[float, float]:
        seen = balance.seen
        seen.append((monotonic_s, balance.input_tokens, balance.output_tokens))
        if monotonic_s - seen[0][0] < WINDOW_S or not balance.owed:
            while seen and monotonic_s - seen[0][0] > WINDOW_S:
                seen.popleft()
            return 0.0, 0.0
        found = (max(0.0, min(s[1] for s in seen)), max(0.0, min(s[2] for s in seen)))
        balance.input_tokens -= found[0]
        balance.output_tokens -= found[1]
        balance.owed = False
        seen.clear()
        return found

    def forget(self, engines: Container[str], sources: Container[str]) -> None:
        """Only these engines, and these sources of `untold`, are left."""
        self._readings.forget(engines)
        self._untold = {key: count for key, count in self._untold.items() if key[0] in sources}
