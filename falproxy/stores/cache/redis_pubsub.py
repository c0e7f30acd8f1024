"""Messages of a Redis subscription, which is checked while it is idle."""

from collections.abc import AsyncGenerator

from redis.asyncio.client import PubSub

PUBSUB_IDLE_TIMEOUT = 5.0  # seconds until an idle subscription is checked with a PING


async def read_messages(subscription: PubSub) -> AsyncGenerator[dict[str, object], None]:
    """Yield the messages of a subscription.

    Raises: TimeoutError, the server does not respond to a PING any more.
    """
    is_ping_sent = False
    while True:
        message = await subscription.get_message(timeout=PUBSUB_IDLE_TIMEOUT)
        if message is not None:
            is_ping_sent = False
            yield message
        elif is_ping_sent:
            raise TimeoutError
        else:
            await subscription.ping()
            is_ping_sent = True
