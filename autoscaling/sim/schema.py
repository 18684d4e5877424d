"""JSON schemas of what the simulator writes: a report, and a comparison of several."""

from __future__ import annotations

from typing import Any

from autoscaling.sim.report import VERSION, Figures

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def report_schema() -> dict[str, Any]:
    """Of `Report.to_plain`, which has exactly these fields: what `relight simulate --json` writes."""
    return {"$schema": DRAFT, "title": "What a policy would have cost on a trace", **_report({})}


def comparison_schema() -> dict[str, Any]:
    """A list of reports, each with its label: what `relight compare --json` writes."""
    label = _field("string", "The policy, and what was set for it.")
    return {
        "$schema": DRAFT,
        "title": "What several policies would have cost on one trace",
        "type": "array",
        "items": _report({"label": label}),
    }


def _report(more: dict[str, Any]) -> dict[str, Any]:
    figures = _figures()
    counts = {"type": "object", "additionalProperties": {"type": "integer"}}
    model = {
        "model": _field("string", "Its name in the trace, or its id in the fleet."),
        **figures,
        "starts_by_rung": {**counts, "description": "Starts by the rung that they began from."},
        "price_per_gpu_h": _field("number", "What a GPU of its type costs an hour."),
    }
    return _object(
        {
            **more,
            "version": {"const": VERSION, "description": "Of this schema."},
            "policy": _field("string", "Its name; mixed where models have several."),
            "params": {
                "type": "object",
                "additionalProperties": {"type": "number"},
                "description": "The policy's own parameters, where they are the same for all models.",
            },
            "trace": _field("string", "The file, or the store."),
            "seed": _field("integer", "Draws arrivals within windows, and starts."),
            "wait_cost": _field(
                ["number", "null"], "GPU-seconds for a second of waiting; null where models differ."
            ),
            "keep_alive_s": _field(["number", "null"], "The specs' own; null where models differ."),
            "park": _field(
                ["boolean", "null"], "Whether dark models' engines may be parked; null where models differ."
            ),
            "measured_from_s": _field(
                "number", "Unix seconds: what came before was learned from and is not counted."
            ),
            "until_s": _field("number", "Unix seconds: the end of the replay."),
            "scale": _field("number", "Share of the trace's requests that came."),
            "slo_s": _field("number", "A request that waits longer has missed the SLO."),
            "price_per_gpu_h": _field(
                "number", "What a GPU costs an hour, for models that name no type of their own."
            ),
            "took_s": _field("number", "Real seconds of the replay."),
            "fits": _field("integer", "How often a forecaster was fitted."),
            "skipped_rows": _field("integer", "Bad rows of the trace that were passed over."),
            "notes": {
                "type": "array",
                "items": {"type": "string"},
                "description": "What the reader should know: models that failed or were left out.",
            },
            "total": {**_object(figures), "description": "Over all models."},
            "models": {
                "type": "array",
                "items": _object(model),
                "description": "The same of each model.",
            },
        }
    )


def _figures() -> dict[str, Any]:
    from pydantic import ConfigDict, TypeAdapter, with_config

    documented = with_config(ConfigDict(use_attribute_docstrings=True))(Figures)
    found = TypeAdapter(documented).json_schema()["properties"]
    return {name: _field(each["type"], each["description"]) for name, each in found.items()}


def _field(kind: str | list[str], text: str) -> dict[str, Any]:
    return {"type": kind, "description": text}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


__all__ = ["comparison_schema", "report_schema"]
