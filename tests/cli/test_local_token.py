"""Where a command finds the control token of a cluster of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoscaling.commands.client import Client
from autoscaling.live.tokens import control_token
from deployments.local.serving import head_env
from deployments.local.state import Checkout, Cluster

CLUSTER = Cluster(ray_port=1, client_port=2, host="127.0.0.1", port=8123, num_cpus=1, served="x")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A checkout whose cluster listens on 8123, whose controller has made its token; another token is the user's."""
    monkeypatch.delenv("RELIGHT_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    checkout = Checkout(tmp_path / "checkout")
    checkout.root.mkdir()
    checkout.make_dirs()
    checkout.save(CLUSTER)
    control_token(checkout.data_dir, {})
    control_token(tmp_path / "home/.local/share/relight", {})
    monkeypatch.setattr(Checkout, "here", classmethod(lambda cls: checkout))
    return checkout


def test_the_checkouts_own_cluster_is_asked_with_its_own_token(checkout: Checkout) -> None:
    """What `up` tells its controller and what the command reads are the same folder."""
    assert head_env(checkout)["RELIGHT_DATA"] == str(checkout.data_dir)
    sent = Client("http://127.0.0.1:8123")._headers()
    assert sent == {"authorization": f"Bearer {control_token(checkout.data_dir, {})}"}


def test_another_cluster_is_asked_with_the_users_token(checkout: Checkout, tmp_path: Path) -> None:
    """The checkout's token is nothing for it."""
    token = control_token(tmp_path / "home/.local/share/relight", {})
    assert Client("http://127.0.0.1:8124")._headers() == {"authorization": f"Bearer {token}"}


def test_a_named_folder_wins(checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RELIGHT_DATA, for the cluster as for the command."""
    monkeypatch.setenv("RELIGHT_DATA", str(tmp_path / "named"))
    assert head_env(checkout)["RELIGHT_DATA"] == str(tmp_path / "named")
    token = control_token(tmp_path / "named", {})
    assert Client("http://127.0.0.1:8123")._headers() == {"authorization": f"Bearer {token}"}
