"""Models of the offline fal: inputs, prices and inference times, from fal's model pages."""

from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal

from falproxy.sandbox.media_models import MEDIA_MODELS
from falproxy.sandbox.model_inputs import (
    InputType,
    Model,
    ModelInput,
    app_id,
    boolean,
    choice,
    integer,
    number,
    required,
    string,
)

__all__ = [
    "APPS",
    "FURTHER_PRICES",
    "MODELS",
    "SIDE_MAX",
    "SIZE_PRESETS",
    "InputType",
    "Model",
    "ModelInput",
    "app_id",
]

SIZE_PRESETS = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
SIDE_MAX = 14142  # pixels, fal's limit for each side of an image

PROMPT = {"prompt": required(InputType.STRING)}
IMAGE_URL = {"image_url": required(InputType.IMAGE)}
IMAGE_URLS = {"image_urls": required(InputType.IMAGES)}
MASK_URL = {"mask_url": required(InputType.IMAGE)}
SEED = {"seed": ModelInput(InputType.INTEGER)}
SYNC_MODE = {"sync_mode": boolean(False)}
SAFETY_CHECKER = {"enable_safety_checker": boolean(True)}
ACCELERATION = {"acceleration": choice("none", "none", "regular", "high")}
LORAS = {"loras": ModelInput(InputType.LORAS)}
ONE_TO_FOUR = integer(1, 1, 4)
JPEG_DEFAULT = choice("jpeg", "jpeg", "png")
PNG_DEFAULT = choice("png", "jpeg", "png")
ASPECT_RATIOS = ("21:9", "16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16", "9:21")
RESOLUTION_MODES = (
    "auto", "match_input", "1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16",
    "9:21",
)  # fmt: skip
GEMINI_ASPECT_RATIOS = ("21:9", "16:9", "3:2", "4:3", "5:4", "1:1", "4:5", "3:4", "2:3", "9:16")

KONTEXT_PRO_OPTIONS = {
    "guidance_scale": number(3.5, 1, 20),
    "num_images": ONE_TO_FOUR,
    "output_format": JPEG_DEFAULT,
    "safety_tolerance": choice("2", "1", "2", "3", "4", "5", "6"),
    "enhance_prompt": boolean(False),
    **SEED,
    **SYNC_MODE,
}
KONTEXT_EDIT_OPTIONS = {**KONTEXT_PRO_OPTIONS, "aspect_ratio": choice(None, *ASPECT_RATIOS)}
KONTEXT_TEXT_OPTIONS = {**KONTEXT_PRO_OPTIONS, "aspect_ratio": choice("1:1", *ASPECT_RATIOS)}
KONTEXT_DEV_OPTIONS = {
    "num_images": ONE_TO_FOUR,
    "resolution_mode": choice("match_input", *RESOLUTION_MODES),
    **ACCELERATION,
    **SAFETY_CHECKER,
    **SEED,
    **SYNC_MODE,
}
FLUX_OPTIONS = {
    "guidance_scale": number(3.5, 1, 20),
    "num_images": ONE_TO_FOUR,
    "output_format": JPEG_DEFAULT,
    **ACCELERATION,
    **SAFETY_CHECKER,
    **SEED,
    **SYNC_MODE,
}
SDXL_OPTIONS = {
    "num_images": integer(1, 1, 8),
    "format": JPEG_DEFAULT,
    "expand_prompt": boolean(False),
    "safety_checker_version": choice("v1", "v1", "v2"),
    **SAFETY_CHECKER,
    **SEED,
    **SYNC_MODE,
}
NANO_BANANA_OPTIONS = {
    "num_images": ONE_TO_FOUR,
    "output_format": choice("png", "jpeg", "png", "webp"),
    "safety_tolerance": choice("4", "1", "2", "3", "4", "5", "6"),
    "limit_generations": boolean(True),
    **SEED,
    **SYNC_MODE,
}


def image_size(default: str) -> dict[str, ModelInput]:
    """Return `image_size`: the name of a preset, or `{"width", "height"}` in pixels."""
    return {
        "image_size": ModelInput(InputType.IMAGE_SIZE, default, 1, SIDE_MAX, tuple(SIZE_PRESETS))
    }


def steps(default: int, minimum: int, maximum: int) -> dict[str, ModelInput]:
    return {"num_inference_steps": integer(default, minimum, maximum)}


def per_image(endpoint: str, inputs: Mapping[str, ModelInput], price: str, seconds: float) -> Model:
    return Model(endpoint, inputs, Decimal(price), "images", seconds)


def per_megapixel(
    endpoint: str, inputs: Mapping[str, ModelInput], price: str, seconds: float
) -> Model:
    return Model(endpoint, inputs, Decimal(price), "megapixels", seconds)


KONTEXT = "fal-ai/flux-pro/kontext"
KONTEXT_EDIT = {**PROMPT, **IMAGE_URL, **KONTEXT_EDIT_OPTIONS}
KONTEXT_MULTI = {**PROMPT, **IMAGE_URLS, **KONTEXT_EDIT_OPTIONS}
KONTEXT_TEXT_TO_IMAGE = {**PROMPT, **KONTEXT_TEXT_OPTIONS}
FACE_SWAP = {
    "base_image_url": required(InputType.IMAGE),
    "swap_image_url": required(InputType.IMAGE),
    "prompt": string(),
}
SAFETY_TOLERANCE = {"safety_tolerance": choice("2", "1", "2", "3", "4", "5", "6")}
FLUX_PRO_OPTIONS = {
    "num_images": ONE_TO_FOUR,
    "output_format": JPEG_DEFAULT,
    **SAFETY_TOLERANCE,
    "enhance_prompt": boolean(False),
    **SEED,
    **SYNC_MODE,
}
FLUX_LORA_OPTIONS = {
    **LORAS,
    **steps(28, 1, 50),
    **FLUX_OPTIONS,
    "guidance_scale": number(3.5, 0, 35),
    "acceleration": choice("none", "none", "regular"),
}
# An image on top of which the model draws: without `image_size` the result has its size.
STRENGTH = {"strength": number(0.85, 0.01, 1)}
OPTIONAL_SIZE = {
    "image_size": ModelInput(InputType.IMAGE_SIZE, None, 1, SIDE_MAX, tuple(SIZE_PRESETS))
}
NANO_BANANA_FIELDS = ("description",)

# fal does not publish the prices of face-swap and the two SDXL endpoints: these are guesses.
IMAGE_MODELS = (
    per_image(KONTEXT, KONTEXT_EDIT, "0.04", 4.0),
    per_image(f"{KONTEXT}/max", KONTEXT_EDIT, "0.08", 6.0),
    per_image(f"{KONTEXT}/multi", KONTEXT_MULTI, "0.04", 5.0),
    per_image(f"{KONTEXT}/max/multi", KONTEXT_MULTI, "0.08", 7.0),
    per_image(f"{KONTEXT}/text-to-image", KONTEXT_TEXT_TO_IMAGE, "0.04", 4.0),
    per_image(f"{KONTEXT}/max/text-to-image", KONTEXT_TEXT_TO_IMAGE, "0.08", 6.0),
    per_megapixel(
        "fal-ai/flux-kontext/dev",
        {**PROMPT, **IMAGE_URL, **steps(28, 10, 50), "guidance_scale": number(2.5, 1, 20),
         "output_format": JPEG_DEFAULT, **KONTEXT_DEV_OPTIONS},
        "0.025", 3.0,
    ),
    per_megapixel(
        "fal-ai/flux-kontext-lora",
        {**PROMPT, **IMAGE_URL, **steps(30, 10, 50), "guidance_scale": number(2.5, 0, 20),
         "output_format": PNG_DEFAULT, **LORAS, **KONTEXT_DEV_OPTIONS},
        "0.035", 3.5,
    ),
    per_megapixel(
        "fal-ai/flux/dev",
        {**PROMPT, **steps(28, 1, 50), **image_size("landscape_4_3"), **FLUX_OPTIONS},
        "0.025", 2.5,
    ),
    replace(
        per_megapixel(
            "fal-ai/flux/schnell",
            {**PROMPT, **steps(4, 1, 12), **image_size("landscape_4_3"), **FLUX_OPTIONS},
            "0.003", 0.8,
        ),
        streams=True,
    ),
    per_megapixel(
        "fal-ai/flux/dev/image-to-image",
        {**PROMPT, **IMAGE_URL, "strength": number(0.95, 0.01, 1), **steps(40, 10, 50),
         **FLUX_OPTIONS},
        "0.03", 2.5,
    ),
    per_megapixel(
        "fal-ai/flux-pro/v1.1",
        {**PROMPT, **image_size("landscape_4_3"), **FLUX_PRO_OPTIONS},
        "0.04", 3.0,
    ),
    per_image(
        "fal-ai/flux-pro/v1.1-ultra",
        {**PROMPT, "image_url": ModelInput(InputType.IMAGE),
         "image_prompt_strength": number(0.1, 0, 1), "aspect_ratio": choice("16:9", *ASPECT_RATIOS),
         "raw": boolean(False), **FLUX_PRO_OPTIONS},
        "0.06", 5.0,
    ),
    per_megapixel(
        "fal-ai/flux-pro/v1/fill",
        {**PROMPT, **IMAGE_URL, **MASK_URL, **FLUX_PRO_OPTIONS},
        "0.05", 4.0,
    ),
    replace(
        per_megapixel(
            "fal-ai/flux-lora",
            {**PROMPT, **image_size("landscape_4_3"), **FLUX_LORA_OPTIONS},
            "0.035", 3.0,
        ),
        streams=True,
    ),
    per_megapixel(
        "fal-ai/flux-lora/image-to-image",
        {**PROMPT, **IMAGE_URL, **STRENGTH, **OPTIONAL_SIZE, **FLUX_LORA_OPTIONS},
        "0.035", 3.0,
    ),
    per_megapixel(
        "fal-ai/flux-lora/inpainting",
        {**PROMPT, **IMAGE_URL, **MASK_URL, **STRENGTH, **OPTIONAL_SIZE, **FLUX_LORA_OPTIONS},
        "0.035", 3.0,
    ),
    per_image(
        "fal-ai/fast-sdxl",
        {**PROMPT, "negative_prompt": string(), **image_size("square_hd"), **steps(25, 1, 50),
         "guidance_scale": number(7.5, 0, 20), **LORAS, **SDXL_OPTIONS},
        "0.005", 2.0,
    ),
    replace(
        per_image(
            "fal-ai/fast-lightning-sdxl",
            {**PROMPT, **image_size("square_hd"),
             "num_inference_steps": choice("4", "1", "2", "4", "8"), **SDXL_OPTIONS},
            "0.003", 0.5,
        ),
        is_realtime=True,
    ),
    replace(per_image("fal-ai/face-swap", FACE_SWAP, "0.02", 2.0), output="image", extra_fields=()),
    replace(
        per_image(
            "fal-ai/nano-banana",
            {**PROMPT, "aspect_ratio": choice("1:1", *GEMINI_ASPECT_RATIOS), **NANO_BANANA_OPTIONS},
            "0.039", 5.0,
        ),
        extra_fields=NANO_BANANA_FIELDS,
    ),
    replace(
        per_image(
            "fal-ai/nano-banana/edit",
            {**PROMPT, **IMAGE_URLS, "aspect_ratio": choice("auto", "auto", *GEMINI_ASPECT_RATIOS),
             **NANO_BANANA_OPTIONS},
            "0.039", 5.5,
        ),
        extra_fields=NANO_BANANA_FIELDS,
    ),
)  # fmt: skip

# Models of other families, whose inputs differ from those of FLUX in names, types and choices.
OTHER_MODELS = (
    per_image(
        "fal-ai/recraft/v3/text-to-image",
        {**PROMPT, **image_size("square_hd"), **SAFETY_CHECKER,
         "style": choice("realistic_image", "realistic_image", "digital_illustration",
                         "vector_illustration")},
        "0.04", 5.0,
    ),
    per_image(
        "fal-ai/ideogram/v3",
        {**PROMPT, "negative_prompt": string(), **image_size("square_hd"),
         "rendering_speed": choice("BALANCED", "TURBO", "BALANCED", "QUALITY"),
         "style": choice(None, "AUTO", "GENERAL", "REALISTIC", "DESIGN"),
         "expand_prompt": boolean(True), "num_images": integer(1, 1, 8), **SEED, **SYNC_MODE},
        "0.06", 6.0,
    ),
    per_image(
        "fal-ai/imagen4/preview",
        {**PROMPT, "aspect_ratio": choice("1:1", "1:1", "16:9", "9:16", "4:3", "3:4"),
         "num_images": ONE_TO_FOUR, "resolution": choice("1K", "1K", "2K"),
         "output_format": choice("png", "jpeg", "png", "webp"), **SEED, **SYNC_MODE},
        "0.05", 5.0,
    ),
    per_image(
        "fal-ai/bytedance/seedream/v4/text-to-image",
        {**PROMPT, **image_size("square_hd"), "num_images": integer(1, 1, 6), **SAFETY_CHECKER,
         **SEED, **SYNC_MODE},
        "0.03", 6.0,
    ),
    per_megapixel(
        "fal-ai/qwen-image",
        {**PROMPT, "negative_prompt": string(), **image_size("landscape_4_3"), **LORAS,
         **steps(30, 2, 250), **FLUX_OPTIONS, "guidance_scale": number(2.5, 0, 20),
         "output_format": PNG_DEFAULT},
        "0.02", 4.0,
    ),
    per_megapixel(
        "fal-ai/stable-diffusion-v35-large",
        {**PROMPT, "negative_prompt": string(), **image_size("landscape_4_3"), **LORAS,
         **steps(28, 1, 50), **FLUX_OPTIONS, "guidance_scale": number(3.5, 0, 20)},
        "0.065", 4.0,
    ),
    per_megapixel(
        "fal-ai/hidream-i1-full",
        {**PROMPT, "negative_prompt": string(), **image_size("square_hd"), **LORAS,
         **steps(40, 1, 50), "guidance_scale": number(5.0, 0, 20), "num_images": ONE_TO_FOUR,
         "output_format": JPEG_DEFAULT, **SAFETY_CHECKER, **SEED, **SYNC_MODE},
        "0.05", 6.0,
    ),
    replace(
        per_image(
            "fal-ai/nano-banana-pro",
            {**PROMPT, "aspect_ratio": choice("1:1", *GEMINI_ASPECT_RATIOS),
             "resolution": choice("1K", "1K", "2K", "4K"), "enable_web_search": boolean(False),
             **NANO_BANANA_OPTIONS},
            "0.15", 8.0,
        ),
        extra_fields=NANO_BANANA_FIELDS,
    ),
    replace(
        per_image(
            "fal-ai/birefnet",
            {**IMAGE_URL, "refine_foreground": boolean(True), "output_mask": boolean(False),
             "operating_resolution": choice("1024x1024", "1024x1024", "2048x2048"),
             "output_format": choice("png", "png", "webp"), **SYNC_MODE},
            "0.001", 1.0,
        ),
        output="image", extra_fields=(),
    ),
    replace(
        per_megapixel(
            "fal-ai/clarity-upscaler",
            {**IMAGE_URL, "prompt": string("masterpiece, best quality"),
             "upscale_factor": number(2.0, 1, 4), "creativity": number(0.35, 0, 1),
             "resemblance": number(0.6, 0, 1), **steps(18, 4, 50), **SAFETY_CHECKER, **SEED},
            "0.03", 6.0,
        ),
        output="image", extra_fields=("seed", "timings"),
    ),
)  # fmt: skip

# Prices of endpoints that the sandbox cannot run: price, unit.
FURTHER_PRICES: Mapping[str, tuple[str, str]] = {
    "fal-ai/kling-video/v2.1/standard/image-to-video": ("0.05", "seconds"),
    "fal-ai/minimax/video-01": ("0.5", "videos"),
    "fal-ai/dia-tts": ("0.04", "1000 characters"),
    "fal-ai/wizper": ("0.00125", "compute seconds"),
    "fal-ai/any-llm": ("0.001", "requests"),
}
MODEL_LIST = (*OTHER_MODELS, *IMAGE_MODELS, *MEDIA_MODELS)
MODELS: Mapping[str, Model] = {model.endpoint: model for model in MODEL_LIST}
APPS = frozenset(model.app for model in MODEL_LIST)
