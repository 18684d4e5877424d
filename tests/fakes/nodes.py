"""A provider of pretended nodes that has some types only in its list. Runs in the autoscaler's process."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE


class ScarceProvider(FakeMultiNodeProvider):  # type: ignore[misc] # Ray has no types
    """Types named in the provider's option `scarce` are taken orders for, and never come."""

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        if tags[TAG_RAY_USER_NODE_TYPE] not in self.provider_config.get("scarce", ()):
            super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
