"""The one who knows the whole fleet: gathers what every gateway sees and what Serve says. Decides nothing.

It may be killed at any moment: gateways report again within seconds, and nothing that serves depends on it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

STALE_S = 15.0


class Observer:
    """The deployment. `models` are the canonical ids with their aliases and the names of their deployments."""

    def __init__(self, models: list[dict[str, Any]]) -> None:
        self._models = models
        self._reports: dict[str, tuple[float, dict[str, Any]]] = {}
        self._last_starts: dict[str, dict[str, Any]] = {}

    async def report(self, gateway: str, report: dict[str, Any]) -> None:
        """One gateway's view, replacing its last."""
        self._reports[gateway] = (time.monotonic(), report)
        for model, seen in report["models"].items():
            start = seen["last_cold_start"]
            if start and start["ready_s"] >= self._last_starts.get(model, {"ready_s": 0})["ready_s"]:
                self._last_starts[model] = start

    async def snapshot(self) -> dict[str, Any]:
        """The fleet as `relight status --json` prints it."""
        now_s = time.monotonic()
        self._reports = {g: (t, r) for g, (t, r) in self._reports.items() if now_s - t < STALE_S}
        replicas = await asyncio.to_thread(_replica_states)
        return fleet_status(self._models, [r for _, r in self._reports.values()], replicas, self._last_starts)


def _replica_states() -> dict[str, dict[str, int]]:
    """Deployment -> replica state -> count, of every application of this Ray cluster."""
    from ray import serve

    found: dict[str, dict[str, int]] = {}
    for application in serve.status().applications.values():
        for name, deployment in application.deployments.items():
            states = {str(getattr(s, "value", s)): n for s, n in deployment.replica_states.items()}
            found[name] = states
    return found


def fleet_status(
    models: list[dict[str, Any]],
    reports: list[dict[str, Any]],
    replicas: Mapping[str, Mapping[str, int]],
    last_starts: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Put the views together. Pure."""
    nodes: dict[str, dict[str, Any]] = {}
    for report in reports:
        nodes[report["node"]] = report
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
        rows.append(
            {
                "id": model["id"],
                "aliases": model["aliases"],
                "state": model_state(engines, states, seen),
                "replicas": states.get("RUNNING", 0),
                "replicas_by_state": states,
                "queued": sum(s["queued"] for s in seen),
                "in_flight": sum(s["in_flight"] for s in seen),
                "last_cold_start": last_starts.get(model["id"]),
                "reason": failures[0] if failures else None,
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
