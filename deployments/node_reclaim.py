"""`python -m deployments.node_reclaim --provider aws|gcp|azure`: tells Ray that the cloud takes this spot machine back.

For the commands that start a node (cluster-configs/), which all types share: on one that is on demand it ends at once.
Clouds tell the machine itself, half a minute (Google, Azure) or two minutes (AWS) ahead. Ray then drains its node, and
Serve starts each replica's successor elsewhere before it lets the replica go. It runs for as long as the node's raylet
does, and imports no Ray.

`--in-s SECONDS` in its place is for Kubernetes, which tells the pod, by its preStop hook: the node is drained at once,
and the command ends when its raylet has gone, or when the time is over.

Notices: AWS https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html, Google
https://cloud.google.com/compute/docs/instances/spot, Azure
https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import psutil

from deployments.node_start import Raylet, find_raylets

EVERY_S = 2.0
ASK_TIMEOUT_S = 2.0
NOTICE_S = 30.0
"""What Google and Azure give at least; the time of a notice that names none."""
_GCS = ("--gcs-address=", "--gcs_address=")

Ask = Callable[[str, str, Mapping[str, str]], "str | None"]
"""(method, URL, headers) -> the answer; None where there is none (404). Raises OSError."""


def ask(method: str, url: str, headers: Mapping[str, str]) -> str | None:
    """Of the cloud's metadata service, which is never behind a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with opener.open(request, timeout=ASK_TIMEOUT_S) as response:
            text: str = response.read().decode()
            return text
    except urllib.error.HTTPError as error:
        if error.code == 404:  # how AWS says that there is no notice
            return None
        raise
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error


def aws(ask: Ask, now_s: float) -> float | None:
    """When the machine will be taken (Unix time); None while nobody says so."""
    base = "http://169.254.169.254/latest"
    token = ask("PUT", f"{base}/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}) or ""
    text = ask("GET", f"{base}/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    if text is None:
        return None
    notice = json.loads(text)
    if notice.get("action") == "none":
        return None
    return datetime.fromisoformat(notice["time"].replace("Z", "+00:00")).timestamp()


def gcp(ask: Ask, now_s: float) -> float | None:
    """As `aws`. Google names no time."""
    url = "http://metadata.google.internal/computeMetadata/v1/instance/preempted"
    text = ask("GET", url, {"Metadata-Flavor": "Google"})
    return now_s + NOTICE_S if text is not None and text.strip().upper() == "TRUE" else None


def azure(ask: Ask, now_s: float) -> float | None:
    """As `aws`. An event that has begun names no time.

    All machines of a scale set are told of each other's events: an event names those that it is for. It counts where
    the machine has no name to tell, since a drain in vain costs less than a machine that goes unannounced.
    """
    base, headers = "http://169.254.169.254/metadata", {"Metadata": "true"}
    document: Any = json.loads(ask("GET", f"{base}/scheduledevents?api-version=2020-07-01", headers) or "{}")
    events = [e for e in document.get("Events", ()) if e.get("EventType") in ("Preempt", "Terminate")]
    if any(event.get("Resources") for event in events):
        url = f"{base}/instance/compute/name?api-version=2021-02-01&format=text"
        name = (ask("GET", url, headers) or "").strip().lower()
        events = [e for e in events if not (name and e.get("Resources")) or _names(e["Resources"], name)]
    times = [
        parsedate_to_datetime(event["NotBefore"]).timestamp() if event.get("NotBefore") else now_s + NOTICE_S
        for event in events
    ]
    return min(times, default=None)


def _names(resources: list[str], name: str) -> bool:
    """Whether it is among them; Azure's names differ by no case."""
    return name in [resource.lower() for resource in resources]


PROVIDERS: Mapping[str, Callable[[Ask, float], float | None]] = {"aws": aws, "gcp": gcp, "azure": azure}


def drain(raylet: Raylet, in_s: float) -> None:
    """Tell Ray that the node goes in so many seconds. Raises CalledProcessError, or psutil.Error if it has gone."""
    process = psutil.Process(raylet.pid)
    gcs = [part.partition("=")[2] for part in process.cmdline() if part.startswith(_GCS)]
    if not gcs:
        raise ValueError(f"the raylet {raylet.pid} names no GCS")
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", gcs[0]]
    command += ["--node-id", raylet.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "the cloud takes this machine back"]
    command += ["--deadline-remaining-seconds", str(max(1, math.floor(in_s)))]
    subprocess.run(command, env=process.environ(), stdin=subprocess.DEVNULL, check=True, timeout=60)


def watch(
    notice: Callable[[float], float | None],
    find: Callable[[], list[Raylet]],
    drain: Callable[[Raylet, float], None],
    sleep: Callable[[float], object] = time.sleep,
    now: Callable[[], float] = time.time,
) -> bool:
    """Until a notice has come and its raylets were drained (true), or until no raylet is left (false).

    A metadata service or a GCS that does not answer is asked again: the notice stands.
    """
    drained: set[str] = set()
    failure = ""
    while found := find():
        try:
            if (until_s := notice(now())) is not None:
                for raylet in found:
                    if raylet.node_id not in drained:
                        drain(raylet, until_s - now())
                        drained.add(raylet.node_id)
                return True
            failure = ""
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            subprocess.SubprocessError,
            psutil.Error,
        ) as error:
            if failure != (failure := repr(error)):
                print(f"node_reclaim: {error}", file=sys.stderr, flush=True)
        sleep(EVERY_S)
    return False


def leave(
    in_s: float,
    find: Callable[[], list[Raylet]],
    drain: Callable[[Raylet, float], None],
    sleep: Callable[[float], object] = time.sleep,
    now: Callable[[], float] = time.time,
) -> bool:
    """Drain at once, and wait for the raylets' end. Whether they have gone within `in_s`, which they were given.

    A drained raylet ends by itself, when its last replica has gone or its time is over. Raises what draining raises.
    """
    end_s = now() + in_s
    for raylet in find():
        drain(raylet, in_s)
    while find():
        if now() >= end_s:
            return False
        sleep(EVERY_S)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m deployments.node_reclaim", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--provider", choices=sorted(PROVIDERS), help="whose machine this is")
    what.add_argument("--in-s", type=float, help="drain now; the node goes in so many seconds")
    options = parser.parse_args(arguments)
    if options.in_s is not None:
        return _leave(options.in_s)
    provider = PROVIDERS[options.provider]
    found = find_raylets()
    if not found:
        print("node_reclaim: no raylet runs here; start Ray first", file=sys.stderr)
        return 1
    if all(raylet.market == "on-demand" for raylet in found):
        print("node_reclaim: this node is on demand, which no cloud takes back")
        return 0
    if watch(lambda now_s: provider(ask, now_s), find_raylets, drain):
        print("node_reclaim: Ray drains this node: the cloud takes the machine back", flush=True)
    return 0


def _leave(in_s: float) -> int:
    try:
        gone = leave(in_s, find_raylets, drain)
    except (OSError, ValueError, subprocess.SubprocessError, psutil.Error) as error:
        print(f"node_reclaim: {error}", file=sys.stderr)
        return 1
    print(f"node_reclaim: the raylet {'has gone' if gone else f'still runs after {in_s:g} s'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
