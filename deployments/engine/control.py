"""The engine host's control socket: what replicas, gateways and the controller ask, a line of JSON each."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from deployments.engine.forks import StartFailed
from deployments.engine.protocol import EngineSpec, encode

if TYPE_CHECKING:
    from deployments.engine.host import Engine, Host


class ControlSocket:
    """Of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def serve(  # noqa: PLR0912 - one branch for each message
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One client: a replica with its lease, a gateway that watches, or a question."""

        def tell(message: Mapping[str, Any]) -> None:
            if not writer.is_closing():
                writer.write(encode(message))

        def there() -> bool:
            """Whether the client still is: read ahead of its messages, so also while one of them is answered."""
            return not (reader.at_eof() or writer.is_closing())

        host = self._host
        held: Engine | None = None
        try:
            async for line in reader:
                try:
                    message = json.loads(line)
                    operation = message["op"]
                except (ValueError, KeyError, TypeError):
                    tell({"event": "error", "reason": "not a message of this protocol"})
                    continue
                match operation:
                    case "configure":
                        specs = [EngineSpec.from_json(s) for s in message["models"]]
                        host.configure(message["config"], specs, tell)
                        tell({"event": "ok"})
                    case "status":
                        tell({"event": "status", **host.status()})
                    case "watch":
                        host.watch(tell)
                    case "warm":
                        tell(await host.warm(message, there))
                    case "light":
                        host.spawn(self._light(message))
                    case "acquire":
                        held = await self._acquire(message, tell, there)
                    case "attach":
                        held = self._attach(message, tell)
                    case "release" if held is not None:
                        engine, held = held, None
                        await host.let_go(engine, park=message.get("park", True))
                        tell({"event": "released"})
                    case "kill" if held is not None:
                        held.info.reason = message.get("reason", "its replica asked for its end")
                        host.kill(held)
                    case _:
                        tell({"event": "error", "reason": f"can't {operation!r} here"})
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            host.forget(tell)
            if held is not None and held.watcher is tell:
                host.abandon(held)
            writer.close()

    async def _light(self, message: Mapping[str, Any]) -> None:
        """Start the model's engine ahead of its replica; one that is waiting, waits on, and one that serves will do."""
        host = self._host
        spec = EngineSpec.from_json(message["spec"])
        lit = [
            e
            for e in host.engines.values()
            if e.info.fingerprint == spec.fingerprint and e.info.state in ("starting", "ready")
        ]
        for engine in lit:
            if not engine.info.held:
                host.claim(engine, hold=False)
        if lit:
            return
        with contextlib.suppress(StartFailed):
            await host.obtain(spec, (), message["requested_s"], hold=False)

    async def _acquire(
        self,
        message: Mapping[str, Any],
        tell: Callable[[Mapping[str, Any]], None],
        there: Callable[[], bool],
    ) -> Engine | None:
        host = self._host
        spec = EngineSpec.from_json(message["spec"])
        host.models.settings(message.get("config"))
        try:
            engine = await host.obtain(
                spec, tuple(message["gpu_ids"]), message["requested_s"], hold=True, there=there
            )
        except StartFailed as error:
            tell({"event": "failed", "reason": str(error)})
            return None
        engine.watcher = tell
        host.spawn(self._tell_when_ready(engine, tell), engine)
        return engine

    async def _tell_when_ready(self, engine: Engine, tell: Callable[[Mapping[str, Any]], None]) -> None:
        try:
            if engine.settled is not None:
                await asyncio.shield(engine.settled)
        except StartFailed as error:
            tell({"event": "failed", "reason": str(error)})
            return
        tell({"event": "ready", "engine": engine.info.to_json()})

    def _attach(self, message: Mapping[str, Any], tell: Callable[[Mapping[str, Any]], None]) -> Engine | None:
        """A replica whose host was killed comes back with the engine that it holds."""
        host = self._host
        engine = host.engines.get(message["engine_id"])
        if engine is None:
            tell({"event": "exit", "engine_id": message["engine_id"], "reason": "the engine is gone"})
            return None
        host.claim(engine, hold=True)
        engine.watcher = tell
        tell({"event": "attached"})
        return engine


__all__ = ["ControlSocket"]
