"""Records <-> rows of their tables. Nested values are JSON text, rungs are their names in lower case."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from autoscaling.core.types import Decision, Rung
from autoscaling.live.records import ColdStartRow, Override, OverrideKind, PrewarmRow

Row = Mapping[str, Any]


def to_json(value: Any) -> str:
    """JSON that every reader takes: numbers that are not finite become null, text stays free of NUL."""
    return json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))


def text(value: Any) -> str:
    """Text as both databases take it: without NUL, and without halves of surrogate pairs."""
    return str(value).replace("\0", "").encode("utf-8", "replace").decode()


def finite(value: float | None) -> float | None:
    """None for what is not finite: no end, or unknown."""
    return None if value is None or not math.isfinite(value) else float(value)


def from_decision(decision: Decision, source: str) -> dict[str, Any]:
    return {
        "source": text(source),
        "model": text(decision.model),
        "made_s": decision.made_s,
        "replicas": decision.replicas,
        "rung": decision.rung.name.lower(),
        "reason": text(decision.reason),
        "until_s": finite(decision.until_s),
        "policy": text(decision.policy),
        "numbers": to_json(decision.numbers),
        "clamps": to_json([str(clamp) for clamp in decision.clamps]),
    }


def decision_dict(row: Row) -> dict[str, Any]:
    """As `Store.decisions` gives it: the columns, with `numbers` and `clamps` read."""
    return {**row, "numbers": json.loads(row["numbers"]), "clamps": json.loads(row["clamps"])}


def from_cold_start(row: ColdStartRow) -> dict[str, Any]:
    return {
        "engine_id": text(row.engine_id),
        "ready_s": row.ready_s,
        "model": text(row.model),
        "begun_s": row.begun_s,
        "total_s": row.total_s,
        "kind": text(row.kind),
        "node": text(row.node),
        "rung": row.rung.name.lower(),
        "prewarmed": int(row.prewarmed),
        "phases": to_json(row.phases),
    }


def to_cold_start(row: Row) -> ColdStartRow:
    return ColdStartRow(
        **{
            **row,
            "rung": Rung[row["rung"].upper()],
            "prewarmed": bool(row["prewarmed"]),
            "phases": tuple(json.loads(row["phases"])),
        }
    )


def from_prewarm(row: PrewarmRow) -> dict[str, Any]:
    return {
        "id": text(row.id),
        "model": text(row.model),
        "begun_s": row.begun_s,
        "reason": text(row.reason),
        "replicas": row.replicas,
        "rung": row.rung.name.lower(),
        "ready_s": finite(row.ready_s),
        "hit_s": finite(row.hit_s),
        "ended_s": finite(row.ended_s),
        "cost_gpu_s": row.cost_gpu_s,
        "spared_requests": row.spared_requests,
        "spared_wait_s": row.spared_wait_s,
    }


def to_prewarm(row: Row) -> PrewarmRow:
    return PrewarmRow(**{**row, "rung": Rung[row["rung"].upper()]})


def from_override(row: Override) -> dict[str, Any]:
    return {
        "id": text(row.id),
        "kind": row.kind,
        "model": None if row.model is None else text(row.model),
        "value": to_json(row.value),
        "who": text(row.who),
        "made_s": row.made_s,
        "until_s": finite(row.until_s),
        "undone_s": finite(row.undone_s),
        "undone_by": None if row.undone_by is None else text(row.undone_by),
    }


def to_override(row: Row) -> Override:
    return Override(**{**row, "kind": cast(OverrideKind, row["kind"]), "value": json.loads(row["value"])})


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (str, int)) or value is None:
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
