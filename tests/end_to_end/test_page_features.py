"""The page in Chromium: reuse of results, masks, models, links, code, history, narrow screens."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.js_world import JS
from tests.support.page_browser import (
    KONTEXT,
    Driver,
    RestartableProxy,
    Visitor,
    create_image,
    open_proxy,
)

pytestmark = pytest.mark.slow(seconds=2)

FLUX = "fal-ai/flux/dev"
MULTI = "fal-ai/flux-pro/kontext/multi"
INPAINTING = "fal-ai/flux-lora/inpainting"
UNKNOWN = "fal-ai/of-nowhere"  # in no list of models
MASK_PIXELS = """async () => {
  const image = document.querySelectorAll('.chosen-images img')[1];
  const canvas = document.createElement('canvas');
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  const at = (x, y) =>
    [...context.getImageData(x * canvas.width, y * canvas.height, 1, 1).data].slice(0, 3);
  return [canvas.width, canvas.height, at(0.5, 0.5), at(0.1, 0.1)];
}"""


def inputs_of(proxy: RestartableProxy) -> list[dict[str, object]]:
    return [job.input for job in proxy.sandbox.paid if isinstance(job.input, dict)]


async def click_in_menu(visitor: Visitor, name: str) -> None:
    await visitor.act("click", selector=".toolbar .menu summary")
    await visitor.click(name)


# Results


async def test_edit_and_rerun_brings_back_images_and_seed(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    await visitor.submit_job("make it winter", image=create_image(tmp_path / "photo.png"))
    await visitor.wait_for_results(1)
    await visitor.choose_model(FLUX)
    await visitor.act("reload")
    await visitor.click("Edit and rerun")
    await visitor.wait_for(f"#job-form[data-endpoint='{KONTEXT}']")
    await visitor.wait_for_text(".chosen-images", "photo.png")
    seed = (await visitor.act("values", selector="#option-seed"))[0]
    assert f"Seed {seed}" in await visitor.text(".facts")
    await visitor.act("fill", label="Prompt", text="make it summer")
    await visitor.act("press", key="Control+Enter")
    await visitor.wait_for_results(2)
    first, second = inputs_of(proxy)
    assert second["image_url"] == first["image_url"]
    assert second["seed"] == int(seed)


async def test_a_variation_has_the_same_inputs_and_another_seed(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    await visitor.submit_job("make it winter", image=create_image(tmp_path / "photo.png"))
    await visitor.wait_for_results(1)
    await visitor.act("doubleClick", role="button", name="New variation")
    await visitor.wait_for_results(2)
    first, second = inputs_of(proxy)
    assert second.pop("seed") != first.get("seed")
    assert second == first
    assert len(proxy.submits()) == 2, "a double click is one job"


async def test_the_seed_of_a_result_is_locked(visitor: Visitor, proxy: RestartableProxy) -> None:
    await visitor.submit_job("a lighthouse", FLUX)
    await visitor.wait_for_results(1)
    await click_in_menu(visitor, "Lock seed")
    await visitor.act("fill", label="Prompt", text="a lighthouse in fog")
    await visitor.act("press", key="Control+Enter")
    await visitor.wait_for_results(2)
    assert f"Seed {inputs_of(proxy)[1]['seed']}" in await visitor.text(".facts")


async def test_any_two_results_are_compared(visitor: Visitor) -> None:
    for prompt in ("the first", "the second"):
        await visitor.submit_job(prompt, "fal-ai/flux/schnell")
    await visitor.wait_for_results(2)
    await visitor.click("Compare")
    await visitor.wait_for(".compare")
    for mode in ("Side by side", "Hold"):
        await visitor.act("click", selector=f"label:has-text('{mode}') input")
        await visitor.check_appearance(f"compare-{mode}")
    await visitor.act("focus", selector=".hold-button")
    divider = "() => document.querySelector('.compare').style.getPropertyValue('--divider')"
    assert await visitor.evaluate(divider) == "0%"
    await visitor.evaluate(
        """() => document.querySelector('.hold-button')
          .dispatchEvent(new PointerEvent('pointerdown'))"""
    )
    assert await visitor.evaluate(divider) == "100%"


async def test_many_jobs_leave_the_result_where_it_is(visitor: Visitor) -> None:
    await visitor.submit_job("the result", "fal-ai/flux/schnell")
    await visitor.wait_for_results(1)
    await visitor.wait_for(".stage img")
    for number in range(14):
        await visitor.submit_job(f"!error 500 internal_server_error {number}", FLUX)
    code = "() => document.querySelectorAll('.job [role=alert]:not([hidden])').length === 14"
    await visitor.wait_until(code)
    bottom = "() => document.querySelector('.toolbar').getBoundingClientRect().bottom"
    assert await visitor.evaluate(bottom) < 900
    await visitor.check_appearance("many-jobs")
    await visitor.click("Clear finished")
    assert await visitor.act("count", selector=".job") == 0


# Inputs


async def test_a_mask_is_drawn_on_the_image(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    await visitor.choose_model(INPAINTING)
    await visitor.click("Draw mask")
    await visitor.wait_for_text("#image-inputs", "Choose the image first")
    await visitor.act("setFiles", paths=[str(create_image(tmp_path / "photo.png"))])
    await visitor.wait_for(".chosen-images li")
    await visitor.click("Draw mask")
    await visitor.wait_for(".mask-canvas")
    canvas = ".mask-canvas"
    await visitor.act("drag", selector=canvas, **{"from": [0.4, 0.5], "to": [0.6, 0.5]})
    await visitor.act("drag", selector=canvas, **{"from": [0.05, 0.1], "to": [0.2, 0.1]})
    await visitor.click("Undo")
    await visitor.check_appearance("mask")
    await visitor.click("Use mask")
    await visitor.wait_for_text(".chosen-images", "photo.png")
    await visitor.wait_for_text("#image-inputs", "mask.png")
    expected = [320, 240, [255, 255, 255], [0, 0, 0]]
    assert await visitor.evaluate(MASK_PIXELS) == expected
    await visitor.act("fill", label="Prompt", text="a bird")
    await visitor.act("press", key="Control+Enter")
    await visitor.wait_for_results(1)
    assert str(inputs_of(proxy)[0]["mask_url"]).startswith("data:image/png;base64,")


async def test_several_images_are_ordered_by_keys_and_limited(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path
) -> None:
    await visitor.choose_model(MULTI)
    photos = [str(create_image(tmp_path / f"photo-{n}.png", seed=n)) for n in range(3)]
    await visitor.act("setFiles", paths=photos)
    await visitor.wait_until("() => document.querySelectorAll('.chosen-images li').length === 3")
    await visitor.act("focus", selector=".chosen-images li:nth-child(3) .thumb")
    await visitor.act("press", key="ArrowLeft")
    await visitor.act("press", key="ArrowLeft")
    names = [text.split(",")[0] for text in await visitor.texts(".description")]
    assert names == ["photo-2.png", "photo-0.png", "photo-1.png"]
    await visitor.check_appearance("several-images")
    await visitor.act("setFiles", paths=photos * 3)
    await visitor.wait_for_text("#image-inputs", "at most 10 images: 2 not added")
    assert await visitor.act("count", selector=".chosen-images li") == 10


async def test_an_image_that_a_text_model_cannot_take_selects_an_edit_model(
    visitor: Visitor, tmp_path: Path
) -> None:
    await visitor.act("fill", label="Prompt", text="make it winter")
    photo = create_image(tmp_path / "photo.png")
    await visitor.act("dropFile", selector="body", path=str(photo), type="image/png")
    await visitor.wait_for_text(".chosen-images", "photo.png")
    assert await visitor.texts(".tasks [aria-current]") == ["Edit"]
    assert await visitor.act("values", selector="#prompt") == ["make it winter"]
    # The image is kept when the model is changed and changed back.
    await visitor.choose_model(FLUX)
    assert await visitor.act("count", selector=".chosen-images li") == 0
    await visitor.choose_model(KONTEXT)
    await visitor.wait_for_text(".chosen-images", "photo.png")


async def test_the_form_is_kept_over_a_reload(visitor: Visitor) -> None:
    await visitor.choose_model("fal-ai/flux/schnell")
    await visitor.act("fill", label="Prompt", text="a lighthouse")
    await visitor.act("fill", label="Number of images", text="2")
    await visitor.act("reload")
    await visitor.wait_for("#job-form[data-endpoint='fal-ai/flux/schnell']")
    assert await visitor.act("values", selector="#prompt, #option-num_images") == [
        "a lighthouse", "2",
    ]  # fmt: skip


async def test_options_that_another_model_does_not_take_are_its_defaults(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    await visitor.choose_model("fal-ai/flux-pro/kontext/text-to-image")
    await visitor.act("click", selector=".shape:has([value='9:21'])")
    await visitor.choose_model("fal-ai/kling-video/v2.5-turbo/pro/text-to-video")
    await visitor.act("fill", label="Prompt", text="waves")
    await visitor.act("press", key="Control+Enter")
    await visitor.wait_for_results(1)
    assert inputs_of(proxy)[0].get("aspect_ratio", "16:9") == "16:9"


async def test_durations_have_a_unit(visitor: Visitor) -> None:
    await visitor.choose_model("fal-ai/kling-video/v2.5-turbo/pro/text-to-video")
    code = "() => [...document.querySelectorAll('#option-duration option')].map((o) => o.text)"
    assert await visitor.evaluate(code) == ["5 s", "10 s"]


async def test_a_missing_prompt_is_a_problem_of_one_model(visitor: Visitor) -> None:
    await visitor.act("click", selector="#submit")
    await visitor.wait_for_text("#prompt-problem", "Write a prompt first")
    await visitor.click("Edit", role="link")
    await visitor.wait_for(f"#job-form[data-endpoint='{KONTEXT}']")
    assert await visitor.texts("#prompt-problem") == []
    assert await visitor.act("count", selector="#prompt[aria-invalid=true]") == 0


async def test_an_endpoint_id_is_shown_once(visitor: Visitor) -> None:
    await visitor.choose_model(UNKNOWN)
    assert await visitor.text("#model-name") == UNKNOWN
    assert await visitor.text("#model-description") == ""


async def test_a_model_of_fal_is_shown_with_its_title_and_description(visitor: Visitor) -> None:
    await visitor.act("click", selector="#model")
    await visitor.click("All", exact=True)
    await visitor.act("fill", label="Search models", text=INPAINTING)
    await visitor.wait_for_text(".model-list h3", "All models of fal")
    await visitor.act("press", key="Enter")
    await visitor.wait_for(f"#job-form[data-endpoint='{INPAINTING}']")
    assert await visitor.text("#model-name") == "Flux Lora Inpainting"
    description = "Flux Lora Inpainting, drawn by the falproxy sandbox."
    assert await visitor.text("#model-description") == description


@pytest.mark.parametrize(
    ("status", "seconds", "action"),
    [
        (429, 12, "Try again in 12 s."),
        (429, 121, "Try again in 3 minutes."),
        (429, 86_399, "Try again in 24 hours."),
        (402, 40_000, "Ask the operator, or try again in 12 hours."),
        (402, 10 * 86_400, "Ask the operator, or try again in 10 days."),
        (402, None, "Ask the operator of the proxy."),
    ],
)
async def test_a_long_wait_is_in_hours_or_days(
    visitor: Visitor, status: int, seconds: int | None, action: str
) -> None:
    code = """async ([status, seconds]) => {
      const { ResponseError } = await import('/web/fal_client.js');
      const { explainError } = await import('/web/error_messages.js');
      const headers = seconds === null ? {} : { 'Retry-After': seconds };
      return explainError(new ResponseError(new Response(null, { status, headers }), {})).action;
    }"""
    assert await visitor.evaluate(code, [status, seconds]) == action


async def test_all_models_of_fal_are_found(visitor: Visitor, proxy: RestartableProxy) -> None:
    await visitor.act("click", selector="#model")
    await visitor.click("All", exact=True)
    await visitor.act("fill", label="Search models", text="inpainting")
    await visitor.wait_for_text(".model-list h3", "All models of fal")
    await visitor.check_appearance("models")
    await visitor.act("fill", label="Search models", text=UNKNOWN)
    await visitor.wait_for_text(".model-list", f"Use endpoint id {UNKNOWN}")
    await visitor.act("press", key="Enter")
    await visitor.wait_for(f"#job-form[data-endpoint='{UNKNOWN}']")
    assert await visitor.text("#model-name") == UNKNOWN


# Links and code


async def test_a_link_opens_the_same_form(
    visitor: Visitor, driver: Driver, proxy: RestartableProxy
) -> None:
    await visitor.choose_model("fal-ai/flux/schnell")
    await visitor.act("fill", label="Prompt", text="caf\u00e9 & <b>100 %</b> #1")
    await visitor.act("fill", label="Number of images", text="2")
    await visitor.act("click", selector="#share-form")
    await visitor.wait_for_text("#toast", "The link is in the clipboard")
    link = await visitor.act("readClipboard")
    assert "+" not in link
    async with driver.visit(link) as other:
        await other.open_page()
        await other.wait_for("#job-form[data-endpoint='fal-ai/flux/schnell']")
        filled = await other.act("values", selector="#prompt, #option-num_images")
        assert filled == ["caf\u00e9 & <b>100 %</b> #1", "2"]
        assert urlsplit(await other.evaluate("() => location.href")).fragment == ""
    assert proxy.submits() == []


@pytest.mark.parametrize(
    "fragment",
    [
        pytest.param("task=nothing", id="an unknown task"),
        pytest.param("model=../../etc/passwd", id="not an endpoint id"),
        pytest.param("model=fal-ai/flux/dev&options=[1", id="broken options"),
        pytest.param('model=fal-ai/flux/dev&options={"seed":"x","a":{}}', id="wrong options"),
        pytest.param("%E0%A4%A", id="broken encoding"),
    ],
)
async def test_a_broken_link_opens_the_page(
    driver: Driver, proxy: RestartableProxy, fragment: str
) -> None:
    async with driver.visit(f"{proxy.base}#{fragment}") as visitor:
        await visitor.open_page()
        await visitor.act("fill", label="Prompt", text="a lighthouse")
        await visitor.act("press", key="Control+Enter")
        await visitor.wait_for_results(1)


async def copy_code(visitor: Visitor, tab: str) -> str:
    await visitor.act("click", selector="#copy-form-code")
    await visitor.click(tab, role="tab")
    await visitor.click("Copy", exact=True)
    await visitor.wait_for_text(".code-dialog", "Copied")
    code: str = await visitor.act("readClipboard")
    await visitor.act("press", key="Escape")
    return code


def command_of(tab: str, code: str, directory: Path) -> list[str]:
    """Write the code to a file, and return the command that runs it."""
    if tab == "curl":
        return ["bash", "-c", f"{code}\n"]
    if tab == "JavaScript":
        (directory / "node_modules").symlink_to(JS / "node_modules")
        (directory / "run.mjs").write_text(code)
        return ["node", "run.mjs"]
    (directory / "run.py").write_text(code)
    return [sys.executable, "run.py"]


@pytest.mark.parametrize("tab", ["curl", "JavaScript", "Python", "OpenAI SDK"])
async def test_copied_code_runs(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path, tab: str
) -> None:
    if tab == "OpenAI SDK":
        pytest.importorskip("openai")
    prompt = 'it\'s a "lighthouse" \\ at $HOME `dusk`'
    await visitor.choose_model("fal-ai/flux/schnell")
    await visitor.act("fill", label="Prompt", text=prompt)
    await visitor.act("click", selector=".shape:has([value=square])")
    await run(command_of(tab, await copy_code(visitor, tab), tmp_path), tmp_path)
    sent = inputs_of(proxy)[-1]
    assert (sent["prompt"], sent["image_size"]) == (prompt, "square")


@pytest.mark.parametrize("tab", ["curl", "JavaScript", "Python"])
async def test_copied_code_with_a_file_runs(
    visitor: Visitor, proxy: RestartableProxy, tmp_path: Path, tab: str
) -> None:
    photo = create_image(tmp_path / "my photo's $1.png")
    await visitor.choose_model(KONTEXT)
    await visitor.act("setFiles", paths=[str(photo)])
    await visitor.wait_for(".chosen-images li")
    await visitor.act("fill", label="Prompt", text="make it winter")
    await run(command_of(tab, await copy_code(visitor, tab), tmp_path), tmp_path)
    assert proxy.sandbox.jobs_by_endpoint == {KONTEXT: 1}


async def run(command: list[str], directory: Path) -> None:
    """Run a command without blocking the servers of the test."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=directory, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()


# History


async def test_a_deleted_result_comes_back_by_undo(visitor: Visitor) -> None:
    await visitor.submit_job("a lighthouse", "fal-ai/flux/schnell")
    await visitor.wait_for_results(1)
    await visitor.act("hover", selector=".thumbnails li")
    await visitor.click("Delete: a lighthouse")
    await visitor.wait_for_results(0)
    await visitor.check_appearance("undo")
    await visitor.click("Undo")
    await visitor.wait_for_results(1)
    await visitor.act("reload")
    await visitor.wait_for_results(1)


async def test_the_history_is_exported_and_imported(
    visitor: Visitor, driver: Driver, proxy: RestartableProxy, tmp_path: Path
) -> None:
    await visitor.submit_job("a lighthouse", "fal-ai/flux/schnell")
    await visitor.wait_for_results(1)
    await visitor.wait_until(
        "() => document.querySelector('.open-button img').src.startsWith('blob:')"
    )
    await visitor.act("click", selector="#history-menu summary")
    content = await visitor.act("downloadText", role="button", name="Export")
    file = tmp_path / "history.json"
    document = json.loads(content)
    hostile = {
        **document["jobs"][0],
        "id": "x",
        "prompt": "hostile",
        "images": [{"url": "javascript:alert(1)"}, {"url": "https://example.com/a.png"}],
        "thumb": "https://example.com/b.png",
        "options": "x",
    }
    document["jobs"] += [hostile, {"images": []}, None]
    file.write_text(json.dumps(document))
    async with driver.visit(proxy.base) as other:
        await other.open_page()
        await other.act("click", selector="#history-menu summary")
        await other.act("chooseFile", role="button", name="Import", paths=[str(file)])
        await other.wait_for_text("#toast", "Imported 2 of 2 results")
        assert sorted(await other.texts(".tile-name")) == ["a lighthouse", "hostile"]
        await other.act("chooseFile", role="button", name="Import", paths=[__file__], menu=True)
        await other.wait_for_text("#toast", "not a history")


async def test_a_history_of_1000_entries_is_fast(driver: Driver, proxy: RestartableProxy) -> None:
    async with driver.visit(proxy.base) as visitor:
        await visitor.open_page()
        await visitor.fill_history(
            [f"entry {number}" for number in range(1000)], "data:image/png;base64,iVBORw0KGgo="
        )
        await visitor.act("reload")
        assert await visitor.text("#history-count") == "1000"
        assert await visitor.act("count", selector=".thumbnails li") == 48
        await visitor.act("fill", label="Search the history", text="entry 777")
        assert await visitor.texts(".tile-name") == ["entry 777"]
        await visitor.act("fill", label="Search the history", text="")
        await visitor.click("Video", exact=True)
        assert await visitor.text("#history-count") == "100 of 1000"
        await visitor.click("Show more")
        assert await visitor.act("count", selector=".thumbnails li") == 96


# Access, narrow screens


async def test_a_declined_key_dialog_does_not_come_back_by_itself(
    driver: Driver, tmp_path: Path
) -> None:
    async with (
        open_proxy(tmp_path / "data", access_key="open sesame") as proxy,
        driver.visit(proxy.base) as visitor,
    ):
        await visitor.act("gotoWithoutWaiting", url=proxy.base)
        await visitor.wait_for("#access-dialog")
        await visitor.click("Not now")
        await visitor.wait_for("html[data-ready]")
        assert await visitor.act("count", selector="#access-dialog") == 0
        await visitor.click("Enter key")
        await visitor.act("fill", label="Your key", text="wrong")
        await visitor.act("press", key="Enter")
        await visitor.wait_for_text("#access-reason", "This access key is not valid")
        assert "wrong" not in await visitor.evaluate("() => JSON.stringify({ ...sessionStorage })")
        await visitor.act("fill", label="Your key", text="open sesame")
        await visitor.act("press", key="Enter")
        await visitor.wait_for_text("#proxy-status", "Forget key")
        # Now the models of the proxy are known.
        await visitor.wait_for("#job-form[data-endpoint='fal-ai/flux/schnell']")
        assert await visitor.texts(".tasks a") == ["Create", "Edit", "Animate", "Speak"]


async def test_on_a_phone_the_form_becomes_a_sheet(driver: Driver, proxy: RestartableProxy) -> None:
    async with driver.visit(proxy.base, width=360, height=740, isTouch=True) as visitor:
        await visitor.open_page()
        assert await visitor.texts("#shortcut") == []
        await visitor.submit_job("a lighthouse")
        await visitor.wait_for(".zoom-button img")
        assert await visitor.act("count", selector="#prompt:visible") == 0
        top = "() => document.querySelector('.stage').getBoundingClientRect().top"
        assert 0 < await visitor.evaluate(top) < 140
        in_view = "() => document.querySelector('#submit').getBoundingClientRect().bottom <= 740"
        assert await visitor.evaluate(in_view)
        await visitor.click("Inputs")
        await visitor.act("fill", label="Prompt", text="another one")
        assert await visitor.evaluate(in_view)
        await visitor.act("click", selector="#submit")
        await visitor.wait_for_results(2)
        fonts = await visitor.evaluate(
            """() => [...document.querySelectorAll('input, textarea, select')]
              .filter(({ type }) => !['radio', 'file', 'checkbox', 'range'].includes(type))
              .filter((input) => Number.parseFloat(getComputedStyle(input).fontSize) < 16)
              .map((input) => input.id)"""
        )
        assert fonts == [], "browsers of phones zoom into small inputs"
