"""The colours of the classes: one for each, seen by everybody, on both pages."""

import numpy as np
import pytest

from torchtune_agent.data.token_class import GROUPS, TokenClass
from torchtune_agent.metrics.colours import CLASSES, PAGE_DARK, PAGE_LIGHT, TOKEN_COLOURS, css_variables

# How colours look to eyes without one kind of cone: Machado, Oliveira and Fernandes 2009, full severity, linear RGB
SIGHT = {
    "usual": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Linear RGB to OKLab (Ottosson 2020), in which distances are as they are seen
TO_LMS = [
    [0.41222147, 0.53633254, 0.05144599],
    [0.21190350, 0.68069955, 0.10739696],
    [0.08830246, 0.28171884, 0.62997870],
]
TO_LAB = [
    [0.21045426, 0.79361779, -0.00407205],
    [1.97799850, -2.42859221, 0.45059371],
    [0.02590404, 0.78277177, -0.80867577],
]


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def seen(colour: str, sight: str) -> np.ndarray:
    rgb = np.clip(np.array(SIGHT[sight]) @ linear(colour), 0, 1)
    return np.array(TO_LAB) @ np.cbrt(np.array(TO_LMS) @ rgb)


def palette(page: str) -> dict[str, str]:
    return {name: look.light if page == "light" else look.dark for name, look in CLASSES.items()}


@pytest.mark.parametrize(("page", "ground"), [("light", PAGE_LIGHT), ("dark", PAGE_DARK)])
def test_every_colour_stands_out_from_the_page(page: str, ground: str) -> None:
    for name, colour in palette(page).items():
        darker, lighter = sorted([luminance(colour) + 0.05, luminance(ground) + 0.05])
        assert lighter / darker >= 3, name


@pytest.mark.parametrize("page", ["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_no_two_colours_look_alike(page: str, sight: str) -> None:
    colours = list(palette(page).items())
    for i, (name, colour) in enumerate(colours):
        for other, another in colours[:i]:
            assert np.linalg.norm(seen(colour, sight) - seen(another, sight)) > 0.08, (name, other)


def test_every_class_and_group_has_one() -> None:
    assert list(CLASSES)[: len(GROUPS)] == list(GROUPS)
    assert set(TOKEN_COLOURS) >= {kind.name.lower() for kind in TokenClass}
    assert all(f"--class-{name}: {look.dark};" in css_variables() for name, look in (CLASSES | TOKEN_COLOURS).items())
