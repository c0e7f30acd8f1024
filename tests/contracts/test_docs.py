"""The documentation agrees with the code: settings, endpoints, links and code blocks."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from falproxy.settings import KEY_VARIABLES, KIB, MIB, variables
from tests.support.doc_snippets import (
    DOCUMENTS,
    LANGUAGES,
    NO_CODE,
    NOT_RUN,
    RUNS,
    all_snippets,
    find,
    find_all,
)
from tests.support.paths import ROOT

README, DOCS = ROOT / "README.md", ROOT / "docs"
README_MAX = 300  # lines
# | `FALPROXY_PORT` | `8080` | port to listen on |
ROW = re.compile(r"^\| `([A-Z][A-Z0-9_]*)` \| *(.*?) *\| *(.*?) *\|$", re.MULTILINE)
DAY = 86400.0  # seconds
Row = tuple[str, str, str]  # variable, default, meaning
# Documents whose links are checked.
LINKING = (
    *DOCUMENTS,
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "examples").glob("*/README.md")),
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s]*(?:\([^()\s]*\))?[^()\s]*)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#{1,6} (.*)$", re.MULTILINE)
# Names that begin like settings and are none.
NO_SETTINGS = {"FALPROXY_USER_", "FALPROXY_URL", "FALPROXY_KEY"}


def rows_of_code() -> list[Row]:
    keys = [(variable, "", meaning) for variable, meaning in KEY_VARIABLES.items()]
    settings = [
        (variable, format_default(field.default), field.metadata["help"])
        for variable, field in variables().items()
    ]
    return keys + settings


def rows_of_guide() -> list[Row]:
    return ROW.findall((DOCS / "configuration.md").read_text())


def format_default(default: object) -> str:
    """Return a default as a user would type it."""
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return f"`{int(default)}`"
    for unit, letter in ((MIB, "M"), (KIB, "K")):
        if isinstance(default, int) and default >= unit and default % unit == 0:
            return f"`{default // unit}{letter}`"
    if isinstance(default, tuple):
        items = [":".join(item) if isinstance(item, tuple) else item for item in default]
        return f"`{','.join(items)}`"
    if isinstance(default, float) and default % DAY == 0:
        return f"`{default / DAY:g}d`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


class TestSettings:
    def test_the_guide_has_one_row_for_each_variable(self) -> None:
        documented = [variable for variable, _, _ in rows_of_guide()]
        assert sorted(documented) == sorted(variable for variable, _, _ in rows_of_code())

    def test_the_guide_has_the_defaults_and_the_meanings_of_the_code(self) -> None:
        documented = {variable: row for variable, *row in rows_of_guide()}
        for variable, *row in rows_of_code():
            assert documented[variable] == row, variable

    @pytest.mark.parametrize("path", LINKING, ids=lambda path: path.relative_to(ROOT).as_posix())
    def test_the_settings_that_a_document_names_exist(self, path: Path) -> None:
        used = {*re.findall(r"\bFALPROXY_[A-Z_]+", path.read_text())} - NO_SETTINGS
        assert used <= {*variables()}


class TestReadme:
    def test_it_is_short(self) -> None:
        assert len(README.read_text().splitlines()) <= README_MAX

    @pytest.mark.parametrize("path", DOCUMENTS[1:], ids=lambda path: path.name)
    def test_it_and_llms_txt_link_all_other_documents(self, path: Path) -> None:
        assert f"(docs/{path.name})" in README.read_text()
        if path.suffix == ".md":
            assert f"({path.name})" in (DOCS / "llms.txt").read_text()

    def test_its_speeds_are_those_of_the_benchmark(self) -> None:
        (row,) = re.findall(r"^\| status polls per CPU second \|(.*)$", README.read_text(), re.M)
        names = ("falproxy", "server-proxy on Express", "server-proxy on Hono")
        results = (ROOT / "bench" / "RESULTS.md").read_text()
        measured = [
            re.search(rf"^\| {name} \| ([\d ]+\d) ", results, re.M)[1]  # type: ignore[index]
            for name in names
        ]
        assert re.findall(r"\d{1,3}(?: \d{3})*", row) == measured


class TestSecurityPolicy:
    def test_it_has_the_sections_that_people_search_for(self) -> None:
        text = (ROOT / "SECURITY.md").read_text()
        for heading in ("Reporting a vulnerability", "Supported versions", "Threat model"):
            assert f"\n## {heading}\n" in text
        assert "@" not in text, "a report is private on the repository's host, not a mail"
        assert "(SECURITY.md)" in README.read_text()


class TestSnippets:
    @pytest.mark.parametrize("key", [*RUNS, *NOT_RUN], ids=" ".join)
    def test_a_row_is_about_one_snippet(self, key: tuple[str, str]) -> None:
        assert len(find_all(*key)) == 1

    def test_no_snippet_has_two_rows(self) -> None:
        with_row = [find(*key) for key in (*RUNS, *NOT_RUN)]
        assert len({*with_row}) == len(with_row)

    def test_no_snippet_is_left_out_without_a_reason(self) -> None:
        assert all(len(reason) > len("needs root") for reason in NOT_RUN.values())
        named = re.findall(r"tests/[\w/]+\.py", " ".join(NOT_RUN.values()))
        assert all((ROOT / name).exists() for name in named)

    def test_all_languages_can_be_run_or_are_no_code(self) -> None:
        assert {snippet.language for snippet in all_snippets()} <= {*LANGUAGES, *NO_CODE}

    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
    def test_the_fences_of_a_document_are_closed(self, path: Path) -> None:
        marks = re.findall(r"^\s*```.*$", path.read_text(), re.MULTILINE)
        assert len(marks) == 2 * sum(
            snippet.document == path.relative_to(ROOT).as_posix() for snippet in all_snippets()
        )

    def test_the_make_targets_of_the_documents_exist(self) -> None:
        targets = re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.M)
        known = {name for line in targets for name in line.split()}
        for path in (*DOCUMENTS, ROOT / "CONTRIBUTING.md"):
            used = re.findall(r"(?:^|`)make ([\w-]+)", path.read_text(), re.MULTILINE)
            assert {*used} <= known, path.name


class TestLinks:
    @pytest.mark.parametrize("path", LINKING, ids=lambda path: path.relative_to(ROOT).as_posix())
    def test_the_files_and_anchors_of_a_document_s_links_exist(self, path: Path) -> None:
        broken = [target for target in relative_links(path) if not exists(path, target)]
        assert broken == []

    @pytest.mark.parametrize("path", LINKING, ids=lambda path: path.relative_to(ROOT).as_posix())
    def test_each_image_has_a_description(self, path: Path) -> None:
        images = [text for mark, text, _ in LINK.findall(prose(path)) if mark]
        assert all(len(text.split()) > 2 for text in images)

    @pytest.mark.parametrize(
        ("heading", "anchor"),
        [
            ("fal's proxy protocol", "fals-proxy-protocol"),
            ("From @fal-ai/server-proxy", "from-fal-aiserver-proxy"),
            ("Upgrades, and going back", "upgrades-and-going-back"),
            ("`/files` of users", "files-of-users"),
        ],
    )
    def test_an_anchor_is_that_of_github(self, heading: str, anchor: str) -> None:
        assert slug(heading) == anchor

    def test_a_broken_link_is_found(self, tmp_path: Path) -> None:
        (tmp_path / "b.md").write_text("# One heading\n")
        page = tmp_path / "a.md"
        page.write_text(
            "[x](b.md) [x](b.md#one-heading) [x](#a) `[x](no)`\n# A\n[x](c.md) [x](b.md#two)"
        )
        broken = [target for target in relative_links(page) if not exists(page, target)]
        assert broken == ["c.md", "b.md#two"]


def prose(path: Path) -> str:
    """Return a document without code."""
    return CODE.sub("", path.read_text())


def relative_links(path: Path) -> Iterator[str]:
    for _, _, target in LINK.findall(prose(path)):
        if not re.match(r"[a-z]+:", target):
            yield target


def exists(path: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    file = (path.parent / name).resolve() if name else path
    return file.exists() and (not anchor or anchor in anchors(file))


@cache
def anchors(path: Path) -> frozenset[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return frozenset(slug(heading) for heading in HEADING.findall(text))


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


class TestEndpoints:
    def test_the_description_and_llms_txt_name_the_same_paths(self) -> None:
        section = (DOCS / "llms.txt").read_text().partition("## Endpoints\n")[2]
        listed = section.partition("\n## ")[0]
        named = {variable_free(path) for path in re.findall(r"(?<=[ `])/[^`?\s]*", listed)}
        source = ROOT / "falproxy" / "web" / "openapi" / "openapi.yaml"
        described = {variable_free(path) for path in yaml.safe_load(source.read_text())["paths"]}
        pages = {"/", "/dashboard", "/docs", "/openapi.json"}
        assert described - {"/files/{}", "/v1/models/{}", "/api/fal/rest/{}"} <= named
        assert named - pages - described <= {"/api/keys", "/api/keys/{}", "/api/keys/{}/rotate"}


def variable_free(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "{}", path)


def test_the_changelog_has_an_unreleased_section() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()
