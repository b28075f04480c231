"""Windows to what the UNet reads: context (77 n, width) and pooled (width)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imaged.engine.prompt.embeddings import Embeddings
from imaged.engine.prompt.tokens import Windows, read_windows
from imaged.errors import JobFailed

CACHED_PROMPTS = 256
MOST_WINDOWS = 64  # 4,800 tokens, about 20,000 characters of English
AT_A_TIME = 8  # windows in one call of a text encoder: a bound on its memory


@dataclass(frozen=True)
class Encoded:
    """context (77 * windows, context width) and pooled (pooled width) of one text."""

    context: torch.Tensor
    pooled: torch.Tensor


class PromptEncoder:
    """Both text encoders of a checkpoint, with the last texts kept.

    Context: the penultimate hidden states of both encoders side by side, window after window.
    Pooled: the second encoder's projected end token of the first window. As in the SDXL
    reference pipeline.
    """

    def __init__(self, nets: Any, embeddings: Path | None = None) -> None:
        self._pairs = (
            (nets.tokenizer, nets.text_encoder),
            (nets.tokenizer_2, nets.text_encoder_2),
        )
        widths = [encoder.config.hidden_size for _, encoder in self._pairs]
        self.embeddings = Embeddings(embeddings, (widths[0], widths[1]))
        self._zero_absent = nets.force_zeros_for_empty_prompt
        self._kept: OrderedDict[tuple[str, int, Hashable], Encoded] = OrderedDict()
        self._zeros: dict[int, Encoded] = {}  # by windows: the UNet keeps what it made of a text

    def pair(
        self, prompt: str, negative: str | None, loras: Hashable = ()
    ) -> tuple[Encoded, Encoded]:
        """Positive and negative, padded with empty windows to one context length.

        `loras`: what is in use, which changes what the encoders make of a text.

        An absent negative prompt is all zeros if the checkpoint says so, else the empty text.
        Raises JobFailed for texts of more than 64 windows.
        """
        self.embeddings.refresh()
        in_use = (loras, self.embeddings.version)
        count = self._windows(prompt)
        if negative is None and self._zero_absent:
            positive = self._encode(prompt, count, in_use)
            if count not in self._zeros:
                self._zeros[count] = Encoded(
                    torch.zeros_like(positive.context), torch.zeros_like(positive.pooled)
                )
            return positive, self._zeros[count]
        count = max(count, self._windows(negative or ""))
        return self._encode(prompt, count, in_use), self._encode(negative or "", count, in_use)

    def _windows(self, text: str) -> int:
        """The longer of the two tokenizers' counts: the second reads "!!!" as three tokens."""
        count = max(len(self._read(text, tokenizer).ids) for tokenizer, _ in self._pairs)
        if count > MOST_WINDOWS:
            raise JobFailed(
                "prompt_too_long",
                f"the prompt and the negative prompt should each be at most {75 * MOST_WINDOWS} "
                f"tokens long; one has more than {75 * (count - 1)}",
            )
        return count

    def _read(self, text: str, tokenizer: Any) -> Windows:
        return read_windows(text, tokenizer, self.embeddings)

    def _encode(self, text: str, count: int, in_use: Hashable) -> Encoded:
        key = (text, count, in_use)
        if key not in self._kept:
            self._kept[key] = self._run(text, count)
            if len(self._kept) > CACHED_PROMPTS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    @torch.inference_mode()
    def _run(self, text: str, count: int) -> Encoded:
        contexts, pooled = [], None
        for side, (tokenizer, encoder) in enumerate(self._pairs):
            windows = self._read(text, tokenizer)
            empty = read_windows("", tokenizer)
            missing = count - len(windows.ids)
            windows = Windows(
                windows.ids + empty.ids * missing,
                windows.weights + empty.weights * missing,
                windows.embedded,
            )
            hidden: list[torch.Tensor] = []
            for first in range(0, count, AT_A_TIME):
                ids = torch.tensor(windows.ids[first : first + AT_A_TIME], device=encoder.device)
                given = [
                    (window - first, place, embedding.vectors[side][n])
                    for window, place, embedding, n in windows.embedded
                    if first <= window < first + AT_A_TIME
                ]
                vectors, whole = encoder(ids, tokenizer.end, given)
                if not hidden:
                    pooled = whole  # the second encoder's; the first has none
                hidden.append(vectors)
            contexts.append(_emphasise(torch.cat(hidden), windows))
        assert pooled is not None
        return Encoded(torch.cat(contexts, dim=-1).flatten(0, 1), pooled[0])


def _emphasise(hidden: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Multiply each token's vector by its weight; the mean is left as it becomes (decision 6)."""
    weights = torch.tensor(windows.weights, device=hidden.device, dtype=hidden.dtype)
    return hidden * weights[..., None]
