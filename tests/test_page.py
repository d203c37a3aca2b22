"""Colours of the pages."""

import re

from moe_ablm import page


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, by WCAG 2.2."""
    digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, by WCAG 2.2."""
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_on_light_and_on_dark_screens():
    light, dark = (dict(re.findall(r"--([\w-]+):#(\w+)", block)) for block in
                   re.findall(r":root\{(.*?)\}", page.STYLE, re.DOTALL))  # fmt: skip
    assert light.keys() == dark.keys()
    assert contrast("000", "fff") == 21
    for scheme in (light, dark):
        for text, ground in [("ink", "paper"), ("faint", "paper"), ("accent", "paper"),
                             ("ink", "band"), ("yes", "yes-band"), ("no", "no-band"),
                             ("open", "open-band")]:  # fmt: skip
            assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground)
    assert luminance(dark["paper"]) < luminance(dark["ink"])
