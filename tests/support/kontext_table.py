"""The models and inputs of /kontext, as a table."""

import base64
from dataclasses import dataclass

import pytest

PRO = ("kontext", "kontext/max")
DEV = ("kontext/dev",)
ALL = (*PRO, *DEV)
GIF = b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"
RATIOS = ("21:9", "16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16", "9:21")
MODES = ("auto", "match_input", "1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3",
         "9:16", "9:21")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A parameter. variants: which take it; taken: values as they are sent here and as they reach
    fal; refused: values that do not fit; accepted: what the refusal says."""

    variants: tuple[str, ...]
    taken: list[tuple[object, object]]
    refused: list[object]
    accepted: str


def same(*values: object) -> list[tuple[object, object]]:
    return [(value, value) for value in values]


NO_FLAGS = ["true", "", 0, 1, 1.0, [], {}]
TABLE = {
    "seed": Row(
        ALL,
        [*same(0, 42, -1, 2**64), (3.0, 3), (-7.0, -7)],
        ["3", "", True, False, 3.5, 1e300, [], [3], {}],
        "a whole number",
    ),
    "guidance_scale": Row(
        ALL,
        same(1, 1.0, 3.5, 20, 20.0),
        [0, 0.99, 20.01, 21, -3, 10**400, "3.5", True, [], {}],
        "a number from 1 to 20",
    ),
    "sync_mode": Row(ALL, same(True, False), NO_FLAGS, "true or false"),
    "num_images": Row(
        ALL,
        [*same(1, 4), (2.0, 2)],
        [0, 5, -1, 1.5, "1", True, [], {}],
        "a whole number from 1 to 4",
    ),
    "output_format": Row(
        ALL, same("jpeg", "png"), ["webp", "JPEG", "jpg", "", 1, True, []], "one of jpeg, png"
    ),
    "enhance_prompt": Row(PRO, same(True, False), NO_FLAGS, "true or false"),
    "safety_tolerance": Row(
        PRO,
        [*same("1", "2", "3", "4", "5", "6"), (1, "1"), (6, "6"), (3.0, "3")],
        ["0", "7", 0, 7, 2.5, "2.0", " 2", "two", "", True, [], ["2"]],
        "one of 1, 2, 3, 4, 5, 6",
    ),
    "aspect_ratio": Row(
        PRO,
        same(*RATIOS),
        ["16:10", "4:5", "match_input", "1:1 ", "", 1, 1.5, []],
        f"one of {', '.join(RATIOS)}",
    ),
    "num_inference_steps": Row(
        DEV,
        [*same(10, 50), (28.0, 28)],
        [9, 51, 0, -10, 28.5, "28", True, []],
        "a whole number from 10 to 50",
    ),
    "enable_safety_checker": Row(DEV, same(True, False), NO_FLAGS, "true or false"),
    "acceleration": Row(
        DEV,
        same("none", "regular", "high"),
        ["low", "None", "", 0, False, []],
        "one of none, regular, high",
    ),
    "resolution_mode": Row(
        DEV, same(*MODES), ["9:22", "AUTO", "", 1, True, []], f"one of {', '.join(MODES)}"
    ),
}
CELLS = [
    pytest.param(name, variant, id=f"{name} of {variant}") for name in TABLE for variant in ALL
]


def uri(content: bytes, declared: str = "image/png") -> str:
    return f"data:{declared};base64,{base64.b64encode(content).decode()}"
