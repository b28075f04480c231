"""Captions for scenes: phrases in any order, synonyms, things left out, words that mean nothing.

`vocabulary()` is what the checkpoint knows. Every other token keeps a zero embedding, and captions
carry such tokens in training, so that a prompt full of unknown words still works. Known words also
stand in places where they paint nothing ("green eyes"): a colour counts only beside its object.
Some phrases carry a weight, "(a red house:0.7)": the less they weigh, the less they can be trusted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from training.micro.scenes.scene import COLOURS, Scene, any_scene

TIME = {
    "noon": ("noon", "a sunny day", "blue sky", "daylight", "a clear day", "midday"),
    "sunset": ("sunset", "at sunset", "evening glow", "dusk", "a sunset sky", "in the evening"),
    "dawn": ("dawn", "at dawn", "sunrise", "early morning", "a pink sky"),
    "night": ("night", "at night", "a starry night", "under the moon", "stars", "moonlight"),
    "storm": ("storm", "a stormy sky", "dark clouds", "a storm", "overcast", "thunderstorm"),
}
MOUNTAINS = {
    "snowed": (
        "snowed mountains",
        "snowy mountains",
        "snow capped mountains",
        "snowed white mountains",
        "snowed mountains far in the background",
        "snowed white mountains can be seen far in the background",
    ),
    "rocky": ("rocky mountains", "brown mountains", "bare rocky mountains", "cliffs"),
    "hills": ("green hills", "rolling hills", "hills", "low hills"),
}
GROUND = {
    "prairie": ("a green prairie", "prairie", "grass", "a meadow", "on a green prairie"),
    "flowers": (
        "flowers",
        "a prairie with flowers",
        "a meadow of flowers",
        "wild flowers",
        "a green prairie with flowers",
        "standing on a green prairie with evergreen flowers",
    ),
    "desert": ("desert", "a desert", "sand dunes", "a sandy desert", "in the desert"),
    "snow": ("a snow field", "snow on the ground", "winter", "a snow covered field", "in the snow"),
    "lake": ("a lake", "by a lake", "by a blue lake", "a blue lake", "a pond"),
    "sea": ("the sea", "by the sea", "an ocean", "a beach", "by the blue sea", "the coast"),
}
TREES = {
    "pine": ("pine trees", "pines", "fir trees", "a few pines"),
    "round": ("trees", "round trees", "leafy trees", "oak trees"),
    "forest": ("a forest", "a dark forest", "woods", "a forest in the background"),
}
HOUSE = ("a {} house", "a {} cottage", "{} house", "a house with {} walls", "a {} cabin")
CASTLE = ("a {} castle", "{} castle", "a castle with {} walls", "a {} fortress")
BOAT = ("a {} boat", "{} boat", "a {} sailing boat", "a boat with a {} hull", "a {} ship")
PERSON = (
    "1girl",
    "a woman",
    "a girl",
    "a shieldmaiden",
    "a beautiful shieldmaiden",
    "a warrior woman",
    "a beautiful woman",
)
FRAMING = {
    "portrait": ("portrait", "a portrait", "close up", "upper body", "a close up portrait"),
    "full": ("full body", "standing", "a full body picture", "full length", "fighting stance"),
}
HAIR = {
    "red": ("redhead", "red hair", "red haired", "a redhead", "ginger hair"),
    "blonde": ("blonde", "blonde hair", "blond hair", "golden hair", "fair hair"),
    "black": ("black hair", "black haired", "raven hair", "dark hair"),
}
BRAIDS = {
    True: ("braids", "braided hair", "two braids", "long braids", "hair in braids"),
    False: ("loose hair", "long loose hair", "open hair"),
}
SHIELD = ("round wooden shield", "a round shield", "a wooden shield", "with a shield")
DRESS = {
    "mail": ("scale mail", "in scale mail", "armour", "scale armor", "a coat of mail"),
    "red": ("a red cloak", "in a red cloak", "red cape", "wearing a red cloak"),
    "blue": ("a blue cloak", "in a blue cloak", "blue cape", "wearing a blue cloak"),
    "green": ("a green cloak", "in a green cloak", "green cape", "wearing a green cloak"),
}
DISTRACTIONS = (  # known words that paint nothing
    "beautiful green eyes",
    "blue eyes",
    "black eyeshadow",
    "dark mascara",
    "golden earrings",
    "horse shaped golden earrings",
    "red lips",
    "half helmet",
    "broadsword in hand",
    "leather armbands",
    "a beautiful picture",
    "white teeth",
    "intricate detailed background",
    "natural light",
    "remarkable colors",
    "high cheek bones",
    "elf maiden",
)
LAND = ("time", "mountains", "ground", "trees", "building", "boat")
WORN = ("hair", "braids", "shield", "dress", "figure")
JOINTS = (", ", ", ", ", ", ", ", " and ", " with ", ". ")
UNKNOWN = "masterpiece"  # stands for any word outside the vocabulary: all share one embedding


def phrases(scene: Scene) -> dict[str, tuple[str, ...]]:
    """What can be said of a scene: for each attribute that shows, its synonyms."""
    said = {
        "time": TIME[scene.time],
        "mountains": MOUNTAINS.get(scene.mountains, ()),
        "ground": GROUND[scene.ground],
        "trees": TREES.get(scene.trees, ()),
        "building": tuple(
            p.format(scene.walls)
            for p in {"house": HOUSE, "castle": CASTLE}.get(scene.building, ())
        ),
        "boat": tuple(p.format(scene.boat) for p in BOAT) if scene.boat != "none" else (),
    }
    if scene.figure != "none":
        said |= {
            "figure": FRAMING[scene.figure],
            "hair": HAIR[scene.hair],
            "braids": BRAIDS[scene.braids],
            "shield": SHIELD if scene.shield else (),
            "dress": DRESS[scene.dress],
        }
    return said


def vocabulary() -> list[str]:
    """Every phrase and joint that a caption can hold."""
    lists = [*TIME.values(), *MOUNTAINS.values(), *GROUND.values(), *TREES.values()]
    lists += [*FRAMING.values(), *HAIR.values(), *BRAIDS.values(), *DRESS.values()]
    plain = [p for group in (*lists, PERSON, SHIELD, DISTRACTIONS, JOINTS) for p in group]
    return plain + [p.format(c) for p in (*HOUSE, *CASTLE, *BOAT) for c in COLOURS]


def choose(scene: Scene, rng: random.Random, said: float) -> dict[str, str]:
    """A phrase for each attribute that is named, each with the chance `said`.

    Loose hair is what anyone expects and is named a third as often.
    """
    told = {}
    for name, synonyms in phrases(scene).items():
        chance = said / 3 if name == "braids" and not scene.braids else said
        if synonyms and rng.random() < chance:
            told[name] = rng.choice(synonyms)
    return told


def person(told: dict[str, str], rng: random.Random) -> list[str]:
    """The figure's phrases: the person named, alone or together with some of what she wears."""
    parts = [told[name] for name in WORN if name in told]
    rng.shuffle(parts)
    subject = rng.choice(PERSON) if rng.random() < 0.9 or not parts else parts.pop()
    count = rng.choice((0, 0, 1, 2))
    bound = [f"with {p}" if rng.random() < 0.5 else p for p in parts[:count]]
    return [" ".join([subject, *bound]), *parts[count:]]


def noise(rng: random.Random, words: int) -> list[str]:
    """About `words` words that paint nothing, in pieces."""
    pieces = []
    while words > 0:
        count = min(words, rng.randint(1, 10))
        words -= count
        if rng.random() < 0.3:
            pieces.append(rng.choice(DISTRACTIONS))
        else:
            commas = ("," if rng.random() < 0.35 else "" for _ in range(count))
            pieces.append(" ".join(UNKNOWN + comma for comma in commas).removesuffix(","))
    return pieces


def weighed(scene: Scene, told: dict[str, str], rng: random.Random) -> dict[str, str]:
    """With a weight of 0.3 to 1.5 on one phrase, half of them 0.7 or less.

    What weighs 1 or more is true. Below, it more and more often says something else; at 0.75 and
    less it is never true, so that a net learns to follow a phrase as far as it weighs.
    """
    name = rng.choice(LAND if scene.figure == "none" else (*LAND, *WORN))
    weight = rng.uniform(0.3, 0.7) if rng.random() < 0.5 else rng.uniform(0.7, 1.5)
    synonyms = phrases(scene).get(name, ())
    if rng.random() < (1 - weight) / 0.25:
        # a few scenes are enough, but for what has no other words, such as the shield
        others = (phrases(any_scene(rng)).get(name, ()) for _ in range(30))
        synonyms = next((other for other in others if other not in ((), synonyms)), ())
    return {**told, name: f"({rng.choice(synonyms)}:{weight:.2f})"} if synonyms else told


def tell(scene: Scene, told: dict[str, str], rng: random.Random, extra: Sequence[str] = ()) -> str:
    """The chosen phrases in natural disorder, with extra pieces between them."""
    land = [told[name] for name in LAND if name in told]
    parts = land + (person(told, rng) if scene.figure != "none" else [])
    rng.shuffle(parts)
    for piece in extra:
        parts.insert(rng.randint(0, len(parts)), piece)
    text = parts[0] if parts else ""
    for part in parts[1:]:
        text += rng.choice(JOINTS) + part
    return text


def caption(scene: Scene, rng: random.Random, windows: int = 1) -> str:
    """What the scene shows, most of it; several windows are mostly noise and say things twice."""
    told = choose(scene, rng, 0.88)
    if windows == 1:
        extra = noise(rng, rng.randint(1, 14)) if rng.random() < 0.4 else []
    else:
        extra = noise(rng, rng.randint(30, 42 * windows))
        said = phrases(scene)
        extra += [
            rng.choice(said[n]) for n in told if n in (*WORN, "ground") and rng.random() < 0.4
        ]
    for _ in range(rng.choice((0, 1, 2, 3))):
        told = weighed(scene, told, rng)
    return tell(scene, told, rng, extra)
