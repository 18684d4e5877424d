"""Files against the schemas of those who read them: Ray's launcher, KubeRay's CRDs, Ray Serve, EC2, Azure.

Unknown keys are errors throughout, also where the reader would ignore them without a word (Serve, Kubernetes).
"""

from __future__ import annotations

import copy
import json
import lzma
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from autoscaling.clusters.problems import Place, Problem, unknown_key
from deployments.config_text import show

AZURE_PARAMETERS = ("availability_zone",)
"""What Ray takes from azure_arm_parameters itself, before its template sees them."""
RAY_AWS_KEYS = ("SubnetIds",)
"""What Ray makes of a node_config before EC2 sees it."""


def against_json_schema(document: Any, schema: Mapping[str, Any], place: Place = ()) -> Iterator[Problem]:
    """Problems by a JSON schema, each with what would be right."""
    import jsonschema

    validator = jsonschema.Draft7Validator(schema)
    for error in sorted(
        validator.iter_errors(document), key=lambda e: [str(step) for step in e.absolute_path]
    ):
        yield from _explain(error, place)


def _explain(error: Any, place: Place) -> Iterator[Problem]:
    here: Place = (*place, *error.absolute_path)
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for key in error.instance:
            if key not in known:
                yield unknown_key(here, str(key), known)
    elif error.validator == "type":
        wanted = error.validator_value
        names = wanted if isinstance(wanted, str) else " or ".join(wanted)
        yield Problem(here, f"{show(error.instance)} is not of type {names}")
    elif error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        for key in missing:
            yield Problem((*here, key), "is missing")
    elif error.validator == "enum":
        wanted = ", ".join(show(value) for value in error.validator_value)
        yield Problem(here, f"{show(error.instance)} is not one of {wanted}")
    elif error.validator == "minimum":
        yield Problem(here, f"{show(error.instance)} is not at least {error.validator_value}")
    elif error.validator == "pattern":
        yield Problem(here, f"{show(error.instance)} does not match {error.validator_value}")
    else:
        yield Problem(here, f"{show(error.instance)}: {error.message.splitlines()[0][:200]}")


# --- Ray's cluster launcher ---------------------------------------------------------------------------------


def ray_cluster(document: Mapping[str, Any]) -> Iterator[Problem]:
    """A file for `ray up`: its JSON schema, then Ray's own preparing and checking, then what the provider would say."""
    found = list(against_json_schema(document, _ray_schema()))
    yield from found
    if found:
        return
    yield from _as_ray_prepares(document)
    kind = document["provider"].get("type")
    for name, node in (document.get("available_node_types") or {}).items():
        place: Place = ("available_node_types", name, "node_config")
        if kind == "aws":
            yield from _ec2(node["node_config"], place)
        elif kind == "azure":
            yield from _azure(node["node_config"], place)


@cache
def _ray_schema() -> dict[str, Any]:
    import ray.autoscaler

    path = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # `ray up` on machines that one has: Ray reads it and its schema does not know it.
    schema["properties"]["min_workers"] = {"type": "integer", "minimum": 0}
    # Its "nullable" is OpenAPI's, not JSON schema's; and a pattern for every name needs no strictness beside it.
    return schema


def _as_ray_prepares(document: Mapping[str, Any]) -> Iterator[Problem]:
    import contextlib
    import io
    import logging

    from ray.autoscaler._private.util import prepare_config, validate_config

    said = io.StringIO()
    log = logging.getLogger("ray.autoscaler")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of fields that it fills in itself
    try:
        # What ends `ray up` prints, then raises something without text.
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            validate_config(prepare_config(copy.deepcopy(dict(document))))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever Ray raises is what it says of the file
        text = " ".join((str(error) or said.getvalue() or repr(error)).split())
        yield Problem((), f"Ray refuses it: {text[:300]}")
    finally:
        log.setLevel(level)


def _ec2(node_config: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    """Ray passes a node_config to EC2's RunInstances, whose model botocore ships."""
    from botocore.validate import ParamValidator

    params = {key: value for key, value in node_config.items() if key not in RAY_AWS_KEYS}
    report = ParamValidator().validate({**params, "MinCount": 1, "MaxCount": 1}, _run_instances())
    for kind, at, details in report._errors:
        here = (*place, *_steps(at))
        if kind == "unknown field":
            known = [*details["valid_names"], *RAY_AWS_KEYS]
            yield unknown_key(here, details["unknown_param"], known)
        elif kind == "invalid type":
            types = ", ".join(t.split("'")[1] for t in details["valid_types"])
            yield Problem(here, f"{show(details['param'])} is not of type {types}")
        else:
            yield Problem(here, f"{kind}: {details}")
    if "InstanceType" not in node_config:
        yield Problem((*place, "InstanceType"), "is missing: EC2 would start an m1.small")


@cache
def _run_instances() -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _steps(path: str) -> Place:
    """botocore's `.BlockDeviceMappings[0].Ebs`."""
    steps: list[str | int] = []
    for part in path.replace("[", ".[").split("."):
        if part.startswith("["):
            steps.append(int(part[1:-1]))
        elif part:
            steps.append(part)
    return tuple(steps)


def _azure(node_config: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    """Ray passes azure_arm_parameters to a template of its own, whose parameters are all there are."""
    import ray.autoscaler

    path = Path(ray.autoscaler.__file__).parent / "_private/_azure/azure-vm-template.json"
    known = [*json.loads(path.read_text(encoding="utf-8"))["parameters"], *AZURE_PARAMETERS]
    given = node_config.get("azure_arm_parameters")
    if not isinstance(given, Mapping):
        yield Problem((*place, "azure_arm_parameters"), "is missing: it holds vmSize and the image")
        return
    here: Place = (*place, "azure_arm_parameters")
    for key in given:
        if key not in known:
            yield unknown_key(here, str(key), known)
    if "vmSize" not in given:
        yield Problem((*here, "vmSize"), "is missing")


# --- KubeRay ------------------------------------------------------------------------------------------------


def kuberay(document: Mapping[str, Any]) -> Iterator[Problem]:
    """A RayService or RayCluster: KubeRay's CRD, then what Ray's autoscaler makes of it."""
    version, kind = document["apiVersion"], document["kind"]
    if version != "ray.io/v1":
        yield Problem(("apiVersion",), f"{show(version)} is not 'ray.io/v1'")
        return
    found = list(against_json_schema(document, _crds()[kind]))
    yield from found
    if found:
        return
    if not document.get("metadata", {}).get("name"):
        yield Problem(("metadata", "name"), "is missing")
        return
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = document["spec"] if kind == "RayCluster" else document["spec"]["rayClusterConfig"]
    metadata = {"namespace": "default", **document["metadata"]}
    try:
        _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": copy.deepcopy(spec)})
    except Exception as error:  # noqa: BLE001 - whatever the autoscaler raises is what it says of the file
        place: Place = ("spec",) if kind == "RayCluster" else ("spec", "rayClusterConfig")
        yield Problem(place, f"Ray's autoscaler refuses it: {' '.join(str(error).split())[:300]}")


@cache
def _crds() -> dict[str, Any]:
    """KubeRay's schemas, made strict. data/README.md says where they come from."""
    packed = files("autoscaling.clusters").joinpath("data/kuberay-crds-v1.json.xz").read_bytes()
    crds: dict[str, Any] = json.loads(lzma.decompress(packed))
    for schema in crds.values():
        # The API server's own; CRDs need not say what is in it.
        schema["properties"]["metadata"] = {"type": "object"}
        _make_strict(schema)
        schema["properties"]["metadata"].pop("additionalProperties", None)
    return crds


def _make_strict(schema: Any) -> None:
    """Kubernetes drops what a CRD does not know; an error is kinder."""
    if isinstance(schema, list):
        for item in schema:
            _make_strict(item)
    if not isinstance(schema, dict):
        return
    if (
        isinstance(schema.get("properties"), dict)
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        schema["additionalProperties"] = False
    for value in schema.values():
        _make_strict(value)


# --- Ray Serve ----------------------------------------------------------------------------------------------


def serve(document: Any, place: Place = ()) -> Iterator[Problem]:
    """A Serve config: keys that Serve would ignore, Serve's own schema, and the arguments of Relight's application."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    if not isinstance(document, Mapping):
        yield Problem(place, f"{show(document)} is not a mapping with `applications:`")
        return
    found = list(_unknown_keys(document, ServeDeploySchema, place))
    yield from found
    try:
        ServeDeploySchema.model_validate(copy.deepcopy(dict(document)))
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            yield Problem((*place, *problem["loc"]), f"{show(problem['input'])}: {problem['msg']}")
        return
    for index, application in enumerate(document["applications"]):
        if application.get("import_path") == "deployments.app:build":
            yield from _relight_arguments(application, (*place, "applications", index))


def _unknown_keys(value: Any, model: Any, place: Place) -> Iterator[Problem]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(item, model, (*place, index))
    if not isinstance(value, Mapping):
        return
    for key, below in value.items():
        field = model.model_fields.get(key)
        if field is None:
            yield unknown_key(place, str(key), model.model_fields)
        elif (inner := _model_in(field.annotation)) is not None:
            yield from _unknown_keys(below, inner, (*place, key))


def _model_in(annotation: Any) -> Any:
    """The pydantic model in a type, however deep."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)


def fleet(document: Mapping[str, Any], place: Place = ()) -> Iterator[Problem]:
    """A fleet, as `relight fleet validate` checks it."""
    from deployments.errors import ConfigError
    from deployments.fleet import parse_fleet

    try:
        parse_fleet(document, "")
    except ConfigError as error:
        for line in error.message.splitlines():
            yield Problem(place, line.removeprefix(": "))


def _relight_arguments(application: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    arguments = application.get("args") or {}
    for key in arguments:
        if key not in ("fleet", "listen"):
            yield unknown_key((*place, "args"), str(key), ("fleet", "listen"))
    if isinstance(inline := arguments.get("fleet"), Mapping):
        yield from fleet(inline, (*place, "args", "fleet"))
