"""Forms with files for `/v1/images/edits`: what is taken, and what is refused before fal hears."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData

from falproxy.dialects.openai.bodies import JsonBody, Upload
from falproxy.spool import Spool, spool_body
from tests.dialects.openai.test_images import HERON, KONTEXT, Studio, open_studio
from tests.support.offline_fal import png

FORM = "multipart/form-data; boundary=cut"


@pytest.fixture
async def studio(tmp_path: Path) -> AsyncIterator[Studio]:
    async with open_studio(tmp_path) as opened:
        yield opened


def form(*files: tuple[str, bytes], **texts: str) -> FormData:
    data = FormData(default_to_multipart=True)
    for name, value in {"model": KONTEXT, "prompt": HERON, **texts}.items():
        if value != "-":
            data.add_field(name, value)
    for name, content in files:
        data.add_field(name, content, filename="in.png", content_type="image/png")
    return data


async def edit(studio: Studio, data: Any, **headers: str) -> tuple[int, Any]:
    url = f"{studio.origin}/v1/images/edits"
    async with studio.session.post(url, data=data, headers=headers) as response:
        return response.status, await response.json()


def raw(*parts: tuple[str, bytes], end: bytes = b"--cut--\r\n") -> bytes:
    """A form by hand. Each part: what follows `form-data`, and its bytes."""
    pieces = [
        b"--cut\r\nContent-Disposition: form-data"
        + given.encode()
        + b"\r\n\r\n"
        + content
        + b"\r\n"
        for given, content in parts
    ]
    return b"".join([*pieces, end])


PROMPT = ('; name="prompt"', HERON.encode())
MODEL = ('; name="model"', KONTEXT.encode())


@pytest.mark.parametrize("name", ["image", "image[]"])
async def test_one_file_by_either_name_is_the_picture(studio: Studio, name: str) -> None:
    status, document = await edit(studio, form((name, png())))
    assert status == 200, document
    assert studio.inputs[0]["image_url"].startswith("data:image/png;base64,")


async def test_bytes_say_what_a_file_is(studio: Studio) -> None:
    data = form()
    data.add_field("image", png(), filename="a.txt", content_type="text/plain")
    status, _ = await edit(studio, data)
    assert status == 200
    assert studio.inputs[0]["image_url"].startswith("data:image/png;base64,")


async def test_texts_are_numbers_where_numbers_are_meant(studio: Studio) -> None:
    given = {"n": "3", "seed": "7", "guidance_scale": "4.5", "size": "1024x1024", "user": ""}
    status, document = await edit(studio, form(("image", png()), **given))
    assert status == 200, document
    assert len(document["data"]) == 3
    (inputs,) = studio.inputs
    assert (inputs["num_images"], inputs["seed"], inputs["guidance_scale"]) == (3, 7, 4.5)
    assert inputs["aspect_ratio"] == "1:1"


async def test_what_nobody_knows_is_left_out(studio: Studio) -> None:
    data = form(("image", png()), ("markup", png()), nonsense="3", **{"svg[model]": "x"})
    status, document = await edit(studio, data)
    assert status == 200, document
    assert studio.inputs[0].keys() == {"prompt", "image_url"}


async def test_a_form_without_a_prompt_names_it(studio: Studio) -> None:
    status, document = await edit(studio, form(("image", png()), prompt="-"))
    assert status == 400
    assert document["error"]["param"] == "prompt"
    assert document["error"]["code"] == "missing_required_parameter"


@pytest.mark.parametrize(
    ("files", "texts", "param", "code"),
    [
        pytest.param([], {}, "image", "missing_required_parameter", id="no picture"),
        pytest.param([("image", b"")], {}, "image", "empty_file", id="an empty file"),
        pytest.param([("image", b"<svg/>")], {}, "image", "unsupported_image_format",
                     id="no picture by its bytes"),
        pytest.param([("image", png()), ("image", png())], {}, "image", "invalid_value",
                     id="two for a model that takes one"),
        pytest.param([("image", png()), ("mask", png())], {}, "mask", "invalid_value",
                     id="a mask for a model that takes none"),
        pytest.param([("image[]", png())] * 17, {}, "image", "too_many_images",
                     id="more than sixteen"),
        pytest.param([("image", png())], {"n": "many"}, "n", "invalid_value", id="no number"),
        pytest.param([("image", png())], {"n": "11"}, "n", "integer_above_max_value",
                     id="too large a number"),
        pytest.param([("image", png())], {"prompt": "x" * 300_000}, "prompt",
                     "string_above_max_length", id="a book for a prompt"),
        pytest.param([("image", png())], {"model": "fal-ai/flux/dev"}, "image", "invalid_value",
                     id="a model that takes no picture"),
        pytest.param([("image", png())], {"safety_tolerance": "9"}, "safety_tolerance",
                     "literal_error", id="what fal refuses"),
    ],
)  # fmt: skip
async def test_what_does_not_fit_is_named(
    studio: Studio, files: list[tuple[str, bytes]], texts: dict[str, str], param: str, code: str
) -> None:
    status, document = await edit(studio, form(*files, **texts))
    error = document["error"]
    assert (status, error["param"], error["code"]) == (400, param, code), error
    assert error["type"] == "invalid_request_error"
    assert studio.sandbox.jobs == 0


async def test_pictures_may_be_named_instead_of_sent(studio: Studio) -> None:
    stored = f"{studio.fal}/files/b/none/none.png"
    status, document = await edit(studio, form(image_url=stored))
    assert (status, document["error"]["param"]) == (400, "image")  # fal finds no picture there
    assert studio.submits == 1


async def test_a_large_form_is_a_413(tmp_path: Path) -> None:
    async with open_studio(tmp_path, max_body=100_000) as studio:
        status, document = await edit(studio, form(("image", png() + bytes(100_000))))
        assert (status, document["error"]["code"]) == (413, "body_too_large")

        async def endless() -> AsyncIterator[bytes]:
            yield raw(PROMPT, MODEL, end=b"")
            yield b'--cut\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
            for _ in range(20):
                yield bytes(10_000)

        status, document = await edit(studio, endless(), **{"Content-Type": FORM})
        assert (status, document["error"]["code"]) == (413, "body_too_large")
        assert studio.submits == 0


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        pytest.param(b"{}", "application/json", 415, id="JSON"),
        pytest.param(b"a=b", "application/x-www-form-urlencoded", 415, id="a form without files"),
        pytest.param(raw(PROMPT), "multipart/form-data", 400, id="no boundary"),
        pytest.param(raw(PROMPT), "multipart/form-data; boundary=other", 400, id="another one"),
        pytest.param(b"", FORM, 400, id="nothing"),
        pytest.param(b"nonsense", FORM, 400, id="nonsense"),
        pytest.param(raw(("", b"x")), FORM, 400, id="a part without a name"),
        pytest.param(raw(PROMPT, end=b""), FORM, 400, id="no end"),
        pytest.param(raw(('; name="prompt"', b"\xff")), FORM, 400, id="a text that is no UTF-8"),
        pytest.param(b"--cut\r\nno header\r\n\r\nx\r\n--cut--\r\n", FORM, 400, id="no header"),
        pytest.param(b"--cut\r\n" + b"x" * 100_000 + b": 1\r\n\r\nx\r\n--cut--\r\n", FORM, 400,
                     id="a header without end"),
        pytest.param(raw(*[(f'; name="a{number}"', b"x") for number in range(200)]), FORM, 400,
                     id="two hundred parts"),
        pytest.param(
            b"--cut\r\nContent-Type: multipart/mixed; boundary=in\r\n\r\n--in--\r\n--cut--\r\n",
            FORM, 400, id="a form in a form",
        ),
    ],
)  # fmt: skip
async def test_what_is_no_form_is_refused(
    studio: Studio, body: bytes, content_type: str, status: int
) -> None:
    answered, document = await edit(studio, body, **{"Content-Type": content_type})
    assert answered == status, document
    assert document["error"]["message"]
    assert studio.submits == 0


async def test_a_client_that_leaves_in_the_middle_is_no_failure_of_ours(
    studio: Studio, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(studio.origin.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\n"
    writer.write(head.encode() + b"Content-Length: 5000\r\n\r\n" + raw(PROMPT, end=b""))
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await writer.wait_closed()
    await asyncio.sleep(0.1)
    assert "failed inside" not in caplog.text
    assert studio.submits == 0


@pytest.mark.parametrize("size", [0, 1, 2, 3, 196_607, 196_608, 196_609, 700_001])
async def test_a_body_is_the_json_of_its_inputs(size: int) -> None:
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


def test_a_body_has_nothing_but_json_and_files() -> None:
    with pytest.raises(TypeError):
        JsonBody({"prompt": Spool(b"x")})
