"""CLIP's text encoder (Radford et al. 2021), of which SDXL has two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from imaged.engine.nets.layers import Linear
from imaged.engine.nets.net import Config, Net
from imaged.errors import CheckpointRefused

Given = tuple[int, int, torch.Tensor]  # window, place, (width,) vector


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Hendrycks and Gimpel 2016: the cheap form that the first encoder was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
}


@dataclass(frozen=True)
class TextConfig(Config):
    """config.json of a text encoder."""

    FIXED: ClassVar[dict[str, Any]] = {"max_position_embeddings": 77}

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 49408
    projection_dim: int = 512
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 77

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise CheckpointRefused(f"hidden_act is {self.hidden_act!r}; SDXL's is gelu")
        if self.num_hidden_layers < 2:
            raise CheckpointRefused("SDXL reads the last layer but one; there is none")


class SelfAttention(nn.Module):
    """Causal self-attention: a token attends to itself and to those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (
            projection(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None)
        out: torch.Tensor = self.out_proj(h.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Layer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = SelfAttention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), seen)
        out: torch.Tensor = x + self.mlp(self.layer_norm2(x))
        return out


def _table(count: int, width: int) -> nn.Embedding:
    """Without random initialization: on the meta device that would import torch's compiler, which
    takes a second and more.
    """
    return nn.Embedding(count, width, _weight=torch.empty(count, width))


class Embeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = _table(config.vocab_size, config.hidden_size)
        self.position_embedding = _table(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: torch.Tensor, given: Sequence[Given]) -> torch.Tensor:
        tokens: torch.Tensor = self.token_embedding(ids)
        for window, place, vector in given:
            tokens[window, place] = vector
        return tokens + self.position_embedding.weight


class Encoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class TextEncoder(Net):
    """77 token ids to one vector each: the output of the last layer but one."""

    IGNORED: tuple[str, ...] = ("embeddings.position_ids", "logit_scale", "text_projection")
    config: TextConfig

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self,
        ids: torch.Tensor,
        end: int,
        given: Sequence[Given] = (),
        skip: int = 0,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(windows, 77) ids -> (windows, 77, width), and pooled (windows, pooled width) or None.

        end:   id of the end token; the first one of a window is pooled.
        given: vectors that replace tokens.
        skip:  how many more layers to leave out before the last but one; `layers - 1` at most.
        mask:  (windows, 77), 0 for tokens that no other attends to.
        """
        seen = None
        if mask is not None and not mask.all():  # without one the causal kernel is used
            seen = mask.bool()[:, None, None] & torch.ones(77, 77, device=ids.device).bool().tril()
        states = [self.embeddings(ids, given)]
        for layer in self.encoder.layers[:-1]:
            states.append(layer(states[-1], seen))
        return states[-1 - skip], self.pooled(states[-1], (ids == end).int().argmax(dim=-1))

    def pooled(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor | None:
        return None


class ProjectingTextEncoder(TextEncoder):
    """SDXL's second text encoder, which also gives one vector for the whole text."""

    IGNORED = ("embeddings.position_ids", "logit_scale")

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def pooled(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        last = self.final_layer_norm(self.encoder.layers[-1](x))
        out: torch.Tensor = self.text_projection(last[torch.arange(len(last)), ends])
        return out
