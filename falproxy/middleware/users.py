"""The user of a call, from the token or from the header `x-falproxy-user`."""

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.proxy.call import OWNER, PRINCIPAL, USER
from falproxy.proxy.head_only import any_request_id
from falproxy.proxy.user import TOKEN_OWNER_PREFIX, USER_HEADER, name_user


def identify_user() -> Middleware:
    """Middleware: set the user of a request. Dialects whose bodies have a field for it complete
    this when they have read the body."""

    @any_request_id
    @web.middleware
    async def identify_user_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        if request.get(OWNER, "").startswith(TOKEN_OWNER_PREFIX):
            request[USER] = request[PRINCIPAL]
        if USER_HEADER in request.headers:
            name_user(request, header_value(request), USER_HEADER)
        return await handler(request)

    return identify_user_middleware


def header_value(request: web.Request) -> str:
    """Raises: ProxyError 400 `user_ambiguous`, the header was sent more than once."""
    values = request.headers.getall(USER_HEADER)
    if len(values) > 1:
        message = f"{USER_HEADER} was sent more than once."
        raise ProxyError(400, "user_ambiguous", message)
    return values[0]
