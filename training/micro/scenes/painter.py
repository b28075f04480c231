"""Flat-illustration landscapes: `draw` paints a `Scene`, from back to front.

Everything is painted at twice the size and scaled down. The figure has a file of its own.
"""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw

from training.micro.scenes.figure import SOLES, Figure
from training.micro.scenes.scene import Colour, Scene

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


class Painter:
    """One canvas at twice the final size; coordinates are fractions of it."""

    def __init__(self, scene: Scene, width: int, height: int) -> None:
        self.scene = scene
        self.rng = random.Random(scene.seed)
        self.w, self.h = width * 2, height * 2
        self.unit = min(self.w, self.h)
        self.horizon = self.rng.uniform(0.5, 0.6)
        self.taken: list[float] = []  # where a building and a boat stand: trees keep away
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
            y = top + (1 - top) * 0.58
            rx, ry = self.w * rng.uniform(0.42, 0.5), self.h * (1 - top) * 0.3
            self.disc(rng.uniform(0.45, 0.55), y, rx, ry, self.lit(WATER))
            self.ripples(0.3, 0.7, y - 0.06, y + 0.08)
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
            self.box(x, y, x + length, y + 0.006, self.lit((130, 188, 240)))

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.polygon([(x0, y0), (x0, y1), (x1, y1), (x1, y0)], colour)

    def building(self) -> None:
        if self.scene.building == "none":
            return
        rng, shore = self.rng, 1 - self.horizon
        wall = WALL[self.scene.walls]
        w = rng.uniform(0.26, 0.34) * self.unit / self.w
        x = rng.uniform(w * 0.6, max(w * 0.6, 0.24 if self.scene.figure != "none" else 0.4))
        self.taken.append(x)
        depth = {"lake": rng.uniform(0.12, 0.22), "sea": rng.uniform(0.7, 0.82)}.get(
            self.scene.ground, rng.uniform(0.2, 0.6)
        )
        base = self.horizon + shore * depth
        if self.scene.building == "house":
            self.house(x - w / 2, base, w, wall)
        else:
            self.castle(x - w * 0.6, base, w * 1.2, wall)

    def pane(self) -> Colour:
        return (
            (255, 226, 130) if self.scene.time in ("night", "storm") else self.lit((176, 214, 236))
        )

    def house(self, x: float, base: float, w: float, wall: Colour) -> None:
        h = w * self.w / self.h * self.rng.uniform(0.6, 0.72)
        self.box(x, base - h, x + w, base, self.lit(wall))
        self.box(x + w * 0.7, base - h, x + w, base, self.lit(wall, 0.86))
        self.polygon(
            [(x - w * 0.08, base - h), (x + w * 0.5, base - h * 1.75), (x + w * 1.08, base - h)],
            self.lit((94, 62, 52)),
        )
        self.box(x + w * 0.42, base - h * 0.55, x + w * 0.58, base, self.lit((74, 48, 40)))
        for left in (0.12, 0.72):
            self.box(
                x + w * left, base - h * 0.7, x + w * (left + 0.17), base - h * 0.35, self.pane()
            )

    def castle(self, x: float, base: float, w: float, wall: Colour) -> None:
        """A wall with merlons and a gate between two towers with pointed roofs."""
        h = w * self.w / self.h
        self.box(x + w * 0.15, base - h * 0.5, x + w * 0.85, base, self.lit(wall, 0.92))
        for k in range(5):
            left = x + w * (0.24 + 0.115 * k)
            self.box(left, base - h * 0.58, left + w * 0.06, base - h * 0.49, self.lit(wall, 0.92))
        for left in (0.0, 0.76):
            a, b = x + w * left, x + w * (left + 0.24)
            self.box(a, base - h * 0.85, b, base, self.lit(wall))
            self.box(a + (b - a) * 0.68, base - h * 0.85, b, base, self.lit(wall, 0.86))
            mid = (a + b) / 2
            self.polygon(
                [
                    (a - w * 0.03, base - h * 0.85),
                    (mid, base - h * 1.25),
                    (b + w * 0.03, base - h * 0.85),
                ],
                self.lit((72, 70, 96)),
            )
            self.box(mid - w * 0.03, base - h * 0.7, mid + w * 0.03, base - h * 0.52, self.pane())
        self.box(x + w * 0.42, base - h * 0.24, x + w * 0.58, base, self.lit((70, 48, 40)))
        self.disc(
            x + w * 0.5,
            base - h * 0.24,
            w * 0.08 * self.w,
            w * 0.08 * self.w,
            self.lit((70, 48, 40)),
        )

    def boat(self) -> None:
        if self.scene.boat == "none":
            return
        rng, shore = self.rng, 1 - self.horizon
        w = rng.uniform(0.27, 0.33) * self.unit / self.w
        h = w * self.w / self.h
        x = 1 - rng.uniform(w * 0.5, max(w * 0.5, 0.2 if self.scene.figure != "none" else 0.4))
        self.taken.append(x)
        depth = rng.uniform(*((0.48, 0.6) if self.scene.ground == "lake" else (0.25, 0.5)))
        if self.scene.figure == "portrait":  # above what she holds
            depth = 0.3 if self.scene.ground == "lake" else 0.12
        self.ship(x, self.horizon + shore * depth, w, h)

    def ship(self, x: float, y: float, w: float, h: float) -> None:
        """Mast, two sails and a hull; its middle on the water is at (x, y)."""
        hull = WALL[self.scene.boat]
        self.box(x - w * 0.015, y - h * 0.85, x + w * 0.025, y, self.lit((92, 64, 46)))
        self.polygon(
            [
                (x + w * 0.05, y - h * 0.84),
                (x + w * 0.4, y - h * 0.16),
                (x + w * 0.05, y - h * 0.16),
            ],
            self.lit(hull),
        )
        self.polygon(
            [
                (x - w * 0.04, y - h * 0.7),
                (x - w * 0.3, y - h * 0.16),
                (x - w * 0.04, y - h * 0.16),
            ],
            self.lit((250, 248, 240)),
        )
        self.polygon(
            [
                (x - w * 0.5, y - h * 0.1),
                (x + w * 0.5, y - h * 0.1),
                (x + w * 0.36, y + h * 0.14),
                (x - w * 0.36, y + h * 0.14),
            ],
            self.lit(hull),
        )
        self.polygon(
            [
                (x - w * 0.43, y + h * 0.02),
                (x + w * 0.43, y + h * 0.02),
                (x + w * 0.36, y + h * 0.14),
                (x - w * 0.36, y + h * 0.14),
            ],
            self.lit(hull, 0.8),
        )

    def forest(self) -> None:
        """A dark band of tree tops along the horizon."""
        if self.scene.trees != "forest":
            return
        rng, low = self.rng, self.horizon + 0.02
        for tone, height in ((0.8, 0.15), (1.0, 0.1)):
            x = -0.05
            while x < 1.05:
                half = rng.uniform(0.03, 0.045) * self.unit / self.w
                top = low - height * rng.uniform(0.75, 1.15)
                self.polygon(
                    [(x - half * 1.3, low), (x, top), (x + half * 1.3, low)],
                    self.lit((24, 78, 54), tone),
                )
                x += half * rng.uniform(0.9, 1.3)

    def figure(self) -> None:
        if self.scene.figure == "none":
            return
        x = self.rng.uniform(0.48, 0.52)
        if self.scene.figure == "portrait":
            unit = min(0.12 * self.h, 0.13 * self.w)
            y = self.rng.uniform(0.38, 0.41)
        else:
            unit = min(0.074 * self.h, 0.1 * self.w)
            y = 0.96 - SOLES * unit / self.h
            self.disc(
                x,
                y + SOLES * unit / self.h,
                2.2 * unit,
                0.35 * unit,
                self.lit(SOIL[self.scene.ground], 0.72),
            )
        Figure(self, x, y, unit).paint()

    def trees(self) -> None:
        if self.scene.trees in ("none", "forest"):
            return
        rng = self.rng
        spots = sorted(rng.uniform(0.1, 0.85) for _ in range(rng.randint(3, 5)))
        for depth in spots:  # far ones first
            if self.scene.ground in ("lake", "sea"):
                depth = 0.12 + 0.1 * depth if self.scene.ground == "lake" else 0.72 + 0.25 * depth
            y = self.horizon + (1 - self.horizon) * depth
            size = self.unit * (0.11 + 0.12 * depth)
            self.tree(self.free_place(), y, size)

    def free_place(self) -> float:
        """Of a few places the one that is farthest from what should stay in sight."""
        taken = [*self.taken, *([0.5] if self.scene.figure != "none" else [])]
        places = [self.rng.uniform(0.03, 0.97) for _ in range(5)]
        return max(places, key=lambda x: min((abs(x - t) for t in taken), default=0))

    def tree(self, x: float, y: float, size: float) -> None:
        u, v = size / self.w, size / self.h
        self.box(x - u * 0.08, y - v * 0.5, x + u * 0.08, y, self.lit((104, 70, 46)))
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
    painter = Painter(scene, width, height)
    painter.heavens()
    painter.mountains()
    painter.forest()
    painter.ground()
    painter.building()
    painter.boat()
    painter.trees()
    painter.figure()
    return painter.image.resize((width, height), Image.Resampling.BOX)
