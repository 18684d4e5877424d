"""From the text of a file to its documents, and which kind each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import yaml

from deployments.config_text import UniqueKeys, yaml_errors
from deployments.errors import ConfigError

# libyaml's parser, where PyYAML was built with it: the files of Kubernetes are long.
if TYPE_CHECKING:
    _Fast = yaml.SafeLoader
else:
    _Fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Kind = Literal["ray", "rayservice", "raycluster", "serve", "fleet", "cloudformation"]


class _Loader(UniqueKeys, _Fast):
    """As Ray reads (YAML 1.1), but a key that stands twice in a mapping is an error."""


def documents(text: str, where: str) -> list[Any]:
    """The documents of a YAML file that are not empty. Raises ConfigError."""
    with yaml_errors(where):
        found = [document for document in yaml.load_all(text, Loader=_Loader) if document is not None]
    if not found:
        raise ConfigError(f"{where}: is empty")
    return found


def kind_of(document: Any) -> Kind | None:
    """None for what nobody here reads."""
    if not isinstance(document, Mapping):
        return None
    if str(document.get("apiVersion", "")).startswith("ray.io/"):
        kind = str(document.get("kind", "")).lower()
        return kind if kind in ("rayservice", "raycluster") else None  # type: ignore[return-value]
    if "AWSTemplateFormatVersion" in document:
        return "cloudformation"
    if "models" in document:
        return "fleet"
    if "applications" in document:
        return "serve"
    return "ray" if "provider" in document or "available_node_types" in document else None
