"""What the store raises."""

from __future__ import annotations

from deployments.errors import RelightError


class StoreUnavailable(RelightError):
    """The database can't be read or written now; the message says why. The same call works when it is back."""

    status = 503
    code = "store_unavailable"
