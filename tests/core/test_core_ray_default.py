"""`ray-default` beside Ray's own functions, on the same load and the same replicas."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from ray.serve import autoscaling_policy
from ray.serve.config import AutoscalingConfig

from autoscaling.core.decide import decide
from autoscaling.core.series import mean, push_step
from autoscaling.core.types import State
from tests.core.lab import Cluster, spec


@pytest.mark.filterwarnings("ignore:.*look_back_period_s.*:FutureWarning")
@pytest.mark.parametrize("seed", range(24))
def test_it_decides_as_ray_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds, factors and delays as they come; a load that jumps every ten seconds or so.

    Ray begins the delay of the last replica at the look after the one at which the others went.
    """
    draw = random.Random(seed)
    low = draw.choice([0, 0, 1, 2])
    high = low + draw.choice([1, 2, 3, 8])
    params = {
        "upscale_delay_s": draw.choice([0.0, 3.0, 10.0]),
        "downscale_delay_s": draw.choice([0.0, 5.0, 20.0, 60.0]),
        "downscale_to_zero_delay_s": draw.choice([0.0, 7.0, 40.0]),
        "upscaling_factor": draw.choice([1.0, 0.5, 2.0]),
        "downscaling_factor": draw.choice([1.0, 0.5]),
        "look_back_period_s": draw.choice([1.0, 5.0, 30.0]),
    }
    asked = spec("ray-default", params=params, min_replicas=low, max_replicas=high)
    config = AutoscalingConfig(
        min_replicas=low, max_replicas=high, target_ongoing_requests=asked.target_ongoing_requests, **params
    )
    policy = autoscaling_policy._apply_autoscaling_config(
        autoscaling_policy.replica_queue_length_autoscaling_policy
    )
    cluster = Cluster(asked, ready=low, target=low, start_s=draw.choice([0.0, 1.0, 5.0]))
    monkeypatch.setattr(autoscaling_policy, "time", SimpleNamespace(time=lambda: cluster.now_s))
    state, rays, series, load, apart = State(), {}, (), 0, 0
    for _ in range(300):
        load = draw.choice([0, 0, 1, 3, 9, 20, 40, 100]) if draw.random() < 0.1 else load
        observation = cluster.observe(load)
        state, decision = decide(asked, state, observation, None)
        series = push_step(series, cluster.now_s, float(load), params["look_back_period_s"])
        context = SimpleNamespace(
            current_num_replicas=cluster.ready,
            target_num_replicas=cluster.target,
            total_num_requests=mean(series, cluster.now_s, params["look_back_period_s"])
            if cluster.ready
            else load,
            config=config,
            policy_state=rays,
        )
        wanted, rays = policy(context)
        apart += decision.replicas != min(high, max(low, wanted))
        cluster.act(decision)
        cluster.now_s += 1.0
    assert apart <= 2


def test_what_max_replicas_takes_away_begins_no_delay() -> None:
    """Ten are wanted and four allowed: when six are, nothing is to go, and no delay has begun when one is."""
    params = {"look_back_period_s": 0.1, "upscale_delay_s": 0.0, "downscale_delay_s": 100.0}
    cluster = Cluster(spec("ray-default", params=params, max_replicas=4), ready=4, target=4)
    cluster.run(5, 100)
    cluster.run(99, 60)
    assert {decision.replicas for decision in cluster.run(90, 10)} == {4}
