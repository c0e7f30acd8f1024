"""What the runners of live video have in common: their images, and the prompts of clients."""

import colorsys
import hashlib
import json

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 320, 240
SQUARE = 60  # pixels
SQUARE_COLOR = (255, 255, 255)
LAP_FRAMES = 60  # in which the square crosses the image
Color = tuple[int, int, int]


class InvalidOfferError(Exception):
    """The client's session description cannot be used."""


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
