"""What a GPU costs an hour, by its type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

GPU_PRICES_PER_H: Mapping[str, float] = {
    "B200": 6.0,
    "H200": 4.0,
    "H100": 3.0,
    "A100": 1.8,
    "L40S": 1.0,
    "A10G": 1.0,
    "V100": 0.9,
    "L4": 0.7,
    "T4": 0.4,
    "CPU": 0.1,
}
"""US dollars an hour of one GPU, by Ray's accelerator types: round figures of what clouds asked for on-demand machines
in 2025. They are there to be overridden."""


def price_of(types: Iterable[str], prices: Mapping[str, float]) -> float | None:
    """Of the first type that has a price; None if none has. A100-80G is priced as A100 unless it has its own."""
    name = priced_as(types, prices)
    return None if name is None else prices[name]


def priced_as(types: Iterable[str], prices: Mapping[str, float]) -> str | None:
    """The name under which that price is."""
    named = (known for name in types for known in (name, name.partition("-")[0]) if known in prices)
    return next(named, None)


__all__ = ["GPU_PRICES_PER_H", "price_of", "priced_as"]
