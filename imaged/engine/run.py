"""One image under way. Between two UNet calls its whole state is (seed, call, history)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from imaged.engine.loading.lora import NO_LORAS, LoraSet
from imaged.engine.nets.cached_unet import Unet
from imaged.engine.plan import Plan
from imaged.engine.prompt.encode import Encoded


@dataclass(frozen=True)
class Conditioning:
    """The UNet's inputs beside the latents, known when an image starts.

    times:       (N, texts, E): time embeddings of each call, with the pooled text of that call.
    keys_values: of each text, by call: (T,) keys and values in every cross-attention.
    """

    times: torch.Tensor
    keys_values: list[list[torch.Tensor]]

    @classmethod
    def of(
        cls,
        plan: Plan,
        texts: Sequence[Sequence[Encoded]],
        unet: Unet,
        made: dict[int, torch.Tensor],
    ) -> Conditioning:
        """texts: by step. made: keys and values by id of the text, of those that have been made."""
        by_call = [[side[step] for step in plan.steps] for side in texts]
        times = [_times(plan, side, unet) for side in by_call]
        for text_id, text in {id(text): text for side in by_call for text in side}.items():
            made[text_id] = unet.text(text) if text_id not in made else made[text_id]
        keys_values = [[made[id(text)] for text in side] for side in by_call]
        return cls(torch.stack(times, dim=1), keys_values)

    def at(self, call: int, rows: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(rows, E) times, and of each row (T,) keys and values: the last texts, see Run.texts."""
        return self.times[call, -rows:], [text[call] for text in self.keys_values[-rows:]]


def _times(plan: Plan, texts: Sequence[Encoded], unet: Unet) -> torch.Tensor:
    """(N, E) time embeddings; texts: by call."""
    steps, ids = plan.table.timesteps, plan.time_ids
    of = {id(text): unet.times(steps, text, ids) for text in {id(t): t for t in texts}.values()}
    if len(of) == 1:
        return of[id(texts[0])]
    return torch.stack([of[id(text)][call] for call, text in enumerate(texts)])


class History:
    """What an image's sampler looks back on, all that its next input is made of.

    columns: (K, C, h, w): first noise, model outputs, later noise; see sampling.tables.Table.
    drawn:   later noises drawn so far, after the first; all on the CPU, in the reference's order.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.drawn = plan, 0
        self.rows_of_table = plan.table.rows.to(device)
        self.columns = torch.zeros(self.rows_of_table.shape[1], *plan.latent_shape, device=device)
        self.generator = torch.Generator("cpu").manual_seed(plan.seed)
        self._draw(0)

    def combine(self, call: int) -> torch.Tensor:
        """(C, h, w): a row of the table times the columns: a call's input; past the last call, the
        final latent.
        """
        combined: torch.Tensor = torch.tensordot(self.rows_of_table[call], self.columns, dims=1)
        return combined

    def add(self, call: int, output: torch.Tensor) -> None:
        """Store one model output, and draw the noise that the sampler adds after this call."""
        table = self.plan.table
        self.columns[1 + call] = output
        for _ in range(table.draws[call]):
            self._draw(1 + table.calls + self.drawn)
            self.drawn += 1

    def estimate(self, call: int) -> torch.Tensor:
        """(C, h, w): the clean latent that this call's output implies.

        A table's rows give every sampler's input in the variance-preserving form
        x = signal * clean + noise * eps, so this asks nothing of the sampler.
        """
        x = self.combine(call)
        signal, noise = self.plan.levels(call)
        output: torch.Tensor = self.columns[1 + call]
        if self.plan.prediction == "v_prediction":
            return signal * x - noise * output
        return (x - noise * output) / signal

    def _draw(self, column: int) -> None:
        noise = torch.randn(1, *self.plan.latent_shape, generator=self.generator)[0]
        if self.columns.is_cuda:
            noise = noise.pin_memory()  # else the copy would wait for the device
        self.columns[column].copy_(noise, non_blocking=True)


@dataclass(eq=False)
class Run:
    """One image of a job.

    key_id:   API key it belongs to.
    arrived:  monotonic seconds; served_s: seconds of the calls it took part in.
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
    conditioning: Conditioning = field(init=False, repr=False)
    history: History = field(init=False, repr=False)
    latent: torch.Tensor | None = None  # (C, h, w): the final one, set by `finish`

    def start(self, unet: Unet, shared: dict[int, torch.Tensor] | None = None) -> None:
        """Reset to the first call.

        shared: cross-attention keys and values by id of the text, for all images of the job.
        """
        self.call, self.retried_alone, self.latent = 0, False, None
        made = {} if shared is None else shared
        self.conditioning = Conditioning.of(self.plan, self.texts, unet, made)
        self.history = History(self.plan, unet.device)

    @property
    def row_conditioning(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(rows, E) times, and of each row (T,) keys and values, at the next call."""
        return self.conditioning.at(self._next, self.rows)

    @property
    def example(self) -> tuple[torch.Tensor, ...]:
        """What a row of its calls is like: x (C, h, w), times (E,) and texts (T,)."""
        times, texts = self.row_conditioning
        return self.history.columns[0], times[-1], texts[-1]

    @property
    def _next(self) -> int:
        return min(self.call, self.plan.table.calls - 1)

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
        """(C, h, w): the UNet's next input, or the final latent."""
        return self.history.combine(self.call)

    def advance(self, output: torch.Tensor) -> None:
        """Take in the output of one UNet call."""
        self.history.add(self.call, output)
        self.call += 1
        self.retried_alone = False

    def finish(self, latent: torch.Tensor) -> None:
        """Keep the final latent alone."""
        self.latent, self.call = latent.to(self.history.rows_of_table.device), self.plan.table.calls
        self.history.columns = torch.empty(0)  # megabytes, while the job's other pictures are made

    @property
    def result(self) -> torch.Tensor:
        """(C, h, w): the final latent; before all calls are made, the estimate of it."""
        if self.latent is not None:
            return self.latent
        if self.call < self.plan.table.calls:
            return self.history.estimate(self.call - 1)
        return self.combine()
