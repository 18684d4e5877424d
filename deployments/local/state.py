"""What a checkout remembers of its cluster, and where: `.relight/` (state, token, logs) and a run directory.

The run directory holds Ray's session and the engines' sockets. It is under /tmp, not in `.relight/`, because
a Unix socket path may have 107 bytes at most, and Ray alone needs more than 60 of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, fields
from pathlib import Path

MARK = "RELIGHT_LOCAL_CLUSTER"
"""In the environment of every process of a local cluster; its value is the run directory."""

DEFAULT_APP = "deployments.app:build"
"""What `up` deploys unless RELIGHT_APP names another application."""

PORTS, PORT_TRIES = range(20_000, 32_000), 100
NODE_ADDRESS = "127.0.0.2"
"""Ray's address here: on loopback, but not 127.0.0.1, which Ray replaces by the network's address."""


class ClusterError(Exception):
    """Something that the person at the terminal can act on; its text is all that they see."""


@dataclass(frozen=True)
class Cluster:
    """A cluster as it was started. `served` is what its application was built from, once it was healthy."""

    ray_port: int
    client_port: int
    host: str
    port: int
    num_cpus: int
    code: str = ""
    app: str = ""
    fleet: str = ""
    served: str = ""

    @property
    def ray_address(self) -> str:
        return f"{NODE_ADDRESS}:{self.ray_port}"

    @property
    def listen(self) -> str:
        """HOST:PORT that HTTP listens on."""
        return _host_port(self.host, self.port)

    @property
    def endpoint(self) -> str:
        host = "127.0.0.1" if self.host in {"0.0.0.0", "::", ""} else self.host
        return f"http://{_host_port(host, self.port)}"


@dataclass(frozen=True)
class Checkout:
    root: Path

    @classmethod
    def here(cls) -> Checkout:
        return cls(Path(__file__).resolve().parents[2])

    @property
    def state_dir(self) -> Path:
        return self.root / ".relight"

    @property
    def run_dir(self) -> Path:
        name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]
        return Path("/tmp") / f"relight-{os.getuid()}-{name}"

    @property
    def token_file(self) -> Path:
        return self.state_dir / "ray-token"

    @property
    def data_dir(self) -> Path:
        """What outlives the cluster: the controller's store and its token. Each checkout's traffic is its own."""
        return self.state_dir / "data"

    @property
    def lock_file(self) -> Path:
        return self.state_dir / "cluster.lock"

    @property
    def _cluster_file(self) -> Path:
        return self.state_dir / "cluster.json"

    def make_dirs(self) -> None:
        self.state_dir.mkdir(mode=0o700, exist_ok=True)
        self.run_dir.mkdir(mode=0o700, exist_ok=True)
        status = self.run_dir.lstat()
        if not self.run_dir.is_dir() or self.run_dir.is_symlink() or status.st_uid != os.getuid():
            raise ClusterError(f"{self.run_dir} belongs to someone else; remove it, or use another checkout")
        # One that is empty was cut short, by a full disk or a power cut, and no Ray starts with it.
        if not self.token_file.exists() or self.token_file.stat().st_size == 0:
            new = self.token_file.with_suffix(".new")
            new.touch(mode=0o600)
            new.write_text(secrets.token_hex(32))
            new.replace(self.token_file)

    def load(self) -> Cluster | None:
        """None where nothing was started, or what is written cannot be read: `up` then starts afresh."""
        try:
            data = json.loads(self._cluster_file.read_text())
            known = {field.name for field in fields(Cluster)}
            return Cluster(**{name: value for name, value in data.items() if name in known})
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def save(self, cluster: Cluster) -> None:
        new = self._cluster_file.with_suffix(".new")
        new.write_text(json.dumps(asdict(cluster), indent=2) + "\n")
        new.replace(self._cluster_file)

    def code_fingerprint(self) -> str:
        """Changes when the code that the cluster's processes run has changed since they started."""
        digest = hashlib.sha256()
        for package in ("deployments", "autoscaling"):
            for path in sorted((self.root / package).rglob("*.py")):
                status = path.stat()
                digest.update(
                    f"{path.relative_to(self.root)} {status.st_size} {status.st_mtime_ns}\n".encode()
                )
        return digest.hexdigest()[:16]


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind_error(host: str, port: int) -> OSError | None:
    """What keeps a process of this user from listening there; None where nothing does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
        return None


def port_is_free(host: str, port: int) -> bool:
    return bind_error(host, port) is None


def pick_port(remembered: int | None) -> int:
    """The remembered port if it is still free, else another that is.

    One that is bound only later is taken from below those that Linux gives to outgoing connections, and above those of
    Ray's workers.
    """
    if remembered and port_is_free("127.0.0.1", remembered):
        return remembered
    for _ in range(PORT_TRIES):
        port = secrets.choice(PORTS)
        if port_is_free("127.0.0.1", port):
            return port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
