"""What Supabase answers and what becomes of a request, and what a person can do about it."""

import asyncio
import json
from collections.abc import Awaitable
from typing import TypeVar

import httpx
from storage3.exceptions import StorageApiError

from falproxy.stores.files import RejectedFileError, StorageError

T = TypeVar("T")

MAPPED_ERRORS = (StorageApiError, httpx.HTTPError, OSError, ValueError)
RETRYABLE_ERRORS = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
EXISTS_CODES = ("Duplicate", "KeyAlreadyExists", "ResourceAlreadyExists", "BucketAlreadyExists")

WRONG_KEY = "Supabase does not accept the key: take a secret key from the project's API settings."
NO_PERMISSION = "The Supabase key has no right to do this: use a secret key, not a publishable one."
BUCKET_IS_PRIVATE = "The bucket is private: make it public, or have URLs signed."
CANNOT_CREATE_BUCKET = "The bucket is missing and cannot be made: make it by hand."

# The status that an answer's body tells, a part of its message, and what a person can do.
API_ERRORS: tuple[tuple[int | None, str, str], ...] = (
    (None, "row-level security", NO_PERMISSION),
    (400, "'authorization'", WRONG_KEY),
    (401, "", WRONG_KEY),
    (402, "", "The Supabase project is over its quota: see its usage page."),
    (403, "", WRONG_KEY),
    (404, "Bucket not found", "The bucket is not there, though it was just made."),
    (413, "", "The file is too large for Supabase: raise the limit of the bucket or the project."),
    (415, "", "The bucket does not allow files of this type: add it to the allowed MIME types."),
)
TRANSPORT_ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (httpx.TimeoutException, "Supabase Storage did not answer in time."),
    (TimeoutError, "Supabase Storage did not answer in time."),
    (
        httpx.ConnectError,
        "Supabase Storage cannot be reached: see whether the project's URL is right.",
    ),
    (httpx.NetworkError, "Supabase Storage broke off the connection."),
    (httpx.RemoteProtocolError, "Supabase Storage broke off the connection."),
    (OSError, "The file to be kept cannot be read."),
    (Exception, "What answers is not Supabase Storage: see whether the project's URL is right."),
)


def is_created(response: httpx.Response) -> bool:
    """Whether the storage itself says that it has the object, not a page in its place."""
    try:
        return response.status_code == httpx.codes.OK and "Key" in response.json()
    except (ValueError, TypeError):
        return False


def read_error(response: httpx.Response) -> StorageApiError:
    """In storage3's form. The status is the body's, which differs from the answer's; only what
    stands in front of the storage answers without one."""
    try:
        told = json.loads(response.content)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        told = {}
    error = str(told.get("error") or told.get("code") or "InternalError")
    status = told.get("statusCode", response.status_code)
    return StorageApiError(str(told.get("message", "")), error, str(status))


def status_of(error: StorageApiError) -> int:
    status = str(error.status)
    return int(status) if status.isdecimal() else 0


def already_exists(error: StorageApiError) -> bool:
    """Whether what was to be made exists. A gateway's bare 409 does not say so."""
    return error.code in EXISTS_CODES


def is_bucket_missing(error: StorageApiError) -> bool:
    return "Bucket not found" in (error.code, error.message)


def is_retryable(error: BaseException) -> bool:
    """Whether another attempt may end differently."""
    if isinstance(error, StorageApiError):
        return status_of(error) == 429 or status_of(error) >= 500
    return isinstance(error, RETRYABLE_ERRORS)


async def map_errors(seconds: float, work: Awaitable[T]) -> T:
    """What it comes to. Raises: StorageError for whatever the clients raise, and without it: it
    refers to requests, which have the key, and may say what the other side wrote."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except MAPPED_ERRORS as error:
        sentence, is_unfit = error_message(error), is_file_rejected(error)
    raise RejectedFileError(sentence) if is_unfit else StorageError(sentence)


def is_file_rejected(error: Exception) -> bool:
    """Whether it is this file that the bucket does not take: too large, or of a type that it does
    not allow."""
    return isinstance(error, StorageApiError) and status_of(error) in (413, 415)


def error_message(error: Exception) -> str:
    """A sentence, of which nothing was written by the other side."""
    if not isinstance(error, StorageApiError):
        return next(text for kind, text in TRANSPORT_ERRORS if isinstance(error, kind))
    status = status_of(error)
    for refused, part, text in API_ERRORS:
        if refused in (None, status) and part in error.message:
            return text
    if is_retryable(error):
        return f"Supabase Storage cannot be used now (status {status})."
    return f"Supabase Storage refused (status {status}): see whether the project's URL is right."
