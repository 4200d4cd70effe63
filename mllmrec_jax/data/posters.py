"""Posters: a palette, a family of shapes and a title as a small picture, the same bytes for the same arguments and Pillow."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

WIDTH, HEIGHT = 160, 240  # of the finished picture (pixels)
_SCALE = 2  # drawn larger and reduced: smooth edges
_W, _H = WIDTH * _SCALE, HEIGHT * _SCALE
_QUALITY = 88

# Of each palette: top, middle and bottom of the sky, the light, and two colours of the shapes.
_COLOURS: dict[str, tuple[Colour, Colour, Colour, Colour, Colour, Colour]] = {
    "ember": ((58, 10, 24), (178, 44, 34), (246, 142, 52), (255, 226, 160), (255, 190, 92), (122, 20, 30)),
    "lagoon": ((6, 24, 66), (12, 96, 138), (72, 196, 190), (222, 255, 240), (150, 236, 222), (8, 54, 104)),
    "orchid": ((36, 10, 66), (122, 34, 142), (236, 112, 176), (255, 222, 244), (250, 164, 222), (76, 18, 112)),
    "meadow": ((10, 44, 26), (44, 122, 52), (186, 204, 70), (252, 252, 196), (226, 234, 120), (18, 74, 40)),
    "noir": ((10, 11, 15), (52, 56, 64), (150, 154, 160), (246, 244, 236), (208, 208, 206), (26, 28, 34)),
}
PALETTES = tuple(_COLOURS)


def _blend(low: Colour, high: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _paint_sky(palette: str, focus: tuple[float, float], tilt: float) -> Image.Image:
    """A three-colour gradient with a light at `focus` and dark corners; computed small, since it is smooth."""
    top, middle, bottom, light, _, _ = (np.array(colour, np.float64) for colour in _COLOURS[palette])
    y, x = np.meshgrid(np.linspace(0, 1, HEIGHT // 3), np.linspace(0, 1, WIDTH // 3), indexing="ij")
    along = np.clip(y + tilt * (x - 0.5), 0, 1)[..., None]
    sky = np.where(along < 0.55, top + (middle - top) * along / 0.55, middle + (bottom - middle) * (along - 0.55) / 0.45)
    distance = np.hypot((x - focus[0]) * WIDTH / HEIGHT, y - focus[1])[..., None]
    sky = sky + (light - sky) * 0.75 * np.exp(-((distance / 0.22) ** 2))
    corners = np.hypot(x - 0.5, (y - 0.5) * 0.8)[..., None]
    sky = sky * (1 - 0.45 * np.clip(corners - 0.35, 0, 1) / 0.3)
    picture = Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8), "RGB")
    return picture.resize((_W, _H), Image.Resampling.BICUBIC)


def _draw_orbs(draw: ImageDraw.ImageDraw, rng: np.random.Generator, palette: str, focus: tuple[float, float]) -> None:
    """One large planet with a shadow side, its halo, and small moons on an orbit."""
    *_, light, bright, dark = _COLOURS[palette]
    x, y, radius = focus[0] * _W, focus[1] * _H, _W * rng.uniform(0.2, 0.28)
    for ring in range(4, 0, -1):
        around = radius * (1 + 0.22 * ring)
        draw.ellipse((x - around, y - around, x + around, y + around), fill=(*light, 22))
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*bright, 255))
    for step in range(12):
        inner = radius * (1 - 0.05 * step)
        shift = radius * 0.03 * step
        left, upper = x - inner - shift, y - inner - shift
        draw.ellipse((left, upper, left + 2 * inner, upper + 2 * inner), fill=(*_blend(dark, light, step / 11), 150))
    for turn in rng.uniform(0, 2 * np.pi, size=int(rng.integers(3, 6))):
        moon_x, moon_y, size = x + 1.75 * radius * np.cos(turn), y + 1.75 * radius * np.sin(turn), radius * rng.uniform(0.08, 0.2)
        draw.ellipse((moon_x - size, moon_y - size, moon_x + size, moon_y + size), fill=(*light, 235))


def _draw_peaks(draw: ImageDraw.ImageDraw, rng: np.random.Generator, palette: str, focus: tuple[float, float]) -> None:
    """A sun behind four ranges of triangular mountains, darker towards the front, with lit left flanks."""
    *_, light, bright, dark = _COLOURS[palette]
    x, y, radius = focus[0] * _W, focus[1] * _H, _W * 0.13
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*light, 250))
    for layer in range(4):
        base = _H * (0.52 + 0.12 * layer)
        colour = _blend(bright, dark, 0.25 + 0.25 * layer)
        width = _W * (0.46 + 0.08 * layer)
        for centre in np.arange(-0.1, 1.2, 0.3) * _W + rng.uniform(-0.1, 0.1) * _W:
            peak, tip = base - _H * rng.uniform(0.1, 0.24), centre + rng.uniform(-0.05, 0.05) * _W
            draw.polygon([(centre - width / 2, base), (tip, peak), (centre + width / 2, base)], fill=(*colour, 255))
            draw.polygon([(centre - width / 2, base), (tip, peak), (tip - width * 0.06, base)], fill=(*light, 46))
        draw.rectangle((0, base - 1, _W, _H), fill=(*colour, 255))


def _draw_waves(draw: ImageDraw.ImageDraw, rng: np.random.Generator, palette: str, focus: tuple[float, float]) -> None:
    """A low moon over layered sine waves with bright crests."""
    *_, light, bright, dark = _COLOURS[palette]
    x, y, radius = focus[0] * _W, focus[1] * _H, _W * 0.11
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*light, 245))
    across = np.linspace(0, _W, 81)
    for layer in range(7):
        height = _H * (0.4 + 0.075 * layer)
        swell = _H * rng.uniform(0.018, 0.034) * np.sin(across / _W * 2 * np.pi * rng.uniform(1.0, 1.9) + rng.uniform(0, 2 * np.pi))
        crest = list(zip(across.tolist(), (height + swell).tolist(), strict=True))
        draw.polygon([*crest, (_W, _H), (0, _H)], fill=(*_blend(bright, dark, layer / 6), 225))
        draw.line(crest, fill=(*light, 190), width=3)


def _draw_rays(draw: ImageDraw.ImageDraw, rng: np.random.Generator, palette: str, focus: tuple[float, float]) -> None:
    """Beams that fan out from a ringed source."""
    *_, light, bright, dark = _COLOURS[palette]
    x, y, beams, turn = focus[0] * _W, focus[1] * _H, int(rng.integers(11, 17)), rng.uniform(0, np.pi)
    for beam in range(beams):
        angle = turn + 2 * np.pi * beam / beams
        half = np.pi / beams * rng.uniform(0.35, 0.6)
        ends = [(x + 1.6 * _H * np.cos(side), y + 1.6 * _H * np.sin(side)) for side in (angle - half, angle + half)]
        draw.polygon([(x, y), *ends], fill=(*(light if beam % 2 else dark), 96))
    for radius, colour, alpha in ((0.24, dark, 255), (0.2, bright, 255), (0.14, dark, 255), (0.09, light, 255)):
        size = _W * radius
        draw.ellipse((x - size, y - size, x + size, y + size), fill=(*colour, alpha))


_Painter = Callable[[ImageDraw.ImageDraw, np.random.Generator, str, tuple[float, float]], None]
_PAINTERS: dict[str, _Painter] = {"orbs": _draw_orbs, "peaks": _draw_peaks, "waves": _draw_waves, "rays": _draw_rays}
SHAPES = tuple(_PAINTERS)


@functools.lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)  # the typeface inside Pillow: no font of the machine is used
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("posters expect a Pillow with FreeType (its wheels have it), got one without; install pillow from PyPI")
    return font


def _write_line(draw: ImageDraw.ImageDraw, text: str, y: float, *, size: int, spacing: float, colour: Colour) -> None:
    """Spaced capitals centred at height `y`, with a soft shadow; smaller where they would not fit."""
    letters = text.upper()
    font, widths = _font(size), [0.0]
    while size > 8:
        font = _font(size)
        widths = [font.getlength(letter) + spacing * size for letter in letters]
        if sum(widths) <= _W * 0.88:
            break
        size -= 2
    x = (_W - sum(widths) + spacing * size) / 2
    for letter, width in zip(letters, widths, strict=True):
        draw.text((x + 2, y + 3), letter, font=font, fill=(0, 0, 0, 150), anchor="lm")
        draw.text((x, y), letter, font=font, fill=(*colour, 255), anchor="lm")
        x += width


def render_poster(title: str, palette: int, shape: int, *, seed: tuple[int, ...]) -> bytes:
    """Paints one poster.

    Args:
      title: drawn at the foot, one word a line.
      palette: index into `PALETTES`.
      shape: index into `SHAPES`.
      seed: non-negative integers that decide the composition (where the light is, how the shapes lie).

    Returns:
      A JPEG of `WIDTH` x `HEIGHT` pixels.
    """
    rng = np.random.default_rng(seed)
    name = PALETTES[palette]
    focus = (float(rng.uniform(0.3, 0.7)), float(rng.uniform(0.26, 0.38)))
    picture = _paint_sky(name, focus, float(rng.uniform(-0.35, 0.35)))
    draw = ImageDraw.Draw(picture, "RGBA")
    _PAINTERS[SHAPES[shape]](draw, rng, name, focus)
    words = title.split()
    foot = _H - 46 - 34 * len(words)
    for row in range(_H - foot + 70):  # the scrim that keeps the title legible
        draw.line((0, foot - 70 + row, _W, foot - 70 + row), fill=(*_COLOURS[name][0], min(215, 3 * row)))
    light = _COLOURS[name][3]
    draw.line((_W * 0.36, foot - 6, _W * 0.64, foot - 6), fill=(*light, 220), width=2)
    for line, word in enumerate(words):
        _write_line(draw, word, foot + 20 + 34 * line, size=32, spacing=0.12, colour=light)
    _write_line(draw, "a posterworld picture", _H - 24, size=11, spacing=0.3, colour=light)
    draw.rectangle((7, 7, _W - 8, _H - 8), outline=(*light, 120), width=2)
    buffer = io.BytesIO()
    picture.reduce(_SCALE).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
