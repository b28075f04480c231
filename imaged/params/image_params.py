"""A checked request: `read_params` turns a body into frozen ImageParams, or raises an error that
names the field and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

from imaged.errors import BadParameter, MalformedBody
from imaged.params.knobs import KNOBS, Knob, safe_name
from imaged.prompt import MAX_LORA_WEIGHT, MAX_LORAS, Lora, Prompt, Reading
from imaged.sampling.schedulers import IN_A1111, unet_calls

DEFAULTS = {knob.name: knob.default for knob in KNOBS}


@dataclass(frozen=True)
class ImageParams:
    """A complete and checked request, as the queue stores it and the engine reads it."""

    prompt: str
    negative_prompt: str | None = DEFAULTS["negative_prompt"]
    samples: int = DEFAULTS["samples"]
    scheduler: str = DEFAULTS["scheduler"]
    num_inference_steps: int = DEFAULTS["num_inference_steps"]
    guidance_scale: float = DEFAULTS["guidance_scale"]
    seed: int = DEFAULTS["seed"]
    img_width: int = DEFAULTS["img_width"]
    img_height: int = DEFAULTS["img_height"]
    base64: bool = DEFAULTS["base64"]
    output_format: str = DEFAULTS["output_format"]
    prompt_report: bool = DEFAULTS["prompt_report"]
    loras: tuple[Lora, ...] = DEFAULTS["loras"]
    prompt_dialect: str = DEFAULTS["prompt_dialect"]
    emphasis: str = DEFAULTS["emphasis"]
    scheduler_profile: str = DEFAULTS["scheduler_profile"]
    clip_skip: int = DEFAULTS["clip_skip"]
    guidance_rescale: float = DEFAULTS["guidance_rescale"]
    guidance_start: float = DEFAULTS["guidance_start"]
    guidance_end: float = DEFAULTS["guidance_end"]
    original_size: tuple[int, int] | None = DEFAULTS["original_size"]
    crop: tuple[int, int] | None = DEFAULTS["crop"]
    target_size: tuple[int, int] | None = DEFAULTS["target_size"]

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
        return (*self.loras, *self.prompts[0].loras)

    @cached_property
    def prompts(self) -> tuple[Prompt, Prompt | None]:
        """Prompt and negative prompt, as they are read: once for this request."""
        reading = Reading(self.prompt_dialect, self.emphasis, self.clip_skip)
        read = partial(Prompt, reading=reading, steps=self.num_inference_steps)
        negative = self.negative_prompt
        return read(self.prompt), None if negative is None else read(negative)

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
    loras = params.all_loras
    if len(loras) > MAX_LORAS:
        raise BadParameter("loras", f"should be at most {MAX_LORAS} with those in the prompt")
    if any(max(abs(lora.unet), abs(lora.text)) > MAX_LORA_WEIGHT for lora in loras):
        most = f"{MAX_LORA_WEIGHT:.0f}"
        raise BadParameter("loras", f"should have weights between -{most} and {most}")
    if params.guidance_start > params.guidance_end:
        raise BadParameter("guidance_start", "should not be more than guidance_end")
    if params.scheduler_profile == "a1111" and params.scheduler not in IN_A1111:
        raise BadParameter(
            "scheduler_profile",
            f'should be "diffusers" with the scheduler {params.scheduler}; "a1111" has '
            + ", ".join(IN_A1111),
        )
    return params, unknown_fields(body, knobs)


def unknown_fields(body: Mapping[str, Any], knobs: Sequence[Knob] = KNOBS) -> list[str]:
    """The names of a body's fields that are no parameters, made safe to show."""
    names = {name for knob in knobs for name in (knob.name, *knob.aliases)}
    return sorted(safe_name(str(name)) for name in body if name not in names)


def plain(value: Any) -> Any:
    """A parameter's value in JSON types."""
    if not isinstance(value, tuple):
        return value
    return [{"name": v.name, "weight": v.unet} if isinstance(v, Lora) else v for v in value]
