"""Subscribes to many jobs at once with fal_client.

Environment: GATEWAY (an origin), ACCESS_KEY, CALLS (a number), SHARED_BY: calls in a row that are
equal; 0 if all calls of all clients differ.

The output is a list of errors, null for each call that succeeded.
"""

import asyncio
import json
import os
import sys

from falproxy.client import AsyncClient


async def subscribe(fal: AsyncClient, number: int) -> str | None:
    await asyncio.sleep(0.1 * number)
    shared_by = int(os.environ["SHARED_BY"])
    group, name = (number // shared_by, "shared") if shared_by else (number, "py")
    prompt = f"!delay {2 + group % 4} {name} {group}"
    arguments = {"prompt": prompt, "image_size": {"width": 64, "height": 64}}
    try:
        await fal.subscribe("fal-ai/flux/dev", arguments)
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return None


async def main() -> None:
    fal = AsyncClient(os.environ["GATEWAY"], key=os.environ["ACCESS_KEY"])
    calls = range(int(os.environ["CALLS"]))
    errors = await asyncio.gather(*(subscribe(fal, number) for number in calls))
    sys.stdout.write(json.dumps(errors))


asyncio.run(main())
