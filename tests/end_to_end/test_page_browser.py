"""The page at `/` in Chromium, on the sandbox: form, running jobs, results, history, access key."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.support.js_world import photo
from tests.support.page_browser import (
    KONTEXT,
    Driver,
    RestartableProxy,
    Visitor,
    create_image,
    open_proxy,
)

pytestmark = pytest.mark.slow(seconds=2)

FIRST_LOAD_MAX = 120_000  # bytes over the wire
PROGRESS = "() => document.querySelector('.job .progress').getAttribute('aria-valuenow')"
SLIDER = ".compare input[type=range]"
TIMES = "\N{MULTIPLICATION SIGN}"
INPUT_RANGE = """(id) => {
  const { min, max, value } = document.getElementById(id);
  return [min, max, value];
}"""
TWO_JOBS_RUN = """() => [...document.querySelectorAll('.job-state')]
  .filter((state) => state.innerText === 'Running').length === 2"""
HAS_THUMBNAILS = """() => [...document.querySelectorAll('.open-button img')]
  .every((image) => image.src.startsWith('blob:'))"""
FOCUSED_ELEMENT = """() => document.activeElement.id.replace(/^[0-9a-f]{32}-/, '')
  || document.activeElement.name || document.activeElement.innerText.trim()
  || document.activeElement.ariaLabel"""
STORE_OLD_VERSION = """async ([name, job]) => new Promise((resolve, reject) => {
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
CREATE_NEWER_VERSION = """() => new Promise((resolve) => {
  const request = indexedDB.open('falproxy:/', 99);
  request.onupgradeneeded = () => request.result.createObjectStore('jobs', { keyPath: 'id' });
  request.onsuccess = () => { request.result.close(); resolve(); };
})"""
NO_STORAGE = """IDBFactory.prototype.open = () => {
  throw new DOMException('no', 'SecurityError');
};"""
QUOTA_EXCEEDED = """const put = IDBObjectStore.prototype.put;
IDBObjectStore.prototype.put = function (...args) {
  if (window.isQuotaExceeded) throw new DOMException('full', 'QuotaExceededError');
  return put.apply(this, args);
};"""


async def test_an_example_fills_the_form_and_runs(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    await visitor.check_appearance("empty")
    assert "sandbox" in await visitor.text("#welcome")
    assert await visitor.text("#proxy-status") == "Sandbox: free"
    assert await visitor.act("count", selector=".example") == 6
    await visitor.act("click", selector=".example")
    assert (await visitor.act("values", selector="#prompt"))[0].startswith("A lighthouse")
    assert proxy.submits() == []
    await visitor.act("click", selector="#submit")
    await visitor.wait_for(".placeholder")
    await visitor.wait_for_results(1)
    await visitor.wait_for(".stage img")
    assert "Sandbox: free" in await visitor.text(".facts")
    assert proxy.sandbox.jobs_by_endpoint == {"fal-ai/flux/schnell": 1}
    assert await visitor.texts(".job") == []
    await visitor.check_appearance("result")


async def test_a_first_prompt_creates_an_image(visitor: Visitor, proxy: RestartableProxy) -> None:
    await visitor.act("fill", label="Prompt", text="a red fox in the snow")
    await visitor.act("press", key="Control+Enter")
    await visitor.wait_for_results(1)
    assert len(proxy.submits()) == 1


async def test_an_example_of_an_edit_brings_its_image(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    await visitor.click("Edit", role="link")
    await visitor.wait_for(f"#job-form[data-endpoint='{KONTEXT}']")
    await visitor.act("click", selector=".example")
    await visitor.wait_for_text(".chosen-images", "mountains.png, 768")
    await visitor.check_appearance("edit")
    await visitor.act("click", selector="#submit")
    await visitor.wait_for_results(1)
    assert proxy.sandbox.jobs_by_endpoint == {KONTEXT: 1}


async def prepare(visitor: Visitor, prompt: str = "a lighthouse", tab: int = 0) -> None:
    await visitor.choose_model("fal-ai/flux/schnell", tab=tab)
    await visitor.act("fill", label="Prompt", text=prompt, tab=tab)


async def click_and_press_enter(visitor: Visitor) -> None:
    await visitor.act("focus", selector="#submit")
    await visitor.act("press", key="Enter")
    await visitor.act("click", selector="#submit")


async def hold_enter_on_the_button(visitor: Visitor) -> None:
    await visitor.act("focus", selector="#submit")
    await visitor.act("hold", key="Enter", repetitions=10)


async def hold_enter_in_an_option(visitor: Visitor) -> None:
    await visitor.act("click", selector="#options summary")
    await visitor.act("fill", label="Seed", text="7")
    await visitor.act("hold", key="Enter", repetitions=10)


ACTIONS: dict[str, Callable[[Visitor], Awaitable[object]]] = {
    "a double click": lambda visitor: visitor.act("doubleClick", selector="#submit"),
    "a held shortcut": lambda visitor: visitor.act("hold", key="Control+Enter", repetitions=10),
    "Enter held on the button": hold_enter_on_the_button,
    "Enter and a click": click_and_press_enter,
    "Enter held in an option": hold_enter_in_an_option,
}


@pytest.mark.parametrize("action", ACTIONS)
async def test_one_action_is_one_job(
    visitor: Visitor, proxy: RestartableProxy, action: str
) -> None:
    await prepare(visitor)
    await ACTIONS[action](visitor)
    await visitor.wait_for_results(1)
    # A further job shows that no other one was on its way.
    await visitor.act("fill", label="Prompt", text="another one")
    await visitor.act("press", key="Control+Enter")
    await visitor.wait_for_results(2)
    assert len(proxy.submits()) == 2
    assert proxy.sandbox.jobs == 2


async def test_the_same_request_again_is_another_job(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    """Without a seed, it gives another image."""
    await prepare(visitor)
    await visitor.act("click", selector="#submit")
    await visitor.wait_for_results(1)
    await visitor.evaluate("() => new Promise((resolve) => setTimeout(resolve, 1100))")
    await visitor.act("click", selector="#submit")
    await visitor.wait_for_results(2)
    assert proxy.sandbox.jobs == 2


async def test_two_tabs_are_two_jobs(visitor: Visitor, proxy: RestartableProxy) -> None:
    await visitor.act("openTab", url=proxy.base)
    for tab in (0, 1):
        await prepare(visitor, tab=tab)
    for tab in (0, 1):
        await visitor.act("click", selector="#submit", tab=tab)
    await visitor.wait_for_results(2)
    assert proxy.sandbox.jobs == 2


async def test_the_first_load_is_small_and_from_the_proxy_only(
    driver: Driver, proxy: RestartableProxy
) -> None:
    async with driver.visit(proxy.base) as visitor:
        await visitor.open_page()
        loaded = await visitor.act("loadedFiles")
        total = sum(entry["bytes"] for entry in loaded)
        assert 0 < total < FIRST_LOAD_MAX, loaded
        origin = urlsplit(proxy.base).netloc
        requests = await visitor.act("requests")
        assert {urlsplit(request["url"]).netloc for request in requests} == {origin}
        assert await visitor.act("layoutShift") < 0.02
        # On a reload everything but the page itself comes from the browser's cache.
        await visitor.act("reload")
        reloaded = [
            entry["name"] for entry in await visitor.act("loadedFiles") if entry["bytes"] > 0
        ]
        assert [name for name in reloaded if "/web/@" in name] == []
        assert await visitor.act("consoleErrors") == []


@pytest.mark.timed
async def test_the_page_works_below_a_prefix(driver: Driver, tmp_path: Path) -> None:
    async with (
        open_proxy(tmp_path / "data", "/deep/er") as proxy,
        driver.visit(proxy.base.rstrip("/")) as visitor,
    ):
        await visitor.open_page()
        await visitor.submit_job("a lighthouse", "fal-ai/flux/schnell")
        await visitor.wait_for_results(1)
        requests = await visitor.act("requests")
        assert {urlsplit(request["url"]).path.split("/")[1] for request in requests} == {"deep"}


# Form


async def test_images_are_added_by_file_drop_paste_and_url(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    photo = create_image(tmp_path / "photo.png")
    await visitor.choose_model(KONTEXT)
    await visitor.act("setFiles", paths=[str(photo)])
    await visitor.wait_for_text(".chosen-images", f"photo.png, 320 {TIMES} 240")
    await visitor.act(
        "dropFile", selector="#job-form", path=str(create_image(tmp_path / "dropped.jpg")), type=""
    )
    await visitor.wait_for_text(".chosen-images", f"dropped.jpg, 320 {TIMES} 240")
    await visitor.act("copyImage", path=str(photo))
    await visitor.act("focus", selector="#prompt")
    await visitor.act("press", key="Control+v")
    await visitor.wait_for_text(".chosen-images", f"image.png, 320 {TIMES} 240")
    await visitor.click("Remove", exact=False)
    assert await visitor.evaluate("() => document.activeElement.type") == "file"
    await visitor.click("Paste")
    await visitor.wait_for_text(".chosen-images", f"320 {TIMES} 240")
    await visitor.click("From URL")
    await visitor.act("fill", label="URL of an image", text="javascript:alert(1)")
    await visitor.act("press", key="Enter")
    await visitor.wait_for_text(".image-input .problem", "This is not the URL of an image.")
    url = proxy.sandbox.file_url("nothing/here.png")
    await visitor.act("fill", label="URL of an image", text=url)
    await visitor.click("Use", exact=True)
    await visitor.wait_for_text(".chosen-images", "No preview")
    assert await visitor.act("count", selector=".chosen-images li") == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("notes.png", b"not an image", "not an image that models can read", id="text"),
        pytest.param("empty.png", b"", "This file is empty", id="nothing in it"),
        pytest.param(
            "torn.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 60, "This image is damaged", id="torn"
        ),
        pytest.param(
            "phone.jpg", b"\0\0\0\x18ftypheic" + b"\0" * 20, "This is a HEIC image", id="heic"
        ),
    ],
)
async def test_an_invalid_file_is_refused_before_anything_is_sent(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    await visitor.choose_model(KONTEXT)
    await visitor.act("setFiles", paths=[str(file)])
    await visitor.wait_for_text(".image-input .problem", words)
    if name == "notes.png":
        await visitor.check_appearance("bad-file")
    await visitor.act("fill", label="Prompt", text="make it winter")
    await visitor.act("click", selector="#submit")
    await visitor.wait_for_text(".image-input .problem", "This model needs an image")
    assert proxy.submits() == []


async def test_an_image_with_too_many_pixels_is_refused(visitor: Visitor, tmp_path: Path) -> None:
    Image.new("1", (8000, 6500)).save(tmp_path / "huge.png")
    await visitor.choose_model(KONTEXT)
    await visitor.act("setFiles", paths=[str(tmp_path / "huge.png")])
    await visitor.wait_for_text(".image-input .problem", "52 megapixels; the maximum is 50")


async def test_options_follow_the_schema_of_the_model(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    await visitor.act("click", selector="#options summary")
    await visitor.choose_model(KONTEXT)
    main = await visitor.texts("#main-fields .field > label, #main-fields .label")
    assert main == ["Aspect ratio", "Number of images"]
    others = await visitor.texts("#option-fields label")
    assert others[:2] == ["Seed", "Guidance"]
    assert "Steps" not in others
    await visitor.choose_model("fal-ai/flux-lora")
    await visitor.wait_for_text("#option-fields", "LoRA styles")
    assert await visitor.evaluate(INPUT_RANGE, "option-num_inference_steps") == ["1", "50", "28"]
    assert await visitor.evaluate(INPUT_RANGE, "option-guidance_scale") == ["0", "35", "3.5"]
    assert await visitor.texts(".image-input") == []
    await visitor.act("fill", label="Steps", text="12")
    await visitor.act("fill", label="Seed", text="7")
    await visitor.act("click", selector=".shape:has([value=custom])")
    await visitor.act("fill", label="Width in pixels", text="640")
    await visitor.act("fill", label="Height in pixels", text="384")
    await visitor.click("Add a style")
    await visitor.act("fill", label="URL of the style", text="https://example.com/a.safetensors")
    await visitor.act("fill", label="Scale of the style", text="9")
    await visitor.act("fill", label="Prompt", text="a lighthouse")
    await visitor.act("click", selector="#submit")
    await visitor.wait_for_text("#option-fields .problem", "from 0 to 4")
    await visitor.act("fill", label="Scale of the style", text="0.8")
    await visitor.check_appearance("options")
    await visitor.act("press", key="Control+Enter")
    await visitor.wait_for_results(1)
    paid = proxy.sandbox.paid[-1]
    assert paid.input == {
        "prompt": "a lighthouse", "seed": 7, "num_inference_steps": 12,
        "image_size": {"width": 640, "height": 384},
        "loras": [{"path": "https://example.com/a.safetensors", "scale": 0.8}],
    }  # fmt: skip
    assert f"640 {TIMES} 384" in await visitor.text(".facts")


async def list_models(visitor: Visitor) -> list[str]:
    """Return the endpoints of the models that the dialog offers first."""
    await visitor.act("click", selector="#model")
    await visitor.click("All", exact=True)
    section = ".model-list h3:has-text('Models of this proxy') + ul .model-entry"
    await visitor.wait_for(section)
    listed: list[str] = await visitor.act("values", selector=section)
    await visitor.act("press", key="Escape")
    return listed


async def test_every_model_of_the_list_has_a_form(visitor: Visitor) -> None:
    for endpoint in await list_models(visitor):
        await visitor.choose_model(endpoint)
        assert await visitor.text("#model-description") != ""
    await visitor.choose_model("fal-ai/face-swap")
    assert await visitor.texts(".image-input > .label") == [
        "Image whose face is replaced", "Image with the new face",
    ]  # fmt: skip
    assert await visitor.texts("#prompt-field") == ["Prompt"], "it may have one"


async def test_without_a_model_list_the_kontext_models_are_offered(
    driver: Driver, proxy: RestartableProxy
) -> None:
    async with driver.visit(proxy.base) as visitor:
        await visitor.act("intercept", pattern="**/api/images/models", status=404, times=9)
        await visitor.open_page()
        assert await list_models(visitor) == [KONTEXT, f"{KONTEXT}/max", "fal-ai/flux-kontext/dev"]


async def test_a_large_image_is_uploaded_to_fal_first(driver: Driver, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(photo())
    async with (
        open_proxy(tmp_path / "data", sandbox=False) as proxy,
        driver.visit(proxy.base) as visitor,
    ):
        await visitor.open_page()
        await visitor.submit_job("make it winter", image=large)
        await visitor.wait_for_results(1)
        sent = proxy.sandbox.paid[-1].input
        assert isinstance(sent, dict)
        assert sent["image_url"].startswith(proxy.sandbox.public_url)


async def test_without_uploads_a_large_image_is_sent_inline(driver: Driver, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(photo())
    async with (
        open_proxy(tmp_path / "data", uploads=False) as proxy,
        driver.visit(proxy.base) as visitor,
    ):
        await visitor.open_page()
        await visitor.submit_job("make it winter", image=large)
        await visitor.wait_for_results(1)
        sent = proxy.sandbox.paid[-1].input
        assert isinstance(sent, dict)
        assert sent["image_url"].startswith("data:image/png;base64,")


# Running jobs


async def test_queue_position_log_and_progress_are_shown(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    async with proxy.busy():
        await visitor.submit_job("!delay 4 a lighthouse", "fal-ai/flux/dev")
        await visitor.wait_for_text(".job-state", "#2 in the queue")
        assert await visitor.evaluate(PROGRESS) is None  # indeterminate
        await visitor.check_appearance("queued")
    await visitor.wait_for_text(".job-state", "Running")
    await visitor.wait_for_text(".placeholder", "2/4")
    assert await visitor.evaluate(PROGRESS) in {"50", "75"}
    assert (await visitor.text(".clock")).endswith(" s")
    await visitor.act("click", selector=".log-toggle")
    assert "2/4" in await visitor.text(".log")
    await visitor.check_appearance("running")
    await visitor.wait_for_results(1)
    assert await visitor.texts(".job") == []


async def test_cancelling_a_job_cancels_it_at_fal(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    await visitor.submit_job("!delay 60 a lighthouse", "fal-ai/flux/dev")
    await visitor.wait_for_text(".job-state", "Running")
    await visitor.click("Cancel")
    await visitor.wait_for_text(".job-state", "Cancelled")
    cancels = [seen for seen in proxy.sandbox.seen if seen.path.endswith("/cancel")]
    assert [(seen.method, seen.status) for seen in cancels] == [("PUT", 202)]
    assert proxy.sandbox.jobs == 0
    ended = f"""async () => {{
      const {{ calls }} = await (await fetch("{proxy.base}api/usage/calls")).json();
      return calls[0]?.status === 499 && !calls[0].is_running;
    }}"""
    await visitor.wait_until(ended)  # not for ever "running" on the dashboard
    await visitor.check_appearance("cancelled")
    await visitor.click("Edit and rerun")
    assert await visitor.act("values", selector="#prompt") == ["!delay 60 a lighthouse"]
    await visitor.click("Dismiss")
    await visitor.wait_for(".job", state="detached")


async def test_several_jobs_run_at_once(visitor: Visitor, proxy: RestartableProxy) -> None:
    for number in range(3):
        await visitor.submit_job(f"!delay 3 image {number}", "fal-ai/flux/schnell")
    await visitor.wait_until("() => document.querySelectorAll('.job').length === 3")
    await visitor.check_appearance("several")
    await visitor.wait_for_results(3)
    assert proxy.sandbox.jobs == 3


async def test_jobs_continue_after_a_reload(visitor: Visitor, proxy: RestartableProxy) -> None:
    await visitor.submit_job("!delay 3 the first", "fal-ai/flux/dev")
    await visitor.submit_job("!delay 3 the second", "fal-ai/flux/dev")
    await visitor.wait_until(TWO_JOBS_RUN)
    await visitor.act("reload")
    assert sorted(await visitor.texts(".job-prompt")) == [
        "!delay 3 the first",
        "!delay 3 the second",
    ]
    await visitor.wait_for_results(2)
    assert proxy.submits() == ["fal-ai/flux/dev"] * 2
    assert proxy.sandbox.jobs == 2


async def test_a_job_continues_after_a_restart_of_the_proxy(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    await visitor.submit_job("!delay 4 a lighthouse", "fal-ai/flux/dev")
    await visitor.wait_for_text(".job-state", "Running")
    await proxy.stop()
    await visitor.wait_for_text(".job", "Retrying")
    await visitor.wait_for_text("#proxy-status", "The proxy does not respond")
    await visitor.check_appearance("away")
    await proxy.start()
    await visitor.wait_for_results(1)
    assert "does not respond" not in await visitor.text("#proxy-status")
    assert proxy.submits() == ["fal-ai/flux/dev"]


async def test_a_submit_whose_response_is_lost_is_not_repeated(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    await visitor.act(
        "loseResponse", pattern="**/api/fal/proxy", method="POST", target="https://queue.fal.run/"
    )
    await visitor.submit_job("a lost letter", "fal-ai/flux/dev")
    await visitor.wait_for_text(".job", "The response was lost")
    assert "fal may have accepted this job" in await visitor.text(".job")
    await visitor.check_appearance("lost")
    await visitor.act("reload")
    await visitor.wait_for_text(".job", "The response was lost")
    assert proxy.submits() == ["fal-ai/flux/dev"]


async def test_a_submit_without_a_proxy_is_held_and_sent_once(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    """The page does not know yet that the proxy is away."""
    await proxy.stop()
    await visitor.submit_job("a lighthouse")
    await visitor.wait_for_text(".job", "Nothing was sent")
    assert await visitor.texts(".job-state") == ["Not sent yet"]
    await visitor.check_appearance("held")
    await proxy.start()
    await visitor.wait_for_results(1)
    assert proxy.submits() == ["fal-ai/flux/schnell"]


async def test_a_held_job_can_be_cancelled(visitor: Visitor, proxy: RestartableProxy) -> None:
    await proxy.stop()
    await visitor.submit_job("a lighthouse")
    await visitor.wait_for_text(".job", "Nothing was sent")
    await visitor.click("Cancel")
    await visitor.wait_for_text(".job-state", "Cancelled")
    await proxy.start()
    await visitor.submit_job("another one")
    await visitor.wait_for_results(1)
    assert proxy.submits() == ["fal-ai/flux/schnell"]


async def test_a_host_in_front_of_a_stopped_proxy_gets_no_job(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    """It responds in its place, with 502: nothing is sent until the proxy itself responds."""
    await visitor.act("intercept", pattern="**/web/about.json", status=502, body="<html>", times=2)
    await visitor.submit_job("a lighthouse")
    await visitor.wait_for_text(".job", "Nothing was sent")
    await visitor.wait_for_results(1)
    assert proxy.submits() == ["fal-ai/flux/schnell"]


async def test_a_failed_job_is_retried_with_its_images(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    photo = create_image(tmp_path / "photo.png")
    await visitor.submit_job("!error 503 times=1 make it winter", image=photo)
    await visitor.wait_for(".job [role=alert]")
    await visitor.act("reload")
    await visitor.act("doubleClick", role="button", name="Retry")
    await visitor.wait_for_results(1)
    sent = proxy.sandbox.paid[-1].input
    assert isinstance(sent, dict)
    assert sent["image_url"].startswith("data:image/png")
    assert len(proxy.submits()) == 2


async def test_a_429_with_retry_after_is_retried(visitor: Visitor, proxy: RestartableProxy) -> None:
    await visitor.act(
        "intercept", pattern="**/api/fal/proxy", method="POST", target="https://queue.fal.run/",
        status=429, headers={"retry-after": "2"}, body='{"message": "Too many calls."}',
    )  # fmt: skip
    await visitor.submit_job("a lighthouse", "fal-ai/flux/dev")
    await visitor.wait_for_text(".job", "the job is sent in 2 s")
    await visitor.wait_for_results(1)
    assert proxy.submits() == ["fal-ai/flux/dev"]


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
async def test_errors_are_explained(visitor: Visitor, prompt: str, words: str) -> None:
    await visitor.submit_job(prompt, "fal-ai/flux/dev")
    await visitor.wait_for_text(".job [role=alert]", words)
    assert await visitor.evaluate("() => document.querySelector('.job').offsetHeight") < 80
    if words.startswith("safety"):
        await visitor.check_appearance("error")


async def test_the_last_lines_of_the_log_are_shown(visitor: Visitor) -> None:
    last = '{"status": "COMPLETED", "error": "it broke", "logs": [{"message": "the last line"}]}'
    await visitor.act(
        "intercept", pattern="**/api/fal/proxy", method="GET", target="/status",
        status=200, body=last, times=9,
    )  # fmt: skip
    await visitor.submit_job("!error 500 internal_server_error", "fal-ai/flux/dev")
    await visitor.wait_for_text(".job [role=alert]", "fal has a problem")
    await visitor.click("Details")
    await visitor.wait_for_text(".log", "the last line")


async def test_only_allowed_models_are_offered(driver: Driver, tmp_path: Path) -> None:
    async with (
        open_proxy(tmp_path / "data", allowed_endpoints=("fal-ai/flux/dev",)) as proxy,
        driver.visit(proxy.base) as visitor,
    ):
        await visitor.open_page()
        assert await list_models(visitor) == ["fal-ai/flux/dev"]
        assert await visitor.texts(".tasks a") == ["Create"]


# Results


async def test_before_and_after_are_compared_by_keyboard_mouse_and_touch(
    driver: Driver, proxy: RestartableProxy, tmp_path: Path
) -> None:
    async with driver.visit(proxy.base, isTouch=True) as visitor:
        await visitor.open_page()
        await visitor.submit_job("make it winter", image=create_image(tmp_path / "photo.png"))
        await visitor.wait_for(".stage img")
        await visitor.click("Compare")
        await visitor.act("focus", selector=SLIDER)
        await visitor.act("press", key="ArrowLeft")
        await visitor.act("press", key="PageUp")
        value = "() => Number(document.querySelector('.compare input').value)"
        assert await visitor.evaluate(value) == 59
        await visitor.act("press", key="Home")
        assert await visitor.evaluate(value) == 0
        await visitor.act("press", key="End")
        assert await visitor.evaluate(value) == 100
        await visitor.act("drag", selector=".compare", **{"from": [0.9, 0.5], "to": [0.25, 0.5]})
        assert 20 <= await visitor.evaluate(value) <= 30
        await visitor.act("touch", selector=".compare", at=[0.8, 0.4])
        assert 75 <= await visitor.evaluate(value) <= 85
        await visitor.act("press", key="Escape")
        await visitor.wait_for(".compare", state="detached")
        assert await visitor.evaluate("() => document.activeElement.innerText") == "Compare"
        await visitor.click("Compare")
        await visitor.check_appearance("compare")


async def test_an_image_is_zoomed_downloaded_copied_and_reused(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    await visitor.submit_job("A lighthouse, at dusk!", "fal-ai/flux/schnell")
    await visitor.wait_for_results(1)
    await visitor.wait_for(".zoom-button img")
    url = await visitor.evaluate("() => document.querySelector('.zoom-button img').src")
    await visitor.act("click", selector=".zoom-button")
    await visitor.wait_for("dialog.zoom")
    await visitor.act("press", key="+")
    await visitor.wait_for_text(".zoom-bar output", "%")
    await visitor.act("press", key="0")
    await visitor.wait_for_text(".zoom-bar output", "Fits")
    await visitor.check_appearance("zoom")
    await visitor.act("press", key="Escape")
    await visitor.wait_for("dialog.zoom", state="detached")
    assert await visitor.evaluate("() => document.activeElement.title") == "Zoom"
    saved = await visitor.act("download", role="button", name="Download")
    seed = proxy.sandbox.paid[-1]
    assert saved["name"].startswith("a-lighthouse-at-dusk-seed-")
    assert saved["name"].endswith(".jpg")
    assert saved["bytes"] > 1000
    assert seed.endpoint == "fal-ai/flux/schnell"
    await visitor.act("click", selector=".toolbar .menu summary")
    await visitor.click("Copy URL")
    await visitor.wait_for_text(".toolbar", "Copied")
    assert await visitor.act("readClipboard") == url
    await visitor.click("Use as input")
    await visitor.wait_for_text(".chosen-images", "a-lighthouse-at-dusk-seed-")
    await visitor.act("fill", label="Prompt", text="make it winter")
    await visitor.act("press", key="Control+Enter")
    await visitor.wait_for_results(2)
    await visitor.wait_for(".before-thumb")


@pytest.mark.parametrize(
    ("endpoint", "label", "player", "price"),
    [
        pytest.param(
            "fal-ai/kling-video/v2.5-turbo/pro/text-to-video", "Prompt", "video",
            "$0.35", id="a video",
        ),
        pytest.param(
            "fal-ai/kokoro/american-english", "Prompt", "audio", "$0.02 per 1000 characters",
            id="speech",
        ),
        pytest.param(
            "fal-ai/ace-step/prompt-to-audio", "Prompt", "audio", "$0.012",
            id="music",
        ),
    ],
)  # fmt: skip
async def test_a_video_or_sound_is_played(
    visitor: Visitor, endpoint: str, label: str, player: str, price: str
) -> None:
    await visitor.choose_model(endpoint)
    await visitor.wait_for_text("#cost", price)
    await visitor.act("fill", label=label, text="a heron in the reeds")
    await visitor.act("click", selector="#submit")
    await visitor.wait_for_results(1)
    await visitor.wait_for(f"#result {player}")
    played = f"""async () => {{
      const player = document.querySelector("#result {player}");
      player.muted = true;
      await player.play();
      return player.currentTime > 0.2;
    }}"""
    await visitor.wait_until(played)
    assert TIMES not in await visitor.text(".facts")
    buttons = await visitor.texts("#result .toolbar > button")
    assert buttons == ["Download", "Edit and rerun", "New variation", "Copy code", "Share"]
    await visitor.check_appearance(player)


async def test_several_images_are_shown_as_a_grid(visitor: Visitor) -> None:
    await visitor.act("click", selector="#options summary")
    await visitor.choose_model("fal-ai/flux/schnell")
    await visitor.act("fill", label="Number of images", text="3")
    await visitor.click("More", exact=True)
    await visitor.act("fill", label="Seed", text="11")
    await visitor.wait_for_text("#cost", "$0.012 for 4 images")
    await visitor.submit_job("a lighthouse")
    await visitor.wait_for_results(1)
    await visitor.wait_until("() => document.querySelectorAll('.grid img').length === 4")
    await visitor.check_appearance("grid")
    await visitor.click("Image 3 of 4", exact=True)
    alt = await visitor.evaluate("() => document.querySelector('.zoom-button img').alt")
    assert alt == "Image 3 of 4: a lighthouse"
    facts = await visitor.text(".facts")
    assert "Seed 11" in facts
    assert "Number of images: 4" in facts
    await visitor.click("All images")
    await visitor.wait_for(".grid")


async def test_the_saved_cost_of_a_reused_result_is_shown(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    photo = create_image(tmp_path / "photo.png")
    await visitor.submit_job("make it winter", image=photo)
    await visitor.wait_for_results(1)
    await visitor.evaluate("() => new Promise((resolve) => setTimeout(resolve, 500))")
    await visitor.act("click", selector="#submit")
    await visitor.wait_for_results(2)
    assert "Reused, saved $0.04" in await visitor.text(".facts")
    assert proxy.sandbox.jobs == 1
    await visitor.check_appearance("reused")


async def test_an_unavailable_image_is_explained(visitor: Visitor) -> None:
    await visitor.submit_job("a lighthouse", "fal-ai/flux/schnell")
    await visitor.wait_for_results(1)
    await visitor.wait_until(
        "() => document.querySelector('.open-button img').src.startsWith('blob:')"
    )
    await visitor.act("intercept", pattern="**/files/**", times=9)
    await visitor.act("reload")
    await visitor.wait_for_text(".unavailable-image", "no longer available at its URL")
    await visitor.check_appearance("gone")


# History


async def test_the_history_is_stored_searched_and_deleted(visitor: Visitor) -> None:
    for prompt in ("a red lighthouse", "a green forest", "a red car"):
        await visitor.submit_job(prompt, "fal-ai/flux/schnell")
    await visitor.wait_for_results(3)
    await visitor.wait_until(HAS_THUMBNAILS)
    await visitor.act("reload")
    await visitor.wait_for_results(3)
    assert await visitor.evaluate(HAS_THUMBNAILS)
    await visitor.act("fill", label="Search the history", text="RED flux/schnell")
    assert sorted(await visitor.texts(".tile-name")) == ["a red car", "a red lighthouse"]
    assert await visitor.text("#history-count") == "2 of 3"
    await visitor.act("fill", label="Search the history", text="blue")
    assert "No results match the search" in await visitor.text("#history-empty")
    await visitor.act("fill", label="Search the history", text="")
    await visitor.check_appearance("history")
    await visitor.act("hover", selector=".thumbnails li")
    await visitor.click("Delete: a green forest")
    await visitor.wait_for_results(2)
    focused = await visitor.evaluate("() => document.activeElement.closest('.thumbnails') !== null")
    assert focused
    await visitor.act("click", selector="#history-menu summary")
    await visitor.click("Delete all")
    await visitor.check_appearance("delete-all")
    await visitor.click("Delete", exact=True)
    await visitor.wait_for_results(0)
    await visitor.act("reload")
    await visitor.wait_for_results(0)
    assert await visitor.texts("#welcome .lead") == ["What do you want to create?"]


async def test_the_history_of_an_older_version_is_shown(
    driver: Driver, proxy: RestartableProxy
) -> None:
    job = {
        "id": "old", "state": "done", "created": 1_700_000_000_000, "prompt": "from long ago",
        "images": [{"url": f"{proxy.base}files/nothing.png"}],
    }  # fmt: skip
    async with driver.visit(proxy.base) as visitor:
        await open_blank(visitor, proxy)
        await visitor.evaluate(STORE_OLD_VERSION, ["falproxy:/", job])
        await visitor.open_page()
        await visitor.wait_for_results(1)
        assert await visitor.texts(".tile-name") == ["from long ago"]


async def open_blank(visitor: Visitor, proxy: RestartableProxy) -> None:
    """Open a document of the page's origin that is not the page."""
    await visitor.act("gotoWithoutWaiting", url=f"{proxy.base}web/about.json")


async def test_the_history_of_a_newer_version_is_not_changed(
    driver: Driver, proxy: RestartableProxy
) -> None:
    async with driver.visit(proxy.base) as visitor:
        await open_blank(visitor, proxy)
        await visitor.evaluate(CREATE_NEWER_VERSION)
        await visitor.open_page()
        assert "A newer version of this page" in await visitor.text("#notices")
        await visitor.submit_job("a lighthouse", "fal-ai/flux/schnell")
        await visitor.wait_for_results(1)


async def test_the_page_works_without_storage(driver: Driver, proxy: RestartableProxy) -> None:
    async with driver.visit(proxy.base) as visitor:
        await visitor.act("addInitScript", code=NO_STORAGE)
        await visitor.open_page()
        assert "does not store the history" in await visitor.text("#notices")
        await visitor.submit_job("a lighthouse", "fal-ai/flux/schnell")
        await visitor.wait_for_results(1)
        await visitor.wait_for(".zoom-button img")


async def test_an_exceeded_quota_is_reported_until_a_result_is_deleted(
    driver: Driver, proxy: RestartableProxy
) -> None:
    async with driver.visit(proxy.base) as visitor:
        await visitor.act("addInitScript", code=QUOTA_EXCEEDED)
        await visitor.open_page()
        await visitor.submit_job("the first", "fal-ai/flux/schnell")
        await visitor.wait_for_results(1)
        await visitor.evaluate("() => { window.isQuotaExceeded = true; }")
        await visitor.submit_job("the second", "fal-ai/flux/schnell")
        await visitor.wait_for_results(2)
        await visitor.wait_for_text("#notices", "no space left for the history")
        await visitor.check_appearance("full")
        await visitor.evaluate("() => { window.isQuotaExceeded = false; }")
        await visitor.act("hover", selector=".thumbnails li:last-child")
        await visitor.click("Delete: the first")
        await visitor.wait_for_results(1)
        await visitor.wait_for_no_text("#notices")


async def test_another_tab_shows_the_job_and_takes_it_over(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    await visitor.act("openTab", url=proxy.base)
    await visitor.submit_job("!delay 3 a lighthouse", "fal-ai/flux/dev")
    await visitor.wait_for_text(".job", "a lighthouse", tab=1)
    await visitor.wait_for_text(".job-state", "Running", tab=1)
    await visitor.act("closeTab")  # the other tab continues the job
    await visitor.wait_for_results(1, tab=1)
    await visitor.act("reload", tab=1)
    await visitor.wait_for_results(1, tab=1)
    assert proxy.submits() == ["fal-ai/flux/dev"]
    assert proxy.sandbox.jobs == 1


# Access key, connection, keyboard


async def test_the_access_key_is_requested_and_stored(driver: Driver, tmp_path: Path) -> None:
    async with (
        open_proxy(tmp_path / "data", access_key="open sesame") as proxy,
        driver.visit(proxy.base) as visitor,
    ):
        await visitor.act("gotoWithoutWaiting", url=proxy.base)
        await visitor.wait_for("#access-dialog")
        await visitor.check_appearance("access")
        await visitor.act("fill", label="Your key", text="wrong")
        await visitor.act("press", key="Enter")
        await visitor.wait_for_text("#access-reason", "This access key is not valid")
        await visitor.act("fill", label="Your key", text="open sesame")
        await visitor.click("Continue")
        await visitor.wait_for("html[data-ready]")
        await visitor.submit_job("a lighthouse", "fal-ai/flux/schnell")
        await visitor.wait_for_results(1)
        await visitor.act("reload")
        assert await visitor.act("count", selector="#access-dialog") == 0
        await visitor.click("Forget key")
        await visitor.act("click", selector="#model")
        await visitor.wait_for("#access-dialog")
        assert proxy.sandbox.jobs == 1


async def test_being_offline_is_shown(visitor: Visitor) -> None:
    await visitor.act("setOffline", isOffline=True)
    await visitor.act("click", selector="#model")
    await visitor.wait_for_text("#toast", "could not be loaded")
    await visitor.submit_job("a lighthouse")
    await visitor.wait_for_text("#proxy-status", "You are offline")
    await visitor.wait_for_text(".job", "Nothing was sent")
    await visitor.act("setOffline", isOffline=False)
    await visitor.wait_until(
        "() => !document.querySelector('#proxy-status').innerText.includes('offline')"
    )


async def test_the_page_works_by_keyboard(visitor: Visitor) -> None:
    stops = []
    for _ in range(14):
        await visitor.act("press", key="Tab")
        stops.append(await visitor.evaluate(FOCUSED_ELEMENT))
    assert stops == [
        "Skip to the results", "falproxy", "Create", "Edit", "Animate", "Speak", "Dashboard", "API",
        "model", "prompt", "option-image_size", "Fewer", "option-num_images", "More",
    ]  # fmt: skip
    small = await visitor.evaluate(
        """() => [...document.querySelectorAll('a, button, input, select, summary')]
          .filter((element) => element.checkVisibility())
          .filter((element) => !element.matches('.skip-link, .file-input, .shape-input'))
          .map((element) => [element.outerHTML.slice(0, 80), element.getBoundingClientRect()])
          .filter(([, { width, height }]) => width < 24 || height < 24)
          .map(([html]) => html)"""
    )
    assert small == []
