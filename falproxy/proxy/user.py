"""The user of a call: the person behind it, named by the caller in a header or in the body.

A user is believed from authenticated callers only. The user of a token is its subject.
"""

import unicodedata

from aiohttp import web

from falproxy.errors import ProxyError
from falproxy.proxy.call import OWNER, USER

USER_HEADER = "x-falproxy-user"
USER_MAX = 128  # characters
TOKEN_OWNER_PREFIX = "jwt:"
# Unicode categories of control characters, and of line and paragraph separators.
CONTROL_CATEGORIES = ("Cc", "Zl", "Zp")
SURROGATE_CATEGORY = "Cs"  # bytes of a header that are not UTF-8, or half of a pair in JSON


def name_user(request: web.Request, text: str, field: str) -> None:
    """Set the user of a request from one of its fields. An empty text names no user. The text
    is checked, but has no effect, if the caller is not authenticated or sent a token.

    field: name of the field, for the error.
    Raises: ProxyError 400 `user_invalid`; `user_ambiguous`, the request names another user too.
    """
    user = parse_user(text, field)
    owner = request.get(OWNER)
    if not user or owner is None or owner.startswith(TOKEN_OWNER_PREFIX):
        return
    if request.get(USER, user) != user:
        raise ProxyError(400, "user_ambiguous", f"{field} and {USER_HEADER} name different users.")
    request[USER] = user


def parse_user(text: str, field: str) -> str:
    """Return a user's name without blanks around it. Raises: ProxyError 400 `user_invalid`."""
    user = text.strip(" \t")
    if user.isascii() and user.isprintable():
        categories: set[str] = set()
    else:
        categories = {unicodedata.category(character) for character in user}
    if SURROGATE_CATEGORY in categories:
        raise invalid_user(f"{field} is not valid UTF-8.")
    if not categories.isdisjoint(CONTROL_CATEGORIES):
        raise invalid_user(f"{field} contains a control character.")
    if len(user) > USER_MAX:
        raise invalid_user(f"{field} has {len(user)} characters; at most {USER_MAX} are accepted.")
    return user


def invalid_user(message: str) -> ProxyError:
    return ProxyError(400, "user_invalid", message)
