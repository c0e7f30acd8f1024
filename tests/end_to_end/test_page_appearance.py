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
# The number of rows, after the toolbar has been rendered for the new width.
TOOLBAR_ROWS = """async () => {
  const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
  await frame();
  await frame();
  const boxes = [...document.querySelector('.toolbar').children]
    .map((item) => item.getBoundingClientRect())
    .filter(({ width }) => width > 0);
  return new Set(boxes.map(({ y, height }) => Math.round(y + height / 2))).size;
}"""
FIGURE_ENDS = """() => [...document.querySelectorAll('.figure')]
  .map((figure) => figure.lastElementChild.classList.contains('api-call'))"""
# Buttons of the keys that are beyond the edge of their table.
HIDDEN_BUTTONS = """() => {
  const { right } = document.querySelector('#keys').getBoundingClientRect();
  const isBeyond = (button) => button.getBoundingClientRect().right > right;
  return [...document.querySelectorAll('#keys button')].filter(isBeyond).map(({ id }) => id);
}"""
CUT_PLACEHOLDERS = """() => {
  const context = document.createElement('canvas').getContext('2d');
  const isCut = (input) => {
    const { font, paddingLeft, paddingRight } = getComputedStyle(input);
    context.font = font;
    const padding = Number.parseFloat(paddingLeft) + Number.parseFloat(paddingRight);
    return context.measureText(input.placeholder).width > input.clientWidth - padding;
  };
  return [...document.querySelectorAll('input[placeholder]')]
    .filter((input) => input.checkVisibility() && isCut(input))
    .map(({ placeholder }) => placeholder);
}"""
HEADER_HEIGHT = "() => document.querySelector('#header').offsetHeight"
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
    await visitor.act("resize", width=360)
    widths = await visitor.evaluate(
        "() => [...document.querySelectorAll('.job-prompt')].map((line) => line.clientWidth)"
    )
    assert min(widths) > 150, "a prompt is readable on a phone"
    assert flaws == []


async def test_a_job_in_the_queue(visitor: Visitor, proxy: RestartableProxy) -> None:
    async with proxy.busy():
        await visitor.submit_job("a lighthouse on a rocky coast at dusk", FLUX)
        await visitor.wait_for_text(".job-state", "queue")
        assert await visitor.find_flaws("queued") == []


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
        await visitor.act("resize", width=360)
        assert await visitor.evaluate(HEADER_HEIGHT) <= 97, "its space is reserved"
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
        await visitor.click("Try it out")
        await visitor.click("Execute")
        await visitor.wait_for(".live-responses-table .response-col_status")
        flaws += await visitor.find_flaws("docs-executed")
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
        assert await visitor.evaluate(FIGURE_ENDS) == [True] * 5, "the request is below each chart"
        assert await visitor.evaluate(HIDDEN_BUTTONS) == []
        assert flaws == []


async def test_a_dashboard_without_numbers_shows_the_notice_alone(
    driver: Driver, tmp_path: Path
) -> None:
    async with (
        open_running_proxy(tmp_path, access_keys=(("ann", ADMIN),), admins=("ann",)) as place,
        driver.visit(f"{place.origin}/") as visitor,
    ):
        await visitor.act("gotoWithoutWaiting", url=f"{place.origin}/dashboard")
        await visitor.click("Not now")
        await visitor.wait_for_text("#notices", "require an access key")
        assert await visitor.texts("#usage .card") == []
        flaws = await visitor.find_flaws("dashboard-signed-out")
        await visitor.click("Enter a key")
        await visitor.act("fill", label="Your key", text=ADMIN)
        await visitor.click("Continue")
        await visitor.wait_for("#keys-panel")
        assert await visitor.texts("#usage .card") != []
        await visitor.act("setOffline", isOffline=True)
        await visitor.act("click", selector="#ranges label:has-text('Week')")
        await visitor.wait_for_text("#notices", "The proxy does not respond")
        await visitor.act("resize", width=360)
        assert await visitor.texts(".status-chips .bad") == [], "it would cover the heading"
        assert flaws == []


async def test_the_dialogs_of_keys(driver: Driver, tmp_path: Path) -> None:
    async with (
        open_running_proxy(tmp_path, access_keys=(("ann", ADMIN),), admins=("ann",)) as place,
        driver.visit(f"{place.origin}/") as visitor,
    ):
        await visitor.act("gotoWithoutWaiting", url=f"{place.origin}/dashboard")
        await visitor.act("fill", label="Your key", text="wrong")
        await visitor.click("Continue")
        await visitor.wait_for_text("#access-reason", "not valid")
        flaws = await visitor.find_flaws("dashboard-wrong-key")
        await visitor.act("fill", label="Your key", text=ADMIN)
        await visitor.click("Continue")
        await visitor.click("Create a key")
        flaws += await visitor.find_flaws("key-create")
        flaws += await visitor.find_invisible_focus(8)
        await visitor.act("fill", label="Name", text="w" * 40)
        await visitor.act("fill", label="Rate", text=LONG_WORD)
        await visitor.click("Create", exact=True)
        await visitor.wait_for_text("dialog [role=alert]", "rate")
        flaws += await visitor.find_flaws("key-refused")
        await visitor.act("fill", label="Rate", text="60/minute")
        await visitor.click("Create", exact=True)
        await visitor.wait_for("#key-secret")
        flaws += await visitor.find_flaws("key-secret")
        flaws += await visitor.find_invisible_focus(3)
        await visitor.click("Done")
        await visitor.click("Rotate the key")
        flaws += await visitor.find_flaws("key-rotate")
        flaws += await visitor.find_invisible_focus(3)
        await visitor.click("Cancel")
        await visitor.click("Revoke the key")
        flaws += await visitor.find_flaws("key-revoke")
        flaws += await visitor.find_invisible_focus(2)
        assert flaws == []


async def test_the_comparison_of_results_with_long_prompts(visitor: Visitor) -> None:
    await visitor.submit_job("the first", SCHNELL)
    await visitor.wait_for_results(1)
    await visitor.click("Compare")
    await visitor.wait_for_text("dialog", "nothing to compare with")
    flaws = await visitor.find_flaws("compare-nothing")
    assert await visitor.texts("dialog select, dialog input") == []
    await visitor.act("press", key="Escape")
    await visitor.submit_job("a lighthouse on a rocky coast, a long exposure at dusk, " * 2)
    await visitor.wait_for_results(2)
    await visitor.submit_job("the third")
    await visitor.wait_for_results(3)
    await visitor.click("Compare")
    for mode in ("Slider", "Side by side", "Hold"):
        await visitor.act("click", selector=f"label:has-text('{mode}') input")
        flaws += await visitor.find_flaws(f"compare-long-{mode}")
    assert flaws == []


async def test_the_actions_of_a_result_are_in_one_row(visitor: Visitor) -> None:
    await visitor.choose_model(SCHNELL)
    await visitor.act("fill", label="Number of images", text="4")
    await visitor.submit_job("a lighthouse")
    await visitor.wait_for_results(1)
    await visitor.wait_until("() => document.querySelectorAll('.grid img').length === 4")
    rows = {}
    for name in ("all", "one"):
        if name == "one":
            await visitor.click("Image 3 of 4", exact=True)
        for width in (360, 768, 1280, 1440, 1920):
            await visitor.act("resize", width=width)
            rows[name, width] = await visitor.evaluate(TOOLBAR_ROWS)
        await visitor.check_appearance(f"toolbar-{name}")
    assert {*rows.values()} == {1}, rows


async def test_placeholders_are_not_cut_off(driver: Driver, tmp_path: Path) -> None:
    async with (
        open_running_proxy(tmp_path) as place,
        driver.visit(f"{place.origin}/", width=360) as visitor,
    ):
        await visitor.open_page()
        assert await visitor.evaluate(CUT_PLACEHOLDERS) == []
        await visitor.act("click", selector="#model")
        await visitor.wait_for(".model-entry")
        assert await visitor.evaluate(CUT_PLACEHOLDERS) == []
        await visitor.act("gotoWithoutWaiting", url=f"{place.origin}/dashboard")
        await visitor.wait_for("html[data-range]")
        assert await visitor.evaluate(CUT_PLACEHOLDERS) == []


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
