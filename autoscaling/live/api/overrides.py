"""What people set at run time: made, listed, and undone."""

from __future__ import annotations

import math
import secrets
from typing import Annotated, Any

from pydantic import Field

from autoscaling.live.api.plain import plain
from autoscaling.live.api.request import Refusal, Request
from autoscaling.live.invalid import InvalidValue
from autoscaling.live.records import Override, OverrideKind
from autoscaling.live.values import LATEST_S, AnyValue, Value, check_time


class Ends(Value):
    """Until when something holds: a time, or so long from now; neither means until it is undone."""

    until_s: Annotated[float, Field(ge=0)] | None = None
    for_s: Annotated[float, Field(gt=0)] | None = None


def ends(request: Request, body: Ends) -> float | None:
    """Until when, in Unix seconds. Raises InvalidValue."""
    if body.until_s is not None and body.for_s is not None:
        raise InvalidValue("until_s", body.until_s, "either until_s or for_s, not both")
    if body.until_s is not None and body.until_s <= request.now_s:
        raise InvalidValue("until_s", body.until_s, f"a time after now ({request.now_s:.0f})")
    if body.for_s is not None:
        if body.for_s >= LATEST_S - request.now_s:
            raise InvalidValue("for_s", body.for_s, "seconds that end before the year 9999")
        return request.now_s + body.for_s
    if body.until_s is not None:
        check_time("until_s", body.until_s)
    return body.until_s


def draft(
    request: Request, kind: OverrideKind, model: str | None, value: AnyValue, until_s: float | None
) -> Override:
    """As it would be made; kept nowhere yet."""
    # The last word wins, also where the clock was set back since the one before.
    before_s = max((override.made_s for override in request.view.store.overrides(request.now_s)), default=0.0)
    return Override(
        id=f"{kind}-{secrets.token_hex(4)}",
        kind=kind,
        model=model,
        value=value.model_dump(exclude_none=True),
        who=request.who(),
        made_s=max(request.now_s, math.nextafter(before_s, math.inf)),
        until_s=until_s,
    )


def keep(request: Request, override: Override) -> Override:
    """Written and in force when it returns. Raises StoreUnavailable."""
    request.view.store.put_override(override)
    request.view.overrides_changed()
    return override


def make(
    request: Request, kind: OverrideKind, model: str | None, value: AnyValue, until_s: float | None
) -> Override:
    """Written and in force when it returns. Raises StoreUnavailable."""
    return keep(request, draft(request, kind, model, value, until_s))


def undo(request: Request, override_id: str, kind: OverrideKind | None = None) -> Override:
    """Undone, and out of force when it returns. 404 where there is none of that id (and kind), 409 where it is over."""
    store = request.view.store
    alive = next((o for o in store.overrides(request.now_s) if o.id == override_id), None)
    if alive is None or kind not in (None, alive.kind):
        past = next((o for o in store.override_history(10_000) if o.id == override_id), None)
        if past is None or kind not in (None, past.kind):
            message = f"There is no {kind or 'override'} {override_id!r}."
            raise Refusal(404, message, field="id", value=override_id, expected="an id as the lists show it")
        how = f"was undone by {past.undone_by}" if past.undone_s is not None else "has ended"
        raise Refusal(409, f"{override_id} {how} already.", field="id", value=override_id)
    undone = store.undo_override(override_id, request.who(), request.now_s)
    if undone is None:
        raise Refusal(
            409, f"{override_id} was undone by someone else just now.", field="id", value=override_id
        )
    request.view.overrides_changed()
    return undone


def listing(request: Request) -> dict[str, Any]:
    """GET overrides: those that are not over; with history=1 those that were, too.

    Of several modes the last that was set is in force. `under` of the others is its id: when it ends before them they
    are in force again.
    """
    store = request.view.store
    limit = request.whole("limit", 100, 1, 10_000)
    alive = list(store.overrides(request.now_s))
    found = store.override_history(limit) if request.flag("history") else alive
    modes = [override.id for override in alive if override.kind == "mode"]
    under = dict.fromkeys(modes[:-1], modes[-1]) if modes else {}
    in_force = {override.id for override in alive} - under.keys()
    return {
        "overrides": [
            {**shown_override(o), "in_force": o.id in in_force, "under": under.get(o.id)} for o in found
        ]
    }


def undo_one(request: Request) -> dict[str, Any]:
    """DELETE overrides/{id}."""
    return {"undone": [shown_override(undo(request, request.tail))]}


def shown_override(override: Override) -> dict[str, Any]:
    shown: dict[str, Any] = plain(override)
    return shown
