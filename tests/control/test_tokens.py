"""The control token: made once, kept from others, compared in full."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from autoscaling.live.tokens import FILE_NAME, TokenError, allows, client_token, control_token, data_dir


def test_it_is_made_once_and_only_the_owner_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    token = control_token(folder, {})
    file = folder / FILE_NAME
    assert file.stat().st_mode & 0o777 == 0o600
    assert (token, len(token) >= 40) == (file.read_text().strip(), True)
    assert control_token(folder, {}) == token
    assert client_token(folder, {}) == token
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]


def test_of_many_that_make_it_at_once_all_have_the_same(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    found: list[str] = []

    def make() -> None:
        barrier.wait()
        found.append(control_token(tmp_path, {}))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {(tmp_path / FILE_NAME).read_text().strip()}


def test_the_environment_comes_first(tmp_path: Path) -> None:
    given = {"RELIGHT_CONTROL_TOKEN": "s" * 20}
    assert control_token(tmp_path, given) == "s" * 20
    assert list(tmp_path.iterdir()) == []
    assert client_token(tmp_path, given) == "s" * 20
    assert client_token(tmp_path, {**given, "RELIGHT_TOKEN": "c" * 20}) == "c" * 20
    assert client_token(tmp_path, {}) is None


def test_a_file_that_others_could_read_is_closed(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    file.write_text("x" * 20 + "\n")
    file.chmod(0o644)
    assert control_token(tmp_path, {}) == "x" * 20
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "wrong", ["short", "with space in the middle", "schlüssel-schlüssel", "a" * 20 + "\tb"]
)
def test_what_is_no_token_is_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(TokenError, match="RELIGHT_CONTROL_TOKEN holds no token"):
        control_token(tmp_path, {"RELIGHT_CONTROL_TOKEN": wrong})
    (tmp_path / FILE_NAME).write_text(wrong)
    with pytest.raises(TokenError, match="holds no token"):
        client_token(tmp_path, {})


def test_only_the_whole_token_is_let_in() -> None:
    assert allows("secret-of-a-fleet", "Bearer secret-of-a-fleet")
    assert allows("secret-of-a-fleet", "bearer secret-of-a-fleet")
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "secret-of-a-fleet",
        "Basic secret-of-a-fleet",
        "Bearer secret-of-a-flee",
        "Bearer sécret",
    ):
        assert not allows("secret-of-a-fleet", wrong), wrong


def test_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_dir({"RELIGHT_DATA": "~/x"}) == tmp_path / "x"
    assert data_dir({}) == tmp_path / ".local/share/relight"
