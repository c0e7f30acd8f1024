"""Images of the runners of live video, and the prompts that clients send to them."""

import colorsys
import hashlib
import json

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 320, 240
SQUARE = 60  # pixels
SQUARE_COLOR = (255, 255, 255)
LAP_FRAMES = 60  # in which the square crosses the image
ADDRESS_FIELD = 4  # of a candidate's line (RFC 8839)
Color = tuple[int, int, int]


class InvalidOfferError(Exception):
    """The client's session description cannot be used."""


def without_local_names(offer: str) -> str:
    """Return a session description without the candidates of names in `.local`, by which browsers
    hide their addresses. The connection is found from the other side, and looking such names up
    would take seconds."""
    lines = offer.splitlines(keepends=True)
    return "".join(line for line in lines if not is_local_candidate(line))


def is_local_candidate(line: str) -> bool:
    fields = line.split()
    is_candidate = line.startswith("a=candidate:") and len(fields) > ADDRESS_FIELD
    return is_candidate and fields[ADDRESS_FIELD].lower().endswith(".local")


def background(endpoint: str, prompt: str = "") -> Color:
    """Return the color of the image behind the moving square."""
    digest = hashlib.sha256(f"{endpoint}\n{prompt}".encode()).digest()
    red, green, blue = colorsys.hls_to_rgb(digest[0] / 255, 0.4, 0.6)
    return round(red * 255), round(green * 255), round(blue * 255)


def square_position(number: int) -> tuple[int, int]:
    """Return the left upper corner of the square in a frame."""
    step = number % (2 * LAP_FRAMES)
    share = 1 - abs(step - LAP_FRAMES) / LAP_FRAMES
    return round(share * (WIDTH - SQUARE)), (HEIGHT - SQUARE) // 2


def draw_frame(number: int, color: Color) -> Image.Image:
    image = Image.new("RGB", (WIDTH, HEIGHT), color)
    left, top = square_position(number)
    box = (left, top, left + SQUARE - 1, top + SQUARE - 1)
    ImageDraw.Draw(image).rectangle(box, fill=SQUARE_COLOR)
    return image


def read_prompt(message: str | bytes) -> str | None:
    """Return the prompt of a message on a data channel: `{"prompt": ...}`."""
    try:
        document = json.loads(message)
    except ValueError:
        return None
    prompt = document.get("prompt") if isinstance(document, dict) else None
    return prompt if isinstance(prompt, str) else None
