"""Flat-illustration landscapes: a `Scene` says what is in the picture, `draw` paints it.

A scene is a handful of named attributes, so that a caption can be written from it and a
picture can be judged against it. Everything is painted at twice the size and scaled down.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

TIMES = ("noon", "sunset", "dawn", "night", "storm")
MOUNTAINS = ("none", "snowed", "rocky", "hills")
GROUNDS = ("prairie", "flowers", "desert", "snow", "lake", "sea")
HOUSES = ("none", "red", "white", "blue", "yellow")
TREES = ("none", "pine", "round")

SKY: dict[str, list[Colour]] = {  # from the zenith to the horizon
    "noon": [(64, 136, 222), (196, 228, 250)],
    "sunset": [(92, 52, 120), (236, 104, 66), (255, 196, 96)],
    "dawn": [(126, 148, 212), (246, 190, 206), (255, 232, 196)],
    "night": [(10, 14, 42), (40, 52, 104)],
    "storm": [(52, 56, 66), (128, 134, 144)],
}
LIGHT: dict[str, tuple[float, float, float]] = {  # how the hour tints whatever stands below
    "noon": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.8, 0.72),
    "dawn": (1.0, 0.92, 0.94),
    "night": (0.42, 0.46, 0.68),
    "storm": (0.66, 0.68, 0.72),
}
SOIL: dict[str, Colour] = {
    "prairie": (92, 170, 66),
    "flowers": (104, 178, 78),
    "desert": (226, 182, 104),
    "snow": (236, 242, 250),
    "lake": (96, 164, 74),
    "sea": (232, 208, 150),
}
WATER: Colour = (44, 118, 202)
WALL: dict[str, Colour] = {
    "red": (204, 38, 38),
    "white": (244, 242, 236),
    "blue": (40, 84, 214),
    "yellow": (246, 208, 48),
}


@dataclass(frozen=True)
class Scene:
    """What one picture shows; `seed` decides where things stand."""

    time: str
    mountains: str
    ground: str
    house: str
    trees: str
    seed: int


def sample_scene(rng: random.Random) -> Scene:
    """A scene with every attribute drawn independently."""
    return Scene(
        time=rng.choice(TIMES),
        mountains=rng.choice(MOUNTAINS),
        ground=rng.choice(GROUNDS),
        house=rng.choice(("none", "none", *HOUSES[1:])),
        trees=rng.choice(TREES),
        seed=rng.getrandbits(32),
    )


class _Painter:
    """One canvas at twice the final size; coordinates are fractions of it."""

    def __init__(self, scene: Scene, width: int, height: int) -> None:
        self.scene = scene
        self.rng = random.Random(scene.seed)
        self.w, self.h = width * 2, height * 2
        self.unit = min(self.w, self.h)
        self.horizon = self.rng.uniform(0.5, 0.6)
        self.image = Image.fromarray(self._sky())
        self.pen = ImageDraw.Draw(self.image)

    def _sky(self) -> np.ndarray:
        stops = np.array(SKY[self.scene.time], float)
        y = np.minimum(np.arange(self.h) / (self.horizon * self.h), 1) * (len(stops) - 1)
        column = np.stack([np.interp(y, np.arange(len(stops)), stops[:, c]) for c in range(3)], 1)
        return np.repeat(column[:, None], self.w, 1).astype(np.uint8)

    def lit(self, colour: Colour, gain: float = 1.0) -> Colour:
        r, g, b = (
            min(255, int(c * k * gain)) for c, k in zip(colour, LIGHT[self.scene.time], strict=True)
        )
        return r, g, b

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        self.pen.polygon([(x * self.w, y * self.h) for x, y in points], fill=colour)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """An ellipse at (x, y) in fractions, with radii in pixels of the big canvas."""
        cx, cy = x * self.w, y * self.h
        self.pen.ellipse([cx - rx, cy - ry, cx + rx, cy + ry], fill=colour)

    # -- from back to front -------------------------------------------------------------

    def heavens(self) -> None:
        rng, time = self.rng, self.scene.time
        x = rng.uniform(0.15, 0.85)
        if time == "night":
            for _ in range(50):
                r = self.unit * rng.uniform(0.003, 0.006)
                self.disc(rng.random(), rng.random() * self.horizon, r, r, (240, 240, 255))
            self.disc(x, 0.17, self.unit * 0.07, self.unit * 0.07, (250, 246, 220))
        elif time == "storm":
            for _ in range(7):
                self.cloud(rng.random(), rng.uniform(0.03, 0.3), (84, 88, 98))
        else:
            y = {"noon": 0.16, "sunset": self.horizon - 0.09, "dawn": self.horizon - 0.14}[time]
            sun = {"noon": (255, 244, 170), "sunset": (255, 236, 140), "dawn": (255, 250, 225)}
            self.disc(x, y, self.unit * 0.075, self.unit * 0.075, sun[time])
            if time == "noon":
                for _ in range(rng.randint(1, 3)):
                    self.cloud(rng.random(), rng.uniform(0.08, 0.3), (250, 252, 255))

    def cloud(self, x: float, y: float, colour: Colour) -> None:
        for dx, r in ((-0.07, 0.035), (0, 0.055), (0.07, 0.04)):
            self.disc(x + dx, y, self.unit * r * 1.9, self.unit * r * 0.8, colour)

    def mountains(self) -> None:
        kind, rng, base = self.scene.mountains, self.rng, self.horizon + 0.02
        if kind == "none":
            return
        if kind == "hills":
            for tone in (0.8, 0.92):
                phase, depth = rng.uniform(0, 6), rng.uniform(0.05, 0.09) * (2 - tone)
                xs = np.linspace(0, 1, 60)
                ys = base - 0.05 - depth * np.sin(xs * rng.uniform(7, 11) + phase)
                ridge = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
                self.polygon([(0, base), *ridge, (1, base)], self.lit((84, 146, 84), tone))
            return
        body = (112, 124, 150) if kind == "snowed" else (142, 106, 82)
        n = max(2, round(4 * self.w / self.h))
        for i in rng.sample(range(n), n):
            x = (i + 0.5 + rng.uniform(-0.3, 0.3)) / n
            top = base - rng.uniform(0.22, 0.34)
            half = rng.uniform(0.75, 1.0) / n
            self.peak(x, top, base, half, body, snowed=kind == "snowed")

    def peak(
        self, x: float, top: float, base: float, half: float, body: Colour, *, snowed: bool
    ) -> None:
        self.polygon([(x - half, base), (x, top), (x + half, base)], self.lit(body, 1.1))
        self.polygon([(x, top), (x + half, base), (x + half * 0.1, base)], self.lit(body, 0.78))
        if snowed:
            cut = 0.42
            low = top + (base - top) * cut
            zigzag = [
                (x + half * cut * k, low + d)
                for k, d in ((0.95, 0.0), (0.45, 0.025), (0.1, -0.015), (-0.4, 0.025), (-0.95, 0.0))
            ]
            self.polygon([(x, top), *zigzag], self.lit((248, 250, 255)))
            self.polygon([(x, top), *zigzag[:3]], self.lit((206, 216, 236)))

    def ground(self) -> None:
        kind, rng, top = self.scene.ground, self.rng, self.horizon
        soil = SOIL[kind]
        self.polygon([(0, top), (1, top), (1, 1), (0, 1)], self.lit(soil))
        for k in range(3):  # broad swells, nearer ones lighter
            y = top + (1 - top) * (0.15 + 0.3 * k)
            xs = np.linspace(0, 1, 40)
            ys = y + 0.02 * np.sin(xs * rng.uniform(4, 8) + rng.uniform(0, 6))
            swell = [(float(a), float(b)) for a, b in zip(xs, ys, strict=True)]
            self.polygon([(0, 1), *swell, (1, 1)], self.lit(soil, 0.92 + 0.05 * k))
        if kind == "flowers":
            for _ in range(int(90 * self.w / self.h)):
                y = top + 0.05 + (0.95 - top) * rng.random() ** 0.8
                r = self.unit * (0.006 + 0.014 * (y - top) / (1 - top))
                tone = rng.choice(((246, 90, 140), (252, 222, 70), (250, 250, 250)))
                self.disc(rng.random(), y, r, r, self.lit(tone))
        elif kind == "lake":
            self.lake_y = top + (1 - top) * 0.58
            rx, ry = self.w * rng.uniform(0.42, 0.5), self.h * (1 - top) * 0.3
            self.disc(rng.uniform(0.45, 0.55), self.lake_y, rx, ry, self.lit(WATER))
            self.ripples(0.3, 0.7, self.lake_y - 0.06, self.lake_y + 0.08)
        elif kind == "sea":
            shore = top + (1 - top) * 0.62
            self.polygon(
                [(0, top), (1, top), (1, shore + 0.02), (0, shore - 0.01)], self.lit(WATER)
            )
            self.ripples(0.02, 0.85, top + 0.03, shore - 0.03)

    def ripples(self, left: float, right: float, top: float, low: float) -> None:
        for _ in range(9):
            x, y = self.rng.uniform(left, right), self.rng.uniform(top, low)
            length = self.rng.uniform(0.06, 0.14)
            self.polygon(
                [(x, y), (x + length, y), (x + length, y + 0.006), (x, y + 0.006)],
                self.lit((130, 188, 240)),
            )

    def house(self) -> None:
        if self.scene.house == "none":
            return
        rng = self.rng
        wall = WALL[self.scene.house]
        w = rng.uniform(0.24, 0.34) * self.unit / self.w
        h = w * self.w / self.h * rng.uniform(0.6, 0.72)
        x = rng.uniform(0.08, 0.92 - w)
        base = self.horizon + (1 - self.horizon) * (
            rng.uniform(0.2, 0.28) if self.scene.ground == "lake" else rng.uniform(0.45, 0.8)
        )
        if self.scene.ground == "sea":
            base = self.horizon + (1 - self.horizon) * rng.uniform(0.74, 0.9)
        roof = base - h * 1.75
        self.polygon([(x, base), (x, base - h), (x + w, base - h), (x + w, base)], self.lit(wall))
        self.polygon(
            [(x + w * 0.7, base), (x + w * 0.7, base - h), (x + w, base - h), (x + w, base)],
            self.lit(wall, 0.86),
        )
        self.polygon(
            [(x - w * 0.08, base - h), (x + w * 0.5, roof), (x + w * 1.08, base - h)],
            self.lit((94, 62, 52)),
        )
        self.polygon(
            [
                (x + w * 0.42, base),
                (x + w * 0.42, base - h * 0.55),
                (x + w * 0.58, base - h * 0.55),
                (x + w * 0.58, base),
            ],
            self.lit((74, 48, 40)),
        )
        lamplit = self.scene.time in ("night", "storm")
        pane = (255, 226, 130) if lamplit else self.lit((176, 214, 236))
        for left in (0.12, 0.72):
            self.polygon(
                [
                    (x + w * left, base - h * 0.35),
                    (x + w * left, base - h * 0.7),
                    (x + w * (left + 0.17), base - h * 0.7),
                    (x + w * (left + 0.17), base - h * 0.35),
                ],
                pane,
            )

    def trees(self) -> None:
        if self.scene.trees == "none":
            return
        rng = self.rng
        spots = sorted(rng.uniform(0.1, 0.85) for _ in range(rng.randint(3, 5)))
        for depth in spots:  # far ones first
            if self.scene.ground in ("lake", "sea"):
                depth = 0.12 + 0.1 * depth if self.scene.ground == "lake" else 0.72 + 0.25 * depth
            y = self.horizon + (1 - self.horizon) * depth
            size = self.unit * (0.11 + 0.12 * depth)
            self.tree(rng.uniform(0.03, 0.97), y, size)

    def tree(self, x: float, y: float, size: float) -> None:
        u, v = size / self.w, size / self.h
        self.polygon(
            [
                (x - u * 0.08, y),
                (x - u * 0.08, y - v * 0.5),
                (x + u * 0.08, y - v * 0.5),
                (x + u * 0.08, y),
            ],
            self.lit((104, 70, 46)),
        )
        if self.scene.trees == "round":
            self.disc(x, y - v * 0.85, size * 0.42, size * 0.46, self.lit((70, 146, 56)))
            self.disc(x - u * 0.1, y - v * 0.95, size * 0.24, size * 0.25, self.lit((104, 178, 78)))
            return
        for k in range(3):
            low, wide = y - v * (0.25 + 0.38 * k), u * (0.42 - 0.09 * k)
            self.polygon(
                [(x - wide, low), (x, low - v * 0.62), (x + wide, low)],
                self.lit((26, 92, 62), 1 + 0.12 * k),
            )


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """Paint a scene as an RGB picture of `width` x `height` pixels."""
    painter = _Painter(scene, width, height)
    painter.heavens()
    painter.mountains()
    painter.ground()
    painter.house()
    painter.trees()
    return painter.image.resize((width, height), Image.Resampling.BOX)
