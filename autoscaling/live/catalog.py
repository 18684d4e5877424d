"""The policies as people are shown them, and what is wrong with a choice of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from autoscaling.core.policies import DEFAULT, POLICIES, Param, wrong_choice
from autoscaling.live.invalid import InvalidValue

_SUMMARIES = {
    "predictive": "Warm before the traffic is, dark when none is expected: by forecast, measured capacity and cost.",
    "reactive": "As many as the requests in progress need, dark after an idle time. No forecast.",
    "keep-alive": "Like reactive, with nothing but a fixed idle time: what Lambda, Modal and RunPod do.",
    "hybrid-histogram": "Each model's own idle times decide when to start ahead and how long to keep.",
    "kpa": "Knative's: a stable and a panic window of the requests in progress.",
    "ray-default": "Ray Serve's own: averaged requests in progress, long delays up and down.",
    "scheduled": "By the clock alone: what schedules ask for, else only while requests are there.",
    "fixed": "Always as many, whatever comes.",
}


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    name: str
    summary: str
    source: str
    """Where the algorithm is from."""
    default: bool
    params: tuple[Param, ...]


@cache
def policies() -> Mapping[str, PolicyInfo]:
    return {
        name: PolicyInfo(name, _SUMMARIES.get(name, ""), policy.source, name == DEFAULT, policy.params)
        for name, policy in POLICIES.items()
    }


def check(policy: str, params: Mapping[str, float]) -> None:
    """Raises InvalidValue where there is no such policy, or it has no such parameter, or it is out of its bounds."""
    if wrong := wrong_choice(policy, params):
        raise InvalidValue(*wrong)
