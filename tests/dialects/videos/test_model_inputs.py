"""Translation of requests for videos into the inputs of models."""

from typing import Any

import pytest

from falproxy.dialects.openai.errors import ImagesError
from falproxy.dialects.openai.models import ResolvedModel
from falproxy.dialects.openai.request_images import Upload
from falproxy.dialects.videos.model_inputs import build_inputs
from falproxy.dialects.videos.results import parse_video_result
from falproxy.dialects.videos.schema import VideoRequest
from falproxy.fal.model_schema import parse_document
from falproxy.spool import Spool

ENDPOINT = "fal-ai/any/video"
TEXT: dict[str, Any] = {"type": "string"}
NUMBER = {"type": "integer"}
RATIOS = {"type": "string", "enum": ["16:9", "9:16", "1:1"]}
RESOLUTIONS = {"type": "string", "enum": ["480p", "720p", "1080p"]}
IMAGE, URL = Upload(Spool(b"x"), "image/png"), "https://example.com/a.png"
VIDEO = Upload(Spool(b"x"), "video/mp4")


def model(required: tuple[str, ...] = (), **inputs: Any) -> ResolvedModel:
    schema = {"properties": {"prompt": TEXT, **inputs}, "required": list(required)}
    content = {"application/json": {"schema": {"type": "object", **schema}}}
    document = {"paths": {f"/{ENDPOINT}": {"post": {"requestBody": {"content": content}}}}}
    return ResolvedModel(ENDPOINT, parse_document(document, ENDPOINT))


def build(
    target: ResolvedModel, *references: Any, files: Any = None, **params: Any
) -> dict[str, Any]:
    request = VideoRequest.model_validate({"prompt": "a heron", **params})
    inputs = build_inputs(request, target, references, files or {}, is_form=False)
    assert inputs.pop("prompt") == "a heron"
    return inputs


@pytest.mark.parametrize(
    ("inputs", "seconds", "expected"),
    [
        ({"duration": {"type": "string", "enum": ["5", "10"]}}, "10", {"duration": "10"}),
        ({"duration": {"type": "string", "enum": ["4s", "8s"]}}, "8", {"duration": "8s"}),
        ({"duration": {"type": "integer", "enum": [6, 10]}}, "6", {"duration": 6}),
        ({"duration": {"enum": ["auto", "4"], "type": "string"}}, 4, {"duration": "4"}),
        ({"duration": {**NUMBER, "maximum": 12}}, "12", {"duration": 12}),
        ({"duration": {"type": "number"}}, "2.5", {"duration": 2.5}),
        ({"duration": {**TEXT, "default": "5s"}}, "7", {"duration": "7s"}),
        ({"duration": {**TEXT, "default": "5"}}, "7", {"duration": "7"}),
        ({"seconds_total": NUMBER}, "30", {"seconds_total": 30}),
        (
            {"num_frames": {**NUMBER, "default": 81}, "fps": {**NUMBER, "default": 16}},
            "5",
            {"num_frames": 81},
        ),
        (
            {"num_frames": {**NUMBER, "default": 96}, "frames_per_second": {"default": 24}},
            "4",
            {"num_frames": 96},
        ),
    ],
)
def test_seconds_are_the_length(inputs: Any, seconds: Any, expected: Any) -> None:
    assert build(model(**inputs), seconds=seconds) == expected


def test_the_number_of_frames_depends_on_the_rate_of_the_request() -> None:
    target = model(num_frames={**NUMBER, "default": 81}, fps={**NUMBER, "default": 16})
    assert build(target, seconds="5", fps=24) == {"num_frames": 121, "fps": 24}


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({}, id="no input for the length"),
        pytest.param({"num_frames": NUMBER}, id="frames without a rate"),
        pytest.param(
            {"num_frames": {**NUMBER, "maximum": 40}, "fps": {"default": 16}}, id="too long"
        ),
        pytest.param({"duration": {**NUMBER, "maximum": 4}}, id="above the maximum"),
        pytest.param({"duration": {**NUMBER, "minimum": 6}}, id="below the minimum"),
        pytest.param({"duration": {"type": "string", "enum": ["4", "8"]}}, id="no choice"),
    ],
)
def test_a_length_that_cannot_be_set_is_refused(inputs: Any) -> None:
    with pytest.raises(ImagesError) as raised:
        build(model(**inputs), seconds="5")
    assert raised.value.status == 400
    assert raised.value.info.param in ("seconds", "duration")


SIZE_OBJECT = {
    "anyOf": [
        {"type": "object", "properties": {"width": NUMBER, "height": NUMBER}},
        {"type": "string", "enum": ["landscape_16_9"]},
    ]
}


@pytest.mark.parametrize(
    ("inputs", "size", "expected"),
    [
        ({"aspect_ratio": RATIOS}, "1280x720", {"aspect_ratio": "16:9"}),
        ({"aspect_ratio": RATIOS}, "1024x1792", {"aspect_ratio": "9:16"}),
        ({"aspect_ratio": RATIOS}, "1:1", {"aspect_ratio": "1:1"}),
        (
            {"aspect_ratio": RATIOS, "resolution": RESOLUTIONS},
            "1792x1024",
            {"aspect_ratio": "16:9", "resolution": "1080p"},
        ),
        (
            {"aspect_ratio": TEXT, "resolution": {"type": "string", "enum": ["768P", "4k"]}},
            "1024x768",
            {"aspect_ratio": "4:3", "resolution": "768P"},
        ),
        ({"resolution": RESOLUTIONS}, "720p", {"resolution": "720p"}),
        ({"size": {"type": "string", "enum": ["1280*720"]}}, "1280x720", {"size": "1280*720"}),
        ({"resolution": {"enum": ["1280x720"]}}, "1280x720", {"resolution": "1280x720"}),
        ({"width": NUMBER, "height": NUMBER}, "704x480", {"width": 704, "height": 480}),
        ({"video_size": SIZE_OBJECT}, "704x480", {"video_size": {"width": 704, "height": 480}}),
        ({"image_size": SIZE_OBJECT}, "landscape_16_9", {"image_size": "landscape_16_9"}),
        ({}, "auto", {}),
        ({}, "", {}),
    ],
)
def test_sizes_are_converted(inputs: Any, size: str, expected: Any) -> None:
    assert build(model(**inputs), size=size) == expected


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        pytest.param({}, "1280x720", id="no input for the size"),
        pytest.param({"aspect_ratio": RATIOS}, "1000x300", id="no such ratio"),
        pytest.param({"aspect_ratio": RATIOS}, "1024x768", id="between two ratios"),
        pytest.param({"aspect_ratio": RATIOS}, "720p", id="no such value"),
        pytest.param(
            {"aspect_ratio": RATIOS, "resolution": RESOLUTIONS}, "3840x2160", id="too large"
        ),
        pytest.param({"resolution": RESOLUTIONS}, "1280x720", id="the shape cannot be set"),
    ],
)
def test_a_size_that_cannot_be_made_is_refused(inputs: Any, size: str) -> None:
    with pytest.raises(ImagesError) as raised:
        build(model(**inputs), size=size)
    assert (raised.value.status, raised.value.info.param) == (400, "size")


def test_the_shape_is_that_of_the_image_if_it_cannot_be_set() -> None:
    target = model(image_url=TEXT, resolution=RESOLUTIONS)
    assert build(target, URL, size="1280x720") == {"image_url": URL, "resolution": "720p"}


LIST = {"type": "array", "items": TEXT}


@pytest.mark.parametrize(
    ("inputs", "required", "references", "expected"),
    [
        ({"image_url": TEXT}, (), [IMAGE], {"image_url": IMAGE}),
        ({"start_image_url": TEXT, "end_image_url": TEXT}, (), [URL], {"start_image_url": URL}),
        ({"first_frame_url": TEXT}, (), [URL], {"first_frame_url": URL}),
        ({"image_urls": LIST}, (), [URL], {"image_urls": [URL]}),
        ({"image_url": TEXT, "image_urls": LIST}, (), [URL, URL], {"image_urls": [URL, URL]}),
        ({"image_url": TEXT, "image_urls": LIST}, ("image_urls",), [URL], {"image_urls": [URL]}),
        ({"image_url": TEXT, "video_url": TEXT}, (), [VIDEO], {"video_url": VIDEO}),
    ],
)
def test_references_have_their_input(
    inputs: Any, required: Any, references: Any, expected: Any
) -> None:
    assert build(model(required, **inputs), *references) == expected


@pytest.mark.parametrize(
    ("inputs", "references"),
    [
        pytest.param({}, [URL], id="no image"),
        pytest.param({"image_url": TEXT}, [VIDEO], id="no video"),
        pytest.param({"video_url": TEXT}, [IMAGE], id="a video only"),
        pytest.param({"image_url": TEXT}, [URL, URL], id="one image only"),
    ],
)
def test_a_reference_that_the_model_does_not_take_is_refused(inputs: Any, references: Any) -> None:
    with pytest.raises(ImagesError) as raised:
        build(model(**inputs), *references)
    assert (raised.value.status, raised.value.info.param) == (400, "input_reference")


def test_files_have_the_names_of_inputs() -> None:
    target = model(image_url=TEXT, end_image_url=TEXT)
    inputs = build(target, IMAGE, files={"end_image_url": IMAGE})
    assert inputs == {"image_url": IMAGE, "end_image_url": IMAGE}
    with pytest.raises(ImagesError) as raised:
        build(target, files={"mask": IMAGE})
    assert raised.value.info.param == "mask"


@pytest.mark.parametrize(
    ("document", "urls"),
    [
        ('{"video": {"url": "https://a/1.mp4"}}', {"video": "https://a/1.mp4"}),
        ('{"video": "https://a/1.mp4"}', {"video": "https://a/1.mp4"}),
        ('{"videos": [{"url": "https://a/1.mp4"}]}', {"video": "https://a/1.mp4"}),
        (
            '{"video": {"url": "u"}, "thumbnail": {"url": "t"}, "spritesheet": "s"}',
            {"video": "u", "thumbnail": "t", "spritesheet": "s"},
        ),
        ('{"images": [{"url": "u"}]}', {}),
        ('{"video": {}}', {}),
        ("[]", {}),
        ("no JSON", {}),
    ],
)
def test_results_have_variants(document: str, urls: Any) -> None:
    assert parse_video_result(document.encode()).urls == urls


def test_results_describe_the_video() -> None:
    document = b'{"video": {"url": "u", "width": 1280, "height": 720, "duration": 5.04}}'
    result = parse_video_result(document)
    assert (result.size, result.seconds) == ("1280x720", "5.04")
