"""The reference: diffusers' StableDiffusionXLPipeline, without its progress bar."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from imaged.params.image_params import ImageParams

# The samplers of the benchmarks, each of one UNet call a step, under diffusers' names.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}


def pipeline(checkpoint: Path, device: str = "cpu") -> Any:
    """The pipeline with a checkpoint's weights: float32 on the CPU, bfloat16 on a GPU."""
    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        checkpoint,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        local_files_only=True,
        add_watermarker=False,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, params: ImageParams) -> Image.Image:
    """The picture of these parameters, with a fresh scheduler."""
    name, extra = SAMPLERS[params.scheduler]
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **extra)
    picture = pipe(
        params.prompt,
        negative_prompt=params.negative_prompt,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        width=params.img_width,
        height=params.img_height,
        generator=torch.Generator("cpu").manual_seed(params.seed),
    ).images[0]
    assert isinstance(picture, Image.Image)
    return picture


def jpeg(picture: Image.Image) -> bytes:
    """Encoded as our server encodes."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
