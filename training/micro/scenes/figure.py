"""The central figure of a scene: a stylised person in flat colours.

Drawn in units of half a head's height from the middle of the head: shoulders at 1.9, waist at 4,
hem at 6.2, soles at 8.6. A portrait is the same figure, large, cut by the lower edge.
"""

from __future__ import annotations

import math
from typing import Protocol

from training.micro.scenes.scene import Colour, Scene

HAIR: dict[str, Colour] = {
    "red": (198, 70, 24),
    "blonde": (244, 208, 104),
    "black": (38, 32, 40),
}
CLOTH: dict[str, Colour] = {
    "mail": (150, 160, 176),
    "red": (190, 34, 40),
    "blue": (40, 78, 190),
    "green": (30, 116, 66),
}
SKIN: Colour = (240, 200, 170)
WOOD: Colour = (158, 106, 60)
SOLES = 8.6
HEAD = 1.25  # how much larger than life: a face should be seen in a small picture


class Canvas(Protocol):
    """What a figure is drawn on: `w` x `h` pixels; points are fractions of them."""

    scene: Scene
    w: int
    h: int

    def lit(self, colour: Colour, gain: float = 1.0) -> Colour:
        """The colour in the scene's light."""

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None: ...

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """An ellipse around (x, y) with radii in pixels."""


class Figure:
    """One person on a canvas; (x, y) of the head in fractions, `unit` in pixels."""

    def __init__(self, canvas: Canvas, x: float, y: float, unit: float) -> None:
        self.canvas, self.x, self.y, self.unit = canvas, x, y, unit
        self.scene = canvas.scene

    def lit(self, colour: Colour, gain: float) -> Colour:
        """Brighter than the land at night and in a storm: hair and cloth keep their names."""
        r, g, b = (
            (dark + min(255, round(c * gain))) // 2
            for dark, c in zip(self.canvas.lit(colour, gain), colour, strict=True)
        )
        return r, g, b

    def shape(self, points: list[tuple[float, float]], colour: Colour, gain: float = 1.0) -> None:
        p = self.canvas
        u, v = self.unit / p.w, self.unit / p.h
        p.polygon([(self.x + a * u, self.y + b * v) for a, b in points], self.lit(colour, gain))

    def oval(
        self, a: float, b: float, rx: float, ry: float, colour: Colour, gain: float = 1.0
    ) -> None:
        p = self.canvas
        x, y = self.x + a * self.unit / p.w, self.y + b * self.unit / p.h
        p.disc(x, y, rx * self.unit, ry * self.unit, self.lit(colour, gain))

    def paint(self) -> None:
        self.back()
        self.legs()
        self.body()
        self.head()
        if self.scene.braids:
            self.braids()
        if self.scene.shield:
            self.shield()

    def back(self) -> None:
        """Cloak and loose hair hang behind everything else."""
        dress, hair = self.scene.dress, HAIR[self.scene.hair]
        if dress != "mail":
            cloak = [(-1.2, 1.3), (1.2, 1.3), (1.9, 2.2), (2.7, 7.9), (1.2, 7.6), (0, 7.9)]
            self.shape([*cloak, (-1.2, 7.6), (-2.7, 7.9), (-1.9, 2.2)], CLOTH[dress], 0.72)
        if not self.scene.braids:
            self.oval(0, 0.6, 1.42, 1.9, hair, 0.8)

    def legs(self) -> None:
        for side in (-1, 1):
            self.shape(
                [(side * 0.15, 5.5), (side * 1.0, 5.5), (side * 0.85, 8.3), (side * 0.3, 8.3)],
                (96, 74, 62),
            )
            self.shape(
                [(side * 0.2, 7.3), (side * 0.95, 7.3), (side * 1.15, SOLES), (side * 0.2, SOLES)],
                (66, 46, 38),
            )

    def body(self) -> None:
        dress = self.scene.dress
        tunic = CLOTH["mail"] if dress == "mail" else (226, 214, 190)
        for side in (-1, 1):
            self.shape(
                [
                    (side * 1.3, 1.75),
                    (side * 1.85, 2.1),
                    (side * 2.25, 4.2),
                    (side * 1.75, 4.35),
                    (side * 1.2, 2.9),
                ],
                tunic,
                0.86,
            )
            self.oval(side * 2.0, 4.45, 0.3, 0.34, SKIN)
            if dress == "mail":
                self.bracer(side)
        self.shape([(-0.34, 0.7), (0.34, 0.7), (0.4, 1.7), (-0.4, 1.7)], SKIN, 0.86)
        self.shape(
            [
                (-0.5, 1.5),
                (0.5, 1.5),
                (1.5, 1.85),
                (1.25, 3.0),
                (1.0, 4.0),
                (1.6, 6.2),
                (-1.6, 6.2),
                (-1.0, 4.0),
                (-1.25, 3.0),
                (-1.5, 1.85),
            ],
            tunic,
        )
        if dress == "mail":
            self.scales(tunic)
        else:
            collar = [(-1.5, 1.75), (-0.4, 1.35), (0, 1.7), (0.4, 1.35), (1.5, 1.75), (1.75, 2.9)]
            self.shape([*collar, (0.5, 2.5), (0, 2.7), (-0.5, 2.5), (-1.75, 2.9)], CLOTH[dress])
            self.oval(0, 2.35, 0.22, 0.22, (236, 196, 80))
        self.shape([(-1.03, 3.85), (1.03, 3.85), (1.08, 4.25), (-1.08, 4.25)], (92, 60, 42))

    def bracer(self, side: int) -> None:
        self.shape(
            [(side * 2.02, 3.3), (side * 1.5, 3.45), (side * 1.72, 4.2), (side * 2.24, 4.1)],
            (112, 74, 48),
        )

    def scales(self, tunic: Colour) -> None:
        """Ten rows of five, every second one shifted by half a scale."""
        for row in range(10):
            y = 2.0 + row * 0.43
            half = 1.3 - 0.25 * (y - 1.8) / 2.2 if y < 4 else 1.0 + 0.6 * (y - 4) / 2.2
            count = 5
            for k in range(count):
                x = (k + (0.5 if row % 2 else 0.0) - count / 2 + 0.25) * 2 * half / count
                self.oval(x, y, half / count * 0.82, 0.24, tunic, 0.78)
                self.oval(x, y - 0.09, half / count * 0.82, 0.22, tunic, 1.12)

    def head(self) -> None:
        """Drawn about the chin at (0, 1)."""
        hair = HAIR[self.scene.hair]
        self.face(0, 0, 0.9, 1.06, hair, 0.9)
        self.face(0, 0.16, 0.7, 0.84, SKIN)
        crown = [
            (math.cos(t) * 0.92, math.sin(t) * 1.08)
            for t in [math.pi * (1 + k / 16) for k in range(17)]
        ]
        fringe = [(0.74, 0.1), (0.5, -0.38), (0.0, -0.52), (-0.5, -0.38), (-0.74, 0.1)]
        self.shape([(a * HEAD, grown(b)) for a, b in (*crown, *fringe)], hair)
        for side in (-1, 1):
            self.face(side * 0.3, 0.14, 0.15, 0.17, (44, 52, 60))
            self.face(side * 0.3 + 0.05, 0.08, 0.05, 0.05, (250, 250, 250))
            self.face(side * 0.46, 0.46, 0.13, 0.09, (238, 160, 140))
        smile = [(-0.28, 0.52), (0, 0.62), (0.28, 0.52), (0.14, 0.74), (-0.14, 0.74)]
        self.shape([(a * HEAD, grown(b)) for a, b in smile], (196, 74, 74))

    def face(
        self, a: float, b: float, rx: float, ry: float, colour: Colour, gain: float = 1.0
    ) -> None:
        self.oval(a * HEAD, grown(b), rx * HEAD, ry * HEAD, colour, gain)

    def braids(self) -> None:
        hair = HAIR[self.scene.hair]
        for side in (-1, 1):
            for k in range(5):
                y = 0.5 + 0.66 * k
                self.oval(side * 1.12, y, 0.44 - 0.02 * k, 0.44, hair, 0.7)
                self.oval(side * 1.12, y - 0.08, 0.36 - 0.02 * k, 0.32, hair, 1.1)
            self.oval(side * 1.12, 3.8, 0.2, 0.3, (214, 178, 84))

    def shield(self) -> None:
        """Round and whole, held higher in a portrait."""
        x, y, r = (1.75, 4.1, 1.75) if self.scene.figure == "full" else (1.6, 3.2, 1.3)
        self.oval(x, y, r, r, (92, 66, 44))
        self.oval(x, y, r * 0.9, r * 0.9, WOOD)
        for k in range(-2, 3):
            half = math.sqrt(max(0.0, 0.86**2 - (k * 0.36) ** 2)) * r
            dx = k * 0.36 * r
            self.shape(
                [
                    (x + dx - 0.035, y - half),
                    (x + dx + 0.035, y - half),
                    (x + dx + 0.035, y + half),
                    (x + dx - 0.035, y + half),
                ],
                WOOD,
                0.72,
            )
        self.oval(x, y, r * 0.27, r * 0.27, (120, 124, 132))
        self.oval(x - 0.06, y - 0.06, r * 0.19, r * 0.19, (190, 196, 204))


def grown(b: float) -> float:
    """A height in the head, taken away from the chin."""
    return 1 + (b - 1) * HEAD
