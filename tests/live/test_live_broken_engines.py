"""Engines that can't start: those who wait are told the engine's own reason, and nobody else is troubled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.live.lab import Relight, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

REASONS = {
    "odd": "unrecognized arguments: --no-such-argument",
    "missing": "there is no folder",
    "corrupt": "SafetensorError",
    "long": "max_model_len (100000) is greater than the derived max_model_len",
}


@pytest.mark.parametrize("model", REASONS)
def test_those_who_wait_are_told_the_engines_own_reason(relight: Relight, model: str) -> None:
    """A 503 with the real text, not a time-out; the status tells it too, and a healthy model still serves."""
    answer = relight.embed(model)
    assert answer.status == 503, answer
    assert answer.json["error"]["code"] == "engine_start_failed"
    assert REASONS[model] in answer.json["error"]["message"]
    row = until("the status to say so", lambda: (r := relight.model(model))["state"] == "failed" and r)
    assert REASONS[model] in row["reason"]
    assert relight.embed("embed").status == 200
    until("no engine process to be left", lambda: not relight.engines(model))


def test_a_folder_that_is_mended_is_served_without_a_redeploy(relight: Relight, sources: Path) -> None:
    """When the cause is gone, the next requests light the model."""
    assert relight.embed("missing").status == 503
    assert relight.embed("corrupt").status == 503
    shutil.copytree(sources / "tiny", sources / "missing")
    shutil.copyfile(sources / "tiny" / "model.safetensors", sources / "corrupt" / "model.safetensors")
    for model in ("missing", "corrupt"):
        answer = until(
            f"{model} to serve", lambda model=model: (a := relight.embed(model)).status == 200 and a
        )
        assert len(answer.json["data"][0]["embedding"]) == 384
        until("the status to forget it", lambda model=model: relight.model(model)["reason"] is None)
