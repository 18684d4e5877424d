"""`relight policy validate`: is a policy right, for a fleet file, a model, or by itself? Needs no cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoscaling.commands import options, output
from autoscaling.commands.client import Client, in_path
from autoscaling.commands.failures import UNREACHABLE, WRONG, CommandError

if TYPE_CHECKING:
    from autoscaling.core.types import Spec
    from autoscaling.live.invalid import InvalidValue


def register(policy_app: typer.Typer) -> None:
    policy_app.command("validate")(validate)


def validate(
    *,
    target_name: Annotated[str, typer.Argument(metavar="FILE|MODEL", help="A fleet file, or a model's id.")],
    policy: options.PolicyOption = None,
    param: options.Params = None,
    wait_cost: options.WaitCost = None,
    keep_alive: options.KeepAlive = None,
    min_replicas: options.MinReplicas = None,
    max_replicas: options.MaxReplicas = None,
    target: options.Target = None,
    priority: options.Priority = None,
    file: options.PolicyFile = None,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """Check a policy and its parameters without setting them.

    With a fleet file, for every model in it and without a cluster. With a model, for that model in the cluster; where
    none answers, only the policy itself is checked, and that is said.
    """
    from autoscaling.commands.policy import body_of

    said = body_of(policy, param, wait_cost, keep_alive, min_replicas, max_replicas, target, priority)
    body = options.over_policy_file(file, said)
    if Path(target_name).is_file():
        answer = _file(Path(target_name), body)
    elif target_name.endswith((".yaml", ".yml")):
        raise CommandError(f"{target_name}: there is no such file", WRONG)
    else:
        answer = _model(target_name, body, address)
    if as_json:
        options.print_json(answer)
        return
    for name, spec in answer["models"].items():
        params = "".join(f", {key} {value:g}" for key, value in spec["params"].items())
        bounds = f"{spec['min_replicas']} to {spec['max_replicas']} replicas, wait_cost {spec['wait_cost']:g}"
        output.say(f"{name}: {spec['policy']}{params}; {bounds}")
    output.say(f"Right. {answer['checked']}")


def _file(path: Path, body: dict[str, Any]) -> dict[str, Any]:
    from autoscaling.live.api.policies import spec_fields
    from deployments.fleet import load_fleet
    from deployments.scaling import scaling_spec

    models = {}
    for model in load_fleet(path).models:
        models[model.id] = spec_fields(_checked(scaling_spec(model), body, f"{path}: {model.id}: "))
    return {"models": models, "checked": f"Checked for the models of {path}."}


def _model(name: str, body: dict[str, Any], address: str | None) -> dict[str, Any]:
    from autoscaling.core.types import MAX_REPLICAS, Spec

    try:
        client = Client(address)
        if not body:
            spec = client.get(f"policies/{in_path(name)}")["spec"]
            return {"models": {name: spec}, "checked": "That is how it is scaled now."}
        answer = client.put(f"policies/{in_path(name)}", body, dry_run=1)
        after = {model: change["after"] for model, change in answer["models"].items()}
        return {"models": after, "checked": f"Checked for {name} in the cluster; nothing was changed."}
    except CommandError as error:
        if error.code != UNREACHABLE or address is not None:
            raise
        if not body:
            raise
        _checked(Spec(name, max_replicas=MAX_REPLICAS), body, "")
        return {"models": {}, "checked": f"Checked by itself, not against {name}'s bounds. {error.message}"}


def _checked(spec: Spec, body: dict[str, Any], where: str) -> Spec:
    from autoscaling.live.api.policies import checked
    from autoscaling.live.values import PolicyValue, parse

    if not body:
        return spec
    if problems := [f"{where}{problem}" for problem in _problems(spec, body)]:
        raise CommandError("\n".join(problems), WRONG)
    return checked(spec, parse(PolicyValue, body))


def _problems(spec: Spec, body: dict[str, Any]) -> Iterator[InvalidValue]:
    """What is wrong with each value, and what those that are right contradict."""
    from autoscaling.core.policies import POLICIES, wrong_choices
    from autoscaling.live.api.policies import checked
    from autoscaling.live.invalid import InvalidValue
    from autoscaling.live.values import PolicyValue, parse, wrong_fields

    right = dict(body)
    for problem in wrong_fields(PolicyValue, body):
        yield problem
        right.pop(problem.field.partition(".")[0], None)
    policy = right.get("policy", spec.policy)
    wrong = list(wrong_choices(policy, right.get("params", {})))
    yield from (InvalidValue(*choice) for choice in wrong)
    if wrong:
        right.pop("params", None)
    if right and policy in POLICIES:
        try:
            checked(spec, parse(PolicyValue, right))
        except InvalidValue as error:
            yield error
