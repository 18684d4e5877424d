"""Numbers as people say them."""

from __future__ import annotations

import math
from datetime import UTC, datetime, tzinfo


def duration(seconds: float) -> str:
    """`0.4 s`, `45 s`, `1 min 30 s`, `2 h 5 min`, `3 d 4 h`: the two largest units."""
    if not math.isfinite(seconds):
        return "for ever"
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    whole = round(seconds)
    parts: list[str] = []
    for unit_s, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, whole = divmod(whole, unit_s)
        if count or parts:
            parts.append(f"{count} {name}" if count else "")
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if part)


def moment(time_s: float, now_s: float, zone: tzinfo = UTC) -> str:
    """`14:03:20` today, `Wed 2026-11-25 14:03` else; with the zone's name where that is not the reader's own."""
    then, now = (datetime.fromtimestamp(time, zone) for time in (time_s, now_s))
    text = f"{then:%H:%M:%S}" if then.date() == now.date() else f"{then:%a %Y-%m-%d %H:%M}"
    return f"{text} UTC" if zone is UTC else text


def count(number: float, one: str, many: str = "") -> str:
    """`1 replica`, `2 replicas`, `0.5 replicas`."""
    return f"{number:g} {one if number == 1 else many or one + 's'}"


def gpu_s(amount: float) -> str:
    """`0.52 GPU-s`, `340 GPU-s`, `2.1 GPU-h`."""
    if abs(amount) >= 3600:
        return f"{amount / 3600:,.1f} GPU-h"
    return f"{amount:.3g} GPU-s" if abs(amount) < 1000 else f"{amount:.0f} GPU-s"


def percent(share: float) -> str:
    """`12 %`, `under 1 %`, `over 99 %`."""
    if 0 < share < 0.01:
        return "under 1 %"
    if 0.99 < share < 1:
        return "over 99 %"
    return f"{100 * share:.0f} %"
