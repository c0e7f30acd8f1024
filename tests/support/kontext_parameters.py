"""The parameters of the Kontext paths, with valid and invalid values."""

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
class Parameter:
    """A parameter.

    variants: the variants that have it.
    valid: values as they are sent to the proxy, with the value that fal gets.
    invalid: values that are refused.
    description: of the valid values, in the error message.
    """

    variants: tuple[str, ...]
    valid: list[tuple[object, object]]
    invalid: list[object]
    description: str


def same(*values: object) -> list[tuple[object, object]]:
    return [(value, value) for value in values]


NOT_BOOLEAN = ["true", "", 0, 1, 1.0, [], {}]
PARAMETERS = {
    "seed": Parameter(
        ALL,
        [*same(0, 42, -1, 2**64), (3.0, 3), (-7.0, -7)],
        ["3", "", True, False, 3.5, 1e300, [], [3], {}],
        "a whole number",
    ),
    "guidance_scale": Parameter(
        ALL,
        same(1, 1.0, 3.5, 20, 20.0),
        [0, 0.99, 20.01, 21, -3, 10**400, "3.5", True, [], {}],
        "a number from 1 to 20",
    ),
    "sync_mode": Parameter(ALL, same(True, False), NOT_BOOLEAN, "true or false"),
    "num_images": Parameter(
        ALL,
        [*same(1, 4), (2.0, 2)],
        [0, 5, -1, 1.5, "1", True, [], {}],
        "a whole number from 1 to 4",
    ),
    "output_format": Parameter(
        ALL, same("jpeg", "png"), ["webp", "JPEG", "jpg", "", 1, True, []], "one of jpeg, png"
    ),
    "enhance_prompt": Parameter(PRO, same(True, False), NOT_BOOLEAN, "true or false"),
    "safety_tolerance": Parameter(
        PRO,
        [*same("1", "2", "3", "4", "5", "6"), (1, "1"), (6, "6"), (3.0, "3")],
        ["0", "7", 0, 7, 2.5, "2.0", " 2", "two", "", True, [], ["2"]],
        "one of 1, 2, 3, 4, 5, 6",
    ),
    "aspect_ratio": Parameter(
        PRO,
        same(*RATIOS),
        ["16:10", "4:5", "match_input", "1:1 ", "", 1, 1.5, []],
        f"one of {', '.join(RATIOS)}",
    ),
    "num_inference_steps": Parameter(
        DEV,
        [*same(10, 50), (28.0, 28)],
        [9, 51, 0, -10, 28.5, "28", True, []],
        "a whole number from 10 to 50",
    ),
    "enable_safety_checker": Parameter(DEV, same(True, False), NOT_BOOLEAN, "true or false"),
    "acceleration": Parameter(
        DEV,
        same("none", "regular", "high"),
        ["low", "None", "", 0, False, []],
        "one of none, regular, high",
    ),
    "resolution_mode": Parameter(
        DEV, same(*MODES), ["9:22", "AUTO", "", 1, True, []], f"one of {', '.join(MODES)}"
    ),
}
CELLS = [
    pytest.param(name, variant, id=f"{name} of {variant}") for name in PARAMETERS for variant in ALL
]


def uri(content: bytes, declared: str = "image/png") -> str:
    return f"data:{declared};base64,{base64.b64encode(content).decode()}"
