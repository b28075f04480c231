"""What a picture can show: `Scene` names it, and `sample_scene` draws one by lot.

Every attribute is a word that captions (captions.py) can say, the painter (painter.py) can
paint and the judge (judge.py) can tell.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

Colour = tuple[int, int, int]  # of 0 to 255

TIMES = ("noon", "sunset", "dawn", "night", "storm")
MOUNTAINS = ("none", "snowed", "rocky", "hills")
GROUNDS = ("prairie", "flowers", "desert", "snow", "lake", "sea")
WATER_GROUNDS = ("lake", "sea")
COLOURS = ("red", "white", "blue", "yellow")
BUILDINGS = ("none", "house", "castle")
TREES = ("none", "pine", "round", "forest")
FIGURES = ("none", "portrait", "full")
HAIR = ("red", "blonde", "black")
DRESSES = ("mail", "red", "blue", "green")


@dataclass(frozen=True)
class Scene:
    """What one picture shows; `seed` decides where things stand.

    `walls` is "none" without a building, `hair` and `dress` are "none" without a figure, and
    `boat` is "none" without water.
    """

    time: str
    mountains: str
    ground: str
    trees: str
    building: str
    walls: str
    boat: str
    figure: str
    hair: str
    braids: bool
    shield: bool
    dress: str
    seed: int


ATTRIBUTES: dict[str, tuple[object, ...]] = {  # what a scene can be told by
    "time": TIMES,
    "mountains": MOUNTAINS,
    "ground": GROUNDS,
    "trees": TREES,
    "building": BUILDINGS,
    "walls": ("none", *COLOURS),
    "boat": ("none", *COLOURS),
    "figure": FIGURES,
    "hair": ("none", *HAIR),
    "braids": (False, True),
    "shield": (False, True),
    "dress": ("none", *DRESSES),
}


# Pairs that training never sees together: what the evaluation asks for.
HELD_OUT_LAND = {
    ("noon", "sea"),
    ("sunset", "snow"),
    ("dawn", "desert"),
    ("night", "flowers"),
    ("storm", "lake"),
}
HELD_OUT_PERSON = {("red", "blue"), ("blonde", "mail"), ("black", "green")}


def held_out(scene: Scene) -> bool:
    """Whether a scene combines attributes as training never does."""
    person = (scene.hair, scene.dress)
    return (scene.time, scene.ground) in HELD_OUT_LAND or person in HELD_OUT_PERSON


def sample_scene(rng: random.Random, unseen: bool = False) -> Scene:
    """A scene of the training's combinations, or one of those that it never sees."""
    while True:
        scene = any_scene(rng)
        if held_out(scene) == unseen:
            return scene


def any_scene(rng: random.Random) -> Scene:
    """Every attribute drawn independently, as far as others allow it."""
    ground = rng.choice(GROUNDS)
    building = rng.choice(("none", "house", "house", "castle"))
    figure = rng.choice(("none", "none", "portrait", "full", "full"))
    person = figure != "none"
    return Scene(
        time=rng.choice(TIMES),
        mountains=rng.choice(MOUNTAINS),
        ground=ground,
        trees=rng.choice(TREES),
        building=building,
        walls=rng.choice(COLOURS) if building != "none" else "none",
        boat=rng.choice(("none", *COLOURS)) if ground in WATER_GROUNDS else "none",
        figure=figure,
        hair=rng.choice(HAIR) if person else "none",
        braids=person and rng.random() < 0.5,
        shield=person and rng.random() < 0.5,
        dress=rng.choice(DRESSES) if person else "none",
        seed=rng.getrandbits(32),
    )
