"""The labels of Ray's nodes by which models ask for them."""

from __future__ import annotations

from collections.abc import Mapping

ACCELERATOR = "ray.io/accelerator-type"
MARKET = "ray.io/market-type"
ON_DEMAND = "on-demand"

Labels = Mapping[str, str]
"""A Ray label selector: label -> value, or `in(A,B)`."""
