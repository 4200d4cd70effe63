"""What can be measured in a picture without a model, in numbers and in words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

_SIDE = 96  # pictures are measured at this longer side (pixels)
_EDGE = 0.04  # gradient (of values in 0..1, a pixel) from which on a pixel belongs to an edge
_BANDS = ("upper", "middle", "lower")
_COLUMNS = ("left", "centre", "right")
# Ends of the ranges of hue (turns); the first colour has both ends.
_HUES = (
    (0.03, "red"),
    (0.11, "orange"),
    (0.18, "yellow"),
    (0.43, "green"),
    (0.53, "teal"),
    (0.70, "blue"),
    (0.80, "purple"),
    (0.94, "pink"),
    (1.01, "red"),
)


class Measures(NamedTuple):
    """Numbers from 0 to 1, and names."""

    colours: tuple[str, ...]
    """The commonest colours, at most three, commonest first."""
    brightness: float
    """Mean luma."""
    contrast: float
    """Standard deviation of luma, doubled."""
    saturation: float
    """Mean saturation (HSV)."""
    edges: float
    """Share of pixels on edges."""
    symmetry: float
    """Correlation of luma with its mirror image, at least 0."""
    focus: tuple[str, str]
    """Where the light is: row and column of the brightest ninth."""
    shape: str
    """What most edges form: round shapes, horizontal bands, upright columns, slanted lines; or nothing."""


def _name_colour(hue: float, saturation: float, value: float) -> str:
    if value < 0.16:
        return "black"
    if saturation < 0.14:
        return "white" if value > 0.85 else "grey"
    name = next(name for end, name in _HUES if hue < end)
    if name in ("orange", "red") and value < 0.5 and saturation < 0.75:
        return "brown"
    return f"dark-{name}" if value < 0.42 else f"pale-{name}" if saturation < 0.4 and value > 0.7 else name


def _find_colours(rgb: np.ndarray) -> tuple[str, ...]:
    """Names of the commonest colours of float [H, W, 3] in 0..1; the second and third only where they cover a tenth."""
    hsv = np.asarray(Image.fromarray(np.round(rgb * 255).astype(np.uint8), "RGB").convert("HSV"), np.float64) / 255
    bins = np.round(hsv.reshape(-1, 3) * np.array([30, 8, 8])).astype(np.int64)
    codes, counts = np.unique(bins @ np.array([10_000, 100, 1]), return_counts=True)
    shares: dict[str, float] = {}
    for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
        name = _name_colour(code // 10_000 / 30, code // 100 % 100 / 8, code % 100 / 8)
        shares[name] = shares.get(name, 0.0) + count / bins.shape[0]
    ranked = sorted(shares, key=lambda name: (-shares[name], name))[:3]
    return tuple(name for place, name in enumerate(ranked) if place == 0 or shares[name] >= 0.1)


def _find_shape(down: np.ndarray, right: np.ndarray, strength: np.ndarray) -> str:
    """What the edges form, by the directions of their gradients; `down`, `right`, `strength` [H, W]."""
    rows, columns = np.nonzero(strength > _EDGE)
    if len(rows) < 0.02 * strength.size:
        return "nothing"
    unit_down, unit_right = down[rows, columns] / strength[rows, columns], right[rows, columns] / strength[rows, columns]
    height, width = strength.shape
    roundest = 0.0  # gradients of a round shape point to its middle, which is looked for on a grid
    for row in np.linspace(0.2, 0.8, 7) * height:
        for column in np.linspace(0.2, 0.8, 7) * width:
            to_down, to_right = rows - row, columns - column
            distance = np.hypot(to_down, to_right) + 1e-9
            near = distance < 0.45 * max(height, width)
            if near.sum() > 30:
                roundest = max(roundest, float((np.abs(to_down * unit_down + to_right * unit_right) / distance)[near].mean()))
    level, upright = float((np.abs(unit_down) > 0.92).mean()), float((np.abs(unit_right) > 0.92).mean())
    # Each against its usual value, in units of how far apart pictures with and without such a shape were.
    evidence = {
        "round shapes": (roundest - 0.82) / 0.07,
        "horizontal bands": (level - 0.43) / 0.08,
        "upright columns": (upright - 0.40) / 0.08,
        "slanted lines": (1 - level - upright - 0.48) / 0.08,
    }
    best = max(evidence, key=lambda name: evidence[name])
    return best if evidence[best] > 0 else "nothing"


def measure_image(image: Image.Image) -> Measures:
    """Measures an RGB picture of any size from one pixel on."""
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    rgb = np.asarray(small, np.float64) / 255
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    spread = rgb.max(axis=2) - rgb.min(axis=2)
    saturation = float((spread / np.maximum(rgb.max(axis=2), 1e-9)).mean())
    padded = np.pad(luma, 1, mode="edge")
    down, right = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2, (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    strength = np.hypot(down, right)
    mirrored = luma[:, ::-1]
    variance = float(luma.var())
    symmetry = float(((luma - luma.mean()) * (mirrored - luma.mean())).mean() / variance) if variance > 1e-9 else 1.0
    ninths = [[float(part.mean()) if part.size else 0.0 for part in np.array_split(band, 3, axis=1)] for band in np.array_split(luma, 3)]
    place = int(np.argmax(ninths))
    return Measures(
        colours=_find_colours(rgb),
        brightness=float(luma.mean()),
        contrast=min(1.0, 2 * float(luma.std())),
        saturation=saturation,
        edges=float((strength > _EDGE).mean()),
        symmetry=max(0.0, symmetry),
        focus=(_BANDS[place // 3], _COLUMNS[place % 3]),
        shape=_find_shape(down, right, strength),
    )


def _grade(value: float, low: float, high: float, names: tuple[str, str, str]) -> str:
    return names[0] if value < low else names[2] if value > high else names[1]


def describe_measures(measures: Measures) -> str:
    """A caption of about 30 words."""
    light = _grade(measures.brightness, 0.3, 0.6, ("dim", "half-lit", "bright"))
    contrast = _grade(measures.contrast, 0.35, 0.55, ("low-contrast", "even-toned", "high-contrast"))
    strength = _grade(measures.saturation, 0.25, 0.6, ("muted", "moderate", "vivid"))
    density = _grade(measures.edges, 0.25, 0.5, ("sparse", "measured", "crowded"))
    balance = "symmetric" if measures.symmetry > 0.6 else "asymmetric"
    shape = "no clear shapes" if measures.shape == "nothing" else measures.shape
    colours = ", ".join(measures.colours)
    return (
        f"A {light}, {contrast} picture in {colours}, with {strength} colour. "
        f"The light is in the {measures.focus[0]} {measures.focus[1]}. "
        f"Edges form {shape}; the composition is {balance} and {density}."
    )
