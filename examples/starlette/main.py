"""A Starlette application that offers fal's models to its signed-in users, below /fal."""

import secrets

from aiohttp import web
from starlette.applications import Starlette
from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    BaseUser,
    SimpleUser,
)
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

import falproxy

sessions: dict[str, str] = {}  # session id → user


class SessionBackend(AuthenticationBackend):
    async def authenticate(
        self, conn: HTTPConnection
    ) -> tuple[AuthCredentials, BaseUser] | None:
        user = sessions.get(conn.cookies.get("session", ""))
        return None if user is None else (AuthCredentials(["authenticated"]), SimpleUser(user))


async def fal_user(request: web.Request) -> str | None:
    """Return the caller of the proxy: the user that Starlette's middleware has found."""
    user = falproxy.asgi_scope(request)["user"]
    return user.display_name if user.is_authenticated else None


async def login(request: Request) -> Response:
    """Sign in without a password: replace this with your own."""
    session = secrets.token_urlsafe()
    sessions[session] = request.query_params["name"]
    response = PlainTextResponse("")
    response.set_cookie("session", session, httponly=True, samesite="lax")
    return response


fal = falproxy.asgi(falproxy.Settings.from_env(), authenticate=fal_user)
app = Starlette(
    lifespan=fal.lifespan,
    routes=[Route("/login", login, methods=["POST"]), Mount("/fal", fal)],
    middleware=[Middleware(AuthenticationMiddleware, backend=SessionBackend())],
)
