"""One picture under way. Its whole state between two calls is (seed, call, history)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from imaged.engine.lora import NONE, Adapted
from imaged.engine.plan import Plan
from imaged.engine.prompt.encode import Encoded
from imaged.engine.unet import Unet


@dataclass(eq=False)
class Run:
    """One picture of a job. `key` is whose it is; `arrived` and `served_s` are seconds.

    history: (K, C, h, w), columns as in samplers.Table.
    """

    job_id: str
    plan: Plan
    #: Negative and positive, or positive alone at guidance 1; of each what it says step by step.
    texts: tuple[Sequence[Encoded], ...]
    loras: Adapted = NONE
    key: int = 0
    arrived: float = 0.0
    served_s: float = 0.0
    sample: int = 0  # which of its job's pictures it is
    rest_at: int | None = None  # the call before which it is parked; None: it goes to the end
    varied: bool = False  # goes on from a state as another request
    precise: bool = False  # the second try, in float32
    squeezed: bool = False  # what it does now did not fit beside others
    call: int = 0
    drawn: int = 0
    history: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    generator: torch.Generator = field(default_factory=lambda: torch.Generator("cpu"))
    latent: torch.Tensor | None = None  # (C, h, w) once all calls are made, kept without a history

    def start(self, unet: Unet, kept: dict[int, torch.Tensor] | None = None) -> None:
        """From the beginning: seed, first noise, and what of the UNet's inputs stays the same.

        `kept`: what the UNet keeps of the job's texts, by their ids; other pictures have made it.
        """
        table = self.plan.table
        self.call = self.drawn = 0
        self.squeezed, self.latent = False, None
        self.rows_of_table = table.rows.to(unet.device)
        by_call = [[side[step] for step in self.plan.steps] for side in self.texts]
        times = [self._times_of(unet, side) for side in by_call]
        self._times = torch.stack(times, dim=1)  # (N, texts, E)
        kept = {} if kept is None else kept
        for key, text in {id(text): text for side in by_call for text in side}.items():
            kept[key] = unet.text(text) if key not in kept else kept[key]
        self._kept = [[kept[id(text)] for text in side] for side in by_call]
        self.generator.manual_seed(self.plan.seed)
        self.history = torch.zeros(table.rows.shape[1], *self.plan.latent_shape, device=unet.device)
        self._draw(0)

    def _times_of(self, unet: Unet, texts: Sequence[Encoded]) -> torch.Tensor:
        """(N, E) for the text of each call."""
        steps, ids = self.plan.table.timesteps, self.plan.time_ids
        of = {id(text): unet.times(steps, text, ids) for text in {id(t): t for t in texts}.values()}
        if len(of) == 1:
            return of[id(texts[0])]
        return torch.stack([of[id(text)][call] for call, text in enumerate(texts)])

    @property
    def kept(self) -> list[torch.Tensor]:
        """What the UNet keeps of each row's text, at the next call."""
        return [side[self._next] for side in self._kept[-self.rows :]]

    @property
    def times(self) -> torch.Tensor:
        """(rows, E) what the residual blocks add to each row at the next call."""
        return self._times[self._next, -self.rows :]

    @property
    def _next(self) -> int:
        return min(self.call, self.plan.table.calls - 1)

    def _draw(self, column: int) -> None:
        """Noise, on the CPU in the order of the reference: latents first, then call by call."""
        noise = torch.randn(1, *self.plan.latent_shape, generator=self.generator)[0]
        if self.history.is_cuda:
            noise = noise.pin_memory()  # else the copy would wait for the device
        self.history[column].copy_(noise, non_blocking=True)

    @property
    def shape(self) -> Hashable:
        """What must agree for two pictures to share a call."""
        return (*self.kind, self.loras)

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What the bits of a call may depend on beside its rows: a LoRA's weight is not of it."""
        context = self.texts[0][0].context.shape[0]
        return (self.plan.latent_shape, context, self.precise, self.loras.files)

    @property
    def rows(self) -> int:
        """Of the next call: where guidance does not work, the prompted one alone."""
        return len(self.texts) if self.plan.guided_at(self._next) else 1

    @property
    def pixels(self) -> int:
        return self.plan.width * self.plan.height

    @property
    def last(self) -> int:
        """UNet calls to its end, or to where it rests."""
        return self.plan.table.calls if self.rest_at is None else self.rest_at

    @property
    def calls_left(self) -> int:
        return self.last - self.call

    @property
    def done(self) -> bool:
        return self.calls_left == 0

    def combine(self) -> torch.Tensor:
        """The table's next row over the history: the UNet's input, or at the end the latent."""
        return self._combined(self.call)

    def _combined(self, call: int) -> torch.Tensor:
        combined: torch.Tensor = torch.tensordot(self.rows_of_table[call], self.history, dims=1)
        return combined

    def advance(self, output: torch.Tensor) -> None:
        """Take in one model output, and draw what the sampler draws after this call."""
        table = self.plan.table
        self.history[1 + self.call] = output
        for _ in range(table.draws[self.call]):
            self._draw(1 + table.calls + self.drawn)
            self.drawn += 1
        self.call += 1
        self.squeezed = False

    def finish(self, latent: torch.Tensor) -> None:
        """All calls are made, and nothing is needed any more but their result."""
        self.latent, self.call = latent.to(self.history.device), self.plan.table.calls
        self.history = torch.empty(0)  # megabytes, while the job's other pictures are made

    @property
    def result(self) -> torch.Tensor:
        """(C, h, w): the final latent; of one that rests before, the clean one as it is seen."""
        if self.latent is not None:
            return self.latent
        return self.estimate() if self.call < self.plan.table.calls else self.combine()

    def estimate(self) -> torch.Tensor:
        """(C, h, w): the clean latent as the last output has it.

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
