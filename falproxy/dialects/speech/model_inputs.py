"""Translation of a request for speech into the inputs of a model. What the model cannot follow is
refused before a job is bought."""

from collections.abc import Mapping
from dataclasses import dataclass

from falproxy.dialects.openai.errors import invalid_parameter
from falproxy.dialects.openai.media_inputs import (
    check_model_inputs,
    extra_inputs,
    schema_unavailable,
)
from falproxy.dialects.openai.models import ResolvedModel
from falproxy.dialects.speech.schema import SpeechRequest, VoiceId
from falproxy.fal.model_schema import InputSchema, ModelSchema

# Names of inputs by priority.
SPOKEN_INPUTS = ("text", "input", "script", "gen_text", "prompt")
VOICE_INPUTS = ("voice", "voice_id", "speaker", "speaker_id", "preset_voice")
INSTRUCTION_INPUTS = ("instructions", "style_instructions", "style_prompt", "prompt")
FORMAT_INPUTS = ("response_format", "output_format", "audio_format", "format")
# Objects with the inputs of a voice, or of the file.
VOICE_OBJECT, FILE_OBJECT = "voice_setting", "audio_setting"
# An input for the form of the result: as a file, or as hexadecimal digits.
RESULT_INPUT, AS_FILE = "output_format", "url"
DEFAULT_VOICES = ("", "auto", "default")


@dataclass(frozen=True, slots=True)
class SpeechInputs:
    """The inputs of a model. has_format: they determine the format of the file."""

    inputs: Mapping[str, object]
    has_format: bool


def build_inputs(params: SpeechRequest, model: ResolvedModel) -> SpeechInputs:
    """Raises: ImagesError 400; 503, fal's description of the model is unavailable."""
    schema, endpoint = model.schema, model.endpoint
    if schema is None:
        raise schema_unavailable(model, "input")
    spoken = schema.first_input(*SPOKEN_INPUTS)
    if spoken is None:
        raise invalid_parameter("model", f"{endpoint} takes no text.", "model_not_supported")
    renamed = {spoken: "input"}
    inputs: dict[str, object] = {spoken: params.input}
    file_format = format_inputs(params.response_format, schema)
    parts = [
        ("voice", voice_inputs(params.voice, schema, endpoint)),
        ("speed", speed_inputs(params.speed, schema, endpoint)),
        ("instructions", instruction_inputs(params.instructions, schema, endpoint, spoken)),
        ("response_format", file_format or {}),
    ]
    if AS_FILE in schema.choices(RESULT_INPUT):
        parts.append((RESULT_INPUT, {RESULT_INPUT: AS_FILE}))
    parts.append(("", extra_inputs(params.model_extra or {}, schema, is_form=False)))
    for param, part in parts:
        for name, value in part.items():
            known = inputs.get(name)
            if isinstance(known, dict) and isinstance(value, dict) and not known.keys() & value:
                inputs[name] = {**known, **value}
            elif name in inputs:
                raise invalid_parameter(name, f"{name} was sent more than once.")
            else:
                inputs[name] = value
            renamed[name] = param or name
    check_model_inputs(inputs, model, renamed)
    return SpeechInputs(inputs, has_format=file_format is not None)


def voice_inputs(
    voice: str | VoiceId | None, schema: ModelSchema, endpoint: str
) -> dict[str, object]:
    """Raises: ImagesError 400, the model has no choice of voices."""
    name = voice.id if isinstance(voice, VoiceId) else voice
    if name is None or name in DEFAULT_VOICES:
        return {}
    if (input_name := schema.first_input(*VOICE_INPUTS)) is not None:
        return {input_name: own_voice(name, schema.inputs[input_name])}
    nested = nested_input(schema, VOICE_OBJECT, *VOICE_INPUTS)
    if nested is None:
        message = f"voice: {endpoint} has no choice of voices. Send auto."
        raise invalid_parameter("voice", message)
    return {VOICE_OBJECT: {nested[0]: own_voice(name, nested[1])}}


def own_voice(name: str, schema: InputSchema) -> str:
    """Return the model's voice of a name, which the model may write with a prefix or in another
    case: `alloy` for `af_alloy`. The name itself if there is no such voice, or several."""
    voices = [each for each in schema.choices if isinstance(each, str)]
    if name in voices:
        return name
    lower = name.lower()
    found = [each for each in voices if each.lower() == lower or each.lower().endswith(f"_{lower}")]
    return found[0] if len(found) == 1 else name


def speed_inputs(speed: float | None, schema: ModelSchema, endpoint: str) -> dict[str, object]:
    """Raises: ImagesError 400, the model has one speed."""
    if speed is None:
        return {}
    if "speed" in schema.inputs:
        return {"speed": speed}
    if nested_input(schema, VOICE_OBJECT, "speed") is not None:
        return {VOICE_OBJECT: {"speed": speed}}
    if speed == 1:
        return {}
    raise invalid_parameter("speed", f"speed: the speed of {endpoint} cannot be set.")


def instruction_inputs(
    text: str | None, schema: ModelSchema, endpoint: str, spoken: str
) -> dict[str, object]:
    """spoken: the input of the text itself. Raises: ImagesError 400, the model takes none."""
    if not text:
        return {}
    names = (name for name in INSTRUCTION_INPUTS if name in schema.inputs and name != spoken)
    if (name := next(names, None)) is None:
        raise invalid_parameter("instructions", f"{endpoint} takes no instructions.")
    return {name: text}


def format_inputs(audio_format: str | None, schema: ModelSchema) -> dict[str, object] | None:
    """Return the input for the format of the file; None if the model has none for it."""
    if audio_format is None:
        return None
    for name in FORMAT_INPUTS:
        if (choice := format_choice(audio_format, schema.inputs.get(name))) is not None:
            return {name: choice}
    for key in FORMAT_INPUTS:
        nested = nested_input(schema, FILE_OBJECT, key)
        if nested and (choice := format_choice(audio_format, nested[1])) is not None:
            return {FILE_OBJECT: {key: choice}}
    return None


def format_choice(audio_format: str, schema: InputSchema | None) -> str | None:
    """Return the model's name of a format, such as `mp3_44100_128`: its default, if that is one of
    the format."""
    if schema is None:
        return None
    names = [each for each in (schema.default, *schema.choices) if isinstance(each, str)]
    # OpenAI's format without a header has a fixed rate.
    wanted = "pcm_24000" if audio_format == "pcm" else audio_format
    return next(
        (each for each in names if each in schema.choices and is_format(each, wanted)), None
    )


def is_format(name: str, audio_format: str) -> bool:
    return name.lower() == audio_format or name.lower().startswith(f"{audio_format}_")


def nested_input(schema: ModelSchema, outer: str, *names: str) -> tuple[str, InputSchema] | None:
    """Return the first of these inputs inside of an object, and its schema; None if it has none."""
    found = schema.inputs.get(outer)
    properties = {} if found is None else found.properties
    return next(((name, properties[name]) for name in names if name in properties), None)
