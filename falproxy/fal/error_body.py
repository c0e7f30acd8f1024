"""The errors that the bodies of fal's responses describe (fal-api.md, 4)."""

from dataclasses import dataclass

from falproxy.json_object import parse_object


@dataclass(frozen=True, slots=True)
class ModelError:
    """The first entry of a list in `detail`: an error that the model itself reports, mostly 422.

    type: such as `image_load_error`; empty if missing.
    message: one sentence for a person; empty if missing.
    location: keys that lead to the rejected input, such as `("body", "image_urls")`; indexes of
        lists are left out.
    """

    type: str
    message: str
    location: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FalErrorBody:
    """The error in the body of a response.

    error_type: type of an error of fal's infrastructure, such as `bad_request`; empty if missing.
    message: `detail`, if it is a string; otherwise empty.
    model_error: None if `detail` is not a list that begins with an object.
    """

    error_type: str = ""
    message: str = ""
    model_error: ModelError | None = None


def parse_error_body(body: bytes) -> FalErrorBody:
    """Parse the body of a failed response. Parts that are missing, or have another type than fal
    documents, are empty."""
    document = parse_object(body) or {}
    detail = document.get("detail")
    entry = detail[0] if isinstance(detail, list) and detail else None
    model_error = None
    if isinstance(entry, dict) and entry:
        model_error = ModelError(
            type=string_or_empty(entry.get("type")),
            message=string_or_empty(entry.get("msg")),
            location=parse_location(entry.get("loc")),
        )
    return FalErrorBody(
        error_type=string_or_empty(document.get("error_type")),
        message=string_or_empty(detail),
        model_error=model_error,
    )


def parse_location(location: object) -> tuple[str, ...]:
    """Return the keys in a `loc` of fal's, without the indexes of lists."""
    if not isinstance(location, list):
        return ()
    return tuple(key for key in location if isinstance(key, str))


def string_or_empty(value: object) -> str:
    return value if isinstance(value, str) else ""
