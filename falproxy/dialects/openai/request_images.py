"""The images and masks of a request: files of a form, and URLs in a form or in JSON."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from falproxy.dialects.openai.errors import invalid_parameter
from falproxy.media.image_rules import InputKind, input_kind
from falproxy.spool import Spool

IMAGES_MAX = 16
# Names in forms: `image`, `image[]` and `image[0]` are all the images, and so on.
FORM_NAME = re.compile(r"(image|mask)s?(?:\[(\d{0,4})\])?", re.ASCII)
# Keys in JSON → the parameter.
JSON_KEYS = {
    "image": "image", "images": "image", "image[]": "image",
    "mask": "mask", "masks": "mask", "mask[]": "mask",
}  # fmt: skip
URL_KEYS = ("image_url", "url")
NOT_A_URL = "must be an image file, an http(s) URL or a data URI"


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a form. It becomes a data URI in the input of a call."""

    content: Spool
    content_type: str


ImageValue = Upload | str  # a file, or a URL


@dataclass(slots=True)
class RequestImages:
    """The images of a request.

    images: in their order.
    files: files of a form with other names, by name; the model may have inputs of these names.
    """

    images: list[ImageValue] = field(default_factory=list)
    mask: ImageValue | None = None
    files: dict[str, Upload] = field(default_factory=dict)

    def add(self, param: str, value: ImageValue) -> None:
        """Add an image or, of the parameter `mask`, the mask. Raises: ImagesError 400, there are
        too many."""
        if param != "mask":
            self.images.append(value)
            if len(self.images) > IMAGES_MAX:
                message = f"At most {IMAGES_MAX} images are accepted."
                raise invalid_parameter(param, message, "too_many_images")
        elif self.mask is None:
            self.mask = value
        else:
            raise invalid_parameter("mask", "Send one mask.", "too_many_images")

    def __bool__(self) -> bool:
        return bool(self.images or self.mask is not None or self.files)


def take_json_images(document: dict[str, object]) -> RequestImages:
    """Remove the images and the mask from a JSON body, and return them.

    Each is a URL or a data URI, as a string or in an object: `{"image_url": "https://..."}`.
    Raises: ImagesError 400.
    """
    request_images = RequestImages()
    for key, param in JSON_KEYS.items():
        for url in image_urls(document.pop(key, None), key):
            request_images.add(param, url)
    return request_images


def image_urls(value: object, key: str) -> Iterator[str]:
    """Yield the URLs of a value or of a list of values. null and `""` count as missing.

    Raises: ImagesError 400.
    """
    if value in (None, "") or (value == [] and JSON_KEYS[key] == "image"):
        return
    for each in value if isinstance(value, list) and value else [value]:
        yield check_url(url_in(each, key), key)


def url_in(value: object, key: str) -> object:
    """Return the URL in a string, or in an object such as `{"image_url": {"url": ...}}`.

    Raises: ImagesError 400, the object has no URL.
    """
    for _ in URL_KEYS:
        if not isinstance(value, Mapping) or not value:
            break
        if value.get("file_id"):
            message = (
                f"{key}: file_id is not supported. Send image_url, an http(s) URL or data URI."
            )
            raise invalid_parameter(key, message, "file_id_unsupported")
        names = [name for name in URL_KEYS if value.get(name)]
        if not names:
            raise invalid_parameter(key, f"{key} {NOT_A_URL}, in image_url.")
        value = value[names[0]]
    return value


def check_url(url: object, key: str) -> str:
    """Raises: ImagesError 400."""
    if not isinstance(url, str) or input_kind(url) is InputKind.OTHER:
        raise invalid_parameter(key, f"{key} {NOT_A_URL}.")
    return url
