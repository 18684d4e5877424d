"""The laboratory as fixtures."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.lab import Lab, make_lab


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    """A lab with one dark model `tiny` (alias `small`) and another, `org/large`."""
    async with make_lab() as lab:
        yield lab
