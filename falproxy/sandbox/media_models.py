"""Video and audio models of the offline fal: inputs, prices and outputs, from fal's model pages.

Prices that depend on further inputs at fal, such as the resolution, are those of the default here.
"""

from collections.abc import Mapping
from decimal import Decimal

from falproxy.sandbox.model_inputs import (
    CHARACTERS,
    InputType,
    Model,
    ModelInput,
    boolean,
    choice,
    integer,
    number,
    object_input,
    optional_string,
    required,
    string,
)

PROMPT = {"prompt": required(InputType.STRING)}
TEXT = {"text": required(InputType.STRING)}
IMAGE_URL = {"image_url": required(InputType.IMAGE)}
OPTIONAL_IMAGE = ModelInput(InputType.IMAGE)
SEED = {"seed": ModelInput(InputType.INTEGER)}

KLING_OPTIONS = {
    "duration": choice("5", "5", "10"),
    "negative_prompt": string("blur, distort, and low quality"),
    "cfg_scale": number(0.5, 0, 1),
}
HAILUO_OPTIONS = {"duration": choice("6", "6", "10"), "prompt_optimizer": boolean(True)}
VEO_OPTIONS = {
    "duration": choice("8s", "4s", "6s", "8s"),
    "resolution": choice("720p", "720p", "1080p"),
    "generate_audio": boolean(True),
    "negative_prompt": optional_string(),
    "safety_tolerance": choice("4", "1", "2", "3", "4", "5", "6"),
    **SEED,
}
LTX_OPTIONS = {
    "negative_prompt": string("low quality, worst quality, deformed, distorted"),
    "num_inference_steps": integer(30, 1, 50),
    "guidance_scale": number(3, 1, 10),
    **SEED,
}
KOKORO_VOICES = (
    "af_heart", "af_alloy", "af_aoede", "af_bella", "af_jessica", "af_kore", "af_nicole", "af_nova",
    "af_river", "af_sarah", "af_sky", "am_adam", "am_echo", "am_eric", "am_fenrir", "am_liam",
    "am_michael", "am_onyx", "am_puck", "am_santa",
)  # fmt: skip
MINIMAX_OPTIONS = {
    "voice_setting": object_input(
        voice_id=string("Wise_Woman"),
        speed=number(1, 0.5, 2),
        vol=number(1, 0.01, 10),
        pitch=integer(0, -12, 12),
        emotion=choice(
            None, "happy", "sad", "angry", "fearful", "disgusted", "surprised", "neutral"
        ),
        english_normalization=boolean(False),
    ),
    "audio_setting": object_input(
        format=choice("mp3", "mp3", "pcm", "flac"),
        sample_rate=choice("32000", "8000", "16000", "22050", "24000", "32000", "44100"),
        bitrate=choice("128000", "32000", "64000", "128000", "256000"),
        channel=choice("1", "1", "2"),
    ),
    "language_boost": choice(
        None, "auto", "Chinese", "Chinese,Yue", "English", "Arabic", "Russian", "Spanish", "French",
        "Portuguese", "German", "Turkish", "Dutch", "Ukrainian", "Vietnamese", "Indonesian",
        "Japanese", "Italian", "Korean", "Thai", "Polish", "Romanian", "Greek", "Czech", "Finnish",
        "Hindi",
    ),
    "output_format": choice("hex", "url", "hex"),
}  # fmt: skip
ELEVENLABS_OPTIONS = {
    "voice": string("Rachel"),
    "stability": number(0.5, 0, 1),
    "similarity_boost": number(0.75, 0, 1),
    "style": number(0, 0, 1),
    "speed": number(1, 0.7, 1.2),
    "timestamps": boolean(False),
    "previous_text": optional_string(),
    "next_text": optional_string(),
    "language_code": optional_string(),
    "apply_text_normalization": choice("auto", "auto", "on", "off"),
}
STABLE_AUDIO_OPTIONS = {
    "seconds_total": integer(190, 1, 190),
    "num_inference_steps": integer(8, 4, 8),
    "guidance_scale": number(1, 1, 25),
    **SEED,
    "sync_mode": boolean(False),
}
STABLE_AUDIO_OPEN_OPTIONS = {
    "seconds_start": integer(0, 0, 47),
    "seconds_total": integer(30, 1, 47),
    "steps": integer(100, 2, 1000),
}
ACE_STEP_OPTIONS = {
    "duration": number(60, 5, 240),
    "instrumental": boolean(False),
    "number_of_steps": integer(27, 3, 60),
    **SEED,
    "scheduler": choice("euler", "euler", "heun"),
    "guidance_type": choice("apg", "cfg", "apg", "cfg_star"),
    "granularity_scale": integer(10, -100, 100),
    "guidance_interval": number(0.5, 0, 1),
    "guidance_interval_decay": number(0, 0, 1),
    "guidance_scale": number(15, 0, 200),
    "minimum_guidance_scale": number(3, 0, 200),
    "tag_guidance_scale": number(5, 0, 10),
    "lyric_guidance_scale": number(1.5, 0, 10),
}


def video_model(
    endpoint: str,
    inputs: Mapping[str, ModelInput],
    price: str,
    unit: str = "seconds",
    *,
    extra_fields: tuple[str, ...] = (),
) -> Model:
    return Model(endpoint, inputs, Decimal(price), unit, 6.0, "video", extra_fields)


def audio_model(
    endpoint: str,
    inputs: Mapping[str, ModelInput],
    price: str,
    unit: str,
    *,
    output: str = "audio",
    extra_fields: tuple[str, ...] = (),
    audio_format: str = "wav",
) -> Model:
    return Model(
        endpoint,
        inputs,
        Decimal(price),
        unit,
        2.0,
        output,
        extra_fields,
        audio_format=audio_format,
    )


KLING = "fal-ai/kling-video/v2.5-turbo/pro"
HAILUO = "fal-ai/minimax/hailuo-02/standard"
VEO = "fal-ai/veo3.1/fast"
MEDIA_MODELS = (
    video_model(
        f"{KLING}/text-to-video",
        {**PROMPT, **KLING_OPTIONS, "aspect_ratio": choice("16:9", "16:9", "9:16", "1:1")},
        "0.07",
    ),
    video_model(
        f"{KLING}/image-to-video",
        {**PROMPT, **IMAGE_URL, **KLING_OPTIONS, "tail_image_url": OPTIONAL_IMAGE},
        "0.07",
    ),
    video_model(f"{HAILUO}/text-to-video", {**PROMPT, **HAILUO_OPTIONS}, "0.045"),
    video_model(
        f"{HAILUO}/image-to-video",
        {**PROMPT, **IMAGE_URL, **HAILUO_OPTIONS, "end_image_url": OPTIONAL_IMAGE,
         "resolution": choice("768P", "512P", "768P")},
        "0.045",
    ),
    video_model(
        VEO,
        {**PROMPT, **VEO_OPTIONS, "aspect_ratio": choice("16:9", "16:9", "9:16"),
         "auto_fix": boolean(True)},
        "0.15",
    ),
    video_model(
        f"{VEO}/image-to-video",
        {**PROMPT, **IMAGE_URL, **VEO_OPTIONS,
         "aspect_ratio": choice("auto", "auto", "16:9", "9:16"), "auto_fix": boolean(False)},
        "0.15",
    ),
    video_model(
        "fal-ai/ltx-video", {**PROMPT, **LTX_OPTIONS}, "0.02", "videos", extra_fields=("seed",)
    ),
    audio_model(
        "fal-ai/kokoro/american-english",
        {**PROMPT, "voice": choice("af_heart", *KOKORO_VOICES), "speed": number(1, 0.1, 5)},
        "0.02",
        CHARACTERS,
    ),
    audio_model(
        "fal-ai/minimax/speech-02-turbo",
        {**TEXT, **MINIMAX_OPTIONS},
        "0.06",
        CHARACTERS,
        extra_fields=("duration_ms",),
        audio_format="mp3",
    ),
    audio_model(
        "fal-ai/elevenlabs/tts/multilingual-v2",
        {**TEXT, **ELEVENLABS_OPTIONS},
        "0.1",
        CHARACTERS,
        audio_format="mp3",
    ),
    audio_model(
        "fal-ai/stable-audio-25/text-to-audio",
        {**PROMPT, **STABLE_AUDIO_OPTIONS},
        "0.2",
        "audios",
        extra_fields=("seed",),
    ),
    audio_model(
        "fal-ai/stable-audio",
        {**PROMPT, **STABLE_AUDIO_OPEN_OPTIONS},
        "0",
        "compute seconds",
        output="audio_file",
    ),
    audio_model(
        "fal-ai/ace-step/prompt-to-audio",
        {**PROMPT, **ACE_STEP_OPTIONS},
        "0.0002",
        "seconds",
        extra_fields=("seed", "tags", "lyrics"),
    ),
)  # fmt: skip
