"""Both text encoders over a prompt's windows: context (77 n, width) and pooled (width,)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache

from imaged.engine.prompt import compel
from imaged.engine.prompt.embeddings import Vectors, load_embedding
from imaged.errors import JobFailed
from imaged.prompt import A1111, Prompt, Reading
from imaged.prompt.embeddings import Embedding, Embeddings
from imaged.prompt.windows import MAX_WINDOWS, WINDOW, Windows, read_windows

CACHED_PROMPTS = 256
MAX_OVER_STEPS = 64  # windows of all texts of a prompt that changes over its steps
AT_A_TIME = 8  # windows in one call of a text encoder: a bound on its memory


@dataclass(frozen=True)
class Encoded:
    """context (77 * windows, context width) and pooled (pooled width) of one text."""

    context: torch.Tensor
    pooled: torch.Tensor


class PromptEncoder:
    """Both text encoders of a checkpoint, with an LRU cache of encoded texts.

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
        self.embeddings = Embeddings(embeddings, (widths[0], widths[1]), load_embedding)
        self._zero_absent = nets.force_zeros_for_empty_prompt
        self._cached: LRUCache[Hashable, Encoded] = LRUCache(CACHED_PROMPTS)
        self._zeros: dict[int, Encoded] = {}  # by windows: the UNet keeps what it made of a text

    def pair(
        self, prompt: str, negative: str | None, reading: Reading = A1111
    ) -> tuple[Encoded, Encoded]:
        """Positive and negative of a prompt that does not change."""
        other = None if negative is None else Prompt(negative, reading)
        [positive], [against] = self.by_step(Prompt(prompt, reading), other)
        return positive, against

    def by_step(
        self, prompt: Prompt, negative: Prompt | None, loras: Hashable = ()
    ) -> tuple[list[Encoded], list[Encoded]]:
        """Positive and negative at each step, padded with empty windows to one context length.

        loras: what is applied to the text encoders; part of the cache's key.

        An absent negative prompt is all zeros if the checkpoint says so, else the empty text.
        Raises JobFailed for texts of more than 64 windows, or of more than 64 over the steps, and
        for text encoders that have too few layers to skip as many.
        """
        self.embeddings.refresh()
        layers = min(encoder.config.num_hidden_layers for _, encoder in self._pairs)
        if prompt.reading.skip >= layers:
            raise JobFailed(
                "too_few_layers", f"clip_skip should be at most {layers - 1} with this checkpoint"
            )
        zero = negative is None and self._zero_absent
        negative = negative or Prompt("", prompt.reading, prompt.steps)
        read = (prompt,) if zero else (prompt, negative)
        said = {text: side for side in read for text in side.by_step}
        in_use = (loras, self.embeddings.version)
        counts = {text: self._windows(said[text], text, in_use) for text in said}
        count = max(counts.values())
        if count * len(counts) > MAX_OVER_STEPS and len(counts) > 2:
            raise JobFailed(
                "prompt_too_long",
                f"what the prompts say over the steps should be at most {75 * MAX_OVER_STEPS} "
                f"tokens in all; it is {75 * count * len(counts)}",
            )
        made = {text: self._encode(said[text], text, count, in_use) for text in said}
        positive = [made[text] for text in prompt.by_step]
        if not zero:
            return positive, [made[text] for text in negative.by_step]
        if count not in self._zeros:
            self._zeros[count] = Encoded(
                torch.zeros_like(positive[0].context), torch.zeros_like(positive[0].pooled)
            )
        return positive, [self._zeros[count]] * prompt.steps

    def _windows(self, prompt: Prompt, text: str, in_use: Hashable) -> int:
        """The longer of the two tokenizers' counts: the second reads "!!!" as three tokens."""
        if prompt.reading.dialect == "compel":
            return len(self._encode(prompt, text, 0, in_use).context) // (WINDOW + 2)
        count = max(len(self._read(prompt, text, tokenizer).ids) for tokenizer, _ in self._pairs)
        if count > MAX_WINDOWS:
            raise JobFailed(
                "prompt_too_long",
                f"the prompt and the negative prompt should each be at most {75 * MAX_WINDOWS} "
                f"tokens long; one has more than {75 * (count - 1)}",
            )
        return count

    def _read(self, prompt: Prompt, text: str, tokenizer: Any) -> Windows:
        return read_windows(prompt.spans[text], tokenizer, self.embeddings)

    def _encode(self, prompt: Prompt, text: str, count: int, in_use: Hashable) -> Encoded:
        key = (text, count, prompt.reading, in_use)
        if (encoded := self._cached.get(key)) is None:
            run = self._by_compel if prompt.reading.dialect == "compel" else self._run
            encoded = self._cached[key] = run(prompt, text, count)
        return encoded

    @torch.inference_mode()
    def _by_compel(self, prompt: Prompt, _: str, count: int) -> Encoded:
        """Padded to `count` windows as the package does it, with those of no text."""
        context, pooled, empty = compel.encode(prompt, self._pairs, self.embeddings)
        missing = count - len(context) // len(empty)
        return Encoded(torch.cat([context, *[empty] * missing]), pooled)

    @torch.inference_mode()
    def _run(self, prompt: Prompt, text: str, count: int) -> Encoded:
        contexts, pooled = [], None
        for side, (tokenizer, encoder) in enumerate(self._pairs):
            windows = self._read(prompt, text, tokenizer)
            empty = read_windows([], tokenizer)
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
                    (window - first, place, _vector(embedding, side, n))
                    for window, place, embedding, n in windows.embedded
                    if first <= window < first + AT_A_TIME
                ]
                vectors, whole = encoder(ids, tokenizer.end, given, prompt.reading.skip)
                if not hidden:
                    pooled = whole  # the second encoder's; the first has none
                hidden.append(vectors)
            contexts.append(_emphasise(torch.cat(hidden), windows, prompt.reading.emphasis))
        assert pooled is not None
        return Encoded(torch.cat(contexts, dim=-1).flatten(0, 1), pooled[0])


def _vector(embedding: Embedding, side: int, n: int) -> torch.Tensor:
    assert isinstance(embedding, Vectors)
    return embedding.sides[side][n]


def _emphasise(hidden: torch.Tensor, windows: Windows, emphasis: str) -> torch.Tensor:
    """Multiply each token's vector by its weight, and leave the mean of a window as it becomes
    (decision 6); "original" scales the window so that its mean is what it was.
    """
    if emphasis == "none":
        return hidden
    weights = torch.tensor(windows.weights, device=hidden.device, dtype=hidden.dtype)
    weighted = hidden * weights[..., None]
    if emphasis == "original":
        before, after = (x.float().mean((1, 2)) for x in (hidden, weighted))
        weighted *= torch.nan_to_num(before / after, 1.0, 1.0, 1.0)[:, None, None].to(hidden.dtype)
    return weighted
