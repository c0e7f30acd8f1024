"""The names of image inputs, in a call's JSON and in its bytes."""

import re

IMAGE_KEYS = ("image", "mask")
IMAGE_KEY_SUFFIXES = ("image_url", "image_urls", "mask_url", "mask_urls", "images")
# How a name goes on behind these words, up to what may be a picture; and what may stand for a
# letter of it.
KEY_WORDS = (b"image", b"mask")
KEY_REST = re.compile(rb'(?:_urls?|s)?"\s*:\s*["\[{]')
UNICODE_ESCAPE = b"\\u"
KEY_WORDS_MAX = 100  # that are looked at


def is_image_key(key: str) -> bool:
    return key in IMAGE_KEYS or key.endswith(IMAGE_KEY_SUFFIXES)


def may_contain_images(body: bytes) -> bool:
    """Whether a call's body could have an image in it, by its bytes alone: `num_images` is none."""
    if UNICODE_ESCAPE in body:
        return True
    left = KEY_WORDS_MAX
    for word in KEY_WORDS:
        at = body.find(word)
        while at >= 0:
            at += len(word)
            left -= 1
            if not left or KEY_REST.match(body, at):
                return True
            at = body.find(word, at)
    return False
