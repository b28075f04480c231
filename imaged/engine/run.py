"""One image under way. Between two UNet calls its whole state is (seed, call, history)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from imaged.engine.loading.lora import NO_LORAS, LoraSet
from imaged.engine.nets.cached_unet import Unet
from imaged.engine.plan import Plan
from imaged.engine.prompt.encode import Encoded


@dataclass(eq=False)
class Run:
    """One image of a job.

    key_id:   API key it belongs to.
    arrived:  monotonic seconds; served_s: seconds of the calls it took part in.
    history:  (K, C, h, w): first noise, model outputs, later noise; see sampling.tables.Table.
    """

    job_id: str
    plan: Plan
    #: Negative and positive, or positive alone at guidance 1; of each the encoded text by step.
    texts: tuple[Sequence[Encoded], ...]
    loras: LoraSet = NO_LORAS
    key_id: int = 0
    arrived: float = 0.0
    served_s: float = 0.0
    sample: int = 0  # its index among the job's images
    park_at: int | None = None  # after so many calls it parks; None: it goes to the end
    varied: bool = False  # resumed from a snapshot with another prompt or guidance
    float32_retry: bool = False  # restarted in float32
    retried_alone: bool = False  # after out of memory, with the device to itself
    call: int = 0  # UNet calls made
    drawn: int = 0  # fresh noises drawn
    history: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    generator: torch.Generator = field(default_factory=lambda: torch.Generator("cpu"))
    latent: torch.Tensor | None = None  # (C, h, w) once all calls are made, kept without a history

    def start(self, unet: Unet, shared: dict[int, torch.Tensor] | None = None) -> None:
        """Reset to the first call: seed, first noise, and the UNet inputs that do not change.

        shared: cross-attention keys and values by id of the text, for all images of the job.
        """
        table = self.plan.table
        self.call = self.drawn = 0
        self.retried_alone, self.latent = False, None
        self.rows_of_table = table.rows.to(unet.device)
        by_call = [[side[step] for step in self.plan.steps] for side in self.texts]
        times = [self._times_of(unet, side) for side in by_call]
        self._times = torch.stack(times, dim=1)  # (N, texts, E)
        made = {} if shared is None else shared
        for text_id, text in {id(text): text for side in by_call for text in side}.items():
            made[text_id] = unet.text(text) if text_id not in made else made[text_id]
        self._keys_values = [[made[id(text)] for text in side] for side in by_call]
        self.generator.manual_seed(self.plan.seed)
        self.history = torch.zeros(table.rows.shape[1], *self.plan.latent_shape, device=unet.device)
        self._draw(0)

    def _times_of(self, unet: Unet, texts: Sequence[Encoded]) -> torch.Tensor:
        """(N, E) time embeddings, with the pooled text of each call."""
        steps, ids = self.plan.table.timesteps, self.plan.time_ids
        of = {id(text): unet.times(steps, text, ids) for text in {id(t): t for t in texts}.values()}
        if len(of) == 1:
            return of[id(texts[0])]
        return torch.stack([of[id(text)][call] for call, text in enumerate(texts)])

    @property
    def keys_values(self) -> list[torch.Tensor]:
        """Cross-attention keys and values of each row's text at the next call."""
        return [side[self._next] for side in self._keys_values[-self.rows :]]

    @property
    def times(self) -> torch.Tensor:
        """(rows, E) time embedding of each row at the next call."""
        return self._times[self._next, -self.rows :]

    @property
    def _next(self) -> int:
        return min(self.call, self.plan.table.calls - 1)

    def _draw(self, column: int) -> None:
        """Draw noise into a column: on the CPU, in the reference's order, latents first, then by
        call.
        """
        noise = torch.randn(1, *self.plan.latent_shape, generator=self.generator)[0]
        if self.history.is_cuda:
            noise = noise.pin_memory()  # else the copy would wait for the device
        self.history[column].copy_(noise, non_blocking=True)

    @property
    def shape(self) -> Hashable:
        """Two images share a call only if these are equal."""
        return (*self.kind, self.loras)

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What batch invariance is verified for: all of `shape` but the weights of LoRAs."""
        context = self.texts[0][0].context.shape[0]
        return (self.plan.latent_shape, context, self.float32_retry, self.loras.files)

    @property
    def rows(self) -> int:
        """Rows in the next call: 2 with guidance, else 1."""
        return len(self.texts) if self.plan.guided_at(self._next) else 1

    @property
    def pixels(self) -> int:
        return self.plan.width * self.plan.height

    @property
    def calls_to_make(self) -> int:
        """UNet calls up to its end, or to where a draft rests."""
        return self.plan.table.calls if self.park_at is None else self.park_at

    @property
    def calls_left(self) -> int:
        return self.calls_to_make - self.call

    @property
    def done(self) -> bool:
        return self.calls_left == 0

    def combine(self) -> torch.Tensor:
        """(C, h, w): the table's next row times the history: the UNet's input, or the last
        latent.
        """
        return self._combined(self.call)

    def _combined(self, call: int) -> torch.Tensor:
        combined: torch.Tensor = torch.tensordot(self.rows_of_table[call], self.history, dims=1)
        return combined

    def advance(self, output: torch.Tensor) -> None:
        """Store one model output, and draw the noise that the sampler adds after this call."""
        table = self.plan.table
        self.history[1 + self.call] = output
        for _ in range(table.draws[self.call]):
            self._draw(1 + table.calls + self.drawn)
            self.drawn += 1
        self.call += 1
        self.retried_alone = False

    def finish(self, latent: torch.Tensor) -> None:
        """Keep the final latent alone."""
        self.latent, self.call = latent.to(self.history.device), self.plan.table.calls
        self.history = torch.empty(0)  # megabytes, while the job's other pictures are made

    @property
    def result(self) -> torch.Tensor:
        """(C, h, w): the final latent; of a draft, the estimate of it."""
        if self.latent is not None:
            return self.latent
        return self.estimate() if self.call < self.plan.table.calls else self.combine()

    def estimate(self) -> torch.Tensor:
        """(C, h, w): the clean latent that the last output implies.

        A table's rows give every sampler's input in the variance-preserving form
        x = signal * clean + noise * eps, so this asks nothing of the sampler.
        """
        last = self.call - 1
        x = self._combined(last)
        signal, noise = self.plan.levels(last)
        output: torch.Tensor = self.history[1 + last]
        if self.plan.prediction == "v_prediction":
            return signal * x - noise * output
        return (x - noise * output) / signal
