"""Parsing of whole numbers that other programs sent."""

DIGITS_MAX = 18  # such a number fits into 64 bits


def parse_digits(text: str | bytes) -> int | None:
    """Return the number that ASCII digits stand for. None for any other text, and for numbers of
    more than DIGITS_MAX digits: `int` accepts more spellings, and raises for 4301 digits."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    if not text.isascii() or not text.isdecimal():
        return None
    digits = text.lstrip("0")
    return int(digits or "0") if len(digits) <= DIGITS_MAX else None
