"""What measures the simulator, on next to nothing: that each part runs, and counts what was replayed."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from bench import simulator


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "req_made.csv.gz"
    rows = "".join(f"{60 * i},m{i % 2},10,10,1.0\n" for i in range(240))
    path.write_bytes(gzip.compress(b"timestamp_s,model,input_tokens,output_tokens,exec_s\n" + rows.encode()))
    return path


@pytest.mark.parametrize("policy", simulator.POLICIES)
def test_dense(trace: Path, policy: str) -> None:
    found = simulator.dense(trace, simulator.Dense("made", 1.0, 1.0), policy)
    assert found["requests"] == 240
    assert found["requests_per_core_s"] > 0


def test_sparse_over_processes_and_at_every_tick(trace: Path) -> None:
    assert simulator.sparse(trace, "ladder")["requests"] == 240
    assert simulator.every_tick(trace)["whole_s"] > 0


def test_streamed_and_at_once() -> None:
    streamed = simulator.streamed(2000, 3, 60.0)
    assert streamed["rows"] == 2000
    assert simulator.at_once(2000, 3)["requests"] == streamed["requests"]
