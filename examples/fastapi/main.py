"""A FastAPI application that offers fal's models to its signed-in users, below /fal."""

import secrets
from typing import Annotated

from aiohttp import web
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.requests import HTTPConnection

import falproxy

sessions: dict[str, str] = {}  # session id → user


def current_user(connection: HTTPConnection) -> str:
    """Dependency: the name of the signed-in user."""
    user = sessions.get(connection.cookies.get("session", ""))
    if user is None:
        raise HTTPException(401, "Sign in first.")
    return user


async def fal_user(request: web.Request) -> str | None:
    """Return the caller of the proxy: the user that the dependency returns."""
    try:
        return current_user(HTTPConnection(falproxy.asgi_scope(request)))
    except HTTPException:
        return None


fal = falproxy.asgi(falproxy.Settings.from_env(), authenticate=fal_user)
app = FastAPI(lifespan=fal.lifespan)
app.mount("/fal", fal)


@app.post("/login")
def login(name: str, response: Response) -> None:
    """Sign in without a password: replace this with your own."""
    session = secrets.token_urlsafe()
    sessions[session] = name
    response.set_cookie("session", session, httponly=True, samesite="lax")


@app.get("/me")
def me(user: Annotated[str, Depends(current_user)]) -> str:
    return user
