"""The models of the offline fal: inputs, prices and seconds, as a table (fal's model pages)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum


class Kind(StrEnum):
    """What an input holds."""

    TEXT = "string"
    INTEGER = "integer"
    NUMBER = "number"
    FLAG = "boolean"
    CHOICE = "choice"
    IMAGE = "image"
    IMAGES = "images"
    LORAS = "loras"
    SIZE = "size"


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a model. default: None means absent; low, high: inclusive bounds."""

    kind: Kind
    default: object = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    is_required: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """One endpoint.

    price: USD for one unit; unit: "images", or "megapixels", rounded up for each image.
    seconds: how long inference takes. output: the key that holds the picture(s).
    extras: what the output holds beside the pictures.
    """

    endpoint: str
    inputs: Mapping[str, Input]
    price: Decimal
    unit: str
    seconds: float
    output: str = "images"
    extras: tuple[str, ...] = ("timings", "seed", "has_nsfw_concepts", "prompt")
    streams: bool = False
    is_realtime: bool = False

    @property
    def app(self) -> str:
        """Owner and alias, the part of the id that status URLs keep."""
        return app_of(self.endpoint)


def app_of(endpoint: str) -> str:
    """The first two segments of an endpoint id."""
    return "/".join(endpoint.split("/")[:2])


def text(default: str = "") -> Input:
    return Input(Kind.TEXT, default)


def whole(default: int | None, low: int, high: int) -> Input:
    return Input(Kind.INTEGER, default, low, high)


def number(default: float, low: float, high: float) -> Input:
    return Input(Kind.NUMBER, default, low, high)


def flag(default: bool) -> Input:
    return Input(Kind.FLAG, default)


def choice(default: str | None, *choices: str) -> Input:
    return Input(Kind.CHOICE, default, choices=choices)


def required(kind: Kind) -> Input:
    return Input(kind, is_required=True)


PRESETS = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
SIDE_MAX = 14142  # pixels, fal's limit for each side of an image

PROMPT = {"prompt": required(Kind.TEXT)}
IMAGE_URL = {"image_url": required(Kind.IMAGE)}
IMAGE_URLS = {"image_urls": required(Kind.IMAGES)}
SEED = {"seed": Input(Kind.INTEGER)}
SYNC = {"sync_mode": flag(False)}
CHECKER = {"enable_safety_checker": flag(True)}
ACCELERATION = {"acceleration": choice("none", "none", "regular", "high")}
LORAS = {"loras": Input(Kind.LORAS)}
ONE_TO_FOUR = whole(1, 1, 4)
JPEG_FIRST = choice("jpeg", "jpeg", "png")
PNG_FIRST = choice("png", "jpeg", "png")
RATIOS = ("21:9", "16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16", "9:21")
MODES = ("auto", "match_input", "1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3",
         "9:16", "9:21")  # fmt: skip
GEMINI_RATIOS = ("21:9", "16:9", "3:2", "4:3", "5:4", "1:1", "4:5", "3:4", "2:3", "9:16")

KONTEXT_PRO = {
    "guidance_scale": number(3.5, 1, 20),
    "num_images": ONE_TO_FOUR,
    "output_format": JPEG_FIRST,
    "safety_tolerance": choice("2", "1", "2", "3", "4", "5", "6"),
    "enhance_prompt": flag(False),
    **SEED,
    **SYNC,
}
KONTEXT_EDIT = {**KONTEXT_PRO, "aspect_ratio": choice(None, *RATIOS)}
KONTEXT_NEW = {**KONTEXT_PRO, "aspect_ratio": choice("1:1", *RATIOS)}
KONTEXT_OPEN = {
    "num_images": ONE_TO_FOUR,
    "resolution_mode": choice("match_input", *MODES),
    **ACCELERATION,
    **CHECKER,
    **SEED,
    **SYNC,
}
FLUX = {
    "guidance_scale": number(3.5, 1, 20),
    "num_images": ONE_TO_FOUR,
    "output_format": JPEG_FIRST,
    **ACCELERATION,
    **CHECKER,
    **SEED,
    **SYNC,
}
SDXL = {
    "num_images": whole(1, 1, 8),
    "format": JPEG_FIRST,
    "expand_prompt": flag(False),
    "safety_checker_version": choice("v1", "v1", "v2"),
    **CHECKER,
    **SEED,
    **SYNC,
}
NANO = {
    "num_images": ONE_TO_FOUR,
    "output_format": choice("png", "jpeg", "png", "webp"),
    "safety_tolerance": choice("4", "1", "2", "3", "4", "5", "6"),
    "limit_generations": flag(True),
    **SEED,
    **SYNC,
}


def size(default: str) -> dict[str, Input]:
    """`image_size`: a preset's name, or `{"width", "height"}` in pixels."""
    return {"image_size": Input(Kind.SIZE, default, 1, SIDE_MAX, tuple(PRESETS))}


def steps(default: int, low: int, high: int) -> dict[str, Input]:
    return {"num_inference_steps": whole(default, low, high)}


def per_image(endpoint: str, inputs: Mapping[str, Input], price: str, seconds: float) -> Model:
    return Model(endpoint, inputs, Decimal(price), "images", seconds)


def per_megapixel(endpoint: str, inputs: Mapping[str, Input], price: str, seconds: float) -> Model:
    return Model(endpoint, inputs, Decimal(price), "megapixels", seconds)


PRO = "fal-ai/flux-pro/kontext"
EDIT = {**PROMPT, **IMAGE_URL, **KONTEXT_EDIT}
MULTI = {**PROMPT, **IMAGE_URLS, **KONTEXT_EDIT}
NEW = {**PROMPT, **KONTEXT_NEW}
FACES = {"base_image_url": required(Kind.IMAGE), "swap_image_url": required(Kind.IMAGE)}
NANO_EXTRAS = ("description",)

# Nobody publishes the prices of face-swap and the two SDXL endpoints: theirs are guesses.
TABLE = (
    per_image(PRO, EDIT, "0.04", 4.0),
    per_image(f"{PRO}/max", EDIT, "0.08", 6.0),
    per_image(f"{PRO}/multi", MULTI, "0.04", 5.0),
    per_image(f"{PRO}/max/multi", MULTI, "0.08", 7.0),
    per_image(f"{PRO}/text-to-image", NEW, "0.04", 4.0),
    per_image(f"{PRO}/max/text-to-image", NEW, "0.08", 6.0),
    per_megapixel(
        "fal-ai/flux-kontext/dev",
        {**PROMPT, **IMAGE_URL, **steps(28, 10, 50), "guidance_scale": number(2.5, 1, 20),
         "output_format": JPEG_FIRST, **KONTEXT_OPEN},
        "0.025", 3.0,
    ),
    per_megapixel(
        "fal-ai/flux-kontext-lora",
        {**PROMPT, **IMAGE_URL, **steps(30, 10, 50), "guidance_scale": number(2.5, 0, 20),
         "output_format": PNG_FIRST, **LORAS, **KONTEXT_OPEN},
        "0.035", 3.5,
    ),
    per_megapixel(
        "fal-ai/flux/dev",
        {**PROMPT, **steps(28, 1, 50), **size("landscape_4_3"), **FLUX},
        "0.025", 2.5,
    ),
    replace(
        per_megapixel(
            "fal-ai/flux/schnell",
            {**PROMPT, **steps(4, 1, 12), **size("landscape_4_3"), **FLUX},
            "0.003", 0.8,
        ),
        streams=True,
    ),
    per_megapixel(
        "fal-ai/flux/dev/image-to-image",
        {**PROMPT, **IMAGE_URL, "strength": number(0.95, 0.01, 1), **steps(40, 10, 50), **FLUX},
        "0.03", 2.5,
    ),
    per_megapixel(
        "fal-ai/flux-pro/v1.1",
        {**PROMPT, **size("landscape_4_3"), "num_images": ONE_TO_FOUR, "output_format": JPEG_FIRST,
         "safety_tolerance": choice("2", "1", "2", "3", "4", "5", "6"),
         "enhance_prompt": flag(False), **SEED, **SYNC},
        "0.04", 3.0,
    ),
    replace(
        per_megapixel(
            "fal-ai/flux-lora",
            {**PROMPT, **LORAS, **steps(28, 1, 50), **size("landscape_4_3"), **FLUX,
             "guidance_scale": number(3.5, 0, 35),
             "acceleration": choice("none", "none", "regular")},
            "0.035", 3.0,
        ),
        streams=True,
    ),
    per_image(
        "fal-ai/fast-sdxl",
        {**PROMPT, "negative_prompt": text(), **size("square_hd"), **steps(25, 1, 50),
         "guidance_scale": number(7.5, 0, 20), **LORAS, **SDXL},
        "0.005", 2.0,
    ),
    replace(
        per_image(
            "fal-ai/fast-lightning-sdxl",
            {**PROMPT, **size("square_hd"),
             "num_inference_steps": choice("4", "1", "2", "4", "8"), **SDXL},
            "0.003", 0.5,
        ),
        is_realtime=True,
    ),
    replace(per_image("fal-ai/face-swap", FACES, "0.02", 2.0), output="image", extras=()),
    replace(
        per_image(
            "fal-ai/nano-banana",
            {**PROMPT, "aspect_ratio": choice("1:1", *GEMINI_RATIOS), **NANO},
            "0.039", 5.0,
        ),
        extras=NANO_EXTRAS,
    ),
    replace(
        per_image(
            "fal-ai/nano-banana/edit",
            {**PROMPT, **IMAGE_URLS, "aspect_ratio": choice("auto", "auto", *GEMINI_RATIOS),
             **NANO},
            "0.039", 5.5,
        ),
        extras=NANO_EXTRAS,
    ),
)  # fmt: skip

MODELS: Mapping[str, Model] = {model.endpoint: model for model in TABLE}
APPS = frozenset(model.app for model in TABLE)
