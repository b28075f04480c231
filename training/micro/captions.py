"""Captions for scenes: phrases in any order, synonyms, things left out, words that mean nothing.

The words of `PHRASES` are the checkpoint's vocabulary. Every other token keeps a zero embedding,
and captions carry such tokens in training, so that a prompt full of unknown words still works.
"""

from __future__ import annotations

import random

from training.micro.scenes import Scene

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "time": {
        "noon": ("noon", "a sunny day", "blue sky", "daylight", "a clear day"),
        "sunset": ("sunset", "at sunset", "evening glow", "dusk", "a sunset sky"),
        "dawn": ("dawn", "at dawn", "sunrise", "early morning"),
        "night": ("night", "at night", "a starry night", "under the moon", "stars"),
        "storm": ("storm", "a stormy sky", "dark clouds", "a storm", "overcast"),
    },
    "mountains": {
        "none": (),
        "snowed": (
            "snowed mountains",
            "snowy mountains",
            "snow capped mountains",
            "snowed white mountains",
            "snowed mountains far in the background",
        ),
        "rocky": ("rocky mountains", "brown mountains", "bare rocky mountains"),
        "hills": ("green hills", "rolling hills", "hills"),
    },
    "ground": {
        "prairie": (
            "a green prairie",
            "prairie",
            "grass",
            "a meadow",
            "standing on a green prairie",
        ),
        "flowers": (
            "flowers",
            "a prairie with flowers",
            "a meadow of flowers",
            "wild flowers",
            "a green prairie with flowers",
        ),
        "desert": ("desert", "a desert", "sand dunes", "a sandy desert"),
        "snow": ("a snow field", "snow on the ground", "winter", "a snow covered field"),
        "lake": ("a lake", "by a lake", "by a blue lake", "a blue lake", "a pond"),
        "sea": ("the sea", "by the sea", "an ocean", "a beach", "by the blue sea"),
    },
    "house": {
        "none": (),
        **{
            c: (
                f"a {c} house",
                f"a {c} cottage",
                f"{c} house",
                f"a house with {c} walls",
                f"a {c} cabin",
            )
            for c in ("red", "white", "blue", "yellow")
        },
    },
    "trees": {
        "none": (),
        "pine": ("pine trees", "pines", "fir trees", "a pine forest"),
        "round": ("trees", "round trees", "leafy trees", "oak trees"),
    },
}
JOINTS = (", ", ", ", ", ", " and ", " with ", ". ")
UNKNOWN = "masterpiece"  # stands for any word outside the vocabulary: all share one embedding


def vocabulary() -> list[str]:
    """Every phrase and joint a caption can hold."""
    return [p for kinds in PHRASES.values() for ps in kinds.values() for p in ps] + list(JOINTS)


def noise_words(rng: random.Random, count: int) -> str:
    """`count` meaningless words with commas strewn in."""
    return " ".join(UNKNOWN + ("," if rng.random() < 0.35 else "") for _ in range(count))


def caption(scene: Scene, rng: random.Random, windows: int = 1) -> str:
    """What the scene shows, in natural disorder; several windows are mostly noise words."""
    parts = []
    for name, kinds in PHRASES.items():
        phrases = kinds[getattr(scene, name)]
        if phrases and rng.random() < 0.88:
            parts.append(rng.choice(phrases))
    rng.shuffle(parts)
    if windows > 1 or rng.random() < 0.4:
        budget = rng.randint(1, 14) if windows == 1 else rng.randint(30, 42 * windows)
        while budget > 0:
            count = min(budget, rng.randint(1, 12))
            parts.insert(rng.randint(0, len(parts)), noise_words(rng, count))
            budget -= count
    text = parts[0] if parts else ""
    for part in parts[1:]:
        text += rng.choice(JOINTS) + part
    return text
