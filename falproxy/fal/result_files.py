"""The files of a model's result: images, videos, audio and others."""

from collections.abc import Iterator
from mimetypes import guess_type

from falproxy.fal.results import FalImage, parse_dimension
from falproxy.json_object import parse_object

NESTING_MAX = 4
FILES_MAX = 1000
MEDIA_KINDS = ("image", "video", "audio")
# Words in the names of results → the kind of the file.
KIND_WORDS = {
    "image": ("image", "mask", "frame", "thumbnail"),
    "video": ("video", "clip"),
    "audio": ("audio", "speech", "music", "voice", "sound"),
}
URL_SCHEMES = ("https://", "http://", "data:")


def parse_result_files(document: bytes) -> tuple[FalImage, ...]:
    """Return the files of a result in their order, each once; none if the document has none."""
    files: dict[str, FalImage] = {}
    for each in walk_files(parse_object(document) or {}, "", 0):
        files.setdefault(each.url, each)
        if len(files) == FILES_MAX:
            break
    return tuple(files.values())


def walk_files(value: object, name: str, nesting: int) -> Iterator[FalImage]:
    """name: of the key that leads to the value."""
    if isinstance(value, str):
        if "url" in name and value.startswith(URL_SCHEMES):
            yield FalImage(value, kind=kind_of(value, None, name))
    elif isinstance(value, dict) and isinstance(url := value.get("url"), str):
        width, height = parse_dimension(value.get("width")), parse_dimension(value.get("height"))
        yield FalImage(url, width, height, kind_of(url, value.get("content_type"), name))
    elif nesting < NESTING_MAX:
        for key, each in named_values(value, name):
            yield from walk_files(each, key, nesting + 1)


def named_values(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Yield the values in a list or an object, with the names that lead to them."""
    if isinstance(value, dict):
        yield from ((str(key).lower(), each) for key, each in value.items())
    elif isinstance(value, list):
        yield from ((name, each) for each in value)


def kind_of(url: str, content_type: object, name: str) -> str:
    """Return `image`, `video`, `audio` or `file`: by the content type, else by the extension of the
    URL, else by the name of the result."""
    guessed = guess_type(url.partition("?")[0].partition("#")[0])[0]
    for media_type in (content_type, guessed):
        kind = media_type.partition("/")[0] if isinstance(media_type, str) else ""
        if kind in MEDIA_KINDS:
            return kind
    words = (kind for kind in MEDIA_KINDS if any(word in name for word in KIND_WORDS[kind]))
    return "file" if guessed else next(words, "file")
