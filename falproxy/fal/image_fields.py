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


def is_image_key(key: str) -> bool:
    return key in IMAGE_KEYS or key.endswith(IMAGE_KEY_SUFFIXES)


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
