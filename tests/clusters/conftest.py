"""Cluster files and their broken variants."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoscaling.clusters.problems import Problem
from autoscaling.clusters.validate import local_files, validate_text
from deployments.fleet import Fleet, load_fleet

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "cluster-configs"


@pytest.fixture(scope="session")
def fleet() -> Fleet:
    return load_fleet(CONFIGS / "fleet.yaml")


@cache
def _load(text: str) -> Any:
    return yaml.safe_load(text)


def parsed(name: str) -> dict[str, Any]:
    return copy.deepcopy(dict(_load((CONFIGS / name).read_text())))


def problems_of(document: dict[str, Any] | str, **options: Any) -> list[Problem]:
    """Errors and notes of a document as if it were in cluster-configs/."""
    text = document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
    beside = {p: (CONFIGS / p).read_text() for p in local_files(text, "f") if (CONFIGS / p).is_file()}
    return validate_text(text, "f", beside=beside, **options)[1]


def errors_of(document: dict[str, Any] | str, **options: Any) -> list[str]:
    return [p.line("f") for p in problems_of(document, **options) if not p.note]
