"""`/api/keys`: keys that are made at run time, for the callers in FALPROXY_ADMINS."""

import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping

from aiohttp import web

from falproxy.dialects.json_body import InvalidTextError, parse_json
from falproxy.errors import ProxyError
from falproxy.proxy.call import OWNER, REQUEST_ID
from falproxy.stores.keys import (
    KEYS_MAX,
    AccessKey,
    KeyEndedError,
    KeyNameTakenError,
    KeyStoreError,
    TooManyKeysError,
)
from falproxy.stores.keys.documents import (
    KeyFieldError,
    ReservedNameError,
    key_document,
    parse_grace,
    parse_key_change,
    parse_new_key,
)
from falproxy.stores.keys.known_keys import KnownKeys
from falproxy.stores.ledger.reports import Json
from falproxy.web.usage import Visibility

logger = logging.getLogger(__name__)

BODY_MAX = 64 * 2**10  # bytes
RETRY_AFTER = "5"  # seconds
JSON_TYPE = "application/json"
GRACE = "grace"

Action = Callable[[web.Request], Awaitable[web.Response]]


class KeyHandlers:
    """reserved: names that a key must not have."""

    def __init__(
        self, known_keys: KnownKeys, visibility: Visibility, reserved: Collection[str]
    ) -> None:
        self._known_keys = known_keys
        self._store = known_keys.store
        self._visibility = visibility
        self._reserved = reserved
        self._of_list: Mapping[str, Action] = {"GET": self._list, "POST": self._create}
        self._of_key: Mapping[str, Action] = {
            "GET": self._show,
            "PATCH": self._change,
            "DELETE": self._revoke,
        }
        self._of_rotation: Mapping[str, Action] = {"POST": self._rotate}

    async def handle(self, request: web.Request) -> web.Response:
        """Handler for all methods of `/api/keys` and the paths below it. Raises: ProxyError."""
        actions = self._of_list
        if "key" in request.match_info:
            is_rotation = request.path.endswith("/rotate")
            actions = self._of_rotation if is_rotation else self._of_key
        if not self._visibility.can_see_all(request):
            raise ProxyError(
                403, "not_an_admin", "Only the callers in FALPROXY_ADMINS may manage keys."
            )
        if (action := actions.get(request.method)) is None:
            allow = {"Allow": ", ".join(actions)}
            raise ProxyError(405, "method_not_allowed", "Method Not Allowed.", allow)
        try:
            return await action(request)
        except (KeyStoreError, KeyFieldError, ReservedNameError) as error:
            raise to_proxy_error(error) from error
        except (KeyNameTakenError, KeyEndedError, TooManyKeysError) as error:
            raise to_proxy_error(error) from error

    async def _list(self, request: web.Request) -> web.Response:
        with_revoked = request.query.get("revoked", "0") in ("1", "true")
        keys = await self._store.list_keys(revoked=with_revoked)
        now = time.time()
        return respond({"keys": [key_document(key, now) for key in keys]})

    async def _create(self, request: web.Request) -> web.Response:
        fields = await read_fields(request)
        new = parse_new_key(fields, request[OWNER], self._reserved, time.time())
        key, secret = await self._store.create(new)
        await self._apply(request, "created", key)
        return respond({**key_document(key, time.time()), "secret": secret}, 201)

    async def _show(self, request: web.Request) -> web.Response:
        return respond(key_document(await self._find(request), time.time()))

    async def _change(self, request: web.Request) -> web.Response:
        fields = await read_fields(request)
        key = await self._find(request)
        change = parse_key_change(fields, key, time.time())
        changed = await self._store.change(key.id, change) or key
        await self._apply(request, "changed", key)
        return respond(key_document(changed, time.time()))

    async def _revoke(self, request: web.Request) -> web.Response:
        key = await self._find(request)
        revoked = await self._store.revoke(key.id) or key
        await self._apply(request, "revoked", key)
        return respond(key_document(revoked, time.time()))

    async def _rotate(self, request: web.Request) -> web.Response:
        fields = await read_fields(request) if request.can_read_body else {}
        if unknown := [*({*fields} - {GRACE})]:
            raise KeyFieldError(str(unknown[0])[:100], "is unknown: use grace")
        key = await self._find(request)
        rotated = await self._store.rotate(key.id, parse_grace(fields.get(GRACE)))
        if rotated is None:
            raise key_not_found()
        await self._apply(request, "rotated", key)
        return respond({**key_document(rotated[0], time.time()), "secret": rotated[1]})

    async def _find(self, request: web.Request) -> AccessKey:
        key = await self._store.find(request.match_info["key"])
        if key is None:
            raise key_not_found()
        return key

    async def _apply(self, request: web.Request, action: str, key: AccessKey) -> None:
        """Log a change that was stored, and apply it in this process at once. Others follow."""
        fields = {
            "request_id": request.get(REQUEST_ID),
            "by": request[OWNER],
            "key_name": key.name,
            "key_id": key.id,
        }
        logger.info("A key was %s", action, extra={"fields": fields})
        try:
            await self._known_keys.refresh()
        except KeyStoreError:
            logger.info("The change of a key is applied with the next refresh")


async def read_fields(request: web.Request) -> dict[str, object]:
    """Return the JSON object of the body. Raises: ProxyError 400, 413, 415."""
    if request.content_type != JSON_TYPE:
        # A page of another origin cannot send this type without a preflight.
        raise ProxyError(415, "not_json", f"Send the key as {JSON_TYPE}.")
    body = b""
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > BODY_MAX:
            raise ProxyError(413, "body_too_large", "The body is too large for a key.")
    try:
        return parse_json(body)
    except InvalidTextError as error:
        raise ProxyError(400, "key_invalid", str(error)) from error


def respond(document: Json, status: int = 200) -> web.Response:
    return web.Response(text=json.dumps(document), status=status, content_type=JSON_TYPE)


def key_not_found() -> ProxyError:
    return ProxyError(404, "key_not_found", "There is no such key.")


def to_proxy_error(error: Exception) -> ProxyError:
    match error:
        case KeyStoreError():
            logger.info("The keys were not read or written: %s", error)
            message = "The keys cannot be read or written now."
            return ProxyError(503, "keys_unavailable", message, {"Retry-After": RETRY_AFTER})
        case KeyFieldError():
            return ProxyError(400, "key_invalid", f"`{error.field}` {error}.")
        case ReservedNameError():
            message = "An access key of the settings, or an admin, has this name."
            return ProxyError(409, "name_taken", message)
        case KeyNameTakenError():
            return ProxyError(409, "name_taken", "There is a key of this name. Revoke it first.")
        case KeyEndedError():
            message = "The key is revoked or has expired, and cannot be changed so."
            return ProxyError(409, "key_ended", message)
        case _:
            pass
    return ProxyError(409, "too_many_keys", f"There are {KEYS_MAX} keys. Revoke some first.")
