"""The page in Chromium: examples fill the form of any model; the first prompt gives a result."""

import pytest

from tests.support.page_browser import KONTEXT, RestartableProxy, Visitor

INPAINTING = "fal-ai/flux-lora/inpainting"
IMAGE_TO_VIDEO = "fal-ai/kling-video/v2.5-turbo/pro/image-to-video"
PROBLEMS = """() => [...document.querySelectorAll('#job-form .problem')]
  .map((problem) => problem.innerText).filter(Boolean)"""


@pytest.mark.parametrize(
    ("endpoint", "count"),
    [
        pytest.param("fal-ai/flux/dev", 0, id="words alone"),
        pytest.param(KONTEXT, 1, id="an image"),
        pytest.param("fal-ai/flux-pro/kontext/multi", 1, id="a list of images"),
        pytest.param("fal-ai/face-swap", 2, id="two images"),
        pytest.param(INPAINTING, 2, id="an image and a mask"),
        pytest.param("fal-ai/flux/dev/image-to-image", 1, id="a model of fal's earlier API"),
        pytest.param("fal-ai/ltx-video", 0, id="a video from words"),
        pytest.param(IMAGE_TO_VIDEO, 1, id="a video from an image"),
        pytest.param("fal-ai/minimax/speech-02-turbo", 0, id="speech"),
    ],
)
async def test_an_example_fills_the_form_of_a_model(
    visitor: Visitor, proxy: RestartableProxy, endpoint: str, count: int
) -> None:
    await visitor.choose_model(endpoint)
    await visitor.wait_until("() => document.querySelectorAll('.example').length === 6")
    await visitor.act("click", selector=".example")
    await visitor.wait_until(
        "(count) => document.querySelectorAll('.chosen-images li').length === count", count
    )
    await visitor.act("click", selector="#submit")
    assert await visitor.evaluate(PROBLEMS) == []
    await visitor.wait_for_results(1)
    assert proxy.sandbox.jobs_by_endpoint == {endpoint: 1}


async def test_a_prompt_without_the_image_of_an_edit_can_be_created(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    await visitor.click("Edit", role="link")
    await visitor.wait_for(f"#job-form[data-endpoint='{KONTEXT}']")
    await visitor.act("click", selector="#submit")
    await visitor.wait_for_text(".image-input .problem", "This model needs an image")
    assert "Create one" not in await visitor.text(".image-input .problem")
    await visitor.act("fill", label="Prompt", text="a red fox in the snow")
    await visitor.act("press", key="Control+Enter")
    await visitor.click("Create one from the prompt alone")
    await visitor.wait_for_results(1)
    assert proxy.sandbox.jobs_by_endpoint == {"fal-ai/flux/schnell": 1}


async def test_the_examples_are_shown_again_after_a_result(
    visitor: Visitor, proxy: RestartableProxy
) -> None:
    assert await visitor.texts("#show-examples") == []
    await visitor.submit_job("a lighthouse", "fal-ai/flux/schnell")
    await visitor.wait_for_results(1)
    await visitor.wait_for(".stage")
    async with proxy.busy():
        await visitor.submit_job("another one", "fal-ai/flux/schnell")
        await visitor.wait_for_text(".job-state", "in the queue")
        await visitor.click("Examples")
        await visitor.wait_for(".example")
        assert await visitor.evaluate("() => document.activeElement.className") == "example"
        await visitor.wait_until(
            "() => Number.parseInt(document.querySelector('.clock').innerText) >= 3"
        )
        assert await visitor.act("count", selector=".placeholder") == 0, "progress replaces nothing"
        await visitor.act("press", key="Enter")
        assert (await visitor.act("values", selector="#prompt"))[0].startswith("A lighthouse")
    await visitor.wait_for(".stage img")
