"""One file through everything that can be known of it without a cloud."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from autoscaling.clusters import check, check_documents, schemas, view
from autoscaling.clusters.catalog import Machines, Provider, load_machines
from autoscaling.clusters.nodes import NODE_START_S
from autoscaling.clusters.problems import Problem
from autoscaling.clusters.reading import Kind, documents, kind_of
from deployments.errors import ConfigError
from deployments.fleet import Fleet, parse_fleet


def validate_text(
    text: str,
    where: str,
    *,
    fleet: Fleet | None = None,
    beside: Mapping[str, str] | None = None,
    prices: Mapping[str, Any] | None = None,
    node_start_s: float = NODE_START_S,
) -> tuple[list[Kind], list[Problem]]:
    """The kinds of documents in the file, and what is wrong with them, in the file's order.

    `beside` holds the texts of files that a cluster file sends to its nodes, by the path that it names: the Serve
    config there is checked too, and where `fleet` is None its fleet is the one that must fit. Raises ConfigError for
    what is no YAML, or nothing that Relight knows.
    """
    kinds: list[Kind] = []
    problems: list[Problem] = []
    for document in documents(text, where):
        kind = kind_of(document)
        if kind is None:
            continue
        kinds.append(kind)
        found = _document(
            document, kind, fleet=fleet, beside=beside or {}, prices=prices, node_start_s=node_start_s
        )
        problems += dict.fromkeys(found)
    if not kinds:
        raise ConfigError(
            f"{where}: is no cluster file: it has neither `provider:` (ray up) nor `apiVersion: ray.io/v1` (KubeRay) "
            "nor `applications:` (Serve) nor `models:` (a fleet)"
        )
    return kinds, problems


def _document(
    document: Any,
    kind: Kind,
    *,
    fleet: Fleet | None,
    beside: Mapping[str, str],
    prices: Mapping[str, Any] | None,
    node_start_s: float,
) -> Iterator[Problem]:
    if kind == "fleet":
        yield from schemas.fleet(document)
        return
    if kind == "cloudformation":
        yield from check_documents.check_cloudformation(document)
        return
    if kind == "serve":
        problems = list(schemas.serve(document))
        yield from problems
        if not problems:
            yield from check_documents.check_serve(document, cluster=False)
        return
    problems = list(schemas.ray_cluster(document) if kind == "ray" else schemas.kuberay(document))
    yield from problems
    if problems:
        return
    if kind == "ray":
        yield from check_documents.check_ray(document)
        cluster = view.of_ray(document)
        serve, prefix = _serve_beside(document, beside)
        yield from check_documents.check_mounts(document, beside)
    else:
        yield from check_documents.check_kuberay(document)
        cluster = view.of_kuberay(document)
        serve, prefix = cluster.serve, "spec.serveConfigV2"
    inner, found = _serve_in(serve, prefix, scaling=bool(cluster.workers)) if serve else (None, [])
    yield from found
    if fleet is None and inner is None:
        text = "without a fleet it is not known whether its models fit; give --fleet"
        yield Problem((), text, note=True)
    yield from check.check_cluster(
        cluster, fleet or inner, _machines(cluster, prices), node_start_s=node_start_s
    )
    yield from check_documents.placeholders(document)


def _machines(cluster: view.Cluster, prices: Mapping[str, Any] | None) -> Machines | None:
    if cluster.provider not in ("aws", "gcp", "azure"):
        return None
    return load_machines(cast(Provider, cluster.provider), prices, "--prices")


def _serve_beside(document: Mapping[str, Any], beside: Mapping[str, str]) -> tuple[str | None, str]:
    """The Serve config among the files that the cluster gets, and its name."""
    for local in (document.get("file_mounts") or {}).values():
        for name in _serve_names(str(local)):
            if (text := beside.get(name)) is not None:
                return text, name
    return None, ""


def _serve_in(text: str, prefix: str, *, scaling: bool) -> tuple[Fleet | None, list[Problem]]:
    """The fleet in a Serve config, and the config's problems, each of which says where it is."""
    try:
        content = documents(text, prefix)[0]
    except ConfigError as error:
        return None, [Problem((), error.message)]
    problems = list(schemas.serve(content))
    fleet = None
    if not problems:
        problems = list(check_documents.check_serve(content, cluster=scaling))
        for application in content["applications"]:
            arguments = application.get("args") or {}
            if application.get("import_path") == "deployments.app:build" and isinstance(
                arguments.get("fleet"), dict
            ):
                fleet = parse_fleet(arguments["fleet"], prefix)
    return fleet, [Problem((), p.line(prefix), p.note) for p in problems]


def local_files(text: str, where: str) -> list[str]:
    """Where files may be that a cluster file sends to its nodes (`./...`), for `beside`. Raises ConfigError."""
    mounts = [d.get("file_mounts") or {} for d in documents(text, where) if kind_of(d) == "ray"]
    sent = [str(p) for m in mounts if isinstance(m, Mapping) for p in m.values() if str(p).startswith("./")]
    return [name for path in sent for name in _serve_names(path)]


def _serve_names(sent: str) -> tuple[str, str]:
    """What may be a Serve config of what a cluster file sends: the file itself, or the one in a folder."""
    return sent, f"{sent.rstrip('/')}/serve.yaml"
