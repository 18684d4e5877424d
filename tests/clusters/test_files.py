"""The files in cluster-configs/: right, and what `relight cluster render` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoscaling.cli import app
from autoscaling.clusters.catalog import PROVIDERS, Provider, load_machines
from autoscaling.clusters.check_documents import PRETENDED_HEAD
from autoscaling.clusters.nodes import choose
from autoscaling.clusters.render import Wanted, render
from autoscaling.clusters.validate import validate_text
from deployments.fleet import Fleet, load_fleet
from tests.clusters.conftest import CONFIGS, ROOT, problems_of

FILES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))
RENDERED = {
    "aws": ["aws.yaml", "serve/serve.yaml"],
    "gcp": ["gcp.yaml"],
    "azure": ["azure.yaml"],
    "local": ["local.yaml"],
    "fake": ["fake-gpu.yaml"],
    "kuberay": ["kuberay/rayservice.yaml", "kuberay/raycluster.yaml"],
}


def test_all_files_that_the_issue_asks_for_are_there() -> None:
    wanted = {name for names in RENDERED.values() for name in names}
    assert wanted <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_right(name: str, fleet: Fleet) -> None:
    assert [p.line(name) for p in problems_of((CONFIGS / name).read_text(), fleet=fleet) if not p.note] == []


@pytest.mark.parametrize("provider", RENDERED)
def test_files_are_what_render_writes(provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["--provider", provider, "--fleet", "cluster-configs/fleet.yaml", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["cluster", "render", *arguments])
    assert result.exit_code == 0, result.output
    for name in RENDERED[provider]:
        assert (tmp_path / name).read_text() == (CONFIGS / name).read_text(), f"render {name} again"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("source", ["fleet.yaml", "cluster-configs/fleet.yaml"])
def test_what_is_rendered_is_right_for_its_fleet(provider: Provider, source: str) -> None:
    content = load_fleet(ROOT / source)
    choice = choose(content, provider, load_machines(provider))
    files = render(content, choice, Wanted("relight cluster render"))
    beside = {f"./{name}": text for name, text in files.items()}
    for name, text in files.items():
        # The default fleet's models answer within ten minutes, a node of its own included.
        _, problems = validate_text(text, name, fleet=content, beside=beside)
        assert [p.line(name) for p in problems if not p.note] == []


def test_gpu_bounds_and_adds_types(fleet: Fleet) -> None:
    machines = load_machines("aws")
    choice = choose(fleet, "aws", machines, ["L4", "A100", "T4"])
    kinds = {t.shape.accelerator for t in choice.types}
    assert kinds == {None, "L4", "A100", "T4"}


def test_every_type_begins_at_zero_and_spot_goes_before_its_twin(fleet: Fleet) -> None:
    import yaml

    types = yaml.safe_load((CONFIGS / "aws.yaml").read_text())["available_node_types"]
    workers = {name: t for name, t in types.items() if name != "head"}
    assert {t["min_workers"] for t in workers.values()} == {0}
    assert {t["labels"].get("ray.io/accelerator-type") for t in workers.values()} == {
        None,
        "L4",
        "A10G",
        "A100",
        "H100",
    }
    for name, spot in workers.items():
        if name.endswith("-spot"):
            assert spot["priority"] == workers[name.replace("-spot", "-ondemand")]["priority"] + 1
    assert types["head"]["resources"] == {"CPU": 0}


def test_the_pretended_head_is_of_the_type_that_rays_provider_says() -> None:
    """By another the autoscaler fails at every look."""
    import yaml
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_TYPE

    text = (CONFIGS / "fake-gpu.yaml").read_text()
    document = yaml.safe_load(text)
    assert document["head_node_type"] == FAKE_HEAD_NODE_TYPE == PRETENDED_HEAD
    assert FAKE_HEAD_NODE_TYPE in document["available_node_types"]
    assert f"export RAY_NODE_TYPE_NAME={FAKE_HEAD_NODE_TYPE}\n" in text


def test_clients_on_kubernetes_reach_the_gateways_door() -> None:
    """KubeRay keeps those ports of a service that the head's container has by the same name, one of Serve's."""
    import yaml

    document = yaml.safe_load((CONFIGS / "kuberay/rayservice.yaml").read_text())
    serve = yaml.safe_load(document["spec"]["serveConfigV2"])
    door = int(serve["applications"][0]["args"]["listen"].rpartition(":")[2])
    (head,) = document["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    ports = {p["name"]: p["containerPort"] for p in head["ports"]}
    (port,) = document["spec"]["serveService"]["spec"]["ports"]
    assert port["name"].startswith("serve-") and ports[port["name"]] == port["targetPort"] == door
    assert (
        f"svc/{document['spec']['serveService']['metadata']['name']} 8080:{port['port']}\n"
        in (ROOT / "docs/kubernetes.md").read_text()
    )


def test_a_pretended_cluster_is_started_from_the_files_beside_it(fleet: Fleet) -> None:
    """Rendered from one's own fleet, its commands must not start the example's."""
    files = render(fleet, choose(fleet, "fake", load_machines("fake")), Wanted("relight cluster render"))
    said = [line for line in files["fake-gpu.yaml"].splitlines() if line.startswith("#   ")]
    assert sum(line.endswith("--autoscaling-config=fake-gpu.yaml") for line in said) == 1
    assert "#   serve deploy serve/serve.yaml" in said and "serve/serve.yaml" in files
    assert not any("cluster-configs/" in line for line in said)
