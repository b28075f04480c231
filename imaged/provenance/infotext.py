"""Infotext: a request's parameters in A1111's text format for PNG files, written and read.

The prompt comes first, then `Negative prompt: `, then one line of `Name: value, ` pairs.
"""

from __future__ import annotations

import json
import re

from imaged.errors import ReceiptRefused
from imaged.params.image_params import DEFAULTS, ImageParams

#: Samplers with another name in A1111.
A1111_NAMES = {"DPM Multi": "DPM++ 2M", "PNDM": "PLMS"}
OPTIONAL_LABELS = {
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
#: Request fields that are always written, as are Size, Model and Version.
LABELS = {
    "num_inference_steps": "Steps",
    "scheduler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
}
NEGATIVE = "Negative prompt:"
_PAIR = re.compile(r'([A-Z][\w ]*): ("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')


def infotext(params: ImageParams, seed: int, checkpoint: str) -> str:
    """The infotext of one image. A prompt with a line that begins with `Negative prompt:` is put on
    one line, because readers would take that line for the negative prompt.
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
    """Pairs for parameters that differ from their defaults, in A1111's names where it has them."""
    given, found = params.as_dict(), {}
    for name, label in OPTIONAL_LABELS.items():
        value = given[name]
        if value == DEFAULTS[name]:
            continue
        if name == "clip_skip":
            value += 2  # A1111 counts from the last layer, ours from the last but one
        pair = isinstance(value, tuple)
        found[label] = f"{value[0]}x{value[1]}" if pair else str(value).capitalize()
    return found


def _lines(text: str) -> str:
    """Stripped lines, none of which looks like the negative prompt."""
    lines = [line.strip() for line in text.strip().split("\n")]
    if any(line.startswith(NEGATIVE) for line in lines[1:]):
        lines = [" ".join(lines)]
    if lines[0].startswith(NEGATIVE):
        lines[0] = "," + lines[0]
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """Quote a value that contains a separator."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value


def read_infotext(text: str) -> dict[str, str]:
    """Request fields from an infotext, ours or A1111's; raises ReceiptRefused without them."""
    *lines, last = text.strip().split("\n")
    try:
        pairs = {name: _plain(value) for name, value in _PAIR.findall(last)}
        skipped = int(pairs.get("Clip skip", "2")) - 2
    except ValueError as error:
        raise ReceiptRefused("its parameters cannot be read") from error
    if not {"Steps", "Sampler", "Seed", "Size"} <= pairs.keys():
        raise ReceiptRefused("there are no parameters in it")
    at = next((n for n, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    width, _, height = pairs["Size"].partition("x")
    names = {label: name for name, label in (LABELS | OPTIONAL_LABELS).items()}
    given = {names[label]: value for label, value in pairs.items() if label in names}
    if "clip_skip" in given:
        given["clip_skip"] = str(skipped)
    if "scheduler" in given:
        ours = {theirs: ours for ours, theirs in A1111_NAMES.items()}
        given["scheduler"] = ours.get(given["scheduler"], given["scheduler"])
    negative = "\n".join(lines[at:])[len(NEGATIVE) :].strip()
    prompt = {
        "prompt": "\n".join(lines[:at]),
        **({"negative_prompt": negative} if negative else {}),
    }
    return {**prompt, **given, "img_width": width, "img_height": height}


def _plain(value: str) -> str:
    return str(json.loads(value)) if value.startswith('"') else value
