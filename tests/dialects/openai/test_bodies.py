"""Forms with files for `/v1/images/edits`: accepted and refused forms, and the JSON sent to fal."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData

from falproxy.dialects.openai.bodies import JsonBody
from falproxy.dialects.openai.request_images import Upload
from falproxy.spool import Spool, spool_body
from tests.support.offline_fal import png
from tests.support.openai_proxy import (
    HERON,
    KONTEXT,
    OpenAIProxy,
    decode_image,
    open_openai_proxy,
)

FORM = "multipart/form-data; boundary=cut"


def form(*files: tuple[str, bytes], **texts: str) -> FormData:
    data = FormData(default_to_multipart=True)
    for name, value in {"model": KONTEXT, "prompt": HERON, **texts}.items():
        if value != "-":
            data.add_field(name, value)
    for name, content in files:
        data.add_field(name, content, filename="in.png", content_type="image/png")
    return data


async def edit(proxy: OpenAIProxy, data: Any, **headers: str) -> tuple[int, Any]:
    url = f"{proxy.origin}/v1/images/edits"
    async with proxy.session.post(url, data=data, headers=headers) as response:
        return response.status, await response.json()


def raw(*parts: tuple[str, bytes], end: bytes = b"--cut--\r\n") -> bytes:
    """Return the bytes of a form. parts: the text after `form-data`, and the content."""
    pieces = [
        b"--cut\r\nContent-Disposition: form-data"
        + params.encode()
        + b"\r\n\r\n"
        + content
        + b"\r\n"
        for params, content in parts
    ]
    return b"".join([*pieces, end])


PROMPT = ('; name="prompt"', HERON.encode())
MODEL = ('; name="model"', KONTEXT.encode())


@pytest.mark.parametrize("name", ["image", "image[]"])
async def test_both_names_of_the_file_are_accepted(proxy: OpenAIProxy, name: str) -> None:
    status, document = await edit(proxy, form((name, png())))
    assert status == 200, document
    assert proxy.inputs[0]["image_url"].startswith("data:image/png;base64,")


async def test_the_content_type_of_a_file_is_sniffed(proxy: OpenAIProxy) -> None:
    data = form()
    data.add_field("image", png(), filename="a.txt", content_type="text/plain")
    status, _ = await edit(proxy, data)
    assert status == 200
    assert proxy.inputs[0]["image_url"].startswith("data:image/png;base64,")


async def test_strings_are_converted_to_numbers(proxy: OpenAIProxy) -> None:
    texts = {"n": "3", "seed": "7", "guidance_scale": "4.5", "size": "1024x1024", "user": ""}
    status, document = await edit(proxy, form(("image", png()), **texts))
    assert status == 200, document
    assert len(document["data"]) == 3
    (inputs,) = proxy.inputs
    assert (inputs["num_images"], inputs["seed"], inputs["guidance_scale"]) == (3, 7, 4.5)
    assert inputs["aspect_ratio"] == "1:1"


async def test_unknown_texts_are_ignored_and_listed(proxy: OpenAIProxy) -> None:
    data = form(("image", png()), nonsense="3", **{"svg[model]": "x"})
    url = f"{proxy.origin}/v1/images/edits"
    async with proxy.session.post(url, data=data) as response:
        assert response.status == 200
        assert response.headers["x-falproxy-ignored"] == "nonsense, svg[model]"
    assert proxy.inputs[0].keys() == {"prompt", "image_url"}


INPAINTING = "fal-ai/flux-lora/inpainting"
MULTI = "fal-ai/flux-pro/kontext/multi"
URL = "https://files.example/a.png"


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize("name", ["mask", "mask[]", "mask[0]", "masks"])
async def test_a_mask_has_several_names(proxy: OpenAIProxy, name: str) -> None:
    data = form(("image", png("teal")), (name, png("white")), model=INPAINTING)
    status, document = await edit(proxy, data)
    assert status == 200, document
    (inputs,) = proxy.inputs
    assert inputs["image_url"] == data_uri(png("teal"))
    assert inputs["mask_url"] == data_uri(png("white"))


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["image", "image"], id="the same name"),
        pytest.param(["image[]", "image[]"], id="a list"),
        pytest.param(["image[0]", "image[1]"], id="indexes"),
        pytest.param(["images[]", "images[]"], id="the plural"),
    ],
)
async def test_images_are_sent_in_their_order(proxy: OpenAIProxy, names: list[str]) -> None:
    files = [*zip(names, [png("red"), png("blue")], strict=True)]
    status, document = await edit(proxy, form(*files, model=MULTI))
    assert status == 200, document
    assert proxy.inputs[0]["image_urls"] == [data_uri(png("red")), data_uri(png("blue"))]


async def test_indexes_determine_the_order(proxy: OpenAIProxy) -> None:
    files = [("image[1]", png("blue")), ("image[0]", png("red"))]
    status, _ = await edit(proxy, form(*files, model=MULTI))
    assert status == 200
    assert proxy.inputs[0]["image_urls"] == [data_uri(png("red")), data_uri(png("blue"))]


@pytest.mark.parametrize(
    ("files", "texts", "param"),
    [
        pytest.param([("mask_image", png())], {}, "mask_image", id="a mask by another name"),
        pytest.param([("image_2", png())], {}, "image_2", id="an image by another name"),
        pytest.param([("markup", png())], {}, "markup", id="OpenAI's markup"),
        pytest.param([("nonsense", png())], {}, "nonsense", id="a file by any name"),
        pytest.param([("mask[]", png())], {}, "mask", id="a mask for a model that takes none"),
        pytest.param([("mask", png()), ("mask", png())], {"model": INPAINTING}, "mask",
                     id="two masks"),
        pytest.param([("mask_url", png()), ("mask", png())], {"model": INPAINTING}, "mask_url",
                     id="a mask by two names"),
        pytest.param([("prompt", b"a heron")], {"prompt": "-"}, "prompt", id="a prompt as a file"),
        pytest.param([], {"mask_url": URL}, "mask_url", id="the URL of a mask"),
        pytest.param([], {"style_reference": URL}, "style_reference", id="any URL"),
        pytest.param([("image", b"x.png")], {"model": MULTI}, "image", id="a path"),
    ],
)  # fmt: skip
async def test_a_file_that_is_not_understood_is_refused(
    proxy: OpenAIProxy, files: list[tuple[str, bytes]], texts: dict[str, str], param: str
) -> None:
    status, document = await edit(proxy, form(("image", png()), *files, **texts))
    assert (status, document["error"]["param"]) == (400, param), document
    assert proxy.submits == 0


async def test_the_error_for_a_file_lists_the_images_that_the_model_takes(
    proxy: OpenAIProxy,
) -> None:
    _, document = await edit(proxy, form(("image", png()), ("mask_image", png())))
    message = f"{KONTEXT} takes no mask_image. It takes image_url."
    assert document["error"]["message"] == message


async def test_a_file_may_have_the_name_of_an_input_of_the_model(proxy: OpenAIProxy) -> None:
    data = form(("image", png("teal")), ("mask_url", png("white")), model=INPAINTING)
    status, document = await edit(proxy, data)
    assert status == 200, document
    assert proxy.inputs[0]["mask_url"] == data_uri(png("white"))


@pytest.mark.parametrize(
    ("params", "content"),
    [
        pytest.param('; name="mask"', b"", id="an empty text"),
        pytest.param('; name="mask"; filename=""', b"", id="no file chosen in a browser"),
        pytest.param('; name="image[]"; filename=""', b"", id="no second image chosen"),
        pytest.param('; name="attachment"; filename=""', b"", id="another field"),
    ],
)
async def test_an_empty_field_is_not_sent(proxy: OpenAIProxy, params: str, content: bytes) -> None:
    image = ('; name="image"; filename="a.png"', png())
    body = raw(PROMPT, MODEL, image, (params, content))
    status, document = await edit(proxy, body, **{"Content-Type": FORM})
    assert status == 200, document
    assert proxy.inputs[0].keys() == {"prompt", "image_url"}


@pytest.mark.parametrize("url", [URL, data_uri(png("teal"))])
async def test_an_image_may_be_the_text_of_a_url(proxy: OpenAIProxy, url: str) -> None:
    status, document = await edit(proxy, form(image=url))
    assert status == 200, document
    assert proxy.inputs[0]["image_url"] == url


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"half \xed\xa0\xbd", "prompt is not valid UTF-8.", id="half an emoji"),
        pytest.param(b"\xff", "prompt is not valid UTF-8.", id="not UTF-8"),
        pytest.param(
            b"\xef\xbb\xbfa heron", "prompt begins with a byte order mark", id="a byte order mark"
        ),
    ],
)
async def test_an_invalid_text_is_refused_with_its_name(
    proxy: OpenAIProxy, content: bytes, message: str
) -> None:
    image = ('; name="image"; filename="a.png"', png())
    body = raw(('; name="prompt"', content), MODEL, image)
    status, document = await edit(proxy, body, **{"Content-Type": FORM})
    assert (status, document["error"]["param"]) == (400, "prompt")
    assert message in document["error"]["message"]
    assert proxy.submits == 0


async def test_a_text_sent_twice_is_refused(proxy: OpenAIProxy) -> None:
    body = raw(PROMPT, MODEL, PROMPT)
    status, document = await edit(proxy, body, **{"Content-Type": FORM})
    assert (status, document["error"]["param"]) == (400, "prompt")


class TestJson:
    """Edits in JSON, as OpenAI documents them."""

    async def edit(self, proxy: OpenAIProxy, **document: Any) -> tuple[int, Any]:
        url = f"{proxy.origin}/v1/images/edits"
        body = {"prompt": HERON, "model": KONTEXT} | document
        async with proxy.session.post(url, json=body) as response:
            return response.status, await response.json()

    @pytest.mark.parametrize(
        "images",
        [
            pytest.param({"images": [{"image_url": URL}]}, id="OpenAI's form"),
            pytest.param({"images": [{"image_url": {"url": URL}}]}, id="an object in it"),
            pytest.param({"images": [URL]}, id="a list of strings"),
            pytest.param({"image": URL}, id="a string"),
            pytest.param({"image": {"url": URL}}, id="an object"),
            pytest.param({"image": [{"image_url": URL}]}, id="a list"),
            pytest.param({"image_url": URL}, id="fal's name"),
            pytest.param({"image": URL, "mask": None}, id="no mask"),
            pytest.param({"image": URL, "mask": ""}, id="an empty mask"),
        ],
    )
    async def test_an_image_has_several_forms(
        self, proxy: OpenAIProxy, images: dict[str, object]
    ) -> None:
        status, document = await self.edit(proxy, **images, n=2, seed=7)
        assert status == 200, document
        assert len(document["data"]) == 2
        assert all(decode_image(image["b64_json"]).width for image in document["data"])
        inputs = {"prompt": HERON, "image_url": URL, "num_images": 2, "seed": 7}
        assert proxy.inputs == [inputs]

    async def test_an_image_may_be_a_data_uri(self, proxy: OpenAIProxy) -> None:
        status, _ = await self.edit(proxy, image=data_uri(png("teal")), response_format="url")
        assert status == 200
        assert proxy.inputs == [{"prompt": HERON, "image_url": data_uri(png("teal"))}]

    async def test_a_mask_is_sent(self, proxy: OpenAIProxy) -> None:
        images = [{"image_url": URL}]
        mask = {"image_url": data_uri(png("white"))}
        status, document = await self.edit(proxy, model=INPAINTING, images=images, mask=mask)
        assert status == 200, document
        (inputs,) = proxy.inputs
        assert (inputs["image_url"], inputs["mask_url"]) == (URL, mask["image_url"])

    async def test_several_images_are_sent_in_their_order(self, proxy: OpenAIProxy) -> None:
        urls = [URL, data_uri(png("red"))]
        status, _ = await self.edit(proxy, model=MULTI, images=[{"image_url": url} for url in urls])
        assert status == 200
        assert proxy.inputs[0]["image_urls"] == urls

    @pytest.mark.parametrize(
        ("images", "param", "message"),
        [
            pytest.param({}, "image", "Send an image", id="none"),
            pytest.param({"images": [{"file_id": "file-1"}]}, "images", "file_id is not supported",
                         id="an uploaded file"),
            pytest.param({"image": URL, "mask": {"file_id": "file-1"}}, "mask",
                         "file_id is not supported", id="an uploaded mask"),
            pytest.param({"images": [{"b64_json": "iVBO"}]}, "images", "data URI", id="base64"),
            pytest.param({"image": "iVBORw0KGgo="}, "image", "data URI", id="base64 in a string"),
            pytest.param({"image": "s3://a/b.png"}, "image", "data URI", id="another scheme"),
            pytest.param({"image": 5}, "image", "data URI", id="a number"),
            pytest.param({"images": []}, "image", "Send an image", id="no images"),
            pytest.param({"images": [URL, None]}, "images", "data URI", id="null in a list"),
            pytest.param({"image": URL, "mask": [None, None]}, "mask", "data URI", id="null masks"),
            pytest.param({"image": URL, "mask": []}, "mask", "data URI", id="no masks"),
            pytest.param({"image": URL, "mask": {}}, "mask", "data URI", id="an empty object"),
            pytest.param({"images": [URL, URL]}, "image", "takes one image", id="two"),
            pytest.param({"image": URL, "mask": URL}, "mask", "takes no mask", id="a mask"),
            pytest.param({"image": URL, "mask_image": URL}, "mask_image", "takes no mask_image",
                         id="a mask by another name"),
            pytest.param({"image": URL, "image_url": URL}, "image_url", "more than once",
                         id="two names"),
            pytest.param({"image": URL, "n": "3"}, "n", "integer", id="a number in a string"),
        ],
    )  # fmt: skip
    async def test_what_is_not_understood_is_refused(
        self, proxy: OpenAIProxy, images: dict[str, object], param: str, message: str
    ) -> None:
        status, document = await self.edit(proxy, **images)
        assert (status, document["error"]["param"]) == (400, param), document
        assert message in document["error"]["message"]
        assert proxy.submits == 0


async def test_a_form_without_a_prompt_is_refused(proxy: OpenAIProxy) -> None:
    status, document = await edit(proxy, form(("image", png()), prompt="-"))
    assert status == 400
    assert document["error"]["param"] == "prompt"
    assert document["error"]["code"] == "missing_required_parameter"


@pytest.mark.parametrize(
    ("files", "texts", "param", "code"),
    [
        pytest.param([], {}, "image", "missing_required_parameter", id="no image"),
        pytest.param([("image", b"")], {}, "image", "empty_file", id="an empty file"),
        pytest.param([("image", b"<svg/>")], {}, "image", "unsupported_image_format",
                     id="not an image"),
        pytest.param([("image", png()), ("image", png())], {}, "image", "invalid_value",
                     id="two for a model that takes one"),
        pytest.param([("image", png()), ("mask", png())], {}, "mask", "invalid_value",
                     id="a mask for a model that takes none"),
        pytest.param([("image[]", png())] * 17, {}, "image", "too_many_images",
                     id="more than sixteen"),
        pytest.param([("image", png())], {"n": "many"}, "n", "invalid_value", id="not a number"),
        pytest.param([("image", png())], {"n": "11"}, "n", "integer_above_max_value",
                     id="too large a number"),
        pytest.param([("image", png())], {"prompt": "x" * 300_000}, "prompt",
                     "string_above_max_length", id="a very long prompt"),
        pytest.param([("image", png())], {"model": "fal-ai/flux/dev"}, "image", "invalid_value",
                     id="a model without image inputs"),
        pytest.param([("image", png())], {"safety_tolerance": "9"}, "safety_tolerance",
                     "literal_error", id="a value that fal refuses"),
    ],
)  # fmt: skip
async def test_an_error_names_the_invalid_parameter(
    proxy: OpenAIProxy,
    files: list[tuple[str, bytes]],
    texts: dict[str, str],
    param: str,
    code: str,
) -> None:
    status, document = await edit(proxy, form(*files, **texts))
    error = document["error"]
    assert (status, error["param"], error["code"]) == (400, param, code), error
    assert error["type"] == "invalid_request_error"
    assert proxy.sandbox.jobs == 0


async def test_an_image_may_be_sent_by_url(proxy: OpenAIProxy) -> None:
    stored = f"{proxy.fal}/files/b/none/none.png"
    status, document = await edit(proxy, form(image_url=stored))
    assert (status, document["error"]["param"]) == (400, "image")  # fal finds no image there
    assert proxy.submits == 1


async def test_a_large_form_is_a_413(tmp_path: Path) -> None:
    async with open_openai_proxy(tmp_path, max_body=100_000) as proxy:
        status, document = await edit(proxy, form(("image", png() + bytes(100_000))))
        assert (status, document["error"]["code"]) == (413, "body_too_large")

        async def endless() -> AsyncIterator[bytes]:
            yield raw(PROMPT, MODEL, end=b"")
            yield b'--cut\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
            for _ in range(20):
                yield bytes(10_000)

        status, document = await edit(proxy, endless(), **{"Content-Type": FORM})
        assert (status, document["error"]["code"]) == (413, "body_too_large")
        assert proxy.submits == 0


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        pytest.param(b"{}", "application/json", 400, id="JSON without a prompt"),
        pytest.param(b"{}", "text/plain", 415, id="another content type"),
        pytest.param(b"a=b", "application/x-www-form-urlencoded", 415, id="a form without files"),
        pytest.param(raw(PROMPT), "multipart/form-data", 400, id="no boundary"),
        pytest.param(raw(PROMPT), "multipart/form-data; boundary=other", 400, id="other boundary"),
        pytest.param(b"", FORM, 400, id="empty"),
        pytest.param(b"nonsense", FORM, 400, id="not a form"),
        pytest.param(raw(("", b"x")), FORM, 400, id="a part without a name"),
        pytest.param(raw(PROMPT, end=b""), FORM, 400, id="without an end"),
        pytest.param(raw(('; name="prompt"', b"\xff")), FORM, 400, id="a string that is not UTF-8"),
        pytest.param(b"--cut\r\nno header\r\n\r\nx\r\n--cut--\r\n", FORM, 400, id="no header"),
        pytest.param(b"--cut\r\n" + b"x" * 100_000 + b": 1\r\n\r\nx\r\n--cut--\r\n", FORM, 400,
                     id="a very long header"),
        pytest.param(raw(*[(f'; name="a{number}"', b"x") for number in range(200)]), FORM, 400,
                     id="two hundred parts"),
        pytest.param(
            b"--cut\r\nContent-Type: multipart/mixed; boundary=in\r\n\r\n--in--\r\n--cut--\r\n",
            FORM, 400, id="a nested form",
        ),
    ],
)  # fmt: skip
async def test_a_body_that_is_not_a_form_is_refused(
    proxy: OpenAIProxy, body: bytes, content_type: str, status: int
) -> None:
    actual_status, document = await edit(proxy, body, **{"Content-Type": content_type})
    assert actual_status == status, document
    assert document["error"]["message"]
    assert proxy.submits == 0


async def test_a_client_that_disconnects_during_a_form_is_not_logged_as_a_failure(
    proxy: OpenAIProxy, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(proxy.origin.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\n"
    writer.write(head.encode() + b"Content-Length: 5000\r\n\r\n" + raw(PROMPT, end=b""))
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await writer.wait_closed()
    await asyncio.sleep(0.1)
    assert "failed inside" not in caplog.text
    assert proxy.submits == 0


@pytest.mark.parametrize("size", [0, 1, 2, 3, 196_607, 196_608, 196_609, 700_001])
async def test_a_json_body_contains_the_inputs(size: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield bytes(size)

    upload = Upload(await spool_body(chunks()), "image/png")
    body = JsonBody({"prompt": 'a "heron" é', "image_urls": [upload, upload], "mask_url": upload})
    for _ in range(2):
        sent = b"".join([chunk async for chunk in body.chunks()])
        assert len(sent) == body.size
        document = json.loads(sent)
        assert document["prompt"] == 'a "heron" é'
        urls = [*document["image_urls"], document["mask_url"]]
        assert all(url.startswith("data:image/png;base64,") for url in urls)
        assert all(len(url) == len(urls[0]) for url in urls)


def test_a_json_body_accepts_json_and_files_only() -> None:
    with pytest.raises(TypeError):
        JsonBody({"prompt": Spool(b"x")})
