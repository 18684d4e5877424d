"""The Dockerfiles: linted by hadolint, and Relight installs from exactly what they copy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.clusters.conftest import CONFIGS, ROOT

DOCKER = CONFIGS / "docker"
FILES = ["cuda.Dockerfile", "cpu.Dockerfile"]


def _instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments), with lines that go on put together."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / name).read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def _copies(name: str) -> list[tuple[list[str], str]]:
    parts = [arguments.split() for instruction, arguments in _instructions(name) if instruction == "COPY"]
    return [(p[:-1], p[-1]) for p in parts]


@pytest.mark.parametrize("name", FILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "--no-color", DOCKER / name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text("FROM python\nRUN cd /tmp && sudo apt-get install gcc\n")
    hadolint = Path(sys.executable).with_name("hadolint")
    assert subprocess.run([hadolint, broken], capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_not_kept_from_the_builder(name: str) -> None:
    rules = (DOCKER / f"{name}.dockerignore").read_text().splitlines()
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    for sources, _ in _copies(name):
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(fnmatch(source, rule) for rule in let_in), source


@pytest.mark.parametrize("name", FILES)
def test_requirements_are_held_to_their_hashes_and_hold_no_weights(name: str) -> None:
    runs = " ".join(arguments for instruction, arguments in _instructions(name) if instruction == "RUN")
    installed = re.findall(r"-r (\S+)", runs)
    assert any(file.endswith("models.txt") for file in installed) is False
    engine = next(f for f in installed if Path(f).name in ("cuda.txt", "cpu.txt"))
    assert f"--require-hashes -r {engine}" in runs
    assert re.search(r"^vllm(-cpu)?==", (ROOT / "requirements" / Path(engine).name).read_text(), re.M)


def test_weights_and_compiled_kernels_outlive_the_container() -> None:
    for name in FILES:
        volumes = next(a for i, a in _instructions(name) if i == "VOLUME")
        environ = dict(p.split("=", 1) for p in next(a for i, a in _instructions(name) if i == "ENV").split())
        assert environ["RAY_AUTH_MODE"] == "token"
        for variable in ("RELIGHT_CACHE", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME"):
            assert environ[variable].startswith("/mnt/relight/") and "/mnt/relight" in volumes


def test_the_clouds_pins_are_those_that_are_tested() -> None:
    dev = (ROOT / "requirements/dev.txt").read_text()
    for line in (DOCKER / "clouds/aws.txt").read_text().splitlines():
        assert f"\n{line} \\\n" in dev, line
    import ray.autoscaler

    defaults = (Path(ray.autoscaler.__file__).parent / "azure/defaults.yaml").read_text()
    for line in (DOCKER / "clouds/azure.txt").read_text().splitlines():
        assert line.startswith("#") or line in defaults, line


def test_the_install_step_needs_no_more_than_what_is_copied(tmp_path: Path) -> None:
    """The image's last `pip install`, in a plain folder that holds what is copied and nothing else."""
    build = tmp_path / "build"
    for sources, target in _copies("cuda.Dockerfile"):
        for source in sources:
            to = build / Path(target).relative_to("/build")
            to = to / Path(source).name if target.endswith("/") else to
            to.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, to)
    step = next(a for i, a in reversed(_instructions("cuda.Dockerfile")) if i == "RUN")
    arguments = step.partition("pip install")[2].split()
    assert arguments == ["--no-deps", "--no-build-isolation", "/build"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        *arguments[:-1],
        str(build),
        "-w",
        str(tmp_path / "wheels"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").glob("relight-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    here = {
        str(p.relative_to(ROOT))
        for package in ("deployments", "autoscaling")
        for p in (ROOT / package).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert here - inside == set()
