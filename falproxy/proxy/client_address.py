"""The client's address and scheme, which a trusted proxy in front of this one may report."""

from aiohttp import hdrs, web

from falproxy.trusted_proxies import TrustedProxies

FORWARDED_FOR = "X-Forwarded-For"
TRUSTED_PROXIES = web.AppKey("falproxy.trusted_proxies", TrustedProxies)
CLIENT_ADDRESS = web.RequestKey("falproxy.client_address", str)


def client_address(request: web.Request) -> str:
    """Return the address of the client, empty if it has none (a Unix socket). The first caller
    needs the application of the request, which aiohttp resets at the end of its handler."""
    if CLIENT_ADDRESS in request:
        return request[CLIENT_ADDRESS]
    address = request.remote or ""
    if proxies := request.app.get(TRUSTED_PROXIES):
        address = proxies.client_address(address, request.headers.getall(FORWARDED_FOR, ()))
    request[CLIENT_ADDRESS] = address
    return address


def client_scheme(request: web.Request) -> str:
    """Return the scheme of the client's request: what the first proxy reports, or without a report
    that of the connection. The client may have forged it, unless trusted proxies are configured:
    then only they are believed."""
    values = ",".join(request.headers.getall(hdrs.X_FORWARDED_PROTO, ()))
    proxies = request.app.get(TRUSTED_PROXIES)
    if proxies and not proxies.trusts(request.remote or ""):
        values = ""
    schemes = (value.strip().lower() for value in values.split(","))
    return next(filter(None, schemes), request.scheme)
