"""Train the micro checkpoint from nothing, on a GPU if torch finds one (not tried yet), else a CPU.

    python -m training.micro.train vae            # autoencoder, on crops of painted scenes
    python -m training.micro.train latents        # paint and encode the scenes once
    python -m training.micro.train text           # text encoders, on naming what captions say
    python -m training.micro.train unet           # UNet, with the text encoders as they are
    python -m training.micro.train export         # write the checkpoint folder in half precision

In this order they made the shipped checkpoint; its card says what was changed on the way, so one
run with today's defaults has not been seen to its end. Each part shows its progress and writes its
state (.pt), loss (.jsonl, .png) and samples (.jpg) into --work every --save-every steps; started
again, it goes on from there, and latents with the sizes that are not there yet. Seeds are fixed.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from training.micro.parts.export import export
from training.micro.parts.latents import latents
from training.micro.parts.run import Options
from training.micro.parts.text import text
from training.micro.parts.unet import unet
from training.micro.parts.vae import vae

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@click.group(help=__doc__)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/micro"),
    show_default=True,
    help="Folder for states, latents, logs and samples.",
)
@click.option("--threads", default=0, help="CPU threads; 0 leaves torch's choice.")
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="bf16",
    show_default=True,
    help="Of the nets' arithmetic; weights and losses are float32.",
)
@click.pass_context
def main(context: click.Context, work: Path, threads: int, precision: str) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    context.obj = Options(work, PRECISIONS[precision])


for part in (vae, latents, text, unet, export):
    main.add_command(part)

if __name__ == "__main__":
    main()
