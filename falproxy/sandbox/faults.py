"""Faults on demand: every error that fal documents, requested in the prompt.

The prompt `!error 422 content_policy_violation` makes the call fail with that error. Options:

* `times=2`: only the first two calls with this prompt fail.
* `at=submit` (or `status`, `result`, `cancel`): this queue operation fails instead of the job.

`!delay 3` sets the inference time to 3 seconds, independent of the sandbox's speed.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from falproxy.sandbox.responses import (
    FalError,
    FalResponse,
    detail_error,
    error_detail,
    model_error,
    request_error,
)
from falproxy.sandbox.state import Sandbox

NGINX_PAGE = (
    "<html>\r\n<head><title>{0}</title></head>\r\n<body>\r\n<center><h1>{0}</h1></center>\r\n"
    "<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
)
LOCKED = "User is locked. Reason: {}"


class BodyShape(StrEnum):
    """Layout of an error's body."""

    MODEL = "list of details"
    REQUEST = "detail and error_type"
    DETAIL = "detail"
    STATUS = "status"
    HTML = "HTML page of the ingress"


@dataclass(frozen=True, slots=True)
class Fault:
    """One error of fal.

    name: name in the prompt, for most faults also fal's error type.
    message: error text.
    ctx, loc: fields of the same name in a model error's detail.
    is_retryable: value of `X-Fal-Retryable`, for model errors only.
    """

    status: int
    name: str
    message: str
    shape: BodyShape = BodyShape.MODEL
    ctx: Mapping[str, object] | None = None
    loc: tuple[str, ...] = ("body", "prompt")
    headers: Mapping[str, str] = field(default_factory=dict)
    is_retryable: bool = False

    def to_error(self) -> FalError:
        match self.shape:
            case BodyShape.MODEL:
                detail = error_detail(self.name, self.message, self.loc, self.ctx)
                return model_error([detail], self.status, self.is_retryable)
            case BodyShape.REQUEST:
                return request_error(self.status, self.name, self.message, self.headers)
            case BodyShape.DETAIL:
                return detail_error(self.status, self.message, self.headers)
            case BodyShape.STATUS:
                return FalError(FalResponse(self.status, {"status": self.message}))
            case BodyShape.HTML:
                page = NGINX_PAGE.format(self.message)
                return FalError(FalResponse(self.status, page, is_html=True))


def input_fault(name: str, message: str, **ctx: object) -> Fault:
    """Return a 422 about the prompt."""
    return Fault(422, name, message, ctx=ctx or None)


def image_fault(name: str, message: str, **ctx: object) -> Fault:
    """Return a 422 about the input image."""
    return Fault(422, name, message, ctx=ctx or None, loc=("body", "image_url"))


def retryable_fault(status: int, name: str, message: str) -> Fault:
    """Return a failure of the model that may succeed on a retry."""
    return Fault(status, name, message, loc=("body",), is_retryable=True)


def request_fault(status: int, name: str, message: str) -> Fault:
    """Return a failure of fal's infrastructure."""
    return Fault(status, name, message, BodyShape.REQUEST)


def detail_fault(status: int, name: str, message: str, **headers: str) -> Fault:
    """Return an error about access, the account or a limit.

    headers: response headers, with underscores in place of hyphens.
    """
    named = {header.replace("_", "-"): value for header, value in headers.items()}
    return Fault(status, name, message, BodyShape.DETAIL, headers=named)


CANNOT_ACCESS = (
    'Cannot access application "{}". Authentication is required to access this application.'
)
NO_USER = "No user found for Key ID and Secret"
MALFORMED_KEY = "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."
NO_HEADER = "Authorization header is required"
BAD_CREDENTIALS = "Cannot access request: invalid key credentials"

FAULTS = (
    # Model errors
    input_fault("content_policy_violation", "The content could not be processed because it "
                "contained material flagged by a content checker."),
    retryable_fault(500, "internal_server_error", "Internal server error"),
    retryable_fault(504, "generation_timeout", "Generation timeout"),
    retryable_fault(400, "downstream_service_error", "Downstream service error"),
    retryable_fault(500, "downstream_service_unavailable", "Downstream service unavailable"),
    input_fault("no_media_generated", "The model did not generate any media."),
    image_fault("image_too_small", "Image dimensions are too small. Minimum dimensions are 256x256 "
                "pixels.", min_height=256, min_width=256),
    image_fault("image_too_large", "Image dimensions are too large. Maximum dimensions are "
                "14142x14142 pixels.", max_height=14142, max_width=14142),
    image_fault("image_load_error", "Failed to load the image. Please ensure the image file is not "
                "corrupted and is in a supported format."),
    image_fault("file_download_error", "Failed to download the file. Please check if the URL is "
                "accessible and try again."),
    image_fault("face_detection_error", "Could not detect face in the image. Please try again."),
    image_fault("file_too_large", "File size exceeds the maximum allowed size of 104857600 bytes.",
                max_size=104857600),
    input_fault("greater_than", "Input should be greater than 0", gt=0),
    input_fault("greater_than_equal", "Input should be greater than or equal to 1", ge=1),
    input_fault("less_than", "Input should be less than 20", lt=20),
    input_fault("less_than_equal", "Input should be less than or equal to 20", le=20),
    input_fault("multiple_of", "Input should be a multiple of 16", multiple_of=16),
    input_fault("sequence_too_short", "Sequence should have at least 1 item", min_length=1),
    input_fault("sequence_too_long", "Sequence should have at most 4 items", max_length=4),
    input_fault("one_of", "Input should be one of the accepted values", expected=["jpeg", "png"]),
    input_fault("feature_not_supported", "The requested feature is not supported."),
    input_fault("invalid_archive", "The archive could not be read.", supported_extensions=[".zip"]),
    input_fault("archive_file_count_below_minimum", "The archive holds too few files.", min_count=4,
                provided_count=1),
    input_fault("archive_file_count_exceeds_maximum", "The archive holds too many files.",
                max_count=100, provided_count=101),
    input_fault("audio_duration_too_long", "Audio duration is too long.", max_duration=60,
                provided_duration=61),
    input_fault("audio_duration_too_short", "Audio duration is too short.", min_duration=1,
                provided_duration=0.5),
    input_fault("video_duration_too_long", "Video duration is too long.", max_duration=60,
                provided_duration=61),
    input_fault("video_duration_too_short", "Video duration is too short.", min_duration=1,
                provided_duration=0.5),
    input_fault("unsupported_audio_format", "Unsupported audio format.",
                supported_formats=[".mp3", ".wav"]),
    image_fault("unsupported_image_format", "Unsupported image format. Supported formats are .jpg, "
                ".jpeg, .png, .webp, .gif, .avif.",
                supported_formats=[".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif"]),
    input_fault("unsupported_video_format", "Unsupported video format.",
                supported_formats=[".mp4", ".mov"]),
    # Request errors
    request_fault(504, "request_timeout", "Request timed out"),
    request_fault(504, "startup_timeout", "Runner startup timed out"),
    request_fault(503, "runner_scheduling_failure", "Runner scheduling failure"),
    request_fault(503, "runner_connection_timeout", "Runner connection timeout"),
    request_fault(503, "runner_disconnected", "Runner disconnected"),
    request_fault(503, "runner_connection_refused", "Runner connection refused"),
    request_fault(503, "runner_connection_error", "Runner connection error"),
    request_fault(502, "runner_incomplete_response", "Runner incomplete response"),
    request_fault(500, "runner_server_error", "Runner server error"),
    request_fault(500, "internal_error", "Internal error"),
    request_fault(499, "client_disconnected", "Client disconnected"),
    request_fault(499, "client_cancelled", "Request was cancelled by the client."),
    request_fault(400, "bad_request", "Bad request"),
    # Access, account, limits
    detail_fault(401, "unauthenticated", CANNOT_ACCESS.format("fal-ai/flux")),
    detail_fault(401, "unknown_key", NO_USER),
    detail_fault(401, "malformed_key", MALFORMED_KEY),
    detail_fault(401, "header_required", NO_HEADER),
    detail_fault(401, "invalid_credentials", BAD_CREDENTIALS),
    detail_fault(403, "locked",
                 LOCKED.format("Exhausted balance. Top up your balance at "
                               "fal.ai/dashboard/billing.")),
    detail_fault(403, "top_up", LOCKED.format("TOP_UP.")),
    detail_fault(404, "application", 'Application "flux" not found'),
    detail_fault(404, "path", "Path /x not found", X_Fal_Billable_Units="0"),
    Fault(404, "not_found", "NOT_FOUND", BodyShape.STATUS),
    detail_fault(405, "method", "Method Not Allowed", Allow="POST"),
    Fault(429, "concurrent_requests_limit", "Reached the concurrent requests limit of this "
          "account.", BodyShape.REQUEST, headers={"X-Fal-needs-retry": "1"}),
    detail_fault(429, "queue_full", "The queue is longer than the request allows."),
    detail_fault(500, "unhandled", "Internal Server Error"),
    Fault(502, "nginx", "502 Bad Gateway", BodyShape.HTML),
    Fault(503, "nginx", "503 Service Temporarily Unavailable", BodyShape.HTML),
    Fault(504, "nginx", "504 Gateway Time-out", BodyShape.HTML),
)  # fmt: skip
FAULTS_BY_KEY: Mapping[tuple[int, str], Fault] = {
    (fault.status, fault.name): fault for fault in FAULTS
}
JOB_OPERATIONS = ("status", "result", "cancel")
# Names used for `!error <status>` without a name. Other statuses use their first fault.
DEFAULT_NAMES = {
    500: "unhandled",
    502: "nginx",
    503: "runner_connection_error",
    504: "request_timeout",
}

ERROR_DIRECTIVE = re.compile(r"!error\s+(\d{3})(?:\s+([a-z_]+)(?![=\w]))?((?:\s+\w+=\w+)*)")
DELAY_DIRECTIVE = re.compile(r"!delay\s+(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class FaultDirective:
    """The `!error` of a prompt.

    name: name of the fault, empty if the prompt has only a status.
    times: number of calls that fail. None means all.
    operation: operation that fails, `job` for the model itself.
    """

    status: int
    name: str
    times: int | None
    operation: str


def parse_fault_directive(prompt: str) -> FaultDirective | None:
    """Return the `!error` of a prompt. None if it has none."""
    match = ERROR_DIRECTIVE.search(prompt)
    if match is None:
        return None
    options = dict(option.split("=") for option in match[3].split())
    times = int(options["times"]) if options.get("times", "").isdecimal() else None
    return FaultDirective(int(match[1]), match[2] or "", times, options.get("at", "job"))


def parse_delay_directive(prompt: str) -> float | None:
    """Return the seconds of the `!delay` of a prompt. None if it has none."""
    match = DELAY_DIRECTIVE.search(prompt)
    return float(match[1]) if match else None


def get_prompt(body: object) -> str:
    """Return the prompt of a call, or the text that a model reads aloud."""
    inputs = body if isinstance(body, dict) else {}
    prompt = inputs.get("prompt", inputs.get("text"))
    return prompt if isinstance(prompt, str) else ""


def raise_requested_fault(prompt: str, operation: str, failures: Counter[str]) -> None:
    """Fail if the prompt has a directive for `operation`.

    failures: number of raised faults by prompt, updated here.

    Raises:
        FalError: the requested error, or 400 if there is no such fault.
    """
    directive = parse_fault_directive(prompt)
    if directive is None or directive.operation != operation:
        return
    if directive.times is not None and failures[prompt] >= directive.times:
        return
    failures[prompt] += 1
    error = find_fault(directive).to_error()
    if operation in JOB_OPERATIONS:
        # The job itself is not affected: only a response about its end has its request id.
        error.response = replace(error.response, has_request_id=False)
    raise error


def check_balance(sandbox: Sandbox) -> None:
    """Raises: FalError 403 as of fal, the account has run out of balance."""
    if sandbox.is_locked:
        raise FAULTS_BY_KEY[403, "locked"].to_error()


def find_fault(directive: FaultDirective) -> Fault:
    """Return the fault that a directive names, or a 400 that lists all faults."""
    name = directive.name or DEFAULT_NAMES.get(directive.status, "")
    for fault in FAULTS:
        if fault.status == directive.status and name in ("", fault.name):
            return fault
    names = ", ".join(f"{fault.status} {fault.name}" for fault in FAULTS)
    message = f"The sandbox has no such error. It has: {names}"
    return Fault(400, "bad_request", message, BodyShape.DETAIL)
