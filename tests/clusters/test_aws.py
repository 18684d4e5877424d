"""aws.yaml and aws-foundation.yaml through Ray's own AWS code, against moto's server instead of EC2 and IAM.

What moto can't show: whether an image boots, has a GPU's driver, or a role's policy suffices (it enforces none here).
It does not resolve `resolve:ssm:` in RunInstances either; the request is looked at as it leaves.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clusters.conftest import CONFIGS, parsed

boto3 = pytest.importorskip("boto3")
REGION = "us-east-1"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An empty account; Ray's clients, and a home of their own for keys."""
    import urllib.request

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).read()
    _forget_clients()
    yield endpoint
    _forget_clients()


def _forget_clients() -> None:
    """Ray keeps its clients, and what it has seen of subnets, for as long as the process lives."""
    from ray.autoscaler._private.aws import config, node_provider, utils

    for cached in (utils.resource_cache, utils.client_cache, config._get_subnets_or_die):
        cached.cache_clear()
    for name in ("make_ec2_resource", "list_ec2_instances"):
        getattr(getattr(node_provider, name, None), "cache_clear", lambda: None)()


@pytest.fixture
def foundation(aws: str) -> dict[str, str]:
    """The stack of aws-foundation.yaml in the account's default network."""
    ec2, cloud = boto3.client("ec2"), boto3.client("cloudformation")
    vpc = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"][0]["VpcId"]
    parameters = {"Vpc": vpc, "SshFrom": "203.0.113.7/32", "WeightsBucket": "weights"}
    cloud.create_stack(
        StackName="relight",
        TemplateBody=(CONFIGS / "aws-foundation.yaml").read_text(),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in parameters.items()],
    )
    stack = cloud.describe_stacks(StackName="relight")["Stacks"][0]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    outputs = {o["OutputKey"]: o["OutputValue"] for o in stack["Outputs"]}
    return {"vpc": vpc, "group": outputs["SecurityGroup"]}


def _bootstrapped(document: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does before it starts the head."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config

    found: dict[str, Any] = bootstrap_aws(prepare_config(copy.deepcopy(document)))
    return found


def _inbound(group: str) -> list[tuple[str, list[str], list[str]]]:
    rules = boto3.client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"][0][
        "IpPermissions"
    ]
    return sorted(
        (
            rule["IpProtocol"],
            [r["CidrIp"] for r in rule["IpRanges"]],
            [p["GroupId"] for p in rule["UserIdGroupPairs"]],
        )
        for rule in rules
    )


def test_bootstrap_uses_the_closed_group_and_the_small_roles(foundation: dict[str, str]) -> None:
    config = _bootstrapped(parsed("aws.yaml"))
    assert _inbound(foundation["group"]) == [
        ("-1", [], [foundation["group"]]),
        ("tcp", ["203.0.113.7/32"], []),
    ]
    types = config["available_node_types"]
    for name, node in types.items():
        assert node["node_config"]["SecurityGroupIds"] == [foundation["group"]], name
        assert node["node_config"]["SubnetIds"], name
        profile = node["node_config"]["IamInstanceProfile"]["Name"]
        assert profile == ("relight-head" if name == "head" else "relight-worker")
        assert boto3.client("iam").get_instance_profile(InstanceProfileName=profile)["InstanceProfile"][
            "Roles"
        ]
    # Ray made no role of its own, which could do everything in EC2 and S3.
    roles = {r["RoleName"] for r in boto3.client("iam").list_roles()["Roles"]}
    assert roles == {"relight-head", "relight-worker"}
    key = config["auth"]["ssh_private_key"]
    assert Path(key).stat().st_mode & 0o077 == 0


def test_without_the_foundation_rays_group_is_open(aws: str) -> None:
    """Why aws.yaml names a group that must be there first."""
    config = _bootstrapped(parsed("aws.yaml"))
    group = config["available_node_types"]["head"]["node_config"]["SecurityGroupIds"][0]
    assert ("tcp", ["0.0.0.0/0"], []) in _inbound(group)


def test_render_with_a_group_of_another_network(foundation: dict[str, str], tmp_path: Path) -> None:
    """Where there is more than one network, the group's is the one."""
    from typer.testing import CliRunner

    from autoscaling.cli import app

    ec2 = boto3.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.9.1.0/24", AvailabilityZone=f"{REGION}f")["Subnet"]
    ec2.modify_subnet_attribute(SubnetId=subnet["SubnetId"], MapPublicIpOnLaunch={"Value": True})
    arguments = ["--provider", "aws", "--fleet", str(CONFIGS / "fleet.yaml"), "--out", str(tmp_path)]
    result = CliRunner().invoke(
        app, ["cluster", "render", *arguments, "--security-group", foundation["group"]]
    )
    assert result.exit_code == 0, result.output
    config = _bootstrapped(yaml.safe_load((tmp_path / "aws.yaml").read_text()))
    for node in config["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"] == [foundation["group"]]
        assert subnet["SubnetId"] not in node["node_config"]["SubnetIds"]


def test_launch_requests(foundation: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every type, as Ray's provider asks EC2 for it; spot as spot, and each with its own disk, role and tags."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import (
        NODE_KIND_WORKER,
        TAG_RAY_LAUNCH_CONFIG,
        TAG_RAY_NODE_KIND,
        TAG_RAY_USER_NODE_TYPE,
    )

    config = _bootstrapped(parsed("aws.yaml"))
    image = boto3.client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    asked: list[dict[str, Any]] = []

    def before(params: dict[str, Any], **_: Any) -> None:
        asked.append(copy.deepcopy(params))
        # moto takes the name of a parameter for that of an image.
        params["ImageId"] = image

    # botocore checks the request against EC2's own model after this, and refuses what EC2 has no name for.
    events = provider.ec2_fail_fast.meta.client.meta.events
    events.register("provide-client-params.ec2.RunInstances", before)
    for name, node in config["available_node_types"].items():
        tags = {
            TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
            TAG_RAY_LAUNCH_CONFIG: "hash",
            TAG_RAY_USER_NODE_TYPE: name,
        }
        created = provider.create_node(node["node_config"], tags, 1)
        assert len(created) == 1, name
        request, instance = asked[-1], next(iter(created.values()))
        instance.reload()
        spot = name.endswith("-spot")
        assert request["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/x86_64/")
        assert request["InstanceType"] == node["node_config"]["InstanceType"] == instance.instance_type
        assert ("InstanceMarketOptions" in request) == spot
        if spot:
            assert request["InstanceMarketOptions"]["MarketType"] == "spot"
            assert instance.instance_lifecycle == "spot"
        assert request["SecurityGroupIds"] == [foundation["group"]]
        assert [g["GroupId"] for g in instance.security_groups] == [foundation["group"]]
        assert request["MetadataOptions"]["HttpTokens"] == "required"
        disk = request["BlockDeviceMappings"][0]["Ebs"]
        assert disk["Encrypted"] and disk["DeleteOnTermination"] and disk["VolumeType"] == "gp3"
        found = {t["Key"]: t["Value"] for t in instance.tags}
        assert found["ray-cluster-name"] == "relight" and found[TAG_RAY_USER_NODE_TYPE] == name
    everything = provider.non_terminated_nodes({})
    assert len(everything) == len(config["available_node_types"])
    # `cache_stopped_nodes: false`: what idles is ended, so that no stopped machine's disk is paid for.
    provider.terminate_nodes(everything)
    states = {
        i["State"]["Name"]
        for r in boto3.client("ec2").describe_instances()["Reservations"]
        for i in r["Instances"]
    }
    assert states == {"terminated"}


def _policy(role: str, name: str) -> dict[str, Any]:
    document = boto3.client("iam").get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
    # moto's CloudFormation hands IAM the text of a Python mapping where AWS' hands it JSON.
    found: dict[str, Any] = ast.literal_eval(document) if isinstance(document, str) else document
    return found


def test_roles_say_no_more_than_they_need(foundation: dict[str, str]) -> None:
    iam = boto3.client("iam")
    for role in ("relight-head", "relight-worker"):
        assert iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"] == []
    head = _policy("relight-head", "autoscaler")
    by_action = {action: s for s in head["Statement"] for action in s["Action"]}
    assert not any(action in ("*", "ec2:*", "iam:*") for action in by_action)
    assert by_action["iam:PassRole"]["Resource"].endswith(":role/relight-worker")
    only = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "relight"}}
    assert by_action["ec2:TerminateInstances"]["Condition"] == only
    weights = _policy("relight-worker", "weights")
    allowed = {a for s in weights["Statement"] for a in s["Action"]}
    assert allowed == {"s3:GetObject", "s3:ListBucket"}


def test_teardown_leaves_nothing(foundation: dict[str, str]) -> None:
    boto3.client("cloudformation").delete_stack(StackName="relight")
    groups = boto3.client("ec2").describe_security_groups()["SecurityGroups"]
    assert "relight" not in {g["GroupName"] for g in groups}
    assert boto3.client("iam").list_roles()["Roles"] == []


def test_the_foundation_is_a_template_that_cloudformation_takes() -> None:
    from cfnlint.api import lint_file

    assert [str(match) for match in lint_file(CONFIGS / "aws-foundation.yaml")] == []
