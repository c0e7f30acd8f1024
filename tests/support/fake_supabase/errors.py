"""Error responses of Supabase Storage. The HTTP status is 400 for nearly all of them; the string
`statusCode` in the body is the real status."""

from dataclasses import dataclass

from aiohttp import web


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """An error response.

    status: status in the body.
    http: status in the status line.
    message: with placeholders for values of the request.
    """

    status: int
    error: str
    message: str
    code: str
    http: int = 400


KEY_EXISTS = ErrorKind(409, "Duplicate", "The resource already exists", "KeyAlreadyExists")
BUCKET_EXISTS = ErrorKind(409, "Duplicate", "The resource already exists", "BucketAlreadyExists")
NO_BUCKET = ErrorKind(404, "Bucket not found", "Bucket not found", "NoSuchBucket")
NO_KEY = ErrorKind(404, "not_found", "Object not found", "NoSuchKey")
INVALID_KEY = ErrorKind(400, "InvalidKey", "Invalid key: {}", "InvalidKey")
INVALID_BUCKET = ErrorKind(400, "Invalid Input", "Bucket name invalid", "InvalidBucketName")
TOO_LARGE = ErrorKind(
    413, "Payload too large", "The object exceeded the maximum allowed size", "EntityTooLarge"
)
NAME_TOO_LONG = ErrorKind(500, "Internal", "Internal Server Error", "InternalError", http=500)
TYPE_REFUSED = ErrorKind(
    415, "invalid_mime_type", "mime type {} is not supported", "InvalidMimeType"
)
TYPE_UNREAD = ErrorKind(415, "invalid_mime_type", "Invalid Content-Type header", "InvalidMimeType")
NO_TOKEN = ErrorKind(
    400, "Error", "headers must have required property 'authorization'", "InvalidRequest"
)
NO_JWT = ErrorKind(403, "Unauthorized", "Invalid Compact JWS", "AccessDenied")
WRONG_SIGNATURE = ErrorKind(403, "Unauthorized", "signature verification failed", "AccessDenied")
EXPIRED = ErrorKind(403, "Unauthorized", '"exp" claim timestamp check failed', "AccessDenied")
NO_POLICY = ErrorKind(
    403, "Unauthorized", "new row violates row-level security policy", "AccessDenied"
)
NO_ROLE = ErrorKind(500, "DatabaseError", "database error, code: 22023", "DatabaseError", http=500)
NO_CONTENT = ErrorKind(400, "InvalidRequest", "No content provided", "InvalidRequest")
NOT_EMPTY = ErrorKind(
    409, "ResourceNotEmpty", "The bucket you tried to delete is not empty", "ResourceNotEmpty"
)
BAD_BODY = ErrorKind(400, "Error", "body must have required property '{}'", "InvalidRequest")
BAD_VALUE = ErrorKind(400, "Error", "body/{} must be right", "InvalidRequest")
SIGNED_FOR_ANOTHER = ErrorKind(400, "InvalidSignature", "Invalid signature", "InvalidSignature")
SIGNED_EXPIRED = ErrorKind(400, "InvalidJWT", EXPIRED.message, "InvalidJWT")
SIGNED_UNREAD = ErrorKind(400, "InvalidJWT", NO_JWT.message, "InvalidJWT")
NO_RANGE = ErrorKind(416, "invalid_range", "invalid range provided", "InvalidRange", http=416)
NO_ROUTE = ErrorKind(404, "Not Found", "Route {} not found", "InvalidRequest", http=404)
DATABASE_BUSY = ErrorKind(
    429,
    "too_many_connections",
    "Too many connections issued to the database",
    "SlowDown",
    http=429,
)
DATABASE_SLOW = ErrorKind(
    544,
    "DatabaseTimeout",
    "The connection to the database timed out",
    "DatabaseTimeout",
    http=544,
)


class Refusal(Exception):
    def __init__(self, kind: ErrorKind, given: str = "") -> None:
        super().__init__(kind.code)
        self.kind = kind
        self.message = kind.message.format(given)


def body_of(kind: ErrorKind, message: str | None = None) -> dict[str, object]:
    return {
        "statusCode": str(kind.status),
        "error": kind.error,
        "message": kind.message if message is None else message,
        "code": kind.code,
    }


def error_response(refusal: Refusal, method: str) -> web.Response:
    """Return the response without a body for HEAD."""
    if method == "HEAD":
        return web.Response(status=refusal.kind.http)
    return web.json_response(body_of(refusal.kind, refusal.message), status=refusal.kind.http)


def unknown_route(method: str, path: str) -> web.Response:
    """Return the response for an unknown route. The status in the body is a number, except below
    /object."""
    if path.startswith("/object"):
        return error_response(Refusal(NO_ROUTE, f"{method}:{path}"), method)
    reported = {
        "message": f"Route {method}:{path} not found",
        "error": "Not Found",
        "statusCode": 404,
    }
    return web.json_response(reported, status=404)
