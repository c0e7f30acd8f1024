"""The page at `/` in Chromium, on the sandbox: making, waiting, looking, keeping."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.end_to_end.test_js_node import photo
from tests.support.page_browser import KONTEXT, Driver, Place, Visitor, launch, open_place, picture

FIRST_LOAD_MAX = 60_000  # bytes over the wire
PROGRESS = "() => document.querySelector('.bar').getAttribute('aria-valuenow')"
SLIDER = ".compare input[type=range]"
BY = "\N{MULTIPLICATION SIGN}"
BOUNDS = """(id) => {
  const { min, max, value } = document.getElementById(id);
  return [min, max, value];
}"""
BOTH_RUN = """() => [...document.querySelectorAll('.phase')]
  .filter((one) => one.innerText === 'Running').length === 2"""
THUMBS = """() => [...document.querySelectorAll('.open img')]
  .every((one) => one.src.startsWith('blob:'))"""
FOCUSED = """() => document.activeElement.id.replace(/^[0-9a-f]{32}-/, '')
  || document.activeElement.innerText.trim() || document.activeElement.ariaLabel"""
OLD = """async ([name, job]) => new Promise((resolve, reject) => {
  indexedDB.deleteDatabase(name).onsuccess = () => {
    const request = indexedDB.open(name, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore('jobs', { keyPath: 'id' }).createIndex('created', 'created');
      request.transaction.objectStore('jobs').put(job);
    };
    request.onsuccess = () => { request.result.close(); resolve(); };
    request.onerror = () => reject(request.error);
  };
})"""
NEWER = """() => new Promise((resolve) => {
  const request = indexedDB.open('falproxy:/', 99);
  request.onupgradeneeded = () => request.result.createObjectStore('jobs', { keyPath: 'id' });
  request.onsuccess = () => { request.result.close(); resolve(); };
})"""
NOTHING_KEPT = """IDBFactory.prototype.open = () => {
  throw new DOMException('no', 'SecurityError');
};"""
FULL = """const put = IDBObjectStore.prototype.put;
IDBObjectStore.prototype.put = function (...given) {
  if (window.isFull) throw new DOMException('full', 'QuotaExceededError');
  return put.apply(this, given);
};"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """One browser for all tests here. TEST_ARTEFACTS: where screenshots are kept."""
    named = os.environ.get("TEST_ARTEFACTS")
    artefacts = Path(named).resolve() if named else tmp_path_factory.mktemp("page")
    artefacts.mkdir(parents=True, exist_ok=True)
    driver = launch(artefacts)
    with driver.process as process:
        assert process.stdin is not None
        try:
            yield driver
            process.stdin.close()
            process.wait(timeout=30)
        finally:
            process.kill()


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with open_place(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
async def visitor(driver: Driver, place: Place) -> AsyncIterator[Visitor]:
    async with driver.visit(place.base) as visiting:
        await visiting.arrive()
        yield visiting


async def test_a_newcomer_gets_a_picture_with_one_click(visitor: Visitor, place: Place) -> None:
    await visitor.look("empty")
    assert "sandbox" in await visitor.text("#welcome")
    assert await visitor.text("#states") == "Sandbox"
    await visitor.click("Make a first picture")
    await visitor.made(1)
    await visitor.wait(SLIDER)
    assert "Miss: about $0.04, not charged" in await visitor.text(".facts")
    assert place.sandbox.jobs_by_endpoint == {KONTEXT: 1}
    await visitor.look("result")
    # The card stays where it is, with its bar full: nothing moves by itself.
    assert await visitor.run(PROGRESS) == "100"
    assert "Done" in await visitor.text(".job")


async def test_it_is_asked_for_the_first_time_in_few_bytes_and_from_here_alone(
    driver: Driver, place: Place
) -> None:
    async with driver.visit(place.base) as visitor:
        await visitor.arrive()
        loaded = await visitor.act("loaded")
        total = sum(entry["bytes"] for entry in loaded)
        assert 0 < total < FIRST_LOAD_MAX, loaded
        here = urlsplit(place.base).netloc
        asked = await visitor.act("requests")
        assert {urlsplit(request["url"]).netloc for request in asked} == {here}
        assert await visitor.act("shift") < 0.02
        # The second time, everything but the page itself comes from the browser's own cache.
        await visitor.act("reload")
        again = [entry["name"] for entry in await visitor.act("loaded") if entry["bytes"] > 0]
        assert [name for name in again if "/web/@" in name] == []
        assert await visitor.act("complaints") == []


async def test_it_works_below_a_prefix(driver: Driver, tmp_path: Path) -> None:
    async with (
        open_place(tmp_path / "data", "/deep/er") as place,
        driver.visit(place.base.rstrip("/")) as visitor,
    ):
        await visitor.arrive()
        await visitor.wish("a lighthouse", "fal-ai/flux/schnell")
        await visitor.made(1)
        asked = await visitor.act("requests")
        assert {urlsplit(request["url"]).path.split("/")[1] for request in asked} == {"deep"}


# Make


async def test_pictures_come_by_choice_drop_paste_and_address(
    visitor: Visitor, place: Place, tmp_path: Path
) -> None:
    photo = picture(tmp_path / "photo.png")
    await visitor.act("files", paths=[str(photo)])
    await visitor.says(".chosen", f"photo.png, 320 {BY} 240")
    await visitor.act(
        "drop", selector="#make", path=str(picture(tmp_path / "dropped.jpg")), type=""
    )
    await visitor.says(".chosen", f"dropped.jpg, 320 {BY} 240")
    await visitor.act("copyPicture", path=str(photo))
    await visitor.act("focus", selector="#prompt")
    await visitor.act("press", key="Control+v")
    await visitor.says(".chosen", f"image.png, 320 {BY} 240")
    await visitor.click("Remove", exact=False)
    assert await visitor.run("() => document.activeElement.type") == "file"
    await visitor.click("Paste")
    await visitor.says(".chosen", f"320 {BY} 240")
    await visitor.click("From an address")
    await visitor.act("fill", label="Address of a picture", text="javascript:alert(1)")
    await visitor.act("press", key="Enter")
    await visitor.says(".slot .problem", "This is no address of a picture.")
    url = place.sandbox.file_url("nothing/here.png")
    await visitor.act("fill", label="Address of a picture", text=url)
    await visitor.click("Use", exact=True)
    await visitor.says(".chosen", "Not shown here")
    assert await visitor.act("count", selector=".chosen li") == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("notes.png", b"not a picture", "no picture that models can read", id="text"),
        pytest.param("empty.png", b"", "This file is empty", id="nothing in it"),
        pytest.param(
            "torn.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 60, "This picture is damaged", id="torn"
        ),
        pytest.param(
            "phone.jpg", b"\0\0\0\x18ftypheic" + b"\0" * 20, "This is a HEIC picture", id="heic"
        ),
    ],
)
async def test_a_bad_file_is_refused_before_anything_is_sent(
    visitor: Visitor, place: Place, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    await visitor.act("files", paths=[str(file)])
    await visitor.says(".slot .problem", words)
    if name == "notes.png":
        await visitor.look("bad-file")
    await visitor.act("fill", label="Prompt", text="make it winter")
    await visitor.click("Make picture")
    await visitor.says(".slot .problem", "This model starts from a picture")
    assert place.submits() == []


async def test_a_picture_of_too_many_pixels_is_refused(visitor: Visitor, tmp_path: Path) -> None:
    await visitor.act("files", paths=[str(picture(tmp_path / "huge.png", (8000, 6500)))])
    await visitor.says(".slot .problem", "52 megapixels; 50 is the most")


async def test_options_appear_where_the_model_takes_them_with_its_ranges(
    visitor: Visitor, place: Place
) -> None:
    await visitor.act("click", selector="#options summary")
    kontext = await visitor.texts("#fields label, #fields .label")
    assert kontext[:4] == ["Pictures", "Aspect ratio", "Seed", "Guidance"]
    assert "Steps" not in kontext
    await visitor.act("choose", label="Model", option="fal-ai/flux-lora")
    await visitor.says("#fields", "LoRA styles")
    assert await visitor.run(BOUNDS, "option-num_inference_steps") == ["1", "50", "28"]
    assert await visitor.run(BOUNDS, "option-guidance_scale") == ["0", "35", "3.5"]
    assert await visitor.texts(".slot") == []
    await visitor.act("fill", label="Steps", text="12")
    await visitor.act("fill", label="Seed", text="7")
    await visitor.act("choose", label="Size", option="own")
    await visitor.act("fill", label="Width in pixels", text="640")
    await visitor.act("fill", label="Height in pixels", text="384")
    await visitor.click("Add a style")
    await visitor.act(
        "fill", label="Address of the style", text="https://example.com/a.safetensors"
    )
    await visitor.act("fill", label="Scale of the style", text="9")
    await visitor.act("fill", label="Prompt", text="a lighthouse")
    await visitor.click("Make picture")
    await visitor.says("#fields .problem", "from 0 to 4")
    await visitor.act("fill", label="Scale of the style", text="0.8")
    await visitor.look("options")
    await visitor.act("press", key="Control+Enter")
    await visitor.made(1)
    paid = place.sandbox.paid[-1]
    assert paid.input == {
        "prompt": "a lighthouse", "seed": 7, "num_inference_steps": 12,
        "image_size": {"width": 640, "height": 384},
        "loras": [{"path": "https://example.com/a.safetensors", "scale": 0.8}],
    }  # fmt: skip
    assert f"640 {BY} 384" in await visitor.text(".facts")


async def test_every_model_of_the_catalogue_has_a_form(visitor: Visitor) -> None:
    for endpoint in await visitor.act("values", selector="#model option"):
        await visitor.act("choose", label="Model", option=endpoint)
        await visitor.says("#model-says", "")
    await visitor.act("choose", label="Model", option="fal-ai/face-swap")
    await visitor.says("#slots", "Swap image")
    assert await visitor.texts(".slot > .label") == ["Base image", "Swap image"]
    assert await visitor.texts("#prompt-field") == []


async def test_without_a_catalogue_the_kontext_family_is_offered(
    driver: Driver, place: Place
) -> None:
    async with driver.visit(place.base) as visitor:
        await visitor.act("intercept", pattern="**/api/images/models", status=404, times=9)
        await visitor.arrive()
        offered = await visitor.act("values", selector="#model option")
        assert offered == [KONTEXT, f"{KONTEXT}/max", "fal-ai/flux-kontext/dev"]


async def test_a_large_picture_goes_to_fal_s_files_first(driver: Driver, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(photo())
    async with (
        open_place(tmp_path / "data", sandbox=False) as place,
        driver.visit(place.base) as visitor,
    ):
        await visitor.arrive()
        await visitor.wish("make it winter", picture=large)
        await visitor.made(1)
        sent = place.sandbox.paid[-1].input
        assert isinstance(sent, dict)
        assert sent["image_url"].startswith(place.sandbox.public_url)


async def test_without_uploads_a_large_picture_goes_with_the_call(
    driver: Driver, tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(photo())
    async with (
        open_place(tmp_path / "data", uploads=False) as place,
        driver.visit(place.base) as visitor,
    ):
        await visitor.arrive()
        await visitor.wish("make it winter", picture=large)
        await visitor.made(1)
        sent = place.sandbox.paid[-1].input
        assert isinstance(sent, dict)
        assert sent["image_url"].startswith("data:image/png;base64,")


# Wait


async def test_the_wait_is_told_as_it_is(visitor: Visitor, place: Place) -> None:
    async with place.busy():
        await visitor.wish("!delay 4 a lighthouse", "fal-ai/flux/dev")
        await visitor.says(".phase", "In the queue, 1 ahead")
        assert await visitor.run(PROGRESS) is None  # nobody knows how long a queue takes
        await visitor.look("queued")
    await visitor.says(".phase", "Running")
    await visitor.says(".log", "2/4")
    assert await visitor.run(PROGRESS) in {"50", "75"}
    assert (await visitor.text(".clock")).endswith(" s")
    await visitor.look("running")
    await visitor.made(1)
    assert await visitor.run(PROGRESS) == "100"


async def test_a_job_is_cancelled_at_fal_too(visitor: Visitor, place: Place) -> None:
    await visitor.wish("!delay 60 a lighthouse", "fal-ai/flux/dev")
    await visitor.says(".phase", "Running")
    await visitor.click("Cancel")
    await visitor.says(".phase", "Cancelled")
    cancels = [seen for seen in place.sandbox.seen if seen.path.endswith("/cancel")]
    assert [(seen.method, seen.status) for seen in cancels] == [("PUT", 202)]
    assert place.sandbox.jobs == 0
    await visitor.look("cancelled")
    await visitor.click("Use again")
    assert await visitor.act("values", selector="#prompt") == ["!delay 60 a lighthouse"]
    await visitor.click("Dismiss")
    await visitor.wait(".job", state="detached")


async def test_several_jobs_run_at_once(visitor: Visitor, place: Place) -> None:
    for number in range(3):
        await visitor.wish(f"!delay 3 picture {number}", "fal-ai/flux/schnell")
    await visitor.until("() => document.querySelectorAll('.job').length === 3")
    await visitor.look("several")
    await visitor.made(3)
    assert place.sandbox.jobs == 3


async def test_a_reload_in_the_middle_goes_on_with_the_jobs(visitor: Visitor, place: Place) -> None:
    await visitor.wish("!delay 3 the first", "fal-ai/flux/dev")
    await visitor.wish("!delay 3 the second", "fal-ai/flux/dev")
    await visitor.until(BOTH_RUN)
    await visitor.act("reload")
    assert sorted(await visitor.texts(".job-prompt")) == [
        "!delay 3 the first",
        "!delay 3 the second",
    ]
    await visitor.made(2)
    assert place.submits() == ["fal-ai/flux/dev"] * 2
    assert place.sandbox.jobs == 2


async def test_a_proxy_that_is_stopped_in_the_middle_is_waited_for(
    visitor: Visitor, place: Place
) -> None:
    await visitor.wish("!delay 4 a lighthouse", "fal-ai/flux/dev")
    await visitor.says(".phase", "Running")
    await place.stop()
    await visitor.says(".job", "I keep asking")
    await visitor.says("#states", "The proxy does not answer")
    await visitor.look("away")
    await place.start()
    await visitor.made(1)
    assert "does not answer" not in await visitor.text("#states")
    assert place.submits() == ["fal-ai/flux/dev"]


async def test_what_may_be_bought_is_never_sent_again(visitor: Visitor, place: Place) -> None:
    await visitor.act(
        "loseAnswer", pattern="**/api/fal/proxy", method="POST", target="https://queue.fal.run/"
    )
    await visitor.wish("a lost letter", "fal-ai/flux/dev")
    await visitor.says(".job", "The answer was lost")
    assert "fal may have taken this job" in await visitor.text(".job")
    await visitor.look("lost")
    await visitor.act("reload")
    await visitor.says(".job", "The answer was lost")
    assert place.submits() == ["fal-ai/flux/dev"]


async def test_a_submit_without_a_proxy_is_told_and_not_repeated(
    visitor: Visitor, place: Place
) -> None:
    await place.stop()
    await visitor.wish("a lighthouse", "fal-ai/flux/schnell")
    await visitor.says(".job", "The answer was lost")
    await place.start()
    await asyncio.sleep(1)
    assert place.submits() == []


async def test_too_many_calls_are_made_later(visitor: Visitor, place: Place) -> None:
    await visitor.act(
        "intercept", pattern="**/api/fal/proxy", method="POST", target="https://queue.fal.run/",
        status=429, headers={"retry-after": "2"}, body='{"message": "Too many calls."}',
    )  # fmt: skip
    await visitor.wish("a lighthouse", "fal-ai/flux/dev")
    await visitor.says(".job", "it is sent in 2 s")
    await visitor.made(1)
    assert place.submits() == ["fal-ai/flux/dev"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        pytest.param(
            "!error 422 content_policy_violation", "safety checker refused this", id="refused"
        ),
        pytest.param("!error 500 internal_server_error", "fal has a problem", id="broken"),
        pytest.param("!error 504 generation_timeout", "The model took too long", id="late"),
    ],
)
async def test_errors_are_told_in_words_with_what_to_do(
    visitor: Visitor, prompt: str, words: str
) -> None:
    await visitor.wish(prompt, "fal-ai/flux/dev")
    await visitor.says(".job [role=alert]", words)
    assert await visitor.texts(".phase") == ["Failed"]
    if words.startswith("safety"):
        await visitor.look("error")


async def test_a_model_that_is_not_allowed_is_told_in_words(driver: Driver, tmp_path: Path) -> None:
    async with (
        open_place(tmp_path / "data", allowed_endpoints=("fal-ai/flux/dev",)) as place,
        driver.visit(place.base) as visitor,
    ):
        await visitor.arrive()
        assert await visitor.act("values", selector="#model option") == ["fal-ai/flux/dev"]


# Look


async def test_before_and_after_by_keyboard_mouse_and_touch(
    driver: Driver, place: Place, tmp_path: Path
) -> None:
    async with driver.visit(place.base, isTouch=True) as visitor:
        await visitor.arrive()
        await visitor.wish("make it winter", picture=picture(tmp_path / "photo.png"))
        await visitor.wait(SLIDER)
        await visitor.act("focus", selector=SLIDER)
        await visitor.act("press", key="ArrowLeft")
        await visitor.act("press", key="PageUp")
        value = "() => Number(document.querySelector('.compare input').value)"
        assert await visitor.run(value) == 59
        await visitor.act("press", key="Home")
        assert await visitor.run(value) == 0
        await visitor.act("press", key="End")
        assert await visitor.run(value) == 100
        await visitor.act("drag", selector=".compare", **{"from": [0.9, 0.5], "to": [0.25, 0.5]})
        assert 20 <= await visitor.run(value) <= 30
        await visitor.act("touch", selector=".compare", at=[0.8, 0.4])
        assert 75 <= await visitor.run(value) <= 85
        await visitor.click("Compare")
        assert await visitor.act("count", selector=".compare") == 0
        assert await visitor.run("() => document.activeElement.innerText") == "Compare"


async def test_a_picture_is_zoomed_saved_copied_and_used_again(
    visitor: Visitor, place: Place, tmp_path: Path
) -> None:
    await visitor.wish("A lighthouse, at dusk!", "fal-ai/flux/schnell")
    await visitor.made(1)
    await visitor.wait(".plain img")
    url = await visitor.run("() => document.querySelector('.plain img').src")
    await visitor.click("Zoom")
    await visitor.wait("dialog.zoom")
    await visitor.act("press", key="+")
    await visitor.says(".zoom-bar output", "%")
    await visitor.act("press", key="0")
    await visitor.says(".zoom-bar output", "Fits")
    await visitor.look("zoom")
    await visitor.act("press", key="Escape")
    await visitor.wait("dialog.zoom", state="detached")
    assert await visitor.run("() => document.activeElement.innerText") == "Zoom"
    saved = await visitor.act("download", role="button", name="Download")
    seed = place.sandbox.paid[-1]
    assert saved["name"].startswith("a-lighthouse-at-dusk-seed-")
    assert saved["name"].endswith(".jpg")
    assert saved["bytes"] > 1000
    assert seed.endpoint == "fal-ai/flux/schnell"
    await visitor.click("Copy URL")
    await visitor.says(".tools", "Copied")
    assert await visitor.act("clipboard") == url
    await visitor.click("Use as input")
    await visitor.says(".chosen", "a-lighthouse-at-dusk-seed-")
    await visitor.act("fill", label="Prompt", text="make it winter")
    await visitor.act("press", key="Control+Enter")
    await visitor.made(2)
    await visitor.wait(SLIDER)


async def test_several_pictures_are_a_grid(visitor: Visitor) -> None:
    await visitor.act("click", selector="#options summary")
    await visitor.act("choose", label="Model", option="fal-ai/flux/schnell")
    await visitor.says("#fields", "Steps")
    await visitor.act("fill", label="Pictures", text="4")
    await visitor.act("fill", label="Seed", text="11")
    await visitor.says("#price", "a megapixel")
    await visitor.wish("a lighthouse")
    await visitor.made(1)
    await visitor.until("() => document.querySelectorAll('.grid img').length === 4")
    await visitor.click("Picture 3 of 4", exact=True)
    alt = await visitor.run("() => document.querySelector('.plain img').alt")
    assert alt == "Picture 3 of 4: a lighthouse"
    facts = await visitor.text(".facts")
    assert "11" in facts.split("\n")
    assert "Pictures" in facts
    await visitor.look("grid")


async def test_what_was_saved_is_shown(visitor: Visitor, place: Place, tmp_path: Path) -> None:
    photo = picture(tmp_path / "photo.png")
    await visitor.wish("make it winter", picture=photo)
    await visitor.made(1)
    assert "Miss: about $0.04" in await visitor.text(".facts")
    await visitor.click("Make picture")
    await visitor.made(2)
    assert "Hit: saved $0.04" in await visitor.text(".facts")
    assert place.sandbox.jobs == 1
    await visitor.look("hit")


async def test_a_picture_that_is_gone_is_told_in_words(visitor: Visitor) -> None:
    await visitor.wish("a lighthouse", "fal-ai/flux/schnell")
    await visitor.made(1)
    await visitor.until("() => document.querySelector('.open img').src.startsWith('blob:')")
    await visitor.act("intercept", pattern="**/files/**", times=9)
    await visitor.act("reload")
    await visitor.says(".gone", "not at its address any more")
    await visitor.look("gone")


# Keep


async def test_the_history_is_kept_searched_and_deleted(visitor: Visitor) -> None:
    for prompt in ("a red lighthouse", "a green forest", "a red car"):
        await visitor.wish(prompt, "fal-ai/flux/schnell")
    await visitor.made(3)
    await visitor.until(THUMBS)
    await visitor.act("reload")
    await visitor.made(3)
    assert await visitor.run(THUMBS)
    await visitor.act("fill", label="Search the history", text="RED flux/schnell")
    assert sorted(await visitor.texts(".open")) == ["a red car", "a red lighthouse"]
    assert await visitor.text("#history-count") == "2 of 3"
    await visitor.act("fill", label="Search the history", text="blue")
    assert "Nothing in the history" in await visitor.text("#history-empty")
    await visitor.act("fill", label="Search the history", text="")
    await visitor.look("history")
    await visitor.act("hover", selector=".thumbs li")
    await visitor.click("Delete: a green forest")
    await visitor.made(2)
    focused = await visitor.run("() => document.activeElement.closest('.thumbs') !== null")
    assert focused
    await visitor.click("Delete all")
    await visitor.look("delete-all")
    await visitor.click("Delete", exact=True)
    await visitor.made(0)
    await visitor.act("reload")
    await visitor.made(0)
    assert await visitor.texts("#welcome .lead") == ["Your pictures appear here."]


async def test_the_history_of_an_older_version_is_there(driver: Driver, place: Place) -> None:
    job = {
        "id": "old", "state": "done", "created": 1_700_000_000_000, "prompt": "from long ago",
        "images": [{"url": f"{place.base}files/nothing.png"}],
    }  # fmt: skip
    async with driver.visit(place.base) as visitor:
        await open_blank(visitor, place)
        await visitor.run(OLD, ["falproxy:/", job])
        await visitor.arrive()
        await visitor.made(1)
        assert await visitor.texts(".open") == ["from long ago"]


async def open_blank(visitor: Visitor, place: Place) -> None:
    """Some document of the page's origin that is not the page."""
    await visitor.act("visitPlain", url=f"{place.base}web/about.json")


async def test_a_history_of_a_newer_version_is_left_alone(driver: Driver, place: Place) -> None:
    async with driver.visit(place.base) as visitor:
        await open_blank(visitor, place)
        await visitor.run(NEWER)
        await visitor.arrive()
        assert "A newer version of this page" in await visitor.text("#notices")
        await visitor.wish("a lighthouse", "fal-ai/flux/schnell")
        await visitor.made(1)


async def test_it_works_where_the_browser_keeps_nothing(driver: Driver, place: Place) -> None:
    async with driver.visit(place.base) as visitor:
        await visitor.act("before", code=NOTHING_KEPT)
        await visitor.arrive()
        assert "keeps no history" in await visitor.text("#notices")
        await visitor.wish("a lighthouse", "fal-ai/flux/schnell")
        await visitor.made(1)
        await visitor.wait(".plain img")


async def test_a_full_history_is_told_and_mended_by_deleting(driver: Driver, place: Place) -> None:
    async with driver.visit(place.base) as visitor:
        await visitor.act("before", code=FULL)
        await visitor.arrive()
        await visitor.wish("the first", "fal-ai/flux/schnell")
        await visitor.made(1)
        await visitor.run("() => { window.isFull = true; }")
        await visitor.wish("the second", "fal-ai/flux/schnell")
        await visitor.made(2)
        await visitor.says("#notices", "no more room for the history")
        await visitor.look("full")
        await visitor.run("() => { window.isFull = false; }")
        await visitor.act("hover", selector=".thumbs li:last-child")
        await visitor.click("Delete: the first")
        await visitor.made(1)
        await visitor.says_nothing("#notices")


async def test_another_tab_sees_the_same_and_nothing_is_done_twice(
    visitor: Visitor, place: Place
) -> None:
    await visitor.act("tab", url=place.base)
    await visitor.wish("!delay 3 a lighthouse", "fal-ai/flux/dev")
    await visitor.says(".job", "a lighthouse", tab=1)
    await visitor.says(".phase", "Running", tab=1)
    await visitor.act("closeTab")  # the other one goes on with the job
    await visitor.made(1, tab=1)
    await visitor.act("reload", tab=1)
    await visitor.made(1, tab=1)
    assert place.submits() == ["fal-ai/flux/dev"]
    assert place.sandbox.jobs == 1


# Whom it lets in, and what it says of itself


async def test_the_access_key_is_asked_for_and_remembered(driver: Driver, tmp_path: Path) -> None:
    async with (
        open_place(tmp_path / "data", access_key="open sesame") as place,
        driver.visit(place.base) as visitor,
    ):
        await visitor.act("visitPlain", url=place.base)
        await visitor.wait("#access-dialog")
        await visitor.look("access")
        await visitor.act("fill", label="Your key", text="wrong")
        await visitor.act("press", key="Enter")
        await visitor.says("#access-why", "does not know that key")
        await visitor.act("fill", label="Your key", text="open sesame")
        await visitor.click("Continue")
        await visitor.wait("html[data-ready]")
        await visitor.wish("a lighthouse", "fal-ai/flux/schnell")
        await visitor.made(1)
        await visitor.act("reload")
        assert await visitor.act("count", selector="#access-dialog") == 0
        await visitor.click("Forget key")
        await visitor.act("choose", label="Model", option="fal-ai/flux/schnell")
        await visitor.wait("#access-dialog")
        assert place.sandbox.jobs == 1


async def test_being_offline_is_said(visitor: Visitor) -> None:
    await visitor.act("offline", **{"is": True})
    await visitor.wish("a lighthouse", "fal-ai/flux/schnell")
    await visitor.says("#states", "You are offline")
    await visitor.act("offline", **{"is": False})
    await visitor.until("() => !document.querySelector('#states').innerText.includes('offline')")


async def test_it_is_walked_through_by_keyboard(visitor: Visitor) -> None:
    stops = []
    for _ in range(13):
        await visitor.act("press", key="Tab")
        stops.append(await visitor.run(FOCUSED))
    assert stops == [
        "Skip to the results", "falproxy", "Page", "Dashboard", "API docs", "model", "file",
        "Paste", "From an address", "prompt", "Options", "submit", "example",
    ]  # fmt: skip
    small = await visitor.run(
        """() => [...document.querySelectorAll('a, button, input:not(.file), select, summary')]
          .filter((one) => one.checkVisibility() && !one.matches('.skip'))
          .map((one) => [one.outerHTML.slice(0, 80), one.getBoundingClientRect()])
          .filter(([, { width, height }]) => width < 24 || height < 24)
          .map(([html]) => html)"""
    )
    assert small == []
