"""Draws docs/images/trace.svg: the traces of a kontext miss and of the hit after it.

Starts `falproxy serve --sandbox` with a Redis and a collector on loopback, edits an image twice,
and draws the spans that the collector received. Run it from the root of the repository:
`.venv/bin/python scripts/draw_trace.py`.
"""

import asyncio
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.otlp_collector import SERVER, ReceivedSpan
from tests.support.traced_kontext import receive_traces

TARGET = Path(__file__).parent.parent / "docs" / "images" / "trace.svg"
WIDTH, NAMES, ROW, HEAD = 960, 300, 22, 34  # pixels: picture, column of names, a row, a headline
MARGIN, LABEL = 16, 110  # pixels: around everything, and right of a bar
COLORS = {"server": "#3b5bdb", "fal": "#e8590c", "redis": "#c2255c", "image_host": "#2b8a3e"}
STYLE = (
    "text{font:12px ui-sans-serif,system-ui,sans-serif;fill:#212529}"
    ".head{font-weight:600;font-size:13px}.dim{fill:#868e96}"
    "@media (prefers-color-scheme:dark){text{fill:#e9ecef}.dim{fill:#adb5bd}}"
)


def describe(span: ReceivedSpan) -> tuple[str, str]:
    """Return the color and the name of a span."""
    attributes = span.attributes
    if span.kind == SERVER:
        return COLORS["server"], span.name
    operation = attributes.get("falproxy.operation")
    system = attributes.get("db.system.name") or attributes.get("peer.service") or "fal"
    name = span.name if operation in (None, "other") else f"{span.name} ({operation})"
    return COLORS[system], name


def draw(traces: Sequence[Sequence[ReceivedSpan]]) -> str:
    height = MARGIN * 2 + sum(HEAD + ROW * len(spans) for spans in traces)
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    rows = "\n".join(draw_all(traces))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n'
        "<title>Traces of a kontext miss and of the hit after it</title>\n"
        f"<style>{STYLE}</style>\n{rows}\n</svg>\n"
    )


def draw_all(traces: Iterable[Sequence[ReceivedSpan]]) -> Iterator[str]:
    top = float(MARGIN)
    for spans in traces:
        (call,) = (span for span in spans if span.kind == SERVER)
        outcome = call.attributes["falproxy.cache"]
        model = call.attributes["gen_ai.request.model"]
        yield text(MARGIN, top + 18, f"{outcome}: {model}, {seconds(call)}", "head")
        top += HEAD
        for span in spans:
            yield from draw_span(span, call, top)
            top += ROW


def draw_span(span: ReceivedSpan, call: ReceivedSpan, top: float) -> Iterator[str]:
    scale = (WIDTH - NAMES - 2 * MARGIN - LABEL) / (call.end - call.start)
    left = MARGIN + NAMES + (span.start - call.start) * scale
    length = max(2.0, (span.end - span.start) * scale)
    color, name = describe(span)
    indent = 0 if span is call else 14
    yield text(MARGIN + indent, top + 15, name)
    place = f'x="{left:.1f}" y="{top + 4:.1f}" width="{length:.1f}" height="14"'
    yield f'<rect {place} rx="2" fill="{color}"/>'
    yield text(left + length + 6, top + 15, seconds(span), "dim")


def text(left: float, baseline: float, content: str, kind: str = "name") -> str:
    return f'<text class="{kind}" x="{left:.1f}" y="{baseline:.1f}">{escape(content)}</text>'


def seconds(span: ReceivedSpan) -> str:
    milliseconds = (span.end - span.start) / 1e6
    return f"{milliseconds:.1f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


if __name__ == "__main__":
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(draw(asyncio.run(receive_traces())))
