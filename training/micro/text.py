"""The text encoders in training: tokens in, embeddings out, and naming what a caption says.

From noise alone a UNet learns to look at its input first and at words late, some of them never.
Encoders that already tell sunset from dawn, and whose house from whose boat is red, give it a
reason to.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from imaged.engine.prompt.tokens import read_windows
from training.micro.architecture import (
    EOS,
    POOLED_WIDTH,
    TEXT_WIDTH,
    build_text_encoders,
    load_tokenizer,
)
from training.micro.captions import choose, noise, tell, vocabulary
from training.micro.scenes import ATTRIBUTES, Scene, any_scene

WIDE = ("time", "mountains", "ground", "figure")  # what changes the whole picture
SAYS = {"building": ("building", "walls")}  # phrases that say more than the attribute's own name


class Conditioner(torch.nn.Module):
    """Both text encoders; embeddings of tokens outside the vocabulary stay zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = build_text_encoders()
        self.tokenizer = load_tokenizer()
        known = {i for p in vocabulary() for i in self.tokenizer(p).input_ids}
        mask = torch.zeros(49408, 1)
        mask[sorted(known)] = 1
        for encoder in (self.one, self.two):
            table = encoder.get_input_embeddings().weight
            torch.nn.init.normal_(table, std=0.5)
            with torch.no_grad():
                table *= mask
            table.register_hook(lambda grad: grad * mask.to(grad.device))

    def tokens(self, text: str) -> list[int]:
        """A text's token ids, without start and end."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def windows(self, texts: list[str], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and weights (batch, count, 77), cut or filled up with empty windows."""
        read = [read_windows(t, self.tokenizer) for t in texts]
        blank = read_windows("", self.tokenizer)
        ids = torch.tensor([(*w.ids, *blank.ids * count)[:count] for w in read])
        weights = torch.tensor([(*w.weights, *blank.weights * count)[:count] for w in read])
        return ids, weights

    def forward(
        self, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, windows, 77) -> context (batch, 77 * windows, 64), pooled (batch, 64)."""
        batch, count, _ = ids.shape
        one = self.one(ids.flatten(0, 1), output_hidden_states=True)
        two_ids = torch.where((ids == EOS) & (ids.roll(1, 2) == EOS), 0, ids)  # padded with "!"
        two = self.two(two_ids.flatten(0, 1), output_hidden_states=True)
        context = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        context = context.view(batch, count * 77, -1) * weights.view(batch, -1, 1)
        return context, two.text_embeds.view(batch, count, -1)[:, 0]


class Reader(torch.nn.Module):
    """A conditioner and what asks it: does it know what each caption says?

    Both contexts are asked at the token where a phrase ends, since that is where the UNet looks
    it up, and the pooled embedding for what changes the whole picture, or that it is not said.
    Captions are of any scene, also of those of which training shows no picture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.text = Conditioner()
        self.kinds = [len(k) + 1 for k in ATTRIBUTES.values()]
        self.one = torch.nn.Linear(TEXT_WIDTH, sum(self.kinds))
        self.two = torch.nn.Linear(TEXT_WIDTH, sum(self.kinds))
        self.pooled = torch.nn.Linear(POOLED_WIDTH, sum(self.kinds))

    def ask(
        self, rng: random.Random, batch: int, said: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean cross entropy over `batch` captions, and each attribute's share named right."""
        scenes = [any_scene(rng) for _ in range(batch)]
        told = [choose(s, rng, said) for s in scenes]
        texts = [
            tell(s, t, rng, noise(rng, rng.choice((0, 0, 6, 12))))
            for s, t in zip(scenes, told, strict=True)
        ]
        device = self.one.weight.device
        ids, weights = self.text.windows(texts, 1)
        context, pooled = self.text(ids.to(device), weights.to(device))
        losses: list[torch.Tensor] = []
        right: dict[str, list[torch.Tensor]] = {name: [] for name in ATTRIBUTES}

        def mark(name: str, logits: torch.Tensor, kinds: torch.Tensor) -> None:
            losses.append(F.cross_entropy(logits, kinds))
            right[name].append((logits.argmax(-1) == kinds).float())

        places = self._places(scenes, told, ids[:, 0].tolist())
        for head, features in zip((self.one, self.two), context.chunk(2, -1), strict=True):
            parts = head(features).split(self.kinds, -1)
            for (name, spots), logits in zip(places.items(), parts, strict=True):
                if spots:
                    n, token, kind = torch.tensor(spots, device=device).T
                    mark(name, logits[n, token], kind)
        answers = dict(zip(ATTRIBUTES, self.pooled(pooled).split(self.kinds, -1), strict=True))
        for name in WIDE:
            kinds = [said_kind(s, t, name) for s, t in zip(scenes, told, strict=True)]
            mark(name, answers[name], torch.tensor(kinds, device=device))
        shares = {name: float(torch.cat(r).mean()) for name, r in right.items() if r}
        return torch.stack(losses).mean(), shares

    def _places(
        self, scenes: list[Scene], told: list[dict[str, str]], rows: list[list[int]]
    ) -> dict[str, list[tuple[int, int, int]]]:
        """For each attribute (caption, token where its phrase ends, kind)."""
        places: dict[str, list[tuple[int, int, int]]] = {name: [] for name in ATTRIBUTES}
        for n, (scene, phrases) in enumerate(zip(scenes, told, strict=True)):
            for phrase_of, phrase in phrases.items():
                token = last_token(rows[n], self.text.tokens(phrase))
                if token is None:
                    continue
                for name in SAYS.get(phrase_of, (phrase_of,)):
                    places[name].append((n, token, ATTRIBUTES[name].index(getattr(scene, name))))
        return places


def last_token(ids: list[int], phrase: list[int]) -> int | None:
    """Where the phrase's last token stands, or None if the window cuts it."""
    for end in range(len(phrase), len(ids) + 1):
        if ids[end - len(phrase) : end] == phrase:
            return end - 1
    return None


def said_kind(scene: Scene, told: Mapping[str, str], name: str) -> int:
    """The kind that the caption names, or one past the last if it names none.

    Asked for what is said and for nothing else, the encoders have no reason to guess one
    attribute from another. That nobody is named says that there is no figure.
    """
    if name in told or (name == "figure" and scene.figure == "none"):
        return ATTRIBUTES[name].index(getattr(scene, name))
    return len(ATTRIBUTES[name])
