"""The few counters of vLLM's metrics page that capacity is learned from. Pure."""

from __future__ import annotations

import re
from typing import Any

_NAMES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:e2e_request_latency_seconds_sum": "latency_sum_s",
    "vllm:e2e_request_latency_seconds_count": "requests",
    "vllm:inter_token_latency_seconds_sum": "inter_token_sum_s",
    "vllm:inter_token_latency_seconds_count": "inter_tokens",
}
_LINE = re.compile(
    "^(" + "|".join(re.escape(name) for name in _NAMES) + r")(?:\{[^}\n]*\})? ([0-9.eE+-]+)$", re.M
)


def engine_counters(page: str) -> dict[str, Any]:
    """{running, waiting, prompt_tokens, generation_tokens, latency_sum_s, requests, inter_token_sum_s, inter_tokens}.

    Series of the same name (one for each engine core) are added up; a name that the page lacks is absent.
    """
    found: dict[str, Any] = {}
    for name, value in _LINE.findall(page):
        key = _NAMES[name]
        found[key] = found.get(key, 0.0) + float(value)
    return found
