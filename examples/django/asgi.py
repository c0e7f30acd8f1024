"""Django, with fal's models for its signed-in users below /fal/."""

import os

from aiohttp import web
from django.core.asgi import get_asgi_application

import falproxy

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
django = get_asgi_application()  # before the imports of models

from django.conf import settings
from django.contrib.auth import aget_user
from django.contrib.sessions.backends.db import SessionStore
from django.http import HttpRequest


async def fal_user(request: web.Request) -> str | None:
    """Return the caller of the proxy: the user of Django's session."""
    django_request = HttpRequest()
    django_request.session = SessionStore(request.cookies.get(settings.SESSION_COOKIE_NAME))
    user = await aget_user(django_request)
    return user.get_username() if user.is_authenticated else None


fal = falproxy.asgi(falproxy.Settings.from_env(), prefix="/fal", authenticate=fal_user)


async def application(scope, receive, send):
    """Send /fal/ and the start and stop of the server to the proxy, all else to Django."""
    if scope["type"] == "lifespan" or scope["path"].startswith("/fal/"):
        await fal(scope, receive, send)
    else:
        await django(scope, receive, send)
