"""The control token: whoever has it may change how models are scaled.

The controller makes it at its first start and keeps it beside its store; the command line reads it there, or from the
environment where it runs on another machine.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

FILE_NAME = "control-token"
_SERVER = "RELIGHT_CONTROL_TOKEN"
_CLIENT = ("RELIGHT_TOKEN", _SERVER)


class TokenError(ValueError):
    """A token that nobody could send or keep. The text says what would be right."""


def data_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where Relight keeps what outlives it: `RELIGHT_DATA`, else ~/.local/share/relight."""
    named = environ.get("RELIGHT_DATA")
    return Path(named).expanduser() if named else Path("~/.local/share/relight").expanduser()


def control_token(directory: Path, environ: Mapping[str, str] = os.environ) -> str:
    """The controller's token: `RELIGHT_CONTROL_TOKEN`, else the file's, which is made where there is none.

    Of several processes that make it at once, one wins and all return its token. Raises TokenError for a token that
    is no header value, OSError where the directory can't be written.
    """
    if given := environ.get(_SERVER):
        return _checked(given, _SERVER)
    path = directory / FILE_NAME
    if not path.exists():
        _make(path)
    # Made by hand, it may be open to others.
    path.chmod(0o600)
    return _checked(path.read_text().strip(), str(path))


def client_token(directory: Path, environ: Mapping[str, str] = os.environ) -> str | None:
    """What a command sends: `RELIGHT_TOKEN`, `RELIGHT_CONTROL_TOKEN`, else the file's; None where there is none."""
    for name in _CLIENT:
        if given := environ.get(name):
            return _checked(given, name)
    path = directory / FILE_NAME
    try:
        return _checked(path.read_text().strip(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TokenError(f"{path} can't be read: {error.strerror}; set RELIGHT_TOKEN to the token") from None


def allows(token: str, authorization: str | None) -> bool:
    """Whether an Authorization header carries the token. Takes the same time whatever is wrong with it."""
    scheme, _, given = (authorization or "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _make(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{FILE_NAME}.{secrets.token_hex(8)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        # Linking is what can't happen twice; renaming would replace the token of whoever was first.
        path.hardlink_to(new)
    except FileExistsError:
        pass
    finally:
        new.unlink()


def _checked(token: str, where: str) -> str:
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise TokenError(f"{where} holds no token: it takes 16 or more printable ASCII characters, no spaces")
    return token
