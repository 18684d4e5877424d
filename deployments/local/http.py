"""GET from a gateway."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

# Straight to it: an http_proxy in the environment is for other places, and rarely knows loopback.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, *, timeout_s: float) -> bytes:
    """Raises OSError (HTTPError among them) where there is no answer, or not a good one."""
    with _opener.open(url, timeout=timeout_s) as response:
        body: bytes = response.read()
        return body


def get_json(url: str, *, timeout_s: float) -> Any:
    """Raises ValueError, too, where the answer is no JSON."""
    return json.loads(get(url, timeout_s=timeout_s))
