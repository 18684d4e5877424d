"""The fleet's status, put together from what every gateway sees and what Serve says. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def fleet_status(
    models: Sequence[Mapping[str, Any]],
    reports: Sequence[Mapping[str, Any]],
    replicas: Mapping[str, Mapping[str, int]],
    last_starts: Mapping[str, Mapping[str, Any]],
    *,
    node_waits: Mapping[str, str] | None = None,
    no_room: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The fleet as `relight status --json` prints it. `replicas` is deployment -> replica state -> count.

    `node_waits` is model -> which node it waits for, of those that wait for one. `no_room` is model -> why it may have
    no replica, which is told of those that have requests.
    """
    nodes: dict[str, dict[str, Any]] = {}
    for report in reports:
        nodes[report["node"]] = dict(report)
    # Of a node without a gateway is known what gateways elsewhere were lent.
    lent = {e["engine_id"]: (node, e) for r in reports for node, e in r["remote"] if node not in nodes}
    for node, engine in lent.values():
        nodes.setdefault(node, {"host_up": True, "engines": [], "host_models": []})["engines"].append(engine)
    rows = []
    for model in models:
        engines = [e for n in nodes.values() for e in n["engines"] if e["model"] == model["id"]]
        seen = [r["models"][model["id"]] for r in reports if model["id"] in r["models"]]
        states = dict(replicas.get(model["deployment"], {}))
        failures = [s["failure"] for s in seen if s["failure"]]
        queued = sum(s["queued"] for s in seen)
        waits = (node_waits or {}).get(model["id"]) or ((no_room or {}).get(model["id"]) if queued else None)
        rows.append(
            {
                "id": model["id"],
                "aliases": model["aliases"],
                "state": model_state(engines, states, seen),
                "replicas": states.get("RUNNING", 0),
                "replicas_by_state": states,
                "queued": queued,
                "in_flight": sum(s["in_flight"] for s in seen),
                "last_cold_start": last_starts.get(model["id"]),
                "reason": failures[0] if failures else waits,
            }
        )
    return {
        "models": rows,
        "nodes": [
            {
                "id": node_id,
                "host_up": node["host_up"],
                "engines": node["engines"],
                "templates": [
                    {"model": m["model"], **m["template"], "source": m["source"]} for m in node["host_models"]
                ],
            }
            for node_id, node in nodes.items()
        ],
        "gateways": len(reports),
    }


def model_state(
    engines: list[dict[str, Any]], replicas: Mapping[str, int], seen: list[dict[str, Any]]
) -> str:
    """dark | lighting | parked | ready | draining | failed. The most awake wins, but a failure is never hidden."""
    engine_states = {e["state"] for e in engines}
    running = replicas.get("RUNNING", 0)
    if any(s["failure"] for s in seen) and "ready" not in engine_states:
        return "failed"
    if "ready" in engine_states or (running and any(s["seen_ready"] for s in seen)):
        return "ready"
    if running or replicas.get("STARTING", 0) or "starting" in engine_states:
        return "lighting"
    if replicas.get("STOPPING", 0) or "draining" in engine_states:
        return "draining"
    if any(s["queued"] for s in seen):
        return "lighting"
    return "parked" if "parked" in engine_states else "dark"
