"""The smallest Serve application that up and down can be tried on."""

from __future__ import annotations

from pathlib import Path

from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, Response


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0.1})
class Stub:
    def __init__(self, fleet: str) -> None:
        if fleet == "broken":
            raise ValueError("this fleet is broken")
        self._fleet = fleet

    async def __call__(self, request: Request) -> Response:
        if request.url.path == "/v1/models":
            return JSONResponse({"data": [{"id": "stub"}]})
        return JSONResponse({"path": request.url.path, "fleet": self._fleet})


def build(args: dict[str, str]) -> Application:
    fleet = args.get("fleet")
    return Stub.bind(Path(fleet).read_text() if fleet else "")  # type: ignore[attr-defined]
