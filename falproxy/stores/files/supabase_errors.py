"""Errors of Supabase Storage: their causes, and messages with instructions for the user."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import httpx
from storage3.exceptions import StorageApiError

from falproxy.json_object import parse_object
from falproxy.parse_digits import parse_digits
from falproxy.stores.files import RejectedFileError, StorageError

T = TypeVar("T")

MAPPED_ERRORS = (StorageApiError, httpx.HTTPError, OSError, ValueError)
RETRYABLE_ERRORS = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
EXISTS_CODES = ("Duplicate", "KeyAlreadyExists", "ResourceAlreadyExists", "BucketAlreadyExists")

WRONG_KEY = "Supabase does not accept the key: take a secret key from the project's API settings."
NO_PERMISSION = "The Supabase key has no right to do this: use a secret key, not a publishable one."
BUCKET_IS_PRIVATE = "The bucket is private: make it public, or use signed URLs."
NO_RIGHT_TO_DELETE = "The Supabase key has no right to delete: use a secret key."
CANNOT_CREATE_BUCKET = "The bucket is missing and cannot be created: create it by hand."

# Status in the response's body (None for any), a part of its message, and our message.
API_ERRORS: tuple[tuple[int | None, str, str], ...] = (
    (None, "row-level security", NO_PERMISSION),
    (400, "'authorization'", WRONG_KEY),
    (401, "", WRONG_KEY),
    (402, "", "The Supabase project is over its quota: see its usage page."),
    (403, "", WRONG_KEY),
    (404, "Bucket not found", "The bucket is not there, although it was just created."),
    (413, "", "The file is too large for Supabase: raise the limit of the bucket or the project."),
    (415, "", "The bucket does not allow files of this type: add it to the allowed MIME types."),
)
TRANSPORT_ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (httpx.TimeoutException, "Supabase Storage did not respond in time."),
    (TimeoutError, "Supabase Storage did not respond in time."),
    (
        httpx.ConnectError,
        "Supabase Storage cannot be reached: see whether the project's URL is right.",
    ),
    (httpx.NetworkError, "Supabase Storage closed the connection."),
    (httpx.RemoteProtocolError, "Supabase Storage closed the connection."),
    (OSError, "The file to be stored cannot be read."),
    (Exception, "The server is not Supabase Storage: see whether the project's URL is right."),
)


def is_created(response: httpx.Response) -> bool:
    """Return whether the storage service itself confirms the object, not a page of a gateway."""
    if response.status_code != httpx.codes.OK:
        return False
    document = parse_object(response.content)
    return document is not None and "Key" in document


def read_error(response: httpx.Response) -> StorageApiError:
    """Return the error of a response in the form that storage3 raises. The status is the one in the
    body, since the HTTP status is 400 for most errors; a gateway's body has none."""
    document = parse_object(response.content) or {}
    code = str(document.get("error") or document.get("code") or "InternalError")
    status = document.get("statusCode", response.status_code)
    return StorageApiError(str(document.get("message", "")), code, str(status))


def status_of(error: StorageApiError) -> int:
    return parse_digits(str(error.status)) or 0


def already_exists(error: StorageApiError) -> bool:
    """Return whether the object or bucket exists already. A bare 409 of a gateway does not imply
    it."""
    return error.code in EXISTS_CODES


def is_bucket_missing(error: StorageApiError) -> bool:
    return "Bucket not found" in (error.code, error.message)


def is_object_missing(error: StorageApiError) -> bool:
    return error.code in ("not_found", "NoSuchKey") and not is_bucket_missing(error)


def is_retryable(error: BaseException) -> bool:
    if isinstance(error, StorageApiError):
        return status_of(error) == 429 or status_of(error) >= 500
    return isinstance(error, RETRYABLE_ERRORS)


async def map_errors(seconds: float, work: Awaitable[T]) -> T:
    """Return the result of `work`.

    seconds: time-out.
    Raises: StorageError. It is raised without its cause, because an exception of the HTTP client
        refers to the request, which has the key, and may quote the response.
    """
    try:
        async with asyncio.timeout(seconds):
            return await work
    except MAPPED_ERRORS as error:
        message, is_rejected = error_message(error), is_file_rejected(error)
    raise RejectedFileError(message) if is_rejected else StorageError(message)


def is_file_rejected(error: Exception) -> bool:
    """Return whether the bucket rejects this file because of its size or type."""
    return isinstance(error, StorageApiError) and status_of(error) in (413, 415)


def error_message(error: Exception) -> str:
    """Return a sentence for users. It quotes nothing from the response."""
    if not isinstance(error, StorageApiError):
        return next(text for kind, text in TRANSPORT_ERRORS if isinstance(error, kind))
    status = status_of(error)
    for expected, message_part, text in API_ERRORS:
        if expected in (None, status) and message_part in error.message:
            return text
    if is_retryable(error):
        return f"Supabase Storage cannot be used now (status {status})."
    return f"Supabase Storage refused (status {status}): see whether the project's URL is right."
