"""The page in Chromium: input images and masks of the form and of jobs survive a reload."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.page_browser import KONTEXT, Driver, RestartableProxy, Visitor, create_image

FLUX = "fal-ai/flux/dev"
MULTI = "fal-ai/flux-pro/kontext/multi"
INPAINTING = "fal-ai/flux-lora/inpainting"
SCHNELL = "fal-ai/flux/schnell"
DRAFTS = """async () => {
  const db = await new Promise((resolve) => {
    const request = indexedDB.open('falproxy:/');
    request.onsuccess = () => resolve(request.result);
  });
  const request = db.transaction('drafts').objectStore('drafts').getAll();
  await new Promise((resolve) => (request.onsuccess = resolve));
  db.close();
  return request.result.map(({ images }) =>
    images.map(({ image }) => image.file?.name ?? image.url));
}"""
HAS_DRAFT = f"""async (names) => {{
  const drafts = await ({DRAFTS})();
  return drafts.some((draft) => JSON.stringify(draft) === JSON.stringify(names));
}}"""
DELETE_DRAFTS = """async () => {
  const db = await new Promise((resolve) => {
    const request = indexedDB.open('falproxy:/');
    request.onsuccess = () => resolve(request.result);
  });
  const transaction = db.transaction('drafts', 'readwrite');
  transaction.objectStore('drafts').clear();
  await new Promise((resolve) => (transaction.oncomplete = resolve));
  db.close();
}"""
# Stores jobs with input images of 400 bytes each, where 1000 bytes are allowed; returns the number
# of images that are stored for each.
STORE_JOBS = """async (states) => {
  const { openJobStore } = await import('/web/job_store.js');
  const store = await openJobStore(1000);
  for (const [index, state] of states.entries()) {
    const file = new File([new Uint8Array(400)], 'a.png');
    const images = index === 0 ? [{ file }, { url: 'https://example.com/a.png' }] : [{ file }];
    await store.write({
      id: `job-${index}`, state, created: index, inputs: 1,
      imageInputs: [{ name: 'image_url', isMany: false, images }],
    });
  }
  const jobs = await (await openJobStore(1000)).readAll();
  return jobs.map(({ imageInputs }) => imageInputs.flatMap(({ images }) => images).length);
}"""


# Stores a form with images of these sizes for each tab, where 1000 bytes are allowed; returns the
# sizes of the images that are stored.
STORE_DRAFTS = """async (tabs) => {
  const { FormDraft } = await import('/web/form_draft.js');
  const { openDatabase, runTransaction } = await import('/web/database.js');
  const db = await openDatabase();
  const read = () => runTransaction(db, 'drafts', 'readonly', (store) => store.getAll());
  const counts = [];
  for (const sizes of tabs) {
    sessionStorage.clear();
    const all = sizes.map((size, index) => ({
      name: 'image_urls', isMask: false,
      image: { file: new File([new Uint8Array(size)], `${index}.png`) },
    }));
    const model = { endpoint: 'fal-ai/flux/dev', task: 'create' };
    const form = { request: { model, prompt: '', options: {} }, images: { all } };
    new FormDraft(form, db, 1000).start();
    let drafts = [];
    while (!drafts.some(({ updated }) => !counts.includes(updated))) {
      await new Promise((resolve) => setTimeout(resolve, 5));
      drafts = await read();
    }
    counts.push(...drafts.map(({ updated }) => updated));
  }
  const drafts = (await read()).sort((one, other) => one.updated - other.updated);
  return drafts.map(({ images }) => images.map(({ image }) => image.file.size));
}"""


async def add_image(visitor: Visitor, path: Path) -> None:
    await visitor.act("setFiles", paths=[str(path)])
    await visitor.wait_for_text(".chosen-images", path.name)


async def draw_mask(visitor: Visitor) -> None:
    await visitor.click("Draw mask")
    await visitor.wait_for(".mask-canvas")
    await visitor.act(
        "drag", selector=".mask-canvas", **{"from": [0.4, 0.5], "to": [0.6, 0.5]}
    )  # fmt: skip
    await visitor.click("Use mask")
    await visitor.wait_for_text("#image-inputs", "mask.png")


async def names(visitor: Visitor) -> list[str]:
    return [text.split(",")[0] for text in await visitor.texts(".chosen-images .description")]


async def test_the_images_of_the_form_survive_a_reload(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    await visitor.choose_model(MULTI)
    photos = [create_image(tmp_path / f"photo-{n}.png", seed=n) for n in range(2)]
    await visitor.act("setFiles", paths=[str(photo) for photo in photos])
    await visitor.wait_for_text(".chosen-images", "photo-1.png")
    await visitor.act("focus", selector=".chosen-images li:nth-child(2) .thumb")
    await visitor.act("press", key="ArrowLeft")
    await visitor.wait_until(HAS_DRAFT, ["photo-1.png", "photo-0.png"])
    await visitor.act("reload")
    assert await names(visitor) == ["photo-1.png", "photo-0.png"]
    await visitor.act("fill", label="Prompt", text="make it winter")
    await visitor.act("press", key="Control+Enter")
    await visitor.wait_for_results(1)
    sent = proxy.sandbox.paid[-1].input
    assert isinstance(sent, dict)
    assert len(sent["image_urls"]) == 2
    # A removed image does not come back.
    await visitor.click("Remove", exact=False)
    await visitor.wait_until(HAS_DRAFT, ["photo-0.png"])
    await visitor.act("reload")
    assert await names(visitor) == ["photo-0.png"]


async def test_a_mask_survives_a_reload_and_other_models(visitor: Visitor, tmp_path: Path) -> None:
    await visitor.choose_model(INPAINTING)
    await add_image(visitor, create_image(tmp_path / "photo.png"))
    await draw_mask(visitor)
    await visitor.choose_model(FLUX)
    await visitor.wait_until(HAS_DRAFT, ["photo.png", "mask.png"])
    await visitor.act("reload")
    assert await names(visitor) == []
    await visitor.choose_model(KONTEXT)
    assert await names(visitor) == ["photo.png"], "a mask is not an image to edit"
    await visitor.choose_model(INPAINTING)
    await visitor.wait_for_text("#image-inputs", "mask.png")
    assert await names(visitor) == ["photo.png", "mask.png"]


async def test_each_tab_has_its_own_images(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    await visitor.choose_model(KONTEXT)
    await add_image(visitor, create_image(tmp_path / "first.png"))
    await visitor.wait_until(HAS_DRAFT, ["first.png"])
    await visitor.act("openTab", url=proxy.base)
    await visitor.wait_for_text(".chosen-images", "first.png", tab=1)
    await visitor.act("setFiles", paths=[str(create_image(tmp_path / "second.png"))], tab=1)
    await visitor.wait_until(HAS_DRAFT, ["second.png"])
    for tab, name in enumerate(("first.png", "second.png")):
        await visitor.act("reload", tab=tab)
        await visitor.wait_for_text(".chosen-images", name, tab=tab)


async def test_a_lost_image_is_reported(visitor: Visitor, tmp_path: Path) -> None:
    await visitor.choose_model(KONTEXT)
    await add_image(visitor, create_image(tmp_path / "photo.png"))
    await visitor.wait_until(HAS_DRAFT, ["photo.png"])
    await visitor.evaluate(DELETE_DRAFTS)
    await visitor.act("reload")
    await visitor.wait_for_text("#toast", "not stored any more")


async def test_a_task_from_another_page_keeps_the_form(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    await visitor.fill_form("make it winter", KONTEXT, create_image(tmp_path / "photo.png"))
    await visitor.wait_until(HAS_DRAFT, ["photo.png"])
    await visitor.act("gotoWithoutWaiting", url=f"{proxy.base}dashboard")
    await visitor.act("goto", url=f"{proxy.base}#task=edit")
    assert await names(visitor) == ["photo.png"]
    assert await visitor.act("values", selector="#prompt") == ["make it winter"]
    assert urlsplit(await visitor.evaluate("() => location.href")).fragment == ""


async def test_a_failed_job_is_retried_with_image_and_mask_after_a_reload(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    await visitor.choose_model(INPAINTING)
    await add_image(visitor, create_image(tmp_path / "photo.png"))
    await draw_mask(visitor)
    await visitor.act("fill", label="Prompt", text="!error 503 times=1 a bird")
    async with proxy.busy():
        await visitor.act("press", key="Control+Enter")
        await visitor.wait_for_text(".job-state", "in the queue")
        await visitor.act("reload")
    await visitor.wait_for(".job [role=alert]")
    await visitor.choose_model(SCHNELL)
    await visitor.act("reload")
    await visitor.click("Retry")
    await visitor.wait_for_results(1)
    sent = proxy.sandbox.paid[-1].input
    assert isinstance(sent, dict)
    for name in ("image_url", "mask_url"):
        assert str(sent[name]).startswith("data:image/png;base64,")


async def test_a_job_that_was_not_sent_before_a_reload_is_sent_by_retry(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    await visitor.fill_form("make it winter", KONTEXT, create_image(tmp_path / "photo.png"))
    await visitor.act("intercept", pattern="**/web/about.json", status=502, body="", times=3)
    await visitor.act("click", selector="#submit")
    await visitor.wait_for_text(".job", "Nothing was sent")
    await visitor.act("reload")
    await visitor.wait_for_text(".job", "The page was closed before this was sent")
    assert proxy.submits() == []
    await visitor.click("Retry")
    await visitor.wait_for_results(1)
    assert proxy.submits() == [KONTEXT]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        pytest.param(["done"] * 2, [2, 1], id="with room"),
        pytest.param(["done"] * 4, [1, 0, 1, 1], id="the oldest first; URLs are kept"),
        pytest.param(["failed", "done", "done"], [2, 0, 1], id="failed jobs, to retry, last"),
        pytest.param(["running", "failed", "done"], [2, 0, 1], id="never those of running jobs"),
    ],
)
async def test_the_stored_images_of_all_jobs_have_a_limit(
    driver: Driver, proxy: RestartableProxy, states: list[str], expected: list[int]
) -> None:
    async with driver.visit(proxy.base) as visitor:
        await visitor.open_page()
        assert await visitor.evaluate(STORE_JOBS, states) == expected


@pytest.mark.parametrize(
    ("tabs", "expected"),
    [
        pytest.param([[400], [500]], [[400], [500]], id="with room"),
        pytest.param([[400], [500], [300]], [[500], [300]], id="the oldest tab first"),
        pytest.param([[400, 700, 300]], [[400, 300]], id="more than there is room for"),
        pytest.param([[n] for n in range(1, 11)], [[n] for n in range(3, 11)], id="many tabs"),
    ],
)
async def test_the_stored_images_of_all_forms_have_a_limit(
    driver: Driver, proxy: RestartableProxy, tabs: list[list[int]], expected: list[list[int]]
) -> None:
    async with driver.visit(proxy.base) as visitor:
        await visitor.open_page()
        assert await visitor.evaluate(STORE_DRAFTS, tabs) == expected
