"""A picture's bytes do not depend on its company.

Two hundred random crowds of mixed samplers, steps, sizes, guidance and prompts, half with one
thread and half with two, with jobs that join and leave between calls: every picture that comes out
is byte-equal to the same picture alone, as its final latent, for decoding is done one by one. At
sizes and steps below what the API offers: the bits of a row are a matter of its shape. Which calls
may be shared is a fact of the processor that the engine finds out (decision 13); where none may,
nothing is shared, and that has to be equal all the same.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.sides.models import SHAPES, Text
from imaged.catalogue.model import MICRO
from imaged.engine import engine as engine_module
from imaged.engine.decode import Picture
from imaged.engine.denoise import denoise
from imaged.engine.engine import Engine
from imaged.engine.loading.load import load
from imaged.engine.nets.cached_unet import Unet
from imaged.engine.nets.unet import UNetConfig, UNetModel
from imaged.engine.outcome import Outcome
from imaged.engine.prompt.encode import PromptEncoder
from imaged.engine.run import History, Run
from imaged.engine.scheduling import call_budget
from imaged.engine.scheduling.batching import Cost
from imaged.engine.scheduling.row_buckets import VerifiedBatchSizes, agrees
from imaged.params.image_params import ImageParams
from imaged.sampling.schedulers import SCHEDULERS

CPU = torch.device("cpu")
CROWDS = 100  # with each number of threads; in the fast tests a fifth of them
PROMPTS = (
    "a red house",
    "a [blue|red] boat by the sea, [dawn:noon:2]",
    "a woman, a green prairie " * 15,
)


def pool(count: int, side: int = 128) -> list[ImageParams]:
    """The jobs that crowds are made of; each is run alone once."""
    rng, other = random.Random(1), random.Random(3)
    return [
        ImageParams(
            rng.choice(PROMPTS),
            rng.choice((None, None, "trees")),
            samples=rng.choice((1, 1, 2)),
            scheduler=SCHEDULERS[n % len(SCHEDULERS)],
            num_inference_steps=rng.randint(2, 3),
            guidance_scale=rng.choice((1.0, 4.5, 7.0)),
            guidance_end=other.choice((1.0, 1.0, 0.5)),
            guidance_rescale=other.choice((0.0, 0.0, 0.7)),
            seed=rng.randrange(1000),
            img_width=rng.choice((side, side, side, side + 64)),
            img_height=side,
        )
        for n in range(count)
    ]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    yield from with_threads(request.param)


@pytest.fixture
def two_threads() -> Iterator[int]:
    yield from with_threads(2)


def with_threads(count: int) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def latent(_: Any, run: Run) -> Picture:
        return Picture(run.combine().cpu().numpy().tobytes(), 0, 0, run.plan.seed)

    monkeypatch.setattr("imaged.engine.decode.finished", latent)


class Sharing:
    """A cost at which all that can share a call does."""

    cost = Cost(1.0, 0.0)

    def add(self, work: float, seconds: float) -> None:
        pass


def engine_of(nets: Any) -> Engine:
    engine = Engine(nets)
    engine.device_time.cost_model = Sharing()  # type: ignore[assignment]
    return engine


def alone(engine: Engine, params: ImageParams) -> list[bytes]:
    engine.submit("alone", params)
    while not (outcomes := engine.tick()):
        pass
    return [p.rgb for p in outcomes[0].pictures]


def stack_texts(engine: Engine, jobs: list[ImageParams], rng: random.Random) -> dict[int, Outcome]:
    """Jobs join at random times, some leave again; the outcomes by place in the list."""
    waiting, outcomes = list(enumerate(jobs)), {}
    while waiting or not engine.idle:
        while waiting and (engine.idle or rng.random() < 0.5):
            n, params = waiting.pop(0)
            engine.submit(str(n), params, key_id=n % 3)
        if rng.random() < 0.05:
            engine.cancel(rng.choice(sorted(engine.jobs)))
        outcomes.update({int(o.job_id): o for o in engine.tick()})
    return outcomes


def differing(nets: Any, crowds: int, jobs: list[ImageParams]) -> tuple[int, int, int, bool]:
    """(pictures that differ from themselves alone, pictures compared, calls that were shared,
    whether the engine found a number of rows that may be).
    """
    engine, rng = engine_of(nets), random.Random(2)
    reference = [alone(engine, params) for params in jobs]
    shared, add = 0, engine.device_time.add

    def counted(images: Sequence[Run], work: int, began: Any) -> None:
        nonlocal shared
        shared += len(images) > 1
        add(images, work, began)

    engine.device_time.add = counted  # type: ignore[method-assign]
    different = compared = 0
    for _ in range(crowds):
        picked = [rng.randrange(len(jobs)) for _ in range(rng.randint(2, 3))]
        outcomes = stack_texts(engine, [jobs[n] for n in picked], rng)
        for place, outcome in outcomes.items():
            assert outcome.error is None
            for picture, bytes_alone in zip(
                outcome.pictures, reference[picked[place]], strict=True
            ):
                different += picture.rgb != bytes_alone
                compared += 1
    engine.close()
    return (
        different,
        compared,
        shared,
        any(any(found.values()) for found in engine.budget.batch_sizes.agree.values()),
    )


def check_all(nets: Any, crowds: int = CROWDS, jobs: int = 26) -> None:
    different, compared, shared, may = differing(nets, crowds, pool(jobs))
    assert different == 0 and compared > 2 * crowds
    assert shared > crowds or not may


@pytest.mark.parametrize(
    ("crowds", "jobs"), [(CROWDS // 5, 13), pytest.param(CROWDS, 26, marks=pytest.mark.slow)]
)
def test_every_picture_in_a_crowd_is_itself_alone(
    nets: Any, threads: int, crowds: int, jobs: int
) -> None:
    check_all(nets, crowds, jobs)


def in_bf16(nets: Any) -> Any:
    """As on a CPU that has it: all but the VAE. It has to hold on others too, where it is slow."""
    parts = ("unet", "text_encoder", "text_encoder_2")
    return replace(nets, **{part: copy.deepcopy(getattr(nets, part)).bfloat16() for part in parts})


@pytest.fixture(scope="module")
def wide() -> Any:
    """Random weights in the widths of the benchmarks' `wide`, under micro's texts."""
    nets = load(MICRO, CPU)
    texts = [
        Text(config.hidden_size, 1, 1, "gelu", config.projection_dim)
        for config in (nets.text_encoder.config, nets.text_encoder_2.config)
    ]
    config = UNetConfig.read(replace(SHAPES["wide"], texts=(texts[0], texts[1])).unet())
    torch.manual_seed(4)
    unet: Any = UNetModel(config).eval().requires_grad_(False)
    return replace(nets, unet=unet.to(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    ("threads", "net"),
    [
        (2, "micro"),
        pytest.param(1, "micro", marks=pytest.mark.slow),
        pytest.param(1, "wide", marks=pytest.mark.slow),
        pytest.param(2, "wide", marks=pytest.mark.slow),
    ],
    indirect=["threads"],
)
def test_so_it_is_in_bfloat16(
    nets: Any, wide: Any, threads: int, net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of one shape, for trials take many calls at this size; they are cut short, too."""
    monkeypatch.setattr("imaged.engine.scheduling.row_buckets.HALF_PRECISION_FACTOR", 8)
    jobs = [replace(job, prompt=PROMPTS[0], img_width=128) for job in pool(8)]
    held = in_bf16(nets if net == "micro" else wide)
    different, compared, shared, may = differing(held, 10, jobs)
    assert different == 0 and compared >= 20
    assert shared > 0 or not may


def uneven(nets: Any) -> Any:
    """Rows on second places come out otherwise, as from a product that sums its tail elsewhere."""

    def place(_: Any, rows: Any, out: torch.Tensor) -> torch.Tensor:
        out[1::2] = torch.nextafter(out[1::2], out[1::2] + 1)
        return out

    unet = copy.deepcopy(nets.unet)
    unet.conv_out.register_forward_hook(place)
    return replace(nets, unet=unet)


def test_where_the_places_of_a_pair_differ_only_guided_pictures_share(
    nets: Any, two_threads: int
) -> None:
    different, _, shared, may = differing(uneven(nets), 25, pool(8))
    assert different == 0
    assert shared > 0 or not may


def places_taken_for_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    allow = VerifiedBatchSizes.allow
    monkeypatch.setattr(VerifiedBatchSizes, "allow", lambda *given: allow(*given[:5]))


@pytest.mark.slow
def test_a_mutant_that_compares_no_places_is_seen(
    nets: Any, two_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    places_taken_for_equal(monkeypatch)
    different, _, shared, may = differing(uneven(nets), 25, pool(8))
    assert (different > 0 and shared > 0) or not may


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_every_picture_in_a_crowd_is_itself_alone_on_a_gpu() -> None:
    check_all(load(MICRO, torch.device("cuda")))


def test_sample_k_is_the_single_job_with_seed_plus_k(nets: Any) -> None:
    engine = engine_of(nets)
    four = replace(pool(1)[0], samples=4, seed=70)
    singles = [alone(engine, replace(four, samples=1, seed=70 + k)) for k in range(4)]
    assert [[rgb] for rgb in alone(engine, four)] == singles


def unpadded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_budget, "fit", lambda rows: rows)


def shared_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    one, begin = torch.Generator("cpu"), History.__init__

    def begun(history: History, *given: Any) -> None:
        begin(history, *given)
        one.set_state(history.generator.get_state())
        history.generator = one

    monkeypatch.setattr(History, "__init__", begun)


def wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(unet: Any, runs: Any, bucket: int) -> list[torch.Tensor]:
        return denoise(unet, runs, bucket)[::-1]

    monkeypatch.setattr(engine_module, "denoise", swapped)


def test_the_crowds_mix_context_lengths(nets: Any) -> None:
    encoder = PromptEncoder(nets)
    lengths = {len(encoder.pair(prompt, None)[0].context) for prompt in PROMPTS}
    assert lengths == {77, 154}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [unpadded, shared_generator, wrong_order])
def test_mutants_are_seen(
    nets: Any,
    two_threads: int,
    monkeypatch: pytest.MonkeyPatch,
    mutant: Callable[[pytest.MonkeyPatch], None],
) -> None:
    mutant(monkeypatch)
    different, _, shared, may = differing(nets, 12, pool(8))
    if not may:
        pytest.skip("no number of rows may be shared on this processor")
    assert shared > 0
    assert different > 0 or (mutant is unpadded and any_count_does(nets))


def any_count_does(nets: Any) -> bool:
    """Whether this processor gives a row the same bits with any number of rows, odd ones too."""
    unet, [text, _] = Unet(nets.unet), PromptEncoder(nets).pair(PROMPTS[0], None)
    times = unet.times(torch.tensor([500.0]), text, (128, 128, 0, 0, 128, 128))
    example = (torch.randn(4, 16, 16), times[0], unet.text(text))
    return all(agrees(unet, rows, example) for rows in (3, 5, 6, 7))


def test_without_grouping_by_context_a_mixed_call_is_impossible(
    nets: Any, two_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "shape", property(lambda run: run.plan.latent_shape))
    engine = engine_of(nets)
    for n, prompt in enumerate(PROMPTS[1:]):
        engine.submit(str(n), replace(pool(1)[0], prompt=prompt, guidance_scale=4.0))
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        while not engine.idle:
            engine.tick()
