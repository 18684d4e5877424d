"""Web pages whose scripts ask the gateway, as a browser lets them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.lab import CHAT, Lab, make_lab

PAGE = "https://chat.example.org"


async def preflight(lab: Lab, origin: str, method: str = "POST", path: str = CHAT) -> Any:
    """What a browser asks before it sends JSON or a key to another origin."""
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    return await lab.client.request("OPTIONS", path, headers=headers)


@pytest.mark.parametrize(("allowed", "shown"), [([PAGE], PAGE), (["*"], "*")])
async def test_a_page_that_is_named_may_ask(allowed: list[str], shown: str) -> None:
    """Its preflight passes with the headers that OpenAI's client sends, and the answer's headers can be read."""
    async with make_lab(cors_origins=allowed) as lab:
        lab.model.light()
        asked = await preflight(lab, PAGE)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == shown
        assert "POST" in asked.headers["access-control-allow-methods"]
        wanted = {"authorization", "content-type", "x-stainless-os"}
        allowed_headers = asked.headers["access-control-allow-headers"].lower()
        assert wanted <= set(allowed_headers.replace(" ", "").split(","))
        assert lab.engine.seen == []
        answer = await lab.chat(headers={"origin": PAGE})
        assert answer.status_code == 200
        assert answer.headers.get_list("access-control-allow-origin") == [shown]
        assert "X-Relight-Cold-Start" in answer.headers["access-control-expose-headers"]


async def test_streams_and_errors_can_be_read_by_a_page() -> None:
    """A script that can't read an error sees a network failure instead of the reason."""
    async with make_lab(cors_origins=[PAGE]) as lab:
        lab.model.light()
        for answer in (
            await lab.chat(stream=True, headers={"origin": PAGE}),
            await lab.client.post(CHAT, json={"model": "none"}, headers={"origin": PAGE}),
            await lab.client.get("/v1/nope", headers={"origin": PAGE}),
            await lab.client.get("/v1/models", headers={"origin": PAGE}),
        ):
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert "origin" in answer.headers["vary"].lower()


async def test_other_pages_and_the_control_api_are_not_opened() -> None:
    """A browser withholds what carries no permission; engines are not asked for theirs."""
    async with make_lab(cors_origins=[PAGE]) as lab:
        lab.model.light()
        lab.engine.script.headers = ((b"access-control-allow-origin", b"*"),)
        other = await preflight(lab, "https://elsewhere.example.org")
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
        answer = await lab.chat(headers={"origin": PAGE})
        assert b"origin" not in {name for name, _ in lab.engine.seen[-1].headers}
        assert answer.headers.get_list("access-control-allow-origin") == [PAGE]
        control = await preflight(lab, PAGE, "GET", "/relight/v1/policies")
        assert control.status_code == 405
        assert "access-control-allow-origin" not in control.headers


async def test_without_the_setting_no_page_may_ask() -> None:
    """As before: OPTIONS is no method of a route, and answers carry no permission."""
    async with make_lab() as lab:
        lab.model.light()
        assert (await preflight(lab, PAGE)).status_code == 405
        answer = await lab.chat(headers={"origin": PAGE})
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers
