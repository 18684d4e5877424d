"""For all tests."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# A deadline is a timed assertion: on a busy machine it fails for nothing. The same code gets the same examples, so that
# a change is not held up by what was there before it; `--hypothesis-profile search` draws new ones.
settings.register_profile("search", deadline=None)
settings.register_profile("relight", deadline=None, derandomize=True)
settings.load_profile("relight")

OWN_CLUSTERS = ("test_by_hand", "test_live_nodes")
"""How the names of those files in tests/live begin that don't share the session's cluster."""


class ByCluster(LoadScopeScheduling):
    """Tests of one cluster go to one process, so that it is started once; all others wherever there is room.

    By where a test is, since pytest-xdist 3.8 does not see `xdist_group` under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = PurePosixPath(nodeid.split("::", maxsplit=1)[0])
        if file.parent.name != "live":
            return nodeid
        return file.stem if file.stem.startswith(OWN_CLUSTERS) else "live"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByCluster:
    return ByCluster(config, log)
