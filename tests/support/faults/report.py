"""The parts of docs/reliability.md that the suites write."""

import re

from tests.support.paths import ROOT

REPORT = ROOT / "docs" / "reliability.md"


def write_section(name: str, text: str) -> None:
    """Replace the text between the comments that name a section."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    document = REPORT.read_text()
    assert section.search(document), f"docs/reliability.md has no section {name}"
    REPORT.write_text(section.sub(lambda _: f"{begin}\n\n{text}\n{end}", document))
