"""Commands that are ended from outside, and whose output takes no more: nothing that they began stays."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

RELIGHT = (sys.executable, "-m", "autoscaling.cli")
PATIENCE_S = 60.0


def eventually(what: str, met: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_running(pid: int) -> bool:
    """One that waits to be reaped is not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def long_trace(tmp_path: Path) -> Path:
    """What takes many seconds to replay."""
    file = tmp_path / "in" / "long.csv"
    file.parent.mkdir()
    rows = "".join(f"{at},m{model}\n" for at in range(0, 20 * 86400, 70) for model in range(3))
    file.write_text("timestamp_s,model\n" + rows)
    return file


COMMANDS = [("simulate", "--jobs", "2", "--json"), ("compare", "--jobs", "2", "--report")]


def heeding() -> None:
    """In the command's process: what is ignored here, as under nohup, is not there."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        (COMMANDS[0], signal.SIGTERM),
        (COMMANDS[0], signal.SIGHUP),
        (COMMANDS[0], signal.SIGINT),
        (COMMANDS[0], signal.SIGKILL),
        (COMMANDS[1], signal.SIGTERM),
        (COMMANDS[1], signal.SIGKILL),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else signal.Signals(each).name,
)
def test_no_process_and_no_unfinished_file_stays(
    tmp_path: Path, long_trace: Path, arguments: tuple[str, ...], number: int
) -> None:
    command, *options = arguments
    process = subprocess.Popen(
        [*RELIGHT, command, long_trace, *options, tmp_path / "out"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding,  # noqa: PLW1509 - this process has no threads that could hold a lock
    )
    try:
        eventually("it shares its work", lambda: bool(children(process.pid)))
        others = children(process.pid)
        assert process.poll() is None
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    eventually("its processes end", lambda: not any(map(is_running, others)))
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 128 + number)
    assert said == ""
    assert killed or {each.name for each in tmp_path.iterdir()} == {"in"}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate", "--policy", "keep-alive"),
        ("simulate", "--policy", "keep-alive", "--json", "-"),
        ("trace",),
    ],
    ids=["table", "json", "trace"],
)
def test_a_full_standard_output_is_one_clear_error(
    tmp_path: Path, arguments: tuple[str, ...], unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    file = tmp_path / "t.csv"
    file.write_text("timestamp_s,model\n0,a\n")
    words = ("trace", "convert", file, "-") if arguments == ("trace",) else (*arguments, file)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*RELIGHT, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("The standard output can't be written: No space left on device\n")
    assert "Traceback" not in done.stderr
