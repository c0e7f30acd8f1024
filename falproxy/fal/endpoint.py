"""Endpoint ids of fal, such as `fal-ai/flux/dev`."""

import re

ENDPOINT = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*){1,8}", re.ASCII)
ENDPOINT_MAX = 200  # characters
# Path segments with a meaning in fal's URLs, which no endpoint id contains.
RESERVED_SEGMENTS = ("requests", "stream", "realtime")
NamedEndpoint = tuple[str, str]  # a model's name and endpoint id
# The Kontext family, whose results are cached by default.
KONTEXT_ENDPOINTS = (
    "fal-ai/flux-pro/kontext",
    "fal-ai/flux-pro/kontext/**",
    "fal-ai/flux-kontext/**",
    "fal-ai/flux-kontext-lora",
    "fal-ai/flux-kontext-lora/**",
)
# The default of SUPPORTED_MODELS. A request without a model gets the first suitable one.
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
    """Return whether a text has the form of an endpoint id, without reserved segments."""
    is_id = len(text) <= ENDPOINT_MAX and ENDPOINT.fullmatch(text) is not None
    return is_id and not set(RESERVED_SEGMENTS) & set(text.lower().split("/"))
