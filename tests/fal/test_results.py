"""The files of results."""

import json

import pytest

from falproxy.fal.results import parse_result_files

IMAGE, VIDEO, SOUND = (f"https://v3.fal.media/files/b/x/{name}" for name in ("i.png", "v.mp4", "s"))


def file(url: str) -> dict[str, object]:
    return {"url": url, "content_type": "x/y", "file_name": "f", "file_size": 1}


@pytest.mark.parametrize(
    ("result", "urls"),
    [
        pytest.param({"images": [file(IMAGE)]}, [IMAGE], id="images"),
        pytest.param({"image": file(IMAGE), "mask": file(SOUND)}, [IMAGE], id="one image"),
        pytest.param({"video": file(VIDEO), "seed": 1}, [VIDEO], id="a video"),
        pytest.param({"videos": [file(VIDEO), file(SOUND)]}, [VIDEO, SOUND], id="videos"),
        pytest.param({"video": file(VIDEO), "thumbnail": file(IMAGE)}, [VIDEO], id="a thumbnail"),
        pytest.param({"audio": file(SOUND), "duration_ms": 3}, [SOUND], id="a sound"),
        pytest.param({"audio_file": file(SOUND)}, [SOUND], id="a sound by another name"),
        pytest.param({"outputs": [{"clip": file(VIDEO)}]}, [VIDEO], id="nested"),
        pytest.param({"model_mesh": file(SOUND)}, [SOUND], id="a file of another kind"),
        pytest.param({"a": file(VIDEO), "b": file(VIDEO)}, [VIDEO], id="twice the same"),
        pytest.param({"images": [], "video": file(VIDEO)}, [VIDEO], id="no images"),
        pytest.param({"output": "text"}, [], id="no file"),
        pytest.param({"video": {"url": None}}, [], id="no URL"),
        pytest.param(["x"], [], id="not an object"),
    ],
)
def test_the_files_of_a_result(result: object, urls: list[str]) -> None:
    assert [each.url for each in parse_result_files(json.dumps(result).encode())] == urls


def test_a_result_that_is_nested_too_deeply_has_no_files() -> None:
    document = b'{"a":' * 3000 + b"1" + b"}" * 3000
    assert parse_result_files(document) == ()
