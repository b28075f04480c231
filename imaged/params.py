"""What a caller may ask for: every knob once, with type, default, bounds and text.

The API, the command line, the SDK and the documentation read `KNOBS`; nothing else knows a
bound. `read_params` turns a request body into frozen `ImageParams` or names the field that is
wrong and what is allowed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from imaged.errors import BadParameter, MalformedBody
from imaged.prompt import A1111, DIALECTS, EMPHASES, Reading
from imaged.schedulers import ALIASES, IN_A1111, SCHEDULERS, key, unet_calls

MAX_PROMPT = 20_000
LONGEST_NAME = 100
MOST_TEXTS, MOST_SAID = 32, 100_000  # different texts of a prompt that changes, and characters


@dataclass(frozen=True)
class Knob:
    """One parameter on the wire: its bounds are inclusive, `multiple` counts from zero."""

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
                f'a list of at most {MOST_LORAS} like {{"name": "NAME", "weight": 0.8}}, weights '
                f"between {-MOST_WEIGHT:.0f} and {MOST_WEIGHT:.0f}"
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

#: What the engine can do, knob by knob; an alias or another dialect may allow so much.
WIDEST: Mapping[str, tuple[int, int]] = {
    "samples": (1, 4),
    "num_inference_steps": (4, 150),
    "guidance_scale": (0, 30),
    "img_width": (256, 2048),
    "img_height": (256, 2048),
}


@dataclass(frozen=True)
class Lora:
    """A LoRA by its file's name, and how strongly it changes UNet and text encoders."""

    name: str
    unet: float = 1.0
    text: float = 1.0


MOST_LORAS, MOST_WEIGHT = 8, 10.0
LORA_NAME = re.compile(r"[^/\\:<>.\x00-\x1f][^/\\:<>\x00-\x1f]{0,99}")  # of a file in one folder
_WEIGHT = r"(?::([+-]?(?:\d{1,4}\.?\d{0,9}|\.\d{1,9})))?"
_TAG = re.compile(f"<lora:({LORA_NAME.pattern}){_WEIGHT}{_WEIGHT}>")


@dataclass(frozen=True)
class ImageParams:
    """One request, complete and checked; what the queue stores and the engine reads."""

    prompt: str
    negative_prompt: str | None = None
    samples: int = 1
    scheduler: str = "DPM++ 2M Karras"
    num_inference_steps: int = 25
    guidance_scale: float = 7.0
    seed: int = -1
    img_width: int = 1024
    img_height: int = 1024
    base64: bool = False
    output_format: str = "jpeg"
    prompt_report: bool = False
    loras: tuple[Lora, ...] = ()
    prompt_dialect: str = A1111.dialect
    emphasis: str = A1111.emphasis
    scheduler_profile: str = "diffusers"
    clip_skip: int = 0
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """As read from JSON, the LoRAs are tables and pairs are lists."""
        loras = tuple(lora if isinstance(lora, Lora) else Lora(**lora) for lora in self.loras)
        object.__setattr__(self, "loras", loras)
        for name in ("original_size", "crop", "target_size"):
            pair = getattr(self, name)
            object.__setattr__(self, name, pair and tuple(pair))

    @property
    def all_loras(self) -> tuple[Lora, ...]:
        """Those of the field and, as A1111 has it, those that the prompt names as <lora:NAME:0.8>
        or <lora:NAME:TEXT WEIGHT:UNET WEIGHT>.
        """
        tags = [Lora(n, float(u or t or 1), float(t or 1)) for n, t, u in _TAG.findall(self.prompt)]
        return (*self.loras, *tags)

    @property
    def reading(self) -> Reading:
        return Reading(self.prompt_dialect, self.emphasis, self.clip_skip)

    def said(self) -> list[str]:
        """The prompt as it stands, and all that it says to the text encoders: at any step, and over
        all of them; with its pieces joined, and apart, as they are where their weights differ.

        Takes time: use a thread. Raises BadParameter for a prompt, or a negative one, that changes
        too often.
        """
        found = [self.prompt]
        for name in ("prompt", "negative_prompt"):
            drawn = without_loras(getattr(self, name) or "")
            texts = dict.fromkeys(self.reading.texts(drawn, self.num_inference_steps))
            self.reading.check(drawn, name)
            if len(texts) > 1 and (len(texts) > MOST_TEXTS or sum(map(len, texts)) > MOST_SAID):
                raise BadParameter(
                    name,
                    f"should say at most {MOST_TEXTS} different things over its steps, of "
                    f"{MOST_SAID} characters in all",
                )
            if name == "prompt" or self.guidance_scale < 1:  # then the picture is of the negative
                read = [self.reading.plain(t, between) for t in texts for between in ("", " ")]
                found += [drawn, *read, *([" then ".join(read)] if len(texts) > 1 else [])]
        return list(dict.fromkeys(found))

    @property
    def unet_calls(self) -> int:
        """UNet calls of one picture."""
        return unet_calls(self.scheduler, self.num_inference_steps)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_params(body: Any, knobs: Sequence[Knob] = KNOBS) -> tuple[ImageParams, list[str]]:
    """A decoded JSON body -> parameters and the names of fields that were ignored.

    Absent and null fields take their default. Numbers may come as strings.
    Raises MalformedBody or BadParameter.
    """
    if not isinstance(body, Mapping):
        raise MalformedBody()
    names = {n: knob for knob in knobs for n in (*knob.aliases, knob.name)}
    given: dict[str, str] = {}
    for name, knob in names.items():  # the knob's own name comes last and so wins over aliases
        if body.get(name) is not None:
            given[knob.name] = name
    values = {}
    for knob in knobs:
        if knob.name in given:
            name = given[knob.name]  # a refusal names what the caller wrote
            values[knob.name] = replace(knob, name=name).read(body[name])
        elif knob.required:
            raise BadParameter(knob.name, f"is mandatory and should be {knob.allowed}")
        else:
            values[knob.name] = knob.default
    if "scheduler_profile" not in given and values["scheduler"] not in IN_A1111:
        values["scheduler_profile"] = "diffusers"  # whatever the default is
    params = ImageParams(**values)
    if params.guidance_start > params.guidance_end:
        raise BadParameter("guidance_start", "should not be more than guidance_end")
    if params.scheduler_profile == "a1111" and params.scheduler not in IN_A1111:
        raise BadParameter(
            "scheduler_profile",
            f'should be "diffusers" with the scheduler {params.scheduler}; "a1111" has '
            + ", ".join(IN_A1111),
        )
    return params, sorted(_shown(str(k)) for k in body if k not in names)


def _shown(name: str) -> str:
    """A foreign field's name, short, and such that it can be sent back."""
    return name[:40].encode("utf-8", "replace").decode()


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


def plain(value: Any) -> Any:
    """A parameter's value as JSON has it."""
    if not isinstance(value, tuple):
        return value
    return [{"name": v.name, "weight": v.unet} if isinstance(v, Lora) else v for v in value]


def without_loras(prompt: str) -> str:
    """The prompt without what names a LoRA in it."""
    return _TAG.sub("", prompt)


def _read_loras(knob: Knob, value: Any) -> tuple[Lora, ...]:
    if isinstance(value, str):  # a form's
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise knob.refuse("other text") from None
    if not isinstance(value, list | tuple) or len(value) > MOST_LORAS:
        raise knob.refuse()
    return tuple(_read_lora(knob, entry) for entry in value)


def _read_pair(knob: Knob, value: Any) -> tuple[int, int]:
    if isinstance(value, str):  # a form's, or the command line's
        value = re.split(r"[x,]", value.strip("[]() ")) if len(value) <= LONGEST_NAME else ()
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
    if not number or not -MOST_WEIGHT <= weight <= MOST_WEIGHT:
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
    if not isinstance(value, str) or len(value) > LONGEST_NAME:
        raise knob.refuse()
    names = {key(choice): choice for choice in knob.choices}
    others = {key(n): c for c in knob.choices for n in ALIASES.get(c, ())}
    found = names.get(key(value)) or others.get(key(value))
    if found is not None:
        return found
    near = get_close_matches(key(value), [*names, *others], 1)
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
