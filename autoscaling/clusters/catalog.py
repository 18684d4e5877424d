"""The machines that Relight knows: shapes, prices, and where those come from (`data/catalog.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deployments.errors import ConfigError

Provider = Literal["aws", "gcp", "azure", "kuberay", "local", "fake"]
PROVIDERS: tuple[Provider, ...] = ("aws", "gcp", "azure", "kuberay", "local", "fake")
Market = Literal["on-demand", "spot"]


class _Entry(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Shape(_Entry):
    """A type of machine (on Kubernetes: of pod)."""

    name: str
    cpus: Annotated[int, Field(ge=1)]
    memory_gib: Annotated[float, Field(gt=0)]
    gpus: Annotated[int, Field(ge=0)] = 0
    accelerator: str | None = None
    """Ray's name of the GPU's type."""
    gpu_memory_gib: float | None = None
    """Of one GPU."""
    nvme_gb: float = 0
    """Local disks in all; 0 where there are none."""
    usd_per_hour: Annotated[float, Field(ge=0)] | None = None
    """On demand, in the catalogue's region; None where nobody said."""
    spot_usd_per_hour: Annotated[float, Field(ge=0)] | None = None
    markets: Annotated[tuple[Market, ...], Field(strict=False)] = ("on-demand", "spot")
    """How it can be had."""

    @model_validator(mode="after")
    def _gpus_have_a_type(self) -> Self:
        if bool(self.gpus) != bool(self.accelerator):
            raise ValueError("gpus and accelerator go together")
        return self


class Machines(_Entry):
    """What one provider has."""

    region: str
    """Where the prices are from."""
    shapes: dict[str, Shape]
    head: str | None = None
    """The shape that carries gateway and controller."""
    spot_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """What spot is assumed to cost where no price is given, as a share of on demand."""
    source: str | None = None
    checked: str | None = None

    @model_validator(mode="after")
    def _head_is_known(self) -> Self:
        if self.head is not None and self.head not in self.shapes:
            raise ValueError(f"head {self.head!r} is not one of the shapes")
        return self

    def usd_per_hour(self, shape: Shape, market: Market) -> float | None:
        """None where nobody said."""
        if market == "on-demand":
            return shape.usd_per_hour
        if shape.spot_usd_per_hour is not None or shape.usd_per_hour is None or self.spot_share is None:
            return shape.spot_usd_per_hour if shape.usd_per_hour != 0 else 0.0
        return shape.usd_per_hour * self.spot_share

    @property
    def accelerators(self) -> tuple[str, ...]:
        """All types of GPU, in the catalogue's order."""
        return tuple(dict.fromkeys(s.accelerator for s in self.shapes.values() if s.accelerator))


def load_machines(provider: Provider, prices: Mapping[str, Any] | None = None, where: str = "") -> Machines:
    """The catalogue of a provider; `prices` (the parsed --prices file, from `where`) is laid over it.

    Raises ConfigError for what is wrong in `prices`.
    """
    text = files("autoscaling.clusters").joinpath("data/catalog.yaml").read_text(encoding="utf-8")
    base: dict[str, Any] = yaml.safe_load(text)[provider]
    over = {} if prices is None else prices.get(provider, {})
    if prices is not None and (wrong := sorted(set(prices) - set(PROVIDERS))):
        raise ConfigError(f"{where}: {wrong[0]!r} is not one of {', '.join(PROVIDERS)}")
    if not isinstance(over, Mapping) or not isinstance(over.get("shapes", {}), Mapping):
        raise ConfigError(f"{where}: {provider}: is not a mapping with `shapes:`")
    shapes = {name: dict(shape) for name, shape in base["shapes"].items()}
    for name, shape in over.get("shapes", {}).items():
        if not isinstance(shape, Mapping):
            raise ConfigError(f"{where}: {provider}.shapes.{name}: {shape!r} is not a mapping")
        shapes.setdefault(str(name), {}).update(shape)
    if over and base.get("source"):
        # What the file leaves out costs what it cost, and in the region that it was looked up in.
        rest = f"{base['source']} in {base['region']}"
        base = {**base, "source": f"{where}, and for what it leaves out {rest}"}
    merged = {**base, **over, "shapes": {name: {**shape, "name": name} for name, shape in shapes.items()}}
    try:
        return Machines.model_validate(merged)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            place = ".".join([provider, *map(str, problem["loc"])])
            lines.append(f"{where}: {place}: {problem['input']!r}: {problem['msg']}")
        raise ConfigError("\n".join(lines)) from None
