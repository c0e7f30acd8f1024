"""OpenAI's client of a proxy."""

import ssl
from functools import cache

import openai


@cache
def tls_context() -> ssl.SSLContext:
    """Return one context for all clients: reading the certificates takes half of the time of a
    short test."""
    return ssl.create_default_context()


def create_openai_client(
    origin: str, key: str = "unused", max_retries: int = openai.DEFAULT_MAX_RETRIES
) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{origin}/v1",
        api_key=key,
        max_retries=max_retries,
        http_client=openai.DefaultAsyncHttpxClient(verify=tls_context()),
    )
