"""Names of image inputs: in the parsed JSON of a call, and in its bytes."""

import re

IMAGE_KEYS = ("image", "mask")
IMAGE_KEY_SUFFIXES = ("image_url", "image_urls", "mask_url", "mask_urls", "images")
# The words that names of image inputs contain, the text that follows them up to the value, and the
# escape that can replace a letter of a name.
KEY_WORDS = (b"image", b"mask")
KEY_REST = re.compile(rb'(?:_urls?|s)?"\s*:\s*["\[{]')
UNICODE_ESCAPE = b"\\u"
KEY_WORDS_MAX = 100  # occurrences that are checked
# Names that clients of any API give to images: `init_image`, `maskUrl`, `image[0]`, `mask_base64`.
# `image_size` is another name; the value of `num_images` is a number, which is no image.
ANY_IMAGE_NAME = re.compile(
    r"(?:.*[_.-])?(?:image|img|mask)s?"
    r"(?:_?(?:url|uri|data|base64|b64|b64_json|bytes|file|file_id|id|input|path|prompt|reference)s?)*"
    r"(?:\[\w{0,20}\])*"
)
CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
FILE_URL_SCHEMES = ("http://", "https://", "data:", "s3://", "gs://")
URL_KEYS = ("url", "image_url", "file_id", "b64_json")


def is_image_key(key: str) -> bool:
    return key in IMAGE_KEYS or key.endswith(IMAGE_KEY_SUFFIXES)


def carries_image(name: str, value: object) -> bool:
    """Return whether a parameter is probably an image, a mask or another file, by its name or by
    its value. Such a parameter must not be dropped, whatever API it belongs to."""
    if not isinstance(value, str | list | dict) or not value:
        return False
    if isinstance(value, str) and value.isdecimal():  # such as `max_images` in a form
        return False
    words = CAMEL_HUMP.sub("_", name[:200]).lower()
    return ANY_IMAGE_NAME.fullmatch(words) is not None or is_file_reference(value)


def is_file_reference(value: object) -> bool:
    """Return whether a value is a URL of a file, an object with one, or a list of them."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str) and each[:8].lower().startswith(FILE_URL_SCHEMES):
            return True
        if isinstance(each, dict) and any(
            isinstance(each.get(key), str | dict) for key in URL_KEYS
        ):
            return True
    return False


def may_contain_images(body: bytes) -> bool:
    """Return whether a call's body could contain an image, judged by its bytes alone. Names such
    as `num_images` do not count."""
    if UNICODE_ESCAPE in body:
        return True
    remaining = KEY_WORDS_MAX
    for word in KEY_WORDS:
        offset = body.find(word)
        while offset >= 0:
            offset += len(word)
            remaining -= 1
            if not remaining or KEY_REST.match(body, offset):
                return True
            offset = body.find(word, offset)
    return False
