"""What the document says of the process's health, and of the files that it serves."""

from falproxy.media.content_type import TYPES
from falproxy.web.openapi.operations import (
    Failure,
    Json,
    Operation,
    Paths,
    answer,
    header,
    path_parameter,
    ref,
    refuse_plainly,
)

TAG = "Service"
HEALTH = {
    "/health": ("health", "As `/health/ready`."),
    "/health/live": ("healthLive", "200 as long as the process turns."),
    "/health/ready": ("healthReady", "503 from the moment the process begins to stop."),
}
BYTES: Json = {"type": "string", "format": "binary"}
NO_FILE = Failure("There is no such file.", "file_not_found", "There is no such file.")
NO_RANGE = Failure(
    "The file has no such bytes.", "range_not_satisfiable", "The file has no such bytes."
)
# The digest of a file's bytes, and what they are.
NAME = rf"^[0-9a-f]{{64}}\.({'|'.join(TYPES)})$"


RANGE: Json = {
    "name": "Range",
    "in": "header",
    "description": "One range of bytes.",
    "schema": {"type": "string", "pattern": r"^bytes=\d{1,9}-\d{0,9}$"},
}


def health_paths() -> Paths:
    return {path: ("get", health(path)) for path in HEALTH}


def health(path: str) -> Operation:
    name, about = HEALTH[path]
    answers = {200: answer("It is well.", ref("Health"), {"status": "ok"})}
    if path != "/health/live":
        answers[503] = answer("It is about to stop.", ref("Health"), {"status": "draining"})
    return Operation(
        id=name,
        tag=TAG,
        summary=f"Whether the process is {'alive' if path == '/health/live' else 'ready'}",
        description=about,
        answers=answers,
        failures={},
        refuse=refuse_plainly,
        is_guarded=False,
    )


def file_paths() -> Paths:
    return {"/files/{name}": ("get", file())}


def file() -> Operation:
    name: Json = {"type": "string", "pattern": NAME}
    files: Json = {kind: {"schema": BYTES} for kind in sorted({*TYPES.values()})}
    return Operation(
        id="getFile",
        tag=TAG,
        summary="Get a file that the proxy keeps",
        description="The files of results are named by their bytes, and never change.",
        parameters=[path_parameter("name", "As in a result's `url`.", name, None), RANGE],
        answers={
            200: {"description": "The file.", "headers": headers_of_files(), "content": files},
            206: {"description": "A part of it.", "headers": headers_of_files(), "content": files},
            304: {"description": "It is the one that you have (`If-None-Match`)."},
        },
        failures={404: NO_FILE, 416: NO_RANGE},
        refuse=refuse_plainly,
        is_guarded=False,
    )


def headers_of_files() -> Json:
    return {name: header(name) for name in ("Cache-Control", "ETag")}
