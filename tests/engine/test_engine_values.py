"""What is pure on the engine's side: parking, messages, reasons."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.command import argv, threads_for
from deployments.engine.parking import Parked, evict, value
from deployments.engine.process import StatusReporter, root_cause
from deployments.engine.protocol import EngineInfo, EngineSpec, encode, receive_with_fds, send_with_fds

MIB = 2**20


def parked(name: str, mib: int, start_s: float = 10.0, uses: int = 1, parked_s: float = 0.0) -> Parked:
    """A parked engine."""
    return Parked(name, mib * MIB, start_s, uses, parked_s)


@pytest.mark.parametrize(
    ("engines", "budget_mib", "ended"),
    [
        ([], 0, ()),
        ([parked("a", 10)], 10, ()),
        ([parked("a", 10)], 9, ("a",)),
        ([parked("a", 10), parked("b", 10)], 10, ("a",)),
        ([parked("a", 10, parked_s=2), parked("b", 10, parked_s=1)], 10, ("b",)),
        ([parked("slow", 10, start_s=60), parked("quick", 10, start_s=1)], 10, ("quick",)),
        ([parked("large", 30), parked("small", 10)], 30, ("large",)),
        ([parked("often", 10, uses=9), parked("once", 10)], 10, ("once",)),
        ([parked("a", 10), parked("b", 10), parked("c", 10)], 0, ("a", "b", "c")),
    ],
)
def test_who_is_ended(engines: list[Parked], budget_mib: int, ended: tuple[str, ...]) -> None:
    """The least valuable first: large, quick to start, seldom used, long parked."""
    assert evict(engines, budget_mib * MIB).evict == ended


many = st.lists(
    st.builds(
        Parked,
        st.uuids().map(str),
        st.integers(0, 10**12),
        st.floats(0, 1e4),
        st.integers(0, 10**6),
        st.floats(0, 1e10),
    ),
    max_size=12,
    unique_by=lambda e: e.engine_id,
)


@given(many, st.integers(0, 10**13), st.floats(0, 1e9))
def test_the_budget_is_kept_and_no_more_than_needed_is_ended(
    engines: list[Parked], budget_bytes: int, clock: float
) -> None:
    """Whatever is parked: the rest fits, the last one ended was needed, and the clock never goes back."""
    result = evict(engines, budget_bytes, clock)
    sizes = {e.engine_id: e.memory_bytes for e in engines}
    left = sum(sizes.values()) - sum(sizes[e] for e in result.evict)
    assert left <= budget_bytes or len(result.evict) == len(engines)
    if result.evict:
        assert left + sizes[result.evict[-1]] > budget_bytes
    assert result.clock >= clock
    assert len(set(result.evict)) == len(result.evict)


@given(many, st.integers(0, 10**13))
def test_the_order_of_the_list_does_not_matter(engines: list[Parked], budget_bytes: int) -> None:
    """The decision can be reproduced."""
    assert evict(engines, budget_bytes) == evict(list(reversed(engines)), budget_bytes)


def test_age_counts_through_the_clock() -> None:
    """What came after an eviction is worth more than the same before it."""
    clock = evict([parked("a", 10)], 0).clock
    assert value(parked("b", 10), clock) > value(parked("b", 10), 0.0)


@pytest.mark.parametrize(
    ("gpus", "own", "tensor"),
    [
        (0, [], None),
        (1, [], None),
        (4, [], "4"),
        (4, ["--pipeline-parallel-size", "2"], "2"),
        (8, ["--pipeline-parallel-size", "2", "--data-parallel-size", "2"], "2"),
        (2, ["--pipeline-parallel-size", "2"], None),
        (2, ["--data-parallel-size", "2"], None),
        (3, ["--data-parallel-size", "2"], None),
        (4, ["--data-parallel-size", "0"], "4"),
        (4, ["--data-parallel-size", "many"], "4"),
        (4, ["--tensor-parallel-size", "2"], None),
    ],
)
def test_the_gpus_that_other_parallelism_leaves_are_for_tensors(
    gpus: int, own: list[str], tensor: str | None
) -> None:
    """All kinds together take what was granted; a model's own arguments win."""
    given = argv(EngineSpec("m", ("m",), "s", argv=tuple(own), gpus=gpus), "/w")
    assert given[len(given) - len(own) :] == own
    added = given[: len(given) - len(own)]
    found = added[added.index("--tensor-parallel-size") + 1] if "--tensor-parallel-size" in added else None
    assert found == tensor


text = st.text(max_size=20)


@given(
    st.builds(
        EngineSpec,
        text,
        st.lists(text).map(tuple),
        text,
        st.lists(text).map(tuple),
        st.lists(st.tuples(text, text)).map(tuple),
        st.integers(0, 8),
        st.booleans(),
    )
)
def test_a_spec_survives_its_journey(spec: EngineSpec) -> None:
    """Through JSON it is the same, with the same fingerprint."""
    again = EngineSpec.from_json(json.loads(encode(spec.to_json())))
    assert again == spec
    assert again.fingerprint == spec.fingerprint


def test_an_engine_survives_its_journey() -> None:
    """Through JSON it is the same."""
    info = EngineInfo("e", "m", "f", "forked", "ready", "/h", "/c", ("0", "1"), phases=[("fork", 1.0, 2.0)])
    assert EngineInfo.from_json(json.loads(encode(info.to_json()))) == info


@pytest.mark.parametrize(
    "changes", [{"model": "n"}, {"names": ("n",)}, {"source": "t"}, {"argv": ("--x",)}, {"gpus": 1}]
)
def test_what_makes_another_engine_changes_the_fingerprint(changes: dict[str, object]) -> None:
    """And how long it may take to drain does not."""
    plain = {"model": "m", "names": ("m",), "source": "s"}
    fingerprint = EngineSpec(**plain).fingerprint  # type: ignore[arg-type]
    assert EngineSpec(**{**plain, **changes}).fingerprint != fingerprint  # type: ignore[arg-type]
    assert EngineSpec(**plain, drain_deadline_s=1.0).fingerprint == fingerprint  # type: ignore[arg-type]


def test_descriptors_travel_beside_a_message() -> None:
    """And are not inherited by accident; a peer that is gone is None."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    read, write = os.pipe()
    send_with_fds(ours, {"op": "fork", "engine_id": "ü"}, [write])
    os.close(write)
    received = receive_with_fds(theirs)
    assert received is not None
    message, (descriptor,) = received
    assert message == {"op": "fork", "engine_id": "ü"}
    assert not os.get_inheritable(descriptor)
    os.write(descriptor, b"x")
    assert os.read(read, 1) == b"x"
    ours.close()
    assert receive_with_fds(theirs) is None
    os.close(descriptor)
    os.close(read)
    theirs.close()


CORE_FAILED = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"


@pytest.mark.parametrize(
    ("error", "log", "reason"),
    [
        (RuntimeError("torn"), "", "RuntimeError: torn"),
        (
            RuntimeError(CORE_FAILED.partition(": ")[2]),
            f"(EngineCore pid=1) ERROR 10:00 ValueError: not enough memory\nTraceback\n{CORE_FAILED}\n",
            "ValueError: not enough memory",
        ),
        (RuntimeError(CORE_FAILED.partition(": ")[2]), "", CORE_FAILED),
        (
            SystemExit(2),
            "usage: vllm serve\nvllm serve: error: unrecognized arguments: --x\nTraceback\n"
            "    self.exit(2, _('%(prog)s: error: %(message)s\\n') % args)\nSystemExit: 2\n",
            "unrecognized arguments: --x",
        ),
        (SystemExit(1), "OSError: no such model\nSystemExit: 1\n", "OSError: no such model"),
    ],
)
def test_the_reason_is_the_engines_own(tmp_path: Path, error: BaseException, log: str, reason: str) -> None:
    """Not that of the server around it, and not a line of somebody's source."""
    (tmp_path / "log").write_text(log)
    assert root_cause(error, tmp_path / "log") == reason


def test_a_reason_without_a_log() -> None:
    """Is the error itself."""
    assert root_cause(ValueError("x"), Path("/no/such/log")) == "ValueError: x"


def test_a_reporter_whose_host_is_gone_goes_on() -> None:
    """Its engine is not to die of that."""
    read, write = os.pipe()
    reporter = StatusReporter(write, 0.0)
    reporter.phase("fork")
    assert json.loads(os.read(read, 4096))["name"] == "fork"
    os.close(read)
    reporter.failed("nobody hears")
    os.close(write)


@pytest.mark.parametrize(
    ("given", "threads"),
    [("3", 3), ("4,2", 4), (" 2 ", 2), ("", None), ("0", None), ("many", None), ("-1,2", None)],
)
def test_openmps_own_syntax_says_how_many_threads(given: str, threads: int | None) -> None:
    """A list is one of levels, of which torch uses the first; what is no number of threads counts as not given."""
    model = EngineSpec("m", ("m",), "s", env=(("OMP_NUM_THREADS", given),))
    assert threads_for(model) == (threads or len(os.sched_getaffinity(0)))
