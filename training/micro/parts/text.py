"""The part `text`: text encoders, tokens in, embeddings out, on naming what a caption says.

From noise alone a UNet learns to look at its input first and at words late, some of them never.
Encoders that already tell sunset from dawn, and whose house from whose boat is red, give it a
reason to.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import click
import torch
import torch.nn.functional as F

from imaged.prompt.a1111 import spans
from imaged.prompt.windows import read_windows
from training.micro.architecture import (
    EOS,
    POOLED_WIDTH,
    TEXT_WIDTH,
    build_text_encoders,
    load_tokenizer,
)
from training.micro.parts.run import DEVICE, Options, Run, cosine, earlier
from training.micro.scenes.captions import PERSON, UNKNOWN, choose, noise, tell, vocabulary
from training.micro.scenes.scene import ATTRIBUTES, Scene, any_scene

SAYS = {"building": ("building", "walls")}  # phrases that say more than the attribute's own name


class Conditioner(torch.nn.Module):
    """Both text encoders; embeddings of tokens outside the vocabulary stay zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = build_text_encoders()
        self.tokenizer = load_tokenizer()
        known = {i for p in vocabulary() for i in self.tokens(p)}
        known |= {self.tokenizer.start, self.tokenizer.end}
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
        return self.tokenizer.ids(text)

    def windows(self, texts: list[str], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and weights (batch, count, 77), cut or filled up with empty windows."""
        read = [read_windows(spans(t), self.tokenizer) for t in texts]
        blank = read_windows(spans(""), self.tokenizer)
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
    """A conditioner and what asks it: does it know what each caption says, and where?

    Both contexts are asked at the token where a phrase ends, since that is where the UNet looks
    it up, and the pooled embedding for the figure, or that none is named. No token may tell of a
    phrase that it is no part of: what it says elsewhere, no weight could take back.
    Captions are of any scene, also of those of which training shows no picture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.text = Conditioner()
        self.kinds = [len(k) for k in ATTRIBUTES.values()]
        self.one = torch.nn.Linear(TEXT_WIDTH, sum(self.kinds))
        self.two = torch.nn.Linear(TEXT_WIDTH, sum(self.kinds))
        self.pooled = torch.nn.Linear(POOLED_WIDTH, len(ATTRIBUTES["figure"]) + 1)
        self.unknown = self.text.tokens(UNKNOWN)[0]

    def ask(
        self, rng: random.Random, batch: int, said: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropy and leakage over `batch` captions, and each attribute's share named right.

        The shares have one more, "leak": how much a phrase changes the context outside of itself,
        by variance.
        """
        scenes = [any_scene(rng) for _ in range(batch)]
        told = [choose(s, rng, said) for s in scenes]
        texts = [
            tell(s, t, rng, noise(rng, rng.choice((0, 0, 6, 12))))
            for s, t in zip(scenes, told, strict=True)
        ]
        ids, weights = self.text.windows(texts, 1)
        rows = ids[:, 0].tolist()
        context, pooled = self.text(ids.to(self.device), weights.to(self.device))
        losses: list[torch.Tensor] = []
        right: dict[str, list[torch.Tensor]] = {name: [] for name in ATTRIBUTES}

        def mark(name: str, logits: torch.Tensor, kinds: torch.Tensor) -> None:
            losses.append(F.cross_entropy(logits, kinds))
            right[name].append((logits.argmax(-1) == kinds).float())

        places = self._places(scenes, told, rows)
        for head, features in zip((self.one, self.two), context.chunk(2, -1), strict=True):
            parts = head(features).split(self.kinds, -1)
            for (name, spots), logits in zip(places.items(), parts, strict=True):
                if spots:
                    n, token, kind = torch.tensor(spots, device=self.device).T
                    mark(name, logits[n, token], kind)
        framed = [framing(s, t) for s, t in zip(scenes, told, strict=True)]
        mark("figure", self.pooled(pooled), torch.tensor(framed, device=self.device))
        leak = self._leak(rng, rows, told, weights, context, pooled)
        shares = {name: float(torch.cat(r).mean()) for name, r in right.items() if r}
        return torch.stack(losses).mean() + leak, {**shares, "leak": leak.item()}

    @property
    def device(self) -> torch.device:
        return self.one.weight.device

    def _leak(
        self,
        rng: random.Random,
        rows: list[list[int]],
        told: list[dict[str, str]],
        weights: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor,
    ) -> torch.Tensor:
        """How much one phrase of each caption changes the context of the other tokens."""
        without, outside = torch.tensor(rows), torch.ones(len(rows), 77, 1)
        same = torch.ones(len(rows), 1)
        for n, (row, phrases) in enumerate(zip(rows, told, strict=True)):
            name = rng.choice([*phrases, "person"])
            options = PERSON if name == "person" else [phrases[name]]
            spans = [span for p in options if (span := find(row, self.text.tokens(p)))]
            if spans:
                inside = slice(*max(spans, key=lambda span: span[1] - span[0]))
                without[n, inside], outside[n, inside] = self.unknown, 0
                same[n] = name not in ("person", "figure")
        with torch.no_grad():
            other, other_pooled = self.text(
                without[:, None].to(self.device), weights.to(self.device)
            )
        outside, same = outside.to(self.device), same.to(self.device)
        moved: torch.Tensor = ((context - other) * outside).square().mean() / other.var()
        moved += ((pooled - other_pooled) * same).square().mean() / other_pooled.var()
        return moved

    def _places(
        self, scenes: list[Scene], told: list[dict[str, str]], rows: list[list[int]]
    ) -> dict[str, list[tuple[int, int, int]]]:
        """For each attribute (caption, token where its phrase ends, kind)."""
        places: dict[str, list[tuple[int, int, int]]] = {name: [] for name in ATTRIBUTES}
        for n, (scene, phrases) in enumerate(zip(scenes, told, strict=True)):
            for phrase_of, phrase in phrases.items():
                span = find(rows[n], self.text.tokens(phrase))
                if span is None:
                    continue
                for name in SAYS.get(phrase_of, (phrase_of,)):
                    kind = ATTRIBUTES[name].index(getattr(scene, name))
                    places[name].append((n, span[1] - 1, kind))
        return places


def find(ids: list[int], phrase: list[int]) -> tuple[int, int] | None:
    """Where the phrase's tokens begin and end, or None if the window cuts it."""
    for end in range(len(phrase), len(ids) + 1):
        if ids[end - len(phrase) : end] == phrase:
            return end - len(phrase), end
    return None


def framing(scene: Scene, told: Mapping[str, str]) -> int:
    """The figure's kind, or one past the last if a figure's framing is not said.

    That nobody is named says that there is no figure.
    """
    kinds = ATTRIBUTES["figure"]
    return kinds.index(scene.figure) if "figure" in told or scene.figure == "none" else len(kinds)


@click.command()
@click.option("--steps", default=2000, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--save-every", default=500, show_default=True)
@click.pass_obj
def text(options: Options, steps: int, batch: int, save_every: int) -> None:
    """Train the text encoders to name what a caption says, before there is a UNet to ask them."""
    torch.manual_seed(4)
    reader = Reader().to(DEVICE)
    run = Run(options.work, "text", reader, reader.parameters(), steps, decay=0.99)
    rng = random.Random(4 + run.start)
    for step in run:
        loss, right = reader.ask(rng, batch, said=rng.choice((0.4, 0.7, 1.0)))
        leak = right.pop("leak")
        share = sum(right.values()) / len(right)
        row = {"right": round(share, 3), "leak": round(leak, 4)}
        run.update(step, loss, (cosine(step, steps, 2e-3),), **row)
        if run.due(step, save_every):
            run.save(step)
    with torch.inference_mode():
        _, right = reader.eval().ask(random.Random(5), 1000, said=1.0)
    click.echo(f"a phrase moves other tokens by {right.pop('leak'):.1%} of their variance")
    for name, share in right.items():
        click.echo(f"{name}: named right in {share:.1%} of new captions")


def learnt_text(work: Path) -> Conditioner:
    """The conditioner out of the trained reader."""
    weights = earlier(work, "text.pt", "text")["average"]
    conditioner = Conditioner().requires_grad_(False)
    conditioner.load_state_dict(
        {k.removeprefix("text."): v for k, v in weights.items() if k.startswith("text.")}
    )
    return conditioner
