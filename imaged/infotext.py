"""A picture's parameters as the text that A1111 keeps in its PNG files, so that tools which read
those can read ours.

The prompt stands first, then `Negative prompt: `, then one line of `Name: value, ` pairs.
"""

from __future__ import annotations

import json

from imaged.params import ImageParams

#: Our sampler -> the name under which A1111 has the same one.
A1111_NAMES = {"DPM Multi": "DPM++ 2M", "PNDM": "PLMS"}
UNUSUAL = {
    "clip_skip": "Clip skip",
    "emphasis": "Emphasis",
    "guidance_rescale": "Guidance rescale",
    "guidance_start": "Guidance start",
    "guidance_end": "Guidance end",
    "original_size": "Original size",
    "crop": "Crop",
    "target_size": "Target size",
    "scheduler_profile": "Scheduler profile",
    "prompt_dialect": "Prompt dialect",
}
NEGATIVE = "Negative prompt:"


def infotext(params: ImageParams, seed: int, checkpoint: str) -> str:
    """The text for one picture.

    Readers strip every line and take any line that begins with `Negative prompt:` for the start
    of the negative prompt, so a prompt that has such a line is put on one line.
    """
    pairs = {
        "Steps": str(params.num_inference_steps),
        "Sampler": A1111_NAMES.get(params.scheduler, params.scheduler),
        "CFG scale": f"{params.guidance_scale:g}",
        "Seed": str(seed),
        "Size": f"{params.img_width}x{params.img_height}",
        **_unusual(params),
        "Model": _quoted(checkpoint),
        "Version": "imaged",
    }
    tags = [f"<lora:{lora.name}:{lora.unet:g}>" for lora in params.loras]
    lines = [_lines(" ".join([params.prompt, *tags]))]
    if params.negative_prompt:
        lines.append(f"{NEGATIVE} {_lines(params.negative_prompt)}")
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items()))
    return "\n".join(lines)


def _unusual(params: ImageParams) -> dict[str, str]:
    """What is not as it is by default; in A1111's words where it has them."""
    usual, given = ImageParams("").as_dict(), params.as_dict()
    found = {}
    for name, label in UNUSUAL.items():
        value = given[name]
        if value == usual[name]:
            continue
        if name == "clip_skip":
            value += 2  # A1111 counts from the last layer, ours from the last but one
        pair = isinstance(value, tuple)
        found[label] = f"{value[0]}x{value[1]}" if pair else str(value).capitalize()
    return found


def _lines(text: str) -> str:
    """Lines as a reader will have them; none of them looks like a heading."""
    lines = [line.strip() for line in text.strip().split("\n")]
    if any(line.startswith(NEGATIVE) for line in lines[1:]):
        lines = [" ".join(lines)]
    if lines[0].startswith(NEGATIVE):
        lines[0] = "," + lines[0]
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """A value with a separator in it, in quotes."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value
