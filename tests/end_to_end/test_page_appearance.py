"""Appearance of all pages in Chromium: axe-core finds nothing, and nothing is wider than the
screen, at 360, 768 and 1440 px, light and dark. States that other tests reach are checked there."""

from pathlib import Path

import pytest

from tests.support.js_world import JS, need, open_world
from tests.support.page_browser import (
    Driver,
    RestartableProxy,
    Visitor,
    create_image,
    open_proxy,
)
from tests.support.running_proxy import open_running_proxy

pytestmark = pytest.mark.slow(seconds=5)

DIST = JS.parent.parent / "examples" / "js-client" / "dist"
FLUX = "fal-ai/flux/dev"
SCHNELL = "fal-ai/flux/schnell"
TASKS = ("Create", "Edit", "Animate", "Speak")
LONG_WORD = "lighthouse" * 30
RTL = (
    "\u05de\u05d2\u05d3\u05dc\u05d5\u05e8 \u05d1\u05e2\u05e8\u05d1, \u05d9\u05dd \u05e9\u05e7\u05d8"
)
LONG_ERROR = "\\n".join(f"line {n}: the safety checker has refused this part" for n in range(10))
OPEN_MENU = """() => {
  const menu = document.querySelector('.toolbar .menu');
  if (!menu.open) menu.querySelector('summary').click();
}"""
OPEN_HISTORY_MENU = """() => {
  const menu = document.querySelector('#history-menu');
  if (!menu.open) menu.querySelector('summary').click();
}"""
OPEN_SHEET = """() => {
  const button = document.querySelector('#sheet-button');
  if (button.checkVisibility() && button.getAttribute('aria-expanded') === 'false') button.click();
}"""
ERRORS_SHOWN = """(count) =>
  document.querySelectorAll('.job [role=alert]:not([hidden])').length === count"""
ADMIN = "s3cret-ann"


async def test_each_task_without_results(visitor: Visitor) -> None:
    flaws = []
    for task in TASKS:
        await visitor.click(task, role="link")
        await visitor.wait_for("#job-form[data-endpoint]")
        await visitor.wait_until("() => document.querySelectorAll('.example').length === 6")
        flaws += await visitor.find_flaws(f"task-{task}")
    await visitor.act("click", selector="#copy-form-code")
    await visitor.wait_for(".code-dialog")
    flaws += await visitor.find_flaws("code")
    await visitor.act("press", key="Escape")
    assert flaws == []


async def test_a_result_with_menus_sheet_and_notices(visitor: Visitor, tmp_path: Path) -> None:
    await visitor.submit_job("make it winter", image=create_image(tmp_path / "photo.png"))
    await visitor.wait_for_results(1)
    await visitor.wait_for(".zoom-button img")
    for number in range(14):
        await visitor.submit_job(f"!error 500 internal_server_error {number}", FLUX)
    await visitor.wait_until(ERRORS_SHOWN, 14)
    flaws = await visitor.find_flaws("menu-above-jobs", OPEN_MENU)
    await visitor.act("press", key="Escape")
    flaws += await visitor.find_flaws("history-menu", OPEN_HISTORY_MENU)
    await visitor.act("press", key="Escape")
    await visitor.act("click", selector="#share-form")
    await visitor.wait_for_text("#toast", "The link is in the clipboard")
    await visitor.act("hover", selector="#toast")
    flaws += await visitor.find_flaws("share")
    await visitor.click("Clear finished")
    flaws += await visitor.find_flaws("history-menu-above-results", OPEN_HISTORY_MENU)
    await visitor.act("press", key="Escape")
    flaws += await visitor.find_flaws("sheet", OPEN_SHEET)
    assert flaws == []


async def test_running_and_failed_jobs_without_a_result(visitor: Visitor) -> None:
    await visitor.submit_job("!error 500 internal_server_error", FLUX)
    await visitor.wait_until(ERRORS_SHOWN, 1)
    top = "() => document.querySelector('.job').getBoundingClientRect().top"
    flaws = await visitor.find_flaws("first-failed")
    await visitor.act("resize", width=360)
    assert (
        await visitor.evaluate(
            f"() => ({top})() - document.querySelector('#results').getBoundingClientRect().top"
        )
        < 40
    )
    await visitor.act("resize", width=1440)
    await visitor.click("Dismiss")
    for number in range(3):
        await visitor.submit_job(f"!delay 60 {LONG_WORD} {number}", FLUX)
    await visitor.wait_for(".log-toggle:visible")
    await visitor.act("click", selector=".log-toggle:visible")
    flaws += await visitor.find_flaws("running-with-log")
    assert flaws == []


async def test_long_words_other_scripts_and_a_long_error(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    await visitor.submit_job(LONG_WORD, SCHNELL)
    await visitor.wait_for_results(1)
    await visitor.wait_for(".zoom-button img")
    flaws = await visitor.find_flaws("long-word", OPEN_SHEET)
    await visitor.submit_job(RTL, SCHNELL)
    await visitor.wait_for_results(2)
    flaws += await visitor.find_flaws("right-to-left")
    await visitor.act(
        "intercept", pattern="**/api/fal/proxy", method="POST", target="https://queue.fal.run/",
        status=422, body=f'{{"detail": "{LONG_ERROR}"}}',
    )  # fmt: skip
    await visitor.submit_job(f"{LONG_WORD} fails", SCHNELL)
    await visitor.wait_for(".job [role=alert]")
    await visitor.click("Details")
    flaws += await visitor.find_flaws("long-error")
    await visitor.act("setOffline", isOffline=True)
    await visitor.submit_job("a lighthouse", SCHNELL)
    await visitor.wait_for_text(".job", "Nothing was sent")
    flaws += await visitor.find_flaws("offline")
    await visitor.act("setOffline", isOffline=False)
    await visitor.wait_for_results(3)
    assert flaws == []


async def test_a_history_of_1000_entries(driver: Driver, proxy: RestartableProxy) -> None:
    async with driver.visit(proxy.base) as visitor:
        await visitor.open_page()
        await visitor.fill_history(
            [f"entry {n}" if n % 3 else "a" * 80 + str(n) for n in range(1000)],
            "/web/examples/city.svg",
        )
        await visitor.act("reload")
        assert await visitor.find_flaws("history-1000") == []
        await visitor.act("resize", width=768)
        rows = """() => new Set([...document.querySelectorAll('.thumbnails li')]
          .map((tile) => tile.getBoundingClientRect().top)).size"""
        assert await visitor.evaluate(rows) == 1, "a strip on tablets"


async def test_a_locked_page_without_a_key(driver: Driver, tmp_path: Path) -> None:
    async with (
        open_proxy(tmp_path / "data", access_key="open sesame") as proxy,
        driver.visit(proxy.base) as visitor,
    ):
        await visitor.act("gotoWithoutWaiting", url=proxy.base)
        await visitor.wait_for("#access-dialog")
        flaws = await visitor.find_flaws("key-dialog")
        await visitor.click("Not now")
        await visitor.wait_for("html[data-ready]")
        flaws += await visitor.find_flaws("locked")
        assert flaws == []


async def test_a_missing_page_and_the_docs(driver: Driver, tmp_path: Path) -> None:
    async with (
        open_running_proxy(tmp_path) as place,
        driver.visit(f"{place.origin}/") as visitor,
    ):
        await visitor.act("gotoWithoutWaiting", url=f"{place.origin}/not/there")
        flaws = await visitor.find_flaws("404")
        await visitor.act("gotoWithoutWaiting", url=f"{place.origin}/docs")
        await visitor.wait_for(".opblock")
        await visitor.act("click", selector=".opblock-summary-control")
        await visitor.wait_for(".opblock-body")
        flaws += await visitor.find_flaws("docs")
        assert flaws == []


async def test_the_dashboard_and_its_keys(driver: Driver, tmp_path: Path) -> None:
    async with (
        open_running_proxy(
            tmp_path, access_keys=(("ann", ADMIN), ("bob", "s3cret-bob")), admins=("ann",)
        ) as place,
        driver.visit(f"{place.origin}/") as visitor,
    ):
        await visitor.act("gotoWithoutWaiting", url=f"{place.origin}/dashboard")
        await visitor.act("fill", label="Your key", text=ADMIN)
        await visitor.click("Continue")
        await visitor.wait_for("#keys-panel")
        flaws = await visitor.find_flaws("dashboard-empty")
        headers = {"x-falproxy-key": ADMIN}
        bodies = [
            (f"/api/fal/run/{FLUX}", {"prompt": prompt})
            for prompt in ("a lighthouse", "!error 422 content_policy_violation", LONG_WORD)
        ] + [("/api/keys", {"name": name}) for name in ("batch", "w" * 40)]
        for path, body in bodies:
            url = f"{place.origin}{path}"
            async with place.session.post(url, json=body, headers=headers) as response:
                assert response.status in {200, 201, 422}
        await visitor.act("gotoWithoutWaiting", url=f"{place.origin}/dashboard")
        await visitor.wait_for("#keys tbody tr")
        await visitor.wait_for_text("body", "content_policy_violation")
        flaws += await visitor.find_flaws("dashboard")
        assert flaws == []


async def test_the_example_page(driver: Driver, tmp_path: Path) -> None:
    need(DIST)
    photo = create_image(tmp_path / "photo.png")
    async with (
        open_world(tmp_path, {"/example": DIST}) as world,
        driver.visit(f"{world.gateway}/example/") as visitor,
    ):
        page = f"{world.gateway}/example/index.html"
        await visitor.act("gotoWithoutWaiting", url=page)
        flaws = await visitor.find_flaws("example")
        await visitor.click("Generate")
        flaws += await visitor.find_flaws("example-incomplete")
        await visitor.act("setFiles", paths=[str(photo)])
        await visitor.act("fill", label="Prompt", text="make it winter")
        async with world.busy():
            await visitor.click("Generate")
            await visitor.wait_for("#status[data-phase=queued]")
            flaws += await visitor.find_flaws("example-queued")
        await visitor.wait_for("#status[data-phase=done]")
        flaws += await visitor.find_flaws("example-done")
        await visitor.act("fill", label="Prompt", text=f"!error 422 {LONG_WORD}")
        await visitor.click("Generate")
        await visitor.wait_for("#status[data-phase=failed]")
        flaws += await visitor.find_flaws("example-error")
        await visitor.act("gotoWithoutWaiting", url=f"{world.gateway}/example/live.html")
        flaws += await visitor.find_flaws("example-live")
        assert flaws == []
