"""Parameters, each defined once: name, type, default, bounds, text, and how its value is read.

API, OpenAPI, command line, SDK and documentation read KNOBS; no bound stands anywhere else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from imaged.errors import BadParameter
from imaged.prompt import A1111, DIALECTS, EMPHASES, LORA_NAME, MAX_LORA_WEIGHT, MAX_LORAS, Lora
from imaged.sampling.schedulers import ALIASES, SCHEDULERS, normalized

MAX_PROMPT = 20_000


MAX_NAME_LENGTH = 100


@dataclass(frozen=True)
class Knob:
    """One parameter of a request. Bounds are inclusive; values are multiples of `multiple`."""

    name: str
    kind: Literal["text", "integer", "number", "boolean", "choice", "loras", "pair"]
    default: Any
    text: str
    low: float | None = None
    high: float | None = None
    multiple: int = 1
    choices: tuple[str, ...] = ()
    required: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        if self.kind == "choice":
            return "one of " + ", ".join(f'"{c}"' for c in self.choices)
        if self.kind == "boolean":
            return "true or false"
        if self.kind == "loras":
            return (
                f'a list of at most {MAX_LORAS} like {{"name": "NAME", "weight": 0.8}}, weights '
                f"between {-MAX_LORA_WEIGHT:.0f} and {MAX_LORA_WEIGHT:.0f}"
            )
        if self.kind == "text":
            return f"a string of at most {self.high:.0f} characters"
        if self.kind == "pair":
            return f"a list of two integers between {self.low:.0f} and {self.high:.0f}"
        noun = "an integer" if self.kind == "integer" else "a number"
        if self.multiple > 1:
            noun = f"a multiple of {self.multiple}"
        return f"{noun} between {self.low:.0f} and {self.high:.0f}"

    def read(self, value: Any) -> Any:
        """The value in its own type; raises BadParameter."""
        return _READERS[self.kind](self, value)

    def refuse(self, found: str = "") -> BadParameter:
        return BadParameter(self.name, f"should be {self.allowed}{found and ', not ' + found}")


KNOBS: tuple[Knob, ...] = (
    Knob("prompt", "text", None, "What the picture shows.", high=MAX_PROMPT, required=True),
    Knob(
        "negative_prompt",
        "text",
        None,
        "What to keep out of the picture.",
        high=MAX_PROMPT,
        aliases=("negativePrompt",),
    ),
    Knob("samples", "integer", 1, "Pictures to make; sample k has seed + k.", 1, 4),
    Knob("scheduler", "choice", "DPM++ 2M Karras", "The sampler.", choices=SCHEDULERS),
    Knob("num_inference_steps", "integer", 25, "Denoising steps.", 20, 100, aliases=("steps",)),
    Knob(
        "guidance_scale",
        "number",
        7.0,
        "How strongly to follow the prompt.",
        1,
        15,
        aliases=("guidance", "cfg_scale"),
    ),
    Knob("seed", "integer", -1, "Seed of the first picture; -1 draws one.", -1, 999999999999999),
    Knob("img_width", "integer", 1024, "Width in pixels.", 512, 2048, 8, aliases=("width",)),
    Knob("img_height", "integer", 1024, "Height in pixels.", 512, 2048, 8, aliases=("height",)),
    Knob("base64", "boolean", False, "Answer with base64 text instead of a file."),
    Knob(
        "output_format",
        "choice",
        "jpeg",
        "The file's format; a PNG carries its parameters as text.",
        choices=("jpeg", "png"),
    ),
    Knob("prompt_report", "boolean", False, "Tell in the result how the prompts were read."),
    Knob("loras", "loras", (), "LoRA files of this server, by name, and their weights."),
    Knob(
        "prompt_dialect",
        "choice",
        A1111.dialect,
        "How prompts are read; plain: as they are.",
        choices=DIALECTS,
    ),
    Knob(
        "emphasis",
        "choice",
        A1111.emphasis,
        "What a weight does; original: the mean is restored; none: nothing.",
        choices=EMPHASES,
    ),
    Knob(
        "scheduler_profile",
        "choice",
        "diffusers",
        "Where the scheduler steps: as diffusers has it, or A1111.",
        choices=("diffusers", "a1111"),
    ),
    Knob("clip_skip", "integer", 0, "More of the text encoders' last layers to leave out.", 0, 11),
    Knob("guidance_rescale", "number", 0.0, "Takes back what guidance adds to contrast.", 0, 1),
    Knob("guidance_start", "number", 0.0, "Share of the steps before guidance works.", 0, 1),
    Knob("guidance_end", "number", 1.0, "Share of the steps after which it does not.", 0, 1),
    Knob(
        "original_size",
        "pair",
        None,
        "Width and height of the photograph that the model imagines; the picture's own.",
        1,
        8192,
    ),
    Knob("crop", "pair", None, "Left and top of the part that it cuts out; its corner.", 0, 8192),
    Knob("target_size", "pair", None, "Width and height of that part; the picture's own.", 1, 8192),
)


#: The widest bounds that the engine can do, which aliases and other dialects may use.
WIDEST: Mapping[str, tuple[int, int]] = {
    "samples": (1, 4),
    "num_inference_steps": (4, 150),
    "guidance_scale": (0, 30),
    "img_width": (256, 2048),
    "img_height": (256, 2048),
}


def safe_name(name: str) -> str:
    """An unknown field's name, shortened, and safe to encode."""
    return name[:40].encode("utf-8", "replace").decode()


def from_form(value: Any) -> Any:
    """A form's field, which is text, as the JSON that it holds; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _read_text(knob: Knob, value: Any) -> str:
    if not isinstance(value, str):
        raise knob.refuse()
    assert knob.high is not None
    if len(value) > knob.high:
        raise knob.refuse("a longer one")
    if knob.required and not value.strip():
        raise knob.refuse("an empty one")
    if "\0" in value:
        raise knob.refuse("one with a NUL character")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise knob.refuse("one with an unpaired surrogate")
    return value


def _read_loras(knob: Knob, value: Any) -> tuple[Lora, ...]:
    value = from_form(value)
    if isinstance(value, str):
        raise knob.refuse("other text")
    if not isinstance(value, list | tuple) or len(value) > MAX_LORAS:
        raise knob.refuse()
    return tuple(_read_lora(knob, entry) for entry in value)


def _read_pair(knob: Knob, value: Any) -> tuple[int, int]:
    if isinstance(value, str):  # a form's, or the command line's
        value = re.split(r"[x,]", value.strip("[]() ")) if len(value) <= MAX_NAME_LENGTH else ()
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise knob.refuse()
    return _read_integer(knob, value[0]), _read_integer(knob, value[1])


def _read_lora(knob: Knob, entry: Any) -> Lora:
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or set(entry) - {"name", "weight"}:
        raise knob.refuse()
    name, weight = entry.get("name"), entry.get("weight", 1.0)
    if not isinstance(name, str) or not LORA_NAME.fullmatch(name):
        raise knob.refuse("an entry without a name of a file")
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not -MAX_LORA_WEIGHT <= weight <= MAX_LORA_WEIGHT:
        raise knob.refuse("a weight beyond these")
    return Lora(name, float(weight), float(weight))


_NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)


def _number(knob: Knob, value: Any) -> int | float:
    if isinstance(value, str):
        value = value.strip()
        if len(value) > 400 or not _NUMERAL.fullmatch(value):
            raise knob.refuse("other text")
        value = float(value) if set(value) & set(".eE") else int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise knob.refuse()
    if isinstance(value, float) and not math.isfinite(value):
        raise knob.refuse("NaN or infinity")
    assert knob.low is not None and knob.high is not None
    if not knob.low <= value <= knob.high:
        raise knob.refuse()
    return value


def _read_integer(knob: Knob, value: Any) -> int:
    number = _number(knob, value)
    if number != int(number) or int(number) % knob.multiple:
        raise knob.refuse()
    return int(number)


def _read_number(knob: Knob, value: Any) -> float:
    return float(_number(knob, value))


def _read_boolean(knob: Knob, value: Any) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, int | str) and str(value).strip().lower() in words:
        return words[str(value).strip().lower()]
    raise knob.refuse()


def _read_choice(knob: Knob, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME_LENGTH:
        raise knob.refuse()
    names = {normalized(choice): choice for choice in knob.choices}
    others = {normalized(n): c for c in knob.choices for n in ALIASES.get(c, ())}
    found = names.get(normalized(value)) or others.get(normalized(value))
    if found is not None:
        return found
    near = get_close_matches(normalized(value), [*names, *others], 1)
    nearest = near and (names.get(near[0]) or others[near[0]])
    raise knob.refuse(f'{json.dumps(value)}; the nearest is "{nearest}"' if nearest else "")


_READERS = {
    "text": _read_text,
    "integer": _read_integer,
    "number": _read_number,
    "boolean": _read_boolean,
    "choice": _read_choice,
    "loras": _read_loras,
    "pair": _read_pair,
}
