"""The UNet, with what does not change from call to call computed once.

Of a call's inputs only the latents are new. A text's keys and values in every cross-attention, and
a picture's embeddings of time, size and pooled text, are known when the picture starts. The plain
call is the UNet's own `forward`; tests hold the two together (tests/golden/test_savings.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from imaged.engine.graphs import Graphs
from imaged.engine.prompt.encode import Encoded
from imaged.errors import CheckpointRefused

KEPT_TEXTS = 16  # SDXL's keys and values are 51 MB a window in bfloat16
KEPT_CROWDS = 4


class _Kept(AttnProcessor2_0):  # type: ignore[misc]
    """Cross-attention over keys and values that are given; without them the library's own."""

    given: tuple[Any, Any] | None = None  # (rows, heads, tokens, head width) each

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.given is None:
            return super().__call__(attn, hidden_states, *args, **kwargs)
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(query, *self.given)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class _Projection(torch.nn.Module):
    """A residual block's projection of the time embedding, or what it gave before."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.given: torch.Tensor | None = None  # (rows, width)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.linear(embedding) if self.given is None else self.given
        return projected


class Unet:
    """A checkpoint's UNet. `text` and `times` prepare a picture, the call denoises many.

    Nothing in the call multiplies a matrix by the rows alone: on small products the libraries
    change their order of summing with the number of rows, and a picture would with its company.

    Raises CheckpointRefused for cross-attentions of another kind than SDXL's.
    """

    def __init__(self, net: Any, *, graphs: bool = False) -> None:
        self.net = net
        self._call = Graphs(self._plain) if graphs else self._plain
        self.device, self.dtype = torch.device(net.device), net.dtype
        self._attentions = [_sdxl(block.attn2) for block in _transformer_blocks(net)]
        for attention in self._attentions:
            if not isinstance(attention.processor, _Kept):
                attention.set_processor(_Kept())
        self._projections = [_projection(m) for m in net.modules() if hasattr(m, "time_emb_proj")]
        self._texts: OrderedDict[int, tuple[Encoded, torch.Tensor]] = OrderedDict()
        self._crowds: OrderedDict[tuple[int, ...], tuple[Any, torch.Tensor]] = OrderedDict()

    @torch.inference_mode()
    def text(self, encoded: Encoded) -> torch.Tensor:
        """(T,) keys and values of one text in every cross-attention, one after the other."""
        kept = self._texts.get(id(encoded))
        if kept is None:
            context = encoded.context.to(self.dtype)[None]
            kept = (encoded, torch.cat([part.flatten() for part in self._project(context)]))
            _keep(self._texts, id(encoded), kept, KEPT_TEXTS)
        return kept[1]

    def _project(self, context: torch.Tensor) -> Iterator[torch.Tensor]:
        for attention in self._attentions:
            for side in (attention.to_k, attention.to_v):
                yield side(context).unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    @torch.inference_mode()
    def times(
        self, timesteps: torch.Tensor, encoded: Encoded, time_ids: Sequence[int]
    ) -> torch.Tensor:
        """(N, E) for N calls: what the residual blocks add for timestep, pooled text and sizes."""
        net = self.net
        time = net.time_embedding(net.time_proj(timesteps.to(self.device)).to(self.dtype))
        sizes = net.add_time_proj(torch.tensor(time_ids, device=self.device, dtype=self.dtype))
        pooled = torch.cat([encoded.pooled.to(self.dtype), sizes.flatten().to(self.dtype)])
        embedded = time + net.add_embedding(pooled[None])
        if net.time_embed_act is not None:
            embedded = net.time_embed_act(embedded)
        activated = torch.nn.functional.silu(embedded)
        return torch.cat([projection(activated) for projection in self._projections], dim=1)

    def crowd(self, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        """(rows, T): the texts stacked; the last few stacks are kept, crowds change seldom."""
        key = tuple(id(text) for text in texts)
        kept = self._crowds.get(key)
        if kept is None:
            kept = (list(texts), torch.stack(list(texts)))  # the list keeps the ids from reuse
            _keep(self._crowds, key, kept, KEPT_CROWDS)
        return kept[1]

    @torch.inference_mode()
    def __call__(self, x: torch.Tensor, times: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """x (rows, C, h, w), times (rows, E), texts (rows, T) -> outputs (rows, C, h, w)."""
        return self._call(x.to(self.dtype), times, texts)

    def _plain(self, x: torch.Tensor, times: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        widths = [projection.linear.out_features for projection in self._projections]
        given = (*self._sides(texts), *torch.split(times, widths, dim=1))
        takers = [*(attention.processor for attention in self._attentions), *self._projections]
        for taker, part in zip(takers, given, strict=True):
            taker.given = part
        try:
            return self._forward(x, times[:, :1], texts)
        finally:
            for taker in takers:
                taker.given = None

    def _sides(self, texts: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(rows, heads, tokens, head width) keys and values of each cross-attention, as views."""
        widths = [attention.to_k.out_features for attention in self._attentions]
        tokens, at = texts.shape[1] // (2 * sum(widths)), 0
        for attention, width in zip(self._attentions, widths, strict=True):
            shape = (attention.heads, tokens, width // attention.heads)
            middle, end = at + tokens * width, at + 2 * tokens * width
            keys, values = texts[:, at:middle], texts[:, middle:end]
            yield keys.view(-1, *shape), values.view(-1, *shape)
            at = end

    def _forward(self, x: torch.Tensor, emb: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """The way through the blocks; `emb` and `texts` only say that there are such inputs."""
        net = self.net
        uneven = any(side % 2**net.num_upsamplers for side in x.shape[-2:])
        x = net.conv_in(x)
        skips = [x]
        for block in net.down_blocks:
            x, outputs = block(x, emb, **_cross(block, texts))
            skips += outputs
        x = net.mid_block(x, emb, **_cross(net.mid_block, texts))
        for block in net.up_blocks:
            count = len(block.resnets)
            taken, skips = skips[-count:], skips[:-count]
            size = skips[-1].shape[2:] if uneven and skips else None
            x = block(x, tuple(taken), emb, upsample_size=size, **_cross(block, texts))
        out: torch.Tensor = net.conv_out(net.conv_act(net.conv_norm_out(x)))
        return out


def _cross(block: Any, texts: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": texts} if getattr(block, "has_cross_attention", False) else {}


def _transformer_blocks(net: Any) -> list[Any]:
    return [m for m in net.modules() if type(m).__name__ == "BasicTransformerBlock"]


def _sdxl(attention: Any) -> Any:
    """The cross-attention if it is what `_Kept` computes."""
    extras = ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "residual_connection")
    if any(getattr(attention, name, None) for name in extras):
        raise CheckpointRefused("its cross-attentions are not SDXL's")
    return attention


def _projection(block: Any) -> _Projection:
    if not isinstance(block.time_emb_proj, _Projection):
        if block.skip_time_act or block.time_embedding_norm != "default":
            raise CheckpointRefused("its residual blocks are not SDXL's")
        block.time_emb_proj = _Projection(block.time_emb_proj)
    projection: _Projection = block.time_emb_proj
    return projection


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    kept[key] = value
    while len(kept) > most:
        kept.popitem(last=False)
