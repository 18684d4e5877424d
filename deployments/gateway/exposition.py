"""One Prometheus page out of many: the gateway's own metrics, and those of every engine it can reach."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import cast

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

log = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class _Page:
    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}

    def add(self, text: str, labels: dict[str, str]) -> None:
        """Add a page, with `labels` on each sample. Raises `ValueError` when it isn't valid text."""
        for family in list(text_string_to_metric_families(text)):  # whole, so that a broken page adds nothing
            merged = self._families.get(family.name)
            if merged is None:
                merged = self._families[family.name] = Metric(family.name, family.documentation, family.type)
            for sample in family.samples:
                # The labels put on here win: an engine can't pass for another.
                merged.samples.append(Sample(sample.name, {**sample.labels, **labels}, *sample[2:]))

    def collect(self) -> Iterable[Metric]:
        return self._families.values()


def merge(own: bytes | None, engines: Sequence[tuple[str, str]]) -> bytes:
    """One page of valid text: each family once, engines' samples labelled with `model` and `replica`.

    `engines` holds (model id, text). `replica` counts the engines of one model from 0 in the given order:
    without it two engines' series would be the same. A page that can't be parsed is left out and logged.
    """
    page = _Page()
    seen: Counter[str] = Counter()
    pages = [] if own is None else [(own.decode("utf-8", "replace"), dict[str, str]())]
    for model, text in engines:
        pages.append((text, {"model": model, "replica": str(seen[model])}))
        seen[model] += 1
    for text, labels in pages:
        try:
            page.add(text, labels)
        except (
            ValueError,
            KeyError,
            IndexError,
        ) as error:  # the parser indexes into lines it expects to be whole
            log.warning("Metrics left out (%s): %s", labels or "the gateway's own", error)
    return generate_latest(cast(CollectorRegistry, page))
