"""The nets of all parts together, as a checkpoint has them, and what they paint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from imaged.engine.loading.load import assemble
from imaged.params.image_params import ImageParams
from training.micro.architecture import CHECKPOINT, build_unet, build_vae
from training.micro.parts.run import DEVICE, earlier
from training.micro.parts.text import learnt_text
from training.micro.sheets import PROMPTS, contact_sheet, generate


def parts_of(work: Path, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """UNet, text encoders and normalised autoencoder by the names of a checkpoint's folders."""
    net, conditioner = build_unet(), learnt_text(work)
    net.load_state_dict(weights)
    autoencoder = build_vae()
    autoencoder.load_state_dict(earlier(work, "vae-normalised.pt", "latents")["net"])
    autoencoder.register_to_config(scaling_factor=1.0)
    return {
        "unet": net,
        "vae": autoencoder,
        "text_encoder": conditioner.one,
        "text_encoder_2": conditioner.two,
    }


def told(net: Any) -> dict[str, Any]:
    """A net's config.json; one library writes it by the config, the other by the net."""
    writer = net.config if hasattr(net.config, "to_json_string") else net
    config: dict[str, Any] = json.loads(writer.to_json_string())
    return config


def samples(work: Path, weights: dict[str, torch.Tensor], count: int = 6) -> Image.Image:
    """What the averaged weights make of the README's prompts, by the product's own engine."""
    nets = assemble(
        {name: (told(net), net.state_dict()) for name, net in parts_of(work, weights).items()},
        tokenizers=CHECKPOINT,
        device=torch.device(DEVICE),
        dtype=torch.float32,
    )
    prompts = PROMPTS[:count]
    jobs = [ImageParams(p, seed=7, img_width=512, img_height=512) for p in prompts]
    return contact_sheet(generate(nets, jobs, "samples"), list(prompts), columns=3, width=340)
