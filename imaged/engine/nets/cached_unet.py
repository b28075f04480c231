"""The UNet, with what does not change from call to call computed once.

Only the latents are new in a call. A text's keys and values in every cross-attention, and an
image's embeddings of time, size and pooled text, are known when the image starts. Tests compare it
with the reference library's plain call (tests/golden/test_savings.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from cachetools import LRUCache

from imaged.engine.nets.cuda_graphs import Graphs
from imaged.engine.nets.layers import Conv2d, KeysValues, Layer
from imaged.engine.nets.unet import UNetModel
from imaged.engine.prompt.encode import Encoded

CACHED_TEXTS = 16  # SDXL's keys and values are 51 MB a window in bfloat16
CACHED_STACKS = 4


class Unet:
    """A checkpoint's UNet. `text` and `times` prepare an image, the call denoises many.

    The call has no matrix product over the rows alone: for small products libraries change the
    order of summation with the number of rows, and an image would change with its batch.
    """

    def __init__(self, net: UNetModel, *, graphs: bool = False) -> None:
        self.net = net
        self._call = Graphs(self._plain) if graphs else self._plain
        self.device, self.dtype = net.device, net.dtype
        self.loras_in_use = False  # whether LoRAs are in use, which recorded calls know nothing of
        self._attentions = net.cross_attentions()
        self._projections = [block.time_emb_proj for block in net.resnets()]
        for layer in net.modules():
            if isinstance(layer, Conv2d):
                layer.packs = True
        #: By id of the text, and by ids of the stacked ones. The objects are kept beside, so that
        #: their ids are not reused.
        self._texts: LRUCache[int, tuple[Encoded, torch.Tensor]] = LRUCache(CACHED_TEXTS)
        self._stacks: LRUCache[tuple[int, ...], tuple[Any, torch.Tensor]] = LRUCache(CACHED_STACKS)

    @torch.inference_mode()
    def text(self, encoded: Encoded) -> torch.Tensor:
        """(T,) keys and values of one text in every cross-attention, one after the other."""
        cached = self._texts.get(id(encoded))
        if cached is None:
            context = encoded.context.to(self.dtype)[None]
            sides = [side for a in self._attentions for side in a.keys_values(context)]
            cached = encoded, torch.cat([side.flatten() for side in sides])
            self._texts[id(encoded)] = cached
        return cached[1]

    @torch.inference_mode()
    def times(
        self, timesteps: torch.Tensor, encoded: Encoded, time_ids: Sequence[int]
    ) -> torch.Tensor:
        """(N, E) for N calls: what the residual blocks add for timestep, pooled text and sizes."""
        sizes = torch.tensor(time_ids, device=self.device)
        pooled = encoded.pooled.to(self.dtype)
        embedded = self.net.embed(timesteps.to(self.device), pooled, sizes)
        return torch.cat([projection(embedded) for projection in self._projections], dim=1)

    def stack_texts(self, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        """(rows, T): the texts stacked. Batches change seldom: the last few stacks are cached."""
        ids = tuple(id(text) for text in texts)
        cached = self._stacks.get(ids)
        if cached is None:
            cached = list(texts), torch.stack(list(texts))
            self._stacks[ids] = cached
        return cached[1]

    @torch.inference_mode()
    def __call__(self, x: torch.Tensor, times: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """x (rows, C, h, w), times (rows, E), texts (rows, T) -> outputs (rows, C, h, w)."""
        call = self._plain if self.loras_in_use else self._call
        return call(x.to(self.dtype), times, texts)

    @torch.inference_mode()
    def enable_paired_rows(self, x: torch.Tensor, times: torch.Tensor, texts: torch.Tensor) -> bool:
        """Find the layers whose bits change with the number of rows, by comparing a call of many,
        and make them compute two rows at a time from now on. Returns whether there are any.
        """
        changing: list[Layer] = []

        def compare(layer: Layer, rows: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            if not torch.equal(layer.paired(*rows), out):
                changing.append(layer)

        layers = [layer for layer in self.net.modules() if isinstance(layer, Layer)]
        hooks = [layer.register_forward_hook(compare) for layer in layers]
        try:
            self._plain(x.to(self.dtype), times, texts)
        finally:
            for hook in hooks:
                hook.remove()
        for layer in changing:
            layer.in_pairs = True
        if changing and isinstance(self._call, Graphs):
            self._call.clear()
        return bool(changing)

    def _plain(self, x: torch.Tensor, times: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        widths = [projection.out_features for projection in self._projections]
        split = iter(torch.split(times, widths, dim=1))
        out: torch.Tensor = self.net(x, split, self._keys_values(texts))
        return out

    def _keys_values(self, texts: torch.Tensor) -> Iterator[KeysValues]:
        """(rows, heads, tokens, head width) keys and values of each cross-attention, as views."""
        widths = [attention.to_k.out_features for attention in self._attentions]
        tokens, at = texts.shape[1] // (2 * sum(widths)), 0
        for attention, width in zip(self._attentions, widths, strict=True):
            shape = (attention.heads, tokens, width // attention.heads)
            middle, end = at + tokens * width, at + 2 * tokens * width
            keys, values = texts[:, at:middle], texts[:, middle:end]
            yield keys.view(-1, *shape), values.view(-1, *shape)
            at = end
