"""A checked request: `read_params` turns a body into frozen ImageParams, or raises an error that
names the field and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from imaged.errors import BadParameter, MalformedBody
from imaged.params.knobs import KNOBS, Knob, shown
from imaged.params.loras import Lora, tagged, without_loras
from imaged.prompt import A1111, Reading
from imaged.sampling.schedulers import IN_A1111, unet_calls

MOST_TEXTS, MOST_SAID = 32, 100_000  # texts of a prompt that changes by step; characters


@dataclass(frozen=True)
class ImageParams:
    """A complete and checked request, as the queue stores it and the engine reads it."""

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
        """Convert what JSON has as objects and lists."""
        loras = tuple(lora if isinstance(lora, Lora) else Lora(**lora) for lora in self.loras)
        object.__setattr__(self, "loras", loras)
        for name in ("original_size", "crop", "target_size"):
            pair = getattr(self, name)
            object.__setattr__(self, name, pair and tuple(pair))

    @property
    def all_loras(self) -> tuple[Lora, ...]:
        """LoRAs of the field `loras`, then those of tags in the prompt (A1111's syntax)."""
        return (*self.loras, *tagged(self.prompt))

    @property
    def reading(self) -> Reading:
        return Reading(self.prompt_dialect, self.emphasis, self.clip_skip)

    def said(self) -> list[str]:
        """The texts that moderation judges: the prompt as sent, and what the text encoders get of
        it at each step and over all steps, with differently weighted pieces joined and apart.

        CPU-bound: call it in a thread. Raises BadParameter for a prompt that changes too often.
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
            if name == "prompt" or self.guidance_scale < 1:  # below 1 the negative prompt is drawn
                read = [self.reading.plain(t, between) for t in texts for between in ("", " ")]
                found += [drawn, *read, *([" then ".join(read)] if len(texts) > 1 else [])]
        return list(dict.fromkeys(found))

    @property
    def unet_calls(self) -> int:
        """UNet calls of one image."""
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
    return params, sorted(shown(str(k)) for k in body if k not in names)


def plain(value: Any) -> Any:
    """A parameter's value in JSON types."""
    if not isinstance(value, tuple):
        return value
    return [{"name": v.name, "weight": v.unet} if isinstance(v, Lora) else v for v in value]
