"""Every error that fal documents, on demand: `!error 422 content_policy_violation` as the prompt.

`times=2` fails only the first two calls with that prompt; `at=submit` (or `status`, `result`,
`cancel`) fails that operation of the queue instead of the job. `!delay 3` sets the seconds of
inference, whatever the sandbox's speed.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from falproxy.sandbox.responses import (
    Answer,
    FalError,
    field_error,
    model_error,
    plain,
    request_error,
)

NGINX = (
    "<html>\r\n<head><title>{0}</title></head>\r\n<body>\r\n<center><h1>{0}</h1></center>\r\n"
    "<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
)
LOCKED = "User is locked. Reason: {}"


class Shape(StrEnum):
    """What the body of an error looks like."""

    MODEL = "a list of details"
    REQUEST = "detail and error_type"
    PLAIN = "detail"
    STATUS = "status"
    HTML = "the ingress's page"


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of fal's error pages. kind: the word that asks for it, empty for a bare status.

    ctx: of the model's detail. is_retryable: what `X-Fal-Retryable` says.
    """

    status: int
    kind: str
    text: str
    shape: Shape = Shape.MODEL
    ctx: Mapping[str, object] | None = None
    loc: tuple[str, ...] = ("body", "prompt")
    headers: Mapping[str, str] = field(default_factory=dict)
    is_retryable: bool = False

    def error(self) -> FalError:
        match self.shape:
            case Shape.MODEL:
                entry = field_error(self.kind, self.text, self.loc, self.ctx)
                return model_error([entry], self.status, self.is_retryable)
            case Shape.REQUEST:
                return request_error(self.status, self.kind, self.text, self.headers)
            case Shape.PLAIN:
                return plain(self.status, self.text, self.headers)
            case Shape.STATUS:
                return FalError(Answer(self.status, {"status": self.text}))
            case Shape.HTML:
                return FalError(Answer(self.status, NGINX.format(self.text), is_html=True))


def model(kind: str, text: str, **ctx: object) -> Fault:
    """A refusal of the input: 422, not worth a retry."""
    return Fault(422, kind, text, ctx=ctx or None)


def picture(kind: str, text: str, **ctx: object) -> Fault:
    return Fault(422, kind, text, ctx=ctx or None, loc=("body", "image_url"))


def broken(status: int, kind: str, text: str) -> Fault:
    """A failure of the model, perhaps worth a retry."""
    return Fault(status, kind, text, loc=("body",), is_retryable=True)


def request(status: int, kind: str, text: str) -> Fault:
    return Fault(status, kind, text, Shape.REQUEST)


def account(status: int, kind: str, text: str, **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Fault(status, kind, text, Shape.PLAIN, headers=named)


CANNOT_ACCESS = (
    'Cannot access application "{}". Authentication is required to access this application.'
)
NO_USER = "No user found for Key ID and Secret"
MALFORMED = "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."
NO_HEADER = "Authorization header is required"
BAD_CREDENTIALS = "Cannot access request: invalid key credentials"

TABLE = (
    # Model errors
    model("content_policy_violation", "The content could not be processed because it contained "
          "material flagged by a content checker."),
    broken(500, "internal_server_error", "Internal server error"),
    broken(504, "generation_timeout", "Generation timeout"),
    broken(400, "downstream_service_error", "Downstream service error"),
    broken(500, "downstream_service_unavailable", "Downstream service unavailable"),
    model("no_media_generated", "The model did not generate any media."),
    picture("image_too_small", "Image dimensions are too small. Minimum dimensions are 256x256 "
            "pixels.", min_height=256, min_width=256),
    picture("image_too_large", "Image dimensions are too large. Maximum dimensions are "
            "14142x14142 pixels.", max_height=14142, max_width=14142),
    picture("image_load_error", "Failed to load the image. Please ensure the image file is not "
            "corrupted and is in a supported format."),
    picture("file_download_error", "Failed to download the file. Please check if the URL is "
            "accessible and try again."),
    picture("face_detection_error", "Could not detect face in the image. Please try again."),
    picture("file_too_large", "File size exceeds the maximum allowed size of 104857600 bytes.",
            max_size=104857600),
    model("greater_than", "Input should be greater than 0", gt=0),
    model("greater_than_equal", "Input should be greater than or equal to 1", ge=1),
    model("less_than", "Input should be less than 20", lt=20),
    model("less_than_equal", "Input should be less than or equal to 20", le=20),
    model("multiple_of", "Input should be a multiple of 16", multiple_of=16),
    model("sequence_too_short", "Sequence should have at least 1 item", min_length=1),
    model("sequence_too_long", "Sequence should have at most 4 items", max_length=4),
    model("one_of", "Input should be one of the accepted values", expected=["jpeg", "png"]),
    model("feature_not_supported", "The requested feature is not supported."),
    model("invalid_archive", "The archive could not be read.", supported_extensions=[".zip"]),
    model("archive_file_count_below_minimum", "The archive holds too few files.", min_count=4,
          provided_count=1),
    model("archive_file_count_exceeds_maximum", "The archive holds too many files.",
          max_count=100, provided_count=101),
    model("audio_duration_too_long", "Audio duration is too long.", max_duration=60,
          provided_duration=61),
    model("audio_duration_too_short", "Audio duration is too short.", min_duration=1,
          provided_duration=0.5),
    model("video_duration_too_long", "Video duration is too long.", max_duration=60,
          provided_duration=61),
    model("video_duration_too_short", "Video duration is too short.", min_duration=1,
          provided_duration=0.5),
    model("unsupported_audio_format", "Unsupported audio format.",
          supported_formats=[".mp3", ".wav"]),
    picture("unsupported_image_format", "Unsupported image format. Supported formats are .jpg, "
            ".jpeg, .png, .webp, .gif, .avif.",
            supported_formats=[".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif"]),
    model("unsupported_video_format", "Unsupported video format.",
          supported_formats=[".mp4", ".mov"]),
    # Request errors
    request(504, "request_timeout", "Request timed out"),
    request(504, "startup_timeout", "Runner startup timed out"),
    request(503, "runner_scheduling_failure", "Runner scheduling failure"),
    request(503, "runner_connection_timeout", "Runner connection timeout"),
    request(503, "runner_disconnected", "Runner disconnected"),
    request(503, "runner_connection_refused", "Runner connection refused"),
    request(503, "runner_connection_error", "Runner connection error"),
    request(502, "runner_incomplete_response", "Runner incomplete response"),
    request(500, "runner_server_error", "Runner server error"),
    request(500, "internal_error", "Internal error"),
    request(499, "client_disconnected", "Client disconnected"),
    request(499, "client_cancelled", "Request was cancelled by the client."),
    request(400, "bad_request", "Bad request"),
    # Access, account, limits
    account(401, "unauthenticated", CANNOT_ACCESS.format("fal-ai/flux")),
    account(401, "unknown_key", NO_USER),
    account(401, "malformed_key", MALFORMED),
    account(401, "header_required", NO_HEADER),
    account(401, "invalid_credentials", BAD_CREDENTIALS),
    account(403, "locked", LOCKED.format("Exhausted balance. Top up your balance at "
                                         "fal.ai/dashboard/billing.")),
    account(403, "top_up", LOCKED.format("TOP_UP.")),
    account(404, "application", 'Application "flux" not found'),
    account(404, "path", "Path /x not found", X_Fal_Billable_Units="0"),
    Fault(404, "not_found", "NOT_FOUND", Shape.STATUS),
    account(405, "method", "Method Not Allowed", Allow="POST"),
    Fault(429, "concurrent_requests_limit", "Reached the concurrent requests limit of this "
          "account.", Shape.REQUEST, headers={"X-Fal-needs-retry": "1"}),
    account(429, "queue_full", "The queue is longer than the request allows."),
    account(500, "unhandled", "Internal Server Error"),
    Fault(502, "nginx", "502 Bad Gateway", Shape.HTML),
    Fault(503, "nginx", "503 Service Temporarily Unavailable", Shape.HTML),
    Fault(504, "nginx", "504 Gateway Time-out", Shape.HTML),
)  # fmt: skip
CATALOGUE: Mapping[tuple[int, str], Fault] = {(row.status, row.kind): row for row in TABLE}
# What a bare `!error <status>` means where the first row of that status is not meant.
BARE = {500: "unhandled", 502: "nginx", 503: "runner_connection_error", 504: "request_timeout"}

ERROR = re.compile(r"!error\s+(\d{3})(?:\s+([a-z_]+)(?![=\w]))?((?:\s+\w+=\w+)*)")
DELAY = re.compile(r"!delay\s+(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Order:
    """What a prompt asks the sandbox to do. times: how many calls fail, None for all; at: the
    operation that fails, `job` for the model itself."""

    status: int
    kind: str
    times: int | None
    at: str


def read_order(prompt: str) -> Order | None:
    """The `!error` of a prompt; None without one."""
    match = ERROR.search(prompt)
    if match is None:
        return None
    options = dict(option.split("=") for option in match[3].split())
    times = int(options["times"]) if options.get("times", "").isdecimal() else None
    return Order(int(match[1]), match[2] or "", times, options.get("at", "job"))


def read_delay(prompt: str) -> float | None:
    """The real seconds that `!delay` asks for; None without one."""
    match = DELAY.search(prompt)
    return float(match[1]) if match else None


def prompt_of(body: object) -> str:
    prompt = body.get("prompt") if isinstance(body, dict) else None
    return prompt if isinstance(prompt, str) else ""


def obey(prompt: str, at: str, failures: Counter[str]) -> None:
    """Fail the operation `at` when the prompt asks for it; `failures` counts by prompt.

    Raises:
        FalError: what was asked for, or 400 when it is not in the catalogue.
    """
    order = read_order(prompt)
    if order is None or order.at != at:
        return
    if order.times is not None and failures[prompt] >= order.times:
        return
    failures[prompt] += 1
    raise find(order).error()


def find(order: Order) -> Fault:
    """The row that an order names; a bare status means its usual row."""
    kind = order.kind or BARE.get(order.status, "")
    for row in TABLE:
        if row.status == order.status and kind in ("", row.kind):
            return row
    known = ", ".join(f"{row.status} {row.kind}" for row in TABLE)
    return Fault(400, "bad_request", f"The sandbox has no such error. It has: {known}", Shape.PLAIN)
