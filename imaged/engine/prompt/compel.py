"""The dialect compel: its package's own arithmetic over our text encoders.

In that dialect a weight scales a token's difference from the empty text; a weight below 1 mixes in
the text in which the token is masked. The package is optional: we parse the text
(prompt/compel.py), it computes the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from imaged.errors import JobFailed
from imaged.prompt import Prompt
from imaged.prompt.compel import MAX_PASSES, Structure, windows
from imaged.prompt.embeddings import Embedding, Embeddings
from imaged.prompt.tokenizer import Tokenizer
from imaged.prompt.windows import WINDOW

LOST = ("couldn't find", "token sequence mismatch")  # how the package's own errors begin
GIVEN = 1 << 20  # ids from here on are vectors of textual inversions


def encode(
    prompt: Prompt, pairs: Sequence[tuple[Tokenizer, Any]], embeddings: Embeddings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Context (77 * windows, width), pooled (width,), and the context (77, width) of no text.

    Raises JobFailed without the package, for more than 64 passes, and for prompts that the package
    rejects.
    """
    try:
        from compel import Compel, ReturnedEmbeddingsType
    except ImportError as error:
        raise JobFailed(
            "dialect_unavailable", "the dialect compel needs its package: pip install compel"
        ) from error
    structure = prompt.structure
    contexts, empties, pooled = [], [], None
    for side, (tokenizer, encoder) in enumerate(pairs):
        words = _Words(tokenizer, embeddings)
        found = Compel(
            tokenizer=words,
            text_encoder=_Vectors(encoder, side, words, prompt.reading.skip),
            returned_embeddings_type=(
                ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
            ),
            truncate_long_prompts=False,
            device=encoder.device,
        )
        _bound(structure, words)
        try:
            context, _ = found.build_conditioning_tensor_for_conjunction(_as_compel(structure))
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith(LOST):
                raise  # the device's
            raise JobFailed("prompt_unreadable", "compel makes nothing of this prompt") from error
        contexts.append(context[0])
        empties.append(found.conditioning_provider.empty_z[0])
        pooled = found.conditioning_provider.get_pooled_embeddings([prompt.text])
    assert pooled is not None
    return torch.cat(contexts, dim=-1), pooled[0], torch.cat(empties, dim=-1)


def _bound(structure: Structure, words: _Words) -> None:
    passes = 0
    for part in structure.parts:
        tokens = words.convert_ids_to_tokens([n for text, _ in part.spans for n in words.ids(text)])
        passes += part.passes(len(windows(tokens, WINDOW)))
    if passes > MAX_PASSES:
        raise JobFailed(
            "prompt_too_long",
            f"the prompt in the dialect compel should take at most {MAX_PASSES} passes of the "
            f"text encoders, one for each window and each weight below 1 in it; it takes {passes}",
        )


def _as_compel(structure: Structure) -> Any:
    """The package's own objects."""
    from compel.prompt_parser import Blend, Conjunction, FlattenedPrompt

    prompts = [FlattenedPrompt(list(part.spans)) for part in structure.parts]
    weights = [part.weight for part in structure.parts]
    if structure.kind == "blend":
        return Conjunction([Blend(prompts, weights, structure.normalized)])
    return Conjunction(prompts, weights)


class _Words:
    """A tokenizer as the package calls one; textual inversions have ids of their own."""

    model_max_length = 77

    def __init__(self, tokenizer: Tokenizer, embeddings: Embeddings) -> None:
        self._tokenizer, self._embeddings = tokenizer, embeddings
        self.bos_token_id, self.eos_token_id = tokenizer.start, tokenizer.end
        self.pad_token_id = tokenizer.pad
        self.given: list[tuple[Embedding, int]] = []  # by id, from GIVEN on

    def ids(self, text: str) -> list[int]:
        found: list[int] = []
        for piece in self._embeddings.split(text):
            if isinstance(piece, str):
                found += self._tokenizer.ids(piece)
                continue
            for n in range(len(piece)):
                if (piece, n) not in self.given:
                    self.given.append((piece, n))
                found.append(GIVEN + self.given.index((piece, n)))
        return found

    def __call__(self, texts: Sequence[str], truncation: bool, **_: Any) -> dict[str, Any]:
        most = self.model_max_length - 2 if truncation else None
        whole = ([self.bos_token_id, *self.ids(t)[:most], self.eos_token_id] for t in texts)
        return {"input_ids": list(whole)}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return ["</w>" if id >= GIVEN else self._tokenizer.text(id) for id in ids]


class _Vectors:
    """A text encoder as the package calls one."""

    def __init__(self, encoder: Any, side: int, words: _Words, skip: int) -> None:
        self._encoder, self._side, self._words, self._skip = encoder, side, words, skip
        self.device, self.dtype = encoder.device, encoder.dtype

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **_: Any) -> Any:
        given = [
            (window, place, self._vector(int(ids[window, place])))
            for window, place in (ids >= GIVEN).nonzero().tolist()
        ]
        known = ids.masked_fill(ids >= GIVEN, 0)
        states, pooled = self._encoder(known, self._words.eos_token_id, given, self._skip, mask)
        return SimpleNamespace(hidden_states=(states, None), text_embeds=pooled)

    def _vector(self, id: int) -> torch.Tensor:
        embedding, n = self._words.given[id - GIVEN]
        vectors: torch.Tensor = embedding.sides[self._side][n]  # type: ignore[attr-defined]
        return vectors
