"""Pictures of things, drawn with Pillow: each in a box of [-1, 1] x [-1, 1], y pointing down."""

from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw

Colour = tuple[int, int, int]
BLACK: Colour = (25, 25, 30)
WHITE: Colour = (245, 245, 240)
GREY: Colour = (120, 120, 125)


@dataclass(frozen=True)
class Pen:
    """Draws in a thing's own coordinates: the box [-1, 1] x [-1, 1] of half size `radius` around `centre`.

    Attributes:
        draw: The picture.
        centre: In pixels.
        radius: In pixels.
        flip: Whether to mirror the thing.
    """

    draw: ImageDraw.ImageDraw
    centre: tuple[float, float]
    radius: float
    flip: bool

    def _point(self, x: float, y: float) -> tuple[float, float]:
        mirrored = -x if self.flip else x
        return self.centre[0] + mirrored * self.radius, self.centre[1] + y * self.radius

    def ellipse(self, x: float, y: float, width: float, height: float, fill: Colour) -> None:
        """Ellipse around (x, y) with the half axes `width` and `height`."""
        cx, cy = self._point(x, y)
        w, h = width * self.radius, height * self.radius
        self.draw.ellipse((cx - w, cy - h, cx + w, cy + h), fill=fill)

    def polygon(self, *points: tuple[float, float], fill: Colour) -> None:
        """Filled polygon."""
        self.draw.polygon([self._point(*point) for point in points], fill=fill)

    def rectangle(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        """Filled rectangle."""
        self.polygon((left, top), (right, top), (right, bottom), (left, bottom), fill=fill)

    def line(self, *points: tuple[float, float], width: float, fill: Colour) -> None:
        """Line of a width in the thing's units."""
        pixels = max(1, round(width * self.radius))
        self.draw.line([self._point(*point) for point in points], fill=fill, width=pixels, joint="curve")


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def bell(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0.75, 0.25, 0.22, _shade(colour, 0.5))
    pen.ellipse(0, -0.3, 0.55, 0.6, colour)
    pen.polygon((-0.55, -0.3), (0.55, -0.3), (0.9, 0.65), (-0.9, 0.65), fill=colour)
    pen.rectangle(-0.95, 0.5, 0.95, 0.7, _shade(colour, 0.7))


def siren(pen: Pen, colour: Colour) -> None:
    for x, y in ((-0.9, -0.5), (-0.5, -0.9), (0.5, -0.9), (0.9, -0.5)):
        pen.line((x * 0.7, y * 0.7), (x, y), width=0.14, fill=(255, 240, 120))
    pen.ellipse(0, 0.1, 0.6, 0.65, colour)
    pen.rectangle(-0.6, 0.1, 0.6, 0.6, colour)
    pen.rectangle(-0.85, 0.5, 0.85, 0.9, BLACK)
    pen.ellipse(-0.2, -0.1, 0.14, 0.25, WHITE)


def car(pen: Pen, colour: Colour) -> None:
    pen.polygon((-0.5, -0.5), (0.35, -0.5), (0.65, 0.0), (-0.7, 0.0), fill=_shade(colour, 0.8))
    pen.polygon((-0.4, -0.38), (0.25, -0.38), (0.45, 0.0), (-0.5, 0.0), fill=(200, 230, 245))
    pen.rectangle(-0.95, -0.05, 0.95, 0.45, colour)
    for x in (-0.5, 0.5):
        pen.ellipse(x, 0.45, 0.28, 0.28, BLACK)
        pen.ellipse(x, 0.45, 0.12, 0.12, GREY)


def cloud(pen: Pen, colour: Colour) -> None:
    for x, y, size in ((-0.55, -0.35, 0.42), (0.55, -0.35, 0.42), (0, -0.5, 0.48)):
        pen.ellipse(x, y, size, size, colour)
    pen.rectangle(-0.55, -0.4, 0.55, 0.06, colour)
    for x, y in (
        (-0.65, 0.2),
        (-0.15, 0.2),
        (0.35, 0.2),
        (0.85, 0.2),
        (-0.8, 0.62),
        (-0.3, 0.62),
        (0.2, 0.62),
        (0.7, 0.62),
    ):
        pen.line((x, y), (x - 0.12, y + 0.32), width=0.16, fill=(30, 90, 240))


def clock(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0, 0.98, 0.98, colour)
    pen.ellipse(0, 0, 0.74, 0.74, (255, 250, 205))
    for x, y in ((0, -0.58), (0.58, 0), (0, 0.58), (-0.58, 0)):
        pen.ellipse(x, y, 0.1, 0.1, colour)
    pen.line((0, 0.1), (0, -0.5), width=0.16, fill=(215, 30, 40))
    pen.line((-0.1, -0.05), (0.42, 0.2), width=0.16, fill=(215, 30, 40))


def drum(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0.6, 0.8, 0.3, colour)
    pen.rectangle(-0.8, -0.2, 0.8, 0.6, colour)
    for left in (-0.8, -0.27, 0.26):
        pen.line((left, -0.1), (left + 0.27, 0.7), (left + 0.54, -0.1), width=0.07, fill=(250, 220, 90))
    pen.ellipse(0, -0.2, 0.8, 0.3, WHITE)
    pen.line((-0.9, -0.9), (-0.1, -0.25), width=0.12, fill=(130, 80, 30))
    pen.line((0.9, -0.9), (0.15, -0.25), width=0.12, fill=(130, 80, 30))


def bird(pen: Pen, colour: Colour) -> None:
    pen.polygon((-0.4, 0.1), (-0.98, -0.3), (-0.95, 0.25), fill=_shade(colour, 0.7))
    pen.ellipse(-0.05, 0.2, 0.6, 0.42, colour)
    pen.ellipse(0.45, -0.25, 0.33, 0.33, colour)
    pen.polygon((0.72, -0.35), (0.99, -0.18), (0.72, -0.08), fill=(250, 150, 30))
    pen.polygon((-0.35, 0.05), (0.25, 0.05), (-0.35, 0.55), fill=_shade(colour, 0.6))
    pen.ellipse(0.52, -0.32, 0.08, 0.08, BLACK)
    for x in (-0.15, 0.15):
        pen.line((x, 0.55), (x, 0.95), width=0.08, fill=(250, 150, 30))


def whistle(pen: Pen, colour: Colour) -> None:
    pen.rectangle(-0.3, -0.65, 0.98, -0.05, colour)
    pen.ellipse(-0.25, 0.15, 0.72, 0.75, colour)
    pen.ellipse(-0.25, 0.15, 0.4, 0.42, _shade(colour, 0.35))
    pen.ellipse(-0.2, 0.25, 0.2, 0.2, (250, 120, 40))
    pen.rectangle(0.15, -0.67, 0.45, -0.4, BLACK)


def bee(pen: Pen, colour: Colour) -> None:
    for x in (-0.3, 0.2):
        pen.ellipse(x, -0.5, 0.3, 0.42, (215, 235, 250))
    pen.ellipse(0, 0.2, 0.8, 0.5, colour)
    for x, height in ((-0.4, 0.4), (0.0, 0.48), (0.4, 0.4)):
        pen.rectangle(x - 0.1, 0.2 - height, x + 0.1, 0.2 + height, BLACK)
    pen.ellipse(0.75, 0.1, 0.24, 0.24, BLACK)


def telephone(pen: Pen, colour: Colour) -> None:
    pen.polygon((-0.5, -0.2), (0.5, -0.2), (0.85, 0.85), (-0.85, 0.85), fill=colour)
    pen.ellipse(0, 0.35, 0.36, 0.36, WHITE)
    pen.ellipse(0, 0.35, 0.14, 0.14, colour)
    pen.rectangle(-0.8, -0.75, 0.8, -0.4, _shade(colour, 0.75))
    for x in (-0.75, 0.75):
        pen.ellipse(x, -0.4, 0.24, 0.32, _shade(colour, 0.75))


def sea(pen: Pen, colour: Colour) -> None:
    x = np.linspace(-1, 1, 17)
    for row, (top, factor) in enumerate(((-0.5, 1.25), (0.0, 1.0), (0.5, 0.75))):
        crest = list(zip(x.tolist(), (top + 0.18 * np.sin(7.5 * x + 2 * row)).tolist(), strict=True))
        pen.polygon(*crest, (1, 0.95), (-1, 0.95), fill=_shade(colour, factor))
        pen.line(*crest, width=0.1, fill=WHITE)


def dog(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0, 0.62, 0.72, colour)
    for x in (-0.68, 0.68):
        pen.ellipse(x, -0.05, 0.26, 0.62, _shade(colour, 0.55))
    pen.ellipse(0, 0.45, 0.42, 0.4, _shade(colour, 1.5))
    pen.ellipse(0, 0.25, 0.2, 0.14, BLACK)
    pen.ellipse(0, 0.72, 0.14, 0.2, (230, 90, 110))
    for x in (-0.25, 0.25):
        pen.ellipse(x, -0.2, 0.1, 0.1, BLACK)


def cat(pen: Pen, colour: Colour) -> None:
    for x in (-1.0, 1.0):
        pen.polygon((0.85 * x, -0.95), (0.85 * x, 0.1), (0.05 * x, -0.4), fill=colour)
        pen.polygon((0.7 * x, -0.65), (0.7 * x, -0.2), (0.35 * x, -0.4), fill=(250, 170, 180))
    pen.ellipse(0, 0.2, 0.85, 0.7, colour)
    for x in (-0.35, 0.35):
        pen.ellipse(x, 0.05, 0.17, 0.2, (160, 230, 90))
        pen.ellipse(x, 0.05, 0.06, 0.18, BLACK)
    pen.polygon((-0.13, 0.35), (0.13, 0.35), (0, 0.5), fill=(240, 110, 130))
    for x in (-1.0, 1.0):
        for y in (0.35, 0.6):
            pen.line((0.3 * x, 0.5), (0.98 * x, y), width=0.05, fill=WHITE)


def frog(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0.3, 0.95, 0.6, colour)
    for x in (-0.5, 0.5):
        pen.ellipse(x, -0.4, 0.36, 0.36, colour)
        pen.ellipse(x, -0.42, 0.22, 0.22, WHITE)
        pen.ellipse(x, -0.42, 0.1, 0.14, BLACK)
    pen.ellipse(0, 0.45, 0.6, 0.24, _shade(colour, 0.45))
    pen.rectangle(-0.62, 0.18, 0.62, 0.4, colour)


def train(pen: Pen, colour: Colour) -> None:
    for x, y, size in ((0.35, -0.75, 0.2), (0.05, -0.85, 0.15), (-0.2, -0.9, 0.1)):
        pen.ellipse(x, y, size, size, (225, 225, 230))
    pen.rectangle(-0.9, -0.6, -0.2, 0.5, _shade(colour, 0.7))
    pen.rectangle(-0.75, -0.45, -0.35, -0.1, (250, 230, 140))
    pen.rectangle(-0.3, -0.15, 0.85, 0.5, colour)
    pen.polygon((0.35, -0.5), (0.75, -0.5), (0.65, -0.1), (0.45, -0.1), fill=BLACK)
    for x in (-0.6, 0.0, 0.6):
        pen.ellipse(x, 0.6, 0.28, 0.28, BLACK)
        pen.ellipse(x, 0.6, 0.1, 0.1, WHITE)


def owl(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0.15, 0.72, 0.82, colour)
    for x in (-1.0, 1.0):
        pen.polygon((0.75 * x, -0.95), (0.7 * x, -0.2), (0.1 * x, -0.55), fill=colour)
        pen.ellipse(0.35 * x, -0.25, 0.36, 0.36, (255, 225, 90))
        pen.ellipse(0.35 * x, -0.25, 0.17, 0.17, BLACK)
        pen.ellipse(0.6 * x, 0.45, 0.2, 0.45, _shade(colour, 0.6))
    pen.polygon((-0.13, -0.05), (0.13, -0.05), (0, 0.25), fill=(240, 130, 30))


def nothing(pen: Pen, colour: Colour) -> None:
    """What cannot be seen."""


def tree(pen: Pen, colour: Colour) -> None:
    pen.rectangle(-0.16, 0.3, 0.16, 0.95, (110, 70, 40))
    for y, width in ((-0.95, 0.5), (-0.55, 0.68), (-0.15, 0.85)):
        pen.polygon((0, y), (width, y + 0.65), (-width, y + 0.65), fill=colour)


def house(pen: Pen, colour: Colour) -> None:
    pen.rectangle(-0.7, -0.1, 0.7, 0.9, colour)
    pen.polygon((-0.95, -0.1), (0, -0.9), (0.95, -0.1), fill=(150, 60, 50))
    pen.rectangle(-0.15, 0.35, 0.2, 0.9, (90, 60, 40))
    pen.rectangle(-0.55, 0.1, -0.25, 0.4, (120, 180, 220))
    pen.rectangle(0.3, 0.1, 0.6, 0.4, (120, 180, 220))


def road(pen: Pen, colour: Colour) -> None:
    pen.polygon((-0.25, -0.9), (0.25, -0.9), (0.95, 0.9), (-0.95, 0.9), fill=colour)
    for top, bottom, width in ((-0.75, -0.45, 0.04), (-0.25, 0.15, 0.07), (0.4, 0.85, 0.11)):
        pen.rectangle(-width, top, width, bottom, WHITE)


def mountain(pen: Pen, colour: Colour) -> None:
    pen.polygon((-0.2, -0.9), (0.6, 0.9), (-0.98, 0.9), fill=colour)
    pen.polygon((0.45, -0.35), (0.98, 0.9), (-0.1, 0.9), fill=_shade(colour, 0.75))
    pen.polygon((-0.2, -0.9), (0.06, -0.32), (-0.2, -0.45), (-0.45, -0.3), fill=WHITE)
