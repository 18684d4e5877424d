"""What a fleet's nodes are, in which order they are tried, and what they cost."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autoscaling.cli import app
from autoscaling.clusters.catalog import load_machines
from autoscaling.clusters.fit import per_node
from autoscaling.clusters.nodes import choose
from autoscaling.clusters.plan import plan
from deployments.errors import ConfigError
from deployments.fleet import Fleet, parse_fleet
from tests.clusters.conftest import CONFIGS

PRICES = """
aws:
  region: eu-central-1
  shapes:
    m7i.xlarge: {usd_per_hour: 0.125, spot_usd_per_hour: 0.0625}
    g6.xlarge: {usd_per_hour: 0.5, spot_usd_per_hour: 0.25}
    g5.xlarge: {usd_per_hour: 1, spot_usd_per_hour: 0.75}
    p5.4xlarge: {usd_per_hour: 4, spot_usd_per_hour: 2}
    p4d.24xlarge: {usd_per_hour: 16, spot_usd_per_hour: 8}
"""


def _fleet(*models: dict[str, Any]) -> Fleet:
    return parse_fleet({"models": [{"id": f"m{i}", "source": "a/b", **m} for i, m in enumerate(models)]})


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.yaml"
    path.write_text(PRICES)
    return path


def _plan(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["cluster", "plan", "--json", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_numbers_are_those_of_the_prices(prices: Path) -> None:
    found = _plan("--provider", "aws", "--fleet", CONFIGS / "fleet.yaml", "--prices", prices)
    assert found["region"] == "eu-central-1"
    by_model = {m["model"]: m for m in found["models"]}
    small, large, embed = by_model["qwen3-8b"], by_model["qwen3-14b"], by_model["bge-small"]
    # In the fleet's order of GPUs, spot before on demand.
    assert [(n["type"], n["usd_per_hour"]) for n in small["nodes"]] == [
        ("l4-spot", 0.25),
        ("l4-ondemand", 0.5),
        ("a10g-spot", 0.75),
        ("a10g-ondemand", 1),
    ]
    assert [n["accelerator"] for n in large["nodes"]] == ["H100", "H100", "A100", "A100"]
    assert small["usd_per_hour"] == {"dark": 0, "lit": 0.25, "most": 1, "lit_at_worst": 1}
    assert large["usd_per_hour"] == {"dark": 0, "lit": 2, "most": 4, "lit_at_worst": 16}
    # Two replicas of two CPUs each share a machine of four.
    assert (embed["replicas_per_node"], embed["max_nodes"]) == (2, 1)
    assert embed["usd_per_hour"]["most"] == 0.0625
    assert found["usd_per_hour"] == {
        "dark": 0.125,
        "lit": 0.125 + 0.25 + 2 + 0.0625,
        "most": 0.125 + 1 + 4 + 0.0625,
    }


def test_what_is_never_dark_is_in_the_dark_price() -> None:
    fleet = _fleet(
        {
            "resources": {"gpus": 1, "accelerator_types": ["A100"]},
            "scaling": {"min_replicas": 9, "max_replicas": 9},
        }
    )
    machines = load_machines("aws", {"aws": {"shapes": {"p4d.24xlarge": {"spot_usd_per_hour": 100}}}}, "f")
    result = plan(fleet, choose(fleet, "aws", machines))
    head = machines.shapes["m7i.xlarge"].usd_per_hour
    assert head is not None
    # Eight on a machine, so that nine take two.
    assert result.dark_usd_per_hour == pytest.approx(head + 200)
    # And what is never dark is lit as well, so that lit is never the cheaper of the two.
    assert result.lit_usd_per_hour == pytest.approx(head + 200)
    on_demand = machines.shapes["p4d.24xlarge"].usd_per_hour
    assert on_demand is not None
    said = result.to_json()["models"][0]["usd_per_hour"]
    assert said == {"dark": 200, "lit": 200, "most": 200, "lit_at_worst": max(200, 2 * on_demand)}


def test_totals_are_those_of_the_models_and_the_head(prices: Path, tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        "models:\n"
        "- {id: a, source: o/n, resources: {gpus: 1, accelerator_types: [L4]},"
        " scaling: {min_replicas: 3, max_replicas: 4}}\n"
        "- {id: b, source: o/n, resources: {gpus: 1, accelerator_types: [A10G]}, scaling: {max_replicas: 2}}\n"
    )
    found = _plan("--provider", "aws", "--fleet", fleet, "--prices", prices)
    each = [model["usd_per_hour"] for model in found["models"]]
    assert [(usd["dark"], usd["lit"], usd["most"]) for usd in each] == [(0.75, 0.75, 1), (0, 0.75, 1.5)]
    head = found["head"]["usd_per_hour"]
    for state, total in found["usd_per_hour"].items():
        assert total == head + sum(usd[state] for usd in each)


def test_a_price_that_nobody_gave_is_unknown_and_not_nothing() -> None:
    found = _plan("--provider", "kuberay", "--fleet", CONFIGS / "fleet.yaml")
    assert found["usd_per_hour"] == {"dark": None, "lit": None, "most": None}
    text = CliRunner().invoke(
        app, ["cluster", "plan", "--provider", "kuberay", "--fleet", str(CONFIGS / "fleet.yaml")]
    )
    assert "give --prices" in text.output


def test_a_machine_without_a_price_is_asked_for_last() -> None:
    """It may cost anything: what is known goes first, where a model says no order of its own."""
    prices = {"kuberay": {"shapes": {"l4": {"usd_per_hour": 0.98, "spot_usd_per_hour": 0.49}}}}
    machines = load_machines("kuberay", prices, "f")
    order = ["l4-spot", "l4-ondemand", "a100-spot", "a100-ondemand"]
    for resources in ({"gpus": 1}, {"gpus": 1, "accelerator_types": ["L4", "A100"]}):
        fleet = _fleet({"resources": resources})
        choice = choose(fleet, "kuberay", machines, ["L4", "A100"])
        assert [t.name for t in choice.for_model(fleet.models[0])] == order
        by_priority = sorted(choice.types, key=lambda t: -t.priority)
        assert [t.name for t in by_priority] == order


def test_the_cheapest_machine_that_fits_is_taken() -> None:
    machines = load_machines("aws")
    for cpus, gpus, machine in ((2, 1, "g6.xlarge"), (6, 1, "g6.2xlarge"), (2, 2, "g6.12xlarge")):
        fleet = _fleet({"resources": {"gpus": gpus, "cpus": cpus, "accelerator_types": ["L4"]}})
        types = choose(fleet, "aws", machines).types
        assert {t.shape.name for t in types} == {machine}
        assert {t.market for t in types} == {"spot", "on-demand"}


def test_two_sizes_of_a_gpu_have_two_names() -> None:
    fleet = _fleet(
        {"resources": {"gpus": 1, "cpus": 2, "accelerator_types": ["L4"]}},
        {"resources": {"gpus": 1, "cpus": 6, "accelerator_types": ["L4"]}},
    )
    names = [t.name for t in choose(fleet, "aws", load_machines("aws")).types]
    assert sorted(names) == ["l4-4cpu-ondemand", "l4-4cpu-spot", "l4-8cpu-ondemand", "l4-8cpu-spot"]


def test_what_comes_as_spot_alone_gets_a_larger_machine_to_fall_back_on() -> None:
    fleet = _fleet({"resources": {"gpus": 1, "accelerator_types": ["H100"]}})
    types = choose(fleet, "gcp", load_machines("gcp")).for_model(fleet.models[0])
    assert (types[0].shape.name, types[0].market) == ("a3-highgpu-1g", "spot")
    assert ("a3-highgpu-8g", "on-demand") in [(t.shape.name, t.market) for t in types]


def test_nodes_idle_as_long_as_their_models_and_as_they_take_to_come_back() -> None:
    fleet = _fleet(
        {"resources": {"gpus": 1, "accelerator_types": ["L4"]}, "scaling": {"keep_alive_s": 1800}},
        {"resources": {"gpus": 1, "accelerator_types": ["H100"]}, "scaling": {"keep_alive_s": 10}},
    )
    types = choose(fleet, "aws", load_machines("aws"), node_start_s=120).types
    assert {t.name: t.idle_timeout_s for t in types if t.market == "spot"} == {
        "l4-spot": 1800,
        "h100-spot": 120,
    }


def test_schedules_count_as_replicas() -> None:
    fleet = _fleet(
        {
            "resources": {"gpus": 1, "accelerator_types": ["L4"]},
            "scaling": {
                "max_replicas": 5,
                "schedules": [{"cron": "0 9 * * *", "duration_s": 60, "replicas": 5}],
            },
        }
    )
    assert choose(fleet, "aws", load_machines("aws")).max_workers == 5


def test_custom_resources_fit_only_where_they_are() -> None:
    fleet = _fleet({"resources": {"gpus": 1, "custom": {"licence": 1}}})
    with pytest.raises(ConfigError) as raised:
        choose(fleet, "aws", load_machines("aws"))
    assert "models[0].resources (m0): fits on no machine of aws: " in raised.value.message
    assert "g6.xlarge has 0 licence, not 1" in raised.value.message


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--provider", "aswan"],
            2,
            "--provider: 'aswan' is not one of aws, gcp, azure, kuberay, local, fake",
        ),
        (["--provider", "aws", "--gpu", "L5"], 2, "--gpu: 'L5' is no GPU of aws: it has T4, L4, A10G, L40S"),
        (["--provider", "aws", "--gpu", "T4"], 2, "models[0].resources (qwen3-8b): accelerator_types"),
        (["--provider", "aws", "--fleet", "/none.yaml"], 2, "/none.yaml: there is no such file"),
    ],
)
def test_wrong_options(arguments: list[str], code: int, message: str) -> None:
    fleet = [] if "--fleet" in arguments else ["--fleet", str(CONFIGS / "fleet.yaml")]
    result = CliRunner().invoke(app, ["cluster", "plan", *arguments, *fleet])
    assert result.exit_code == code
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("prices", "message"),
    [
        ({"azur": {}}, "f: 'azur' is not one of aws"),
        (
            {"aws": {"shapes": {"g6.xlarge": {"usd_per_hour": -1}}}},
            "f: aws.shapes.g6.xlarge.usd_per_hour: -1: ",
        ),
        *(
            ({"aws": {"shapes": {"g6.xlarge": {"usd_per_hour": usd}}}}, f"g6.xlarge.usd_per_hour: {usd!r}: ")
            for usd in (float("inf"), float("nan"), "1e400", "1", True)
        ),
        ({"aws": {"shapes": {"g6.xlarge": {"markets": ["spots"]}}}}, "f: aws.shapes.g6.xlarge.markets.0: "),
        ({"aws": {"shapes": {"new": {"cpus": 1}}}}, "f: aws.shapes.new.memory_gib: "),
        ({"aws": {"shapes": {"g6.xlarge": {"usd": 1}}}}, "f: aws.shapes.g6.xlarge.usd: 1: Extra inputs"),
        ({"aws": {"head": "none"}}, "head 'none' is not one of the shapes"),
        ({"aws": {"shapes": []}}, "f: aws: is not a mapping with `shapes:`"),
    ],
)
def test_wrong_prices(prices: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_machines("aws", prices, "f")
    assert message in raised.value.message


def test_what_a_price_file_leaves_out_is_said_to_be_of_the_catalogues_region() -> None:
    """Another region's name over a list of this one's prices would be a wrong price for each of them."""
    catalogue = load_machines("aws")
    some = {"aws": {"region": "eu-central-1", "shapes": {"g6.xlarge": {"usd_per_hour": 1.006}}}}
    found = load_machines("aws", some, "mine.yaml")
    assert found.region == "eu-central-1"
    assert found.source == f"mine.yaml, and for what it leaves out {catalogue.source} in us-east-1"
    assert load_machines("aws", {"gcp": {}}, "mine.yaml") == catalogue
    assert (
        load_machines("aws", {"aws": {**some["aws"], "source": "our contract"}}, "f").source == "our contract"
    )


def test_render_does_not_write_over_what_one_has_changed(tmp_path: Path) -> None:
    arguments = ["cluster", "render", "--provider", "aws", "--fleet", str(CONFIGS / "fleet.yaml")]
    assert CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)]).exit_code == 0
    assert CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)]).exit_code == 0
    (tmp_path / "aws.yaml").write_text("mine")
    refused = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert refused.exit_code == 1 and "--force" in refused.output
    assert (tmp_path / "aws.yaml").read_text() == "mine"
    assert CliRunner().invoke(app, [*arguments, "--out", str(tmp_path), "--force"]).exit_code == 0
    assert (tmp_path / "aws.yaml").read_text() != "mine"


def _render(provider: str, *option: str) -> Any:
    arguments = ["cluster", "render", "--provider", provider, "--fleet", str(CONFIGS / "fleet.yaml")]
    return CliRunner().invoke(app, [*arguments, *option])


@pytest.mark.parametrize(
    ("provider", "option", "value"),
    [
        ("aws", "--name", "Big_1"),
        ("aws", "--image", "ghcr.io/me/relight:cuda"),
        ("aws", "--image", "ghcr.io/me/relight@sha256:00"),
        ("kuberay", "--image", ""),
        ("kuberay", "--image", "ghcr.io/me/'relight'"),
        ("aws", "--region", "us east 1"),
        ("azure", "--region", ""),
        ("aws", "--security-group", 'sg-0123"'),
        ("gcp", "--project", "my project"),
        ("kuberay", "--redis", "redis"),
        ("kuberay", "--redis", "a b:6379"),
        ("kuberay", "--redis", "redis:0"),
        ("fake", "--gcs", "1:2:x"),
        ("fake", "--gcs", "127.0.0.1:²"),
    ],
)
def test_wrong_names(provider: str, option: str, value: str) -> None:
    result = _render(provider, option, value)
    assert result.exit_code == 2 and result.output.startswith(f"{option}: {value!r} is not ")


@pytest.mark.parametrize(
    ("provider", "option", "value"),
    [
        ("kuberay", "--region", "us-east-1"),
        ("azure", "--security-group", "sg-0123456789abcdef0"),
        ("aws", "--project", "my-project"),
        ("aws", "--redis", "other:6379"),
        ("kuberay", "--gcs", "10.0.0.1:6379"),
        ("local", "--image", "ghcr.io/me/relight"),
        ("local", "--node-start", "60"),
    ],
)
def test_an_option_that_does_nothing_for_the_provider_is_refused(
    provider: str, option: str, value: str
) -> None:
    result = _render(provider, option, value)
    assert result.exit_code == 2
    assert result.output.startswith(f"{option}: the files of {provider} hold no such thing; it is for ")


@pytest.mark.parametrize(
    ("provider", "option", "value"),
    [
        ("aws", "--image", "localhost:5000/me/re-light_2"),
        ("aws", "--image", "123456789012.dkr.ecr.us-east-1.amazonaws.com/relight"),
        ("aws", "--region", "eu-central-1"),
        ("aws", "--security-group", "sg-0123456789abcdef0"),
        ("gcp", "--project", "example.com:my-project"),
        ("kuberay", "--redis", "redis.relight.svc.cluster.local:6379"),
        ("fake", "--gcs", "[::1]:6379"),
    ],
)
def test_what_is_said_stands_in_the_files(provider: str, option: str, value: str) -> None:
    result = _render(provider, option, value)
    assert result.exit_code == 0, result.output
    assert value in "".join(line for line in result.stdout.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("seconds", ["1e300", "86401", "0"])
def test_a_node_takes_a_day_at_most(seconds: str) -> None:
    assert _render("aws", "--node-start", seconds).exit_code == 2


def test_shapes_are_those_that_ec2_describes() -> None:
    """moto ships what DescribeInstanceTypes answered to somebody else."""
    packed = files("moto").joinpath("ec2/resources/instance_types.json.gz").read_bytes()
    described = json.loads(gzip.decompress(packed))
    for name, shape in load_machines("aws").shapes.items():
        real = described[name]
        assert shape.cpus == real["VCpuInfo"]["DefaultVCpus"], name
        assert shape.memory_gib == real["MemoryInfo"]["SizeInMiB"] / 1024, name
        gpus = real.get("GpuInfo", {}).get("Gpus", [])
        assert shape.gpus == sum(g["Count"] for g in gpus), name
        assert [shape.accelerator] == [g["Name"] for g in gpus] if gpus else shape.accelerator is None, name
        assert shape.nvme_gb == real.get("InstanceStorageInfo", {}).get("TotalSizeInGB", 0), name
        assert set(shape.markets) <= set(real["SupportedUsageClasses"]), name


def test_a_node_holds_what_divides() -> None:
    model = _fleet({"resources": {"gpus": 2, "cpus": 3}}).models[0]
    assert per_node(model, {"CPU": 16, "GPU": 8}) == 4
    assert per_node(model, {"CPU": 9, "GPU": 8}) == 3
