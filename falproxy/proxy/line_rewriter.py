"""Bodies that are changed line by line while they pass."""

from collections.abc import AsyncIterator, Callable, Sequence

# Takes whole lines, and gives them changed, in as many pieces as are ready at different times.
Rewrite = Callable[[bytes], AsyncIterator[bytes]]


def sync_rewrite(transform: Callable[[bytes], bytes]) -> Rewrite:
    """What waits for nothing."""

    async def rewrite(lines: bytes) -> AsyncIterator[bytes]:
        yield transform(lines)

    return rewrite


async def apply_rewrites(lines: bytes, rewrites: Sequence[Rewrite]) -> AsyncIterator[bytes]:
    """The lines after all changes, one after the other."""
    if not rewrites:
        yield lines
        return
    first, *others = rewrites
    async for piece in first(lines):
        async for ready in apply_rewrites(piece, others):
            yield ready
