"""Reading of the error in the body of a response from fal."""

import json

import pytest

from falproxy.fal.error_body import FalErrorBody, ModelError, parse_error_body

MODEL_ERROR = {"loc": ["body", "image_urls", 0], "msg": "Not an image.", "type": "image_load_error"}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        pytest.param(
            {"detail": [MODEL_ERROR, {"type": "missing"}]},
            FalErrorBody(
                model_error=ModelError("image_load_error", "Not an image.", ("body", "image_urls"))
            ),
            id="the first of several model errors",
        ),
        pytest.param(
            {"detail": "Request was cancelled.", "error_type": "client_cancelled"},
            FalErrorBody("client_cancelled", "Request was cancelled."),
            id="an error of fal's infrastructure",
        ),
        pytest.param(
            {"detail": [{"loc": "body", "msg": 1, "type": None}]},
            FalErrorBody(model_error=ModelError("", "", ())),
            id="a model error whose parts have other types",
        ),
        pytest.param({"detail": [{}]}, FalErrorBody(), id="an empty model error"),
        pytest.param({"detail": []}, FalErrorBody(), id="an empty list"),
        pytest.param({"detail": ["text"]}, FalErrorBody(), id="a list of strings"),
        pytest.param({"status": "NOT_FOUND"}, FalErrorBody(), id="a document of the queue host"),
    ],
)
def test_the_error_of_a_document(document: object, expected: FalErrorBody) -> None:
    assert parse_error_body(json.dumps(document).encode()) == expected


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>nginx</html>", id="a page of the ingress"),
        pytest.param(b"[1]", id="not an object"),
        pytest.param(b"\xff\xfe{", id="not Unicode"),
        pytest.param(b"[" * 100_000, id="nested beyond the interpreter's limit"),
    ],
)
def test_a_body_that_describes_no_error(body: bytes) -> None:
    assert parse_error_body(body) == FalErrorBody()
