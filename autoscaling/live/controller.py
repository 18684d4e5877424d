"""The controller: the one deployment that knows the whole fleet, forecasts, decides and records.

Of two that run at once, while the application is redeployed, the one that came last decides. It may be killed at any
moment. Gateways report again within seconds, policies inside Serve act on the last plan until
that expires and then reactively, and a successor goes on from the store.

It starts and tells the fleet's status even where nothing that decides can: what failed is in the status.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from autoscaling.core.codec import from_plain
from autoscaling.live.call_log import log_no_calls
from autoscaling.live.capacity import CapacityBook
from autoscaling.live.clock import SystemClock
from autoscaling.live.garbage import collect_seldom
from autoscaling.live.metrics import SERVE_STALE_S, LiveMetrics, ServeView, serve_view
from autoscaling.live.nodes import Warming, alive_nodes, failed_launches, has_autoscaler
from autoscaling.live.observer import fleet_status
from autoscaling.live.owner import Ownership
from autoscaling.live.plan_store import policies_health, publish
from autoscaling.live.rungs import RungBook
from autoscaling.live.setup import ControllerSetup

if TYPE_CHECKING:
    from autoscaling.live.planner import ForecastService, Planner
    from autoscaling.live.store import Store

log = logging.getLogger("ray.serve")

SERVE_EVERY_S = 1.0
SERVE_SHARE = 20.0
"""Serve is asked no more often than this many times as long as it takes to answer."""
NODES_EVERY_S = 5.0
AUTOSCALER_EVERY_S = 60.0
SERVE_TIMEOUT_S = 3.0
LET_GO_S = 3.0
UNAVAILABLE = 503


class Controller:
    """The deployment. `setup` is a `ControllerSetup` in plain values, `warm` asks the engine host of its own node."""

    def __init__(
        self,
        setup: Mapping[str, Any],
        warm: Callable[[Mapping[str, Any]], dict[str, Any]],
        park_budget_bytes: int = 0,
    ) -> None:
        import ray

        collect_seldom()
        log_no_calls()
        self._setup = from_plain(ControllerSetup, setup)
        self._clock = SystemClock()
        self._metrics = LiveMetrics(
            self._setup.models, RungBook(), CapacityBook(), self._clock, park_budget_bytes=park_budget_bytes
        )
        self._warm = Warming(warm, ray.get_runtime_context().get_node_id())
        self._owner = Ownership(secrets.token_hex(8), self._clock, renew_s=self._setup.tick_s)
        self._decides = True
        self._planner: Planner | None = None
        self._control: Any = None
        self._error: str | None = "it is starting"
        self._policies: Mapping[str, Any] | None = None
        self._cluster_errors: dict[str, str] = {}
        self._last_starts: dict[str, Mapping[str, Any]] = {}
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._follow_cluster, name="relight-cluster", daemon=True),
            threading.Thread(target=self._tick_for_ever, name="relight-tick", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # Its threads

    def _tick_for_ever(self) -> None:
        try:
            self._owner.claim(self._stop.wait)
        except Exception as error:  # noqa: BLE001 - without the GCS nobody else has come either
            log.warning("the cluster could not be claimed: %r", error)
        try:
            # Here, not at the top: should one of the libraries behind it be missing or broken, the status still works.
            from autoscaling.live.planner import Planner

            self._planner = planner = Planner(
                self._setup,
                self._metrics,
                self._clock,
                publish=publish,
                warm=self._warm,
                forecasts=_make_forecasts,
            )
        except Exception as error:
            log.exception("the controller can't decide; models scale reactively")
            self._error = f"{type(error).__name__}: {error}"
            return
        self._error = None
        try:
            from autoscaling.live.control import Control
            from autoscaling.live.tokens import control_token, data_dir

            self._control = Control(planner, control_token(data_dir()))
        except Exception as error:
            log.exception("the control API can't be had")
            self._cluster_errors["control"] = f"{type(error).__name__}: {error}"
        next_s = self._clock.monotonic_s()
        while not self._stop.wait(max(0.0, next_s - self._clock.monotonic_s())):
            next_s = max(next_s + self._setup.tick_s, self._clock.monotonic_s())
            self._decides = self._owner.holds(self._let_go)
            if self._decides:
                planner.tick()

    def _let_go(self) -> None:
        """Another controller has come: from here on gateways are not heard, and what they told is written."""
        self._decides = False
        log.info("another controller has come; this one decides no more")
        if self._planner is not None:
            self._planner.store.flush(LET_GO_S)

    def _follow_cluster(self) -> None:
        """What Serve and Ray say, over and over: asking may take as long as they are being restarted."""
        nodes_s = autoscaler_s = float("-inf")
        autoscaler = False
        pause_s = SERVE_EVERY_S
        while not self._stop.wait(pause_s):
            now_s = self._clock.monotonic_s()
            try:
                deployments = _ask_serve()
                # With a thousand models its answer is large: asking must not be what keeps Serve's controller busy.
                pause_s = max(SERVE_EVERY_S, SERVE_SHARE * (self._clock.monotonic_s() - now_s))
                self._metrics.take_serve(deployments, SERVE_STALE_S + 2 * pause_s)
                # Who waits for a node is to know soon that it came, or that it can't be had.
                waits = self._planner is not None and bool(self._planner.node_waits())
                if waits or now_s - nodes_s >= NODES_EVERY_S:
                    nodes = alive_nodes()
                    if now_s - autoscaler_s >= AUTOSCALER_EVERY_S:
                        autoscaler, autoscaler_s = has_autoscaler(node.id for node in nodes), now_s
                    self._metrics.take_nodes(nodes, autoscaler=autoscaler)
                    if autoscaler:
                        self._metrics.launches.take(failed_launches())
                    self._policies = policies_health()
                    nodes_s = now_s
            except Exception as error:  # noqa: BLE001 - Ray raises what it likes while it restarts; what is known ages
                self._cluster_errors["cluster"] = f"{type(error).__name__}: {error}"
                continue
            self._cluster_errors.pop("cluster", None)

    # What it is called with

    async def report(self, gateway: str, report: dict[str, Any]) -> dict[str, Any]:
        """One gateway's view, replacing its last.

        Returns {"taken": whether it is kept here, "sequence": up to where counts are, "node_waits": model -> which node
        it waits for, "no_room": model -> why it may have no replica now, None where that is not known; "no_room_s": for
        how long}.
        """
        for model, seen in report["models"].items():
            start = seen["last_cold_start"]
            if start and start["ready_s"] >= self._last_starts.get(model, {"ready_s": 0})["ready_s"]:
                self._last_starts[model] = start
        planner = self._planner
        if planner is None or not self._decides:
            self._metrics.take_report(gateway, report, ())
            return {"taken": False, "sequence": 0, "node_waits": {}, "no_room": None}
        sequence = await asyncio.to_thread(planner.take_report, gateway, report)
        no_room, holds_s = planner.no_room()
        return {
            "taken": True,
            "sequence": sequence,
            "node_waits": planner.node_waits(),
            "no_room": no_room,
            "no_room_s": holds_s,
        }

    async def snapshot(self) -> dict[str, Any]:
        """The fleet as `relight status --json` prints it."""
        return await asyncio.to_thread(self._snapshot)

    def _snapshot(self) -> dict[str, Any]:
        # Asked anew, so that whoever waits for a state sees it at once; what is known already will do if Serve is away.
        deployments: Mapping[str, ServeView] = self._metrics.serve() or {}
        try:
            deployments = _ask_serve()
            self._metrics.take_serve(deployments)
        except Exception as error:  # noqa: BLE001 - as in _follow_cluster
            self._cluster_errors["cluster"] = f"{type(error).__name__}: {error}"
        models = [
            {"id": m.id, "aliases": list(m.aliases), "deployment": m.deployment} for m in self._setup.models
        ]
        status = fleet_status(
            models,
            list(self._metrics.reports().values()),
            {name: view.states for name, view in deployments.items()},
            self._last_starts,
            node_waits=self._planner.node_waits() if self._planner is not None else {},
            no_room=self._planner.no_room()[0] if self._planner is not None else {},
        )
        return {**status, "controller": self._health()}

    def _health(self) -> dict[str, Any]:
        errors = dict(self._cluster_errors)
        policies = dict(self._policies or {})
        if self._planner is None:
            return {
                "ok": False,
                "mode": "off",
                "errors": {**errors, "start": self._error},
                "policies": policies,
            }
        health = dict(self._planner.health())
        return {
            **health,
            "ok": health["ok"] and not errors,
            "errors": {**health["errors"], **errors},
            "policies": policies,
        }

    async def control(self, request: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """One request to the control API, as the gateway got it. Returns (HTTP status, JSON document)."""
        control = self._control
        if control is None:
            reason = self._cluster_errors.get("control") or self._error
            return UNAVAILABLE, {"error": {"message": f"The controller does not decide: {reason}"}}
        answer: tuple[int, dict[str, Any]] = await asyncio.to_thread(
            control.handle,
            request["method"],
            request["path"],
            request["query"],
            request["body"],
            request["authorization"],
        )
        return answer

    # Serve's hooks

    def check_health(self) -> None:
        """Serve's periodic check: without its threads it is of no use, and is replaced. One that can't decide stays."""
        dead = [thread.name for thread in self._threads if not thread.is_alive()]
        if dead and not (self._planner is None and dead == ["relight-tick"]):
            raise RuntimeError(f"{', '.join(dead)} ended")

    def __del__(self) -> None:
        """Serve calls this before it ends the process: what waits is written."""
        self._stop.set()
        for thread in self._threads:
            thread.join(LET_GO_S)
        if self._planner is not None:
            if self._decides:
                # Nobody has come after us. Where Serve ends as a whole, nobody is left to end the lease.
                try:
                    self._planner.let_nodes_go()
                except Exception as error:  # noqa: BLE001 - what is left must end all the same
                    log.warning("nodes that were asked for ahead are not let go: %r", error)
            self._planner.close()
        with contextlib.suppress(Exception):
            self._owner.release()


def _ask_serve() -> dict[str, ServeView]:
    """Serve's deployments with their replicas and targets. Raises what Ray raises."""
    import ray

    # The one call that tells targets too, and a tenth of the cost of `serve.status()`.
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    details = ray.get(controller.get_serve_instance_details.remote(), timeout=SERVE_TIMEOUT_S)
    return serve_view(details)


def _make_forecasts(store: Store, horizon_s: Callable[[str], float]) -> ForecastService:
    from autoscaling.forecast.service import ForecastService as Service

    def traffic(model: str) -> Any:
        return store.traffic(model, SystemClock().now_s())

    service: ForecastService = Service(traffic, horizon_s, SystemClock())
    return service
