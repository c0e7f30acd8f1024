"""Endpoint ids of fal, such as `fal-ai/flux/dev`."""

import re

ENDPOINT = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*){1,8}", re.ASCII)
ENDPOINT_MAX = 200  # characters
# Path segments of fal's own URLs, which no endpoint id contains.
RESERVED_SEGMENTS = ("requests", "stream", "realtime")
NamedEndpoint = tuple[str, str]  # a model's name and endpoint
# The Kontext family: calls that users repeat, with results worth keeping.
KONTEXT_ENDPOINTS = (
    "fal-ai/flux-pro/kontext",
    "fal-ai/flux-pro/kontext/**",
    "fal-ai/flux-kontext/**",
    "fal-ai/flux-kontext-lora",
    "fal-ai/flux-kontext-lora/**",
)
# Unless SUPPORTED_MODELS says otherwise. The first that fits is taken where a client names none.
DEFAULT_MODELS: tuple[NamedEndpoint, ...] = (
    ("flux-dev", "fal-ai/flux/dev"),
    ("flux-schnell", "fal-ai/flux/schnell"),
    ("flux-pro", "fal-ai/flux-pro/v1.1"),
    ("flux-pro-ultra", "fal-ai/flux-pro/v1.1-ultra"),
    ("kontext", "fal-ai/flux-pro/kontext"),
    ("kontext-max", "fal-ai/flux-pro/kontext/max"),
    ("kontext-multi", "fal-ai/flux-pro/kontext/multi"),
    ("kontext-dev", "fal-ai/flux-kontext/dev"),
    ("nano-banana", "fal-ai/nano-banana"),
    ("nano-banana-edit", "fal-ai/nano-banana/edit"),
    ("fast-sdxl", "fal-ai/fast-sdxl"),
)


def is_endpoint(text: str) -> bool:
    """Whether it could be an endpoint id of fal's, and is nothing else in a URL."""
    is_id = len(text) <= ENDPOINT_MAX and ENDPOINT.fullmatch(text) is not None
    return is_id and not set(RESERVED_SEGMENTS) & set(text.lower().split("/"))
