"""Which nets make an image: the checkpoint's own or copies in float32, with its LoRAs in use."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from imaged.engine.loading.load import Nets
from imaged.engine.loading.lora import NO_LORAS, Loras
from imaged.engine.nets.cached_unet import Unet
from imaged.engine.nets.vae import VAE
from imaged.engine.run import Run

log = logging.getLogger(__name__)

Float32 = tuple[Unet, VAE, Loras]


def float32_copies(nets: Nets, loras: Path | None) -> Float32:
    """A float32 copy of the UNet, which takes up to twice its memory again, and a float32 VAE, the
    checkpoint's own if it is float32 already. loras: the folder of their files.
    """
    unet = copy.deepcopy(nets.unet).float()
    vae = nets.vae if nets.vae.dtype == torch.float32 else copy.deepcopy(nets.vae).float()
    return Unet(unet), vae, Loras({"unet": unet}, loras)


class NetVariants:
    """A checkpoint's nets as each image needs them. Images that were NaN or flat in half precision
    are made again in float32, by copies that are kept while one of them is under way.

    folder: of LoRA files. graphs: replay CUDA graphs (nets/cuda_graphs.py). copies: in float32.
    """

    def __init__(self, nets: Nets, folder: Path | None, *, graphs: bool) -> None:
        self._nets, self._folder = nets, folder
        self.unet = Unet(nets.unet, graphs=graphs)
        texts = {part: getattr(nets, part) for part in ("text_encoder", "text_encoder_2")}
        self.loras = Loras({"unet": nets.unet, **texts}, folder)
        self.copies: Float32 | None = None

    def unet_of(self, run: Run) -> Unet:
        """The UNet that makes this image, with the image's LoRAs in use and no others."""
        unet, loras = self.unet, self.loras
        if run.float32_retry:
            unet, _, loras = self.in_float32()
        loras.use(run.loras)
        unet.loras_in_use = run.loras != NO_LORAS
        return unet

    def vae_of(self, run: Run) -> VAE:
        return self.in_float32()[1] if run.float32_retry else self._nets.vae

    def restart_in_float32(self, run: Run) -> bool:
        """Restart an image in float32; False if it was in float32 already, or if its request
        changed at a draft: from the start it would be another image.
        """
        dtype = self._nets.unet.dtype
        if run.float32_retry or run.varied or dtype == self._nets.vae.dtype == torch.float32:
            return False
        log.warning("job %s: not a picture in %s; again in float32", run.job_id, dtype)
        run.float32_retry = True
        run.start(self.unet_of(run))
        return True

    def in_float32(self) -> Float32:
        """The copies in float32, made when they are first asked for."""
        if self.copies is None:
            self.loras.use(NO_LORAS)  # else the copy would have them for good
            self.copies = float32_copies(self._nets, self._folder)
        return self.copies

    def free_float32(self, under_way: Iterable[Run]) -> None:
        """Free the copies, as large as the checkpoint, if none of these images needs them."""
        if not any(run.float32_retry for run in under_way):
            self.copies = None
