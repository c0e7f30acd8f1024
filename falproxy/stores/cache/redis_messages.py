"""Messages of a Redis subscription."""

import asyncio
from collections.abc import AsyncGenerator

from redis.asyncio.client import PubSub

from falproxy.stores.redis_client import CALL_TIMEOUT

PUBSUB_IDLE_TIMEOUT = 5.0  # seconds until an idle subscription is checked with a PING


async def read_messages(
    subscription: PubSub, channel: str
) -> AsyncGenerator[dict[str, object], None]:
    """Subscribe to a channel and yield its messages.

    Raises: TimeoutError, the server does not respond, or not to a PING any more.
    """
    async with asyncio.timeout(CALL_TIMEOUT):
        await subscription.subscribe(channel)
    is_ping_sent = False
    while True:
        # Both connect again after a lost connection, which the timeout of redis-py does not limit.
        async with asyncio.timeout(PUBSUB_IDLE_TIMEOUT + CALL_TIMEOUT):
            message = await subscription.get_message(timeout=PUBSUB_IDLE_TIMEOUT)
            if message is None and is_ping_sent:
                raise TimeoutError
            if message is None:
                await subscription.ping()
        is_ping_sent = message is None
        if message is not None:
            yield message
