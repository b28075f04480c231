"""The benchmarks' arithmetic and documents, and one run of the code that a GPU would run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bench import app, figures, report
from bench.app import COMMANDS, main
from bench.code import Code, Tree
from bench.figures import Figures, Row
from bench.gpu.steps import flops
from bench.rounds import (
    Pair,
    Spread,
    against_targets,
    compare,
    order,
    percentile,
    seconds_each,
    verdict,
)
from bench.sides import policies
from bench.sides.models import SHAPES
from bench.sides.policies import Arrival, at_once, batches, one_at_a_time
from imaged.engine.engine import Engine
from imaged.engine.outcome import Outcome
from imaged.params.image_params import ImageParams

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results go into a folder of the test's own."""
    monkeypatch.setattr(app, "BUILD", tmp_path / "bench")
    return tmp_path / "bench"


def drifting() -> tuple[Any, Any]:
    """Two sides of the same speed on a machine that slows down by one with every measurement."""
    clock = iter(range(10, 1000))
    return (lambda _: float(next(clock))), (lambda _: float(next(clock)))


def test_sides_take_turns() -> None:
    seen: list[str] = []
    pair = compare(
        lambda n: seen.append(f"A{n}") or 1.0,  # type: ignore[func-returns-value]
        lambda n: seen.append(f"B{n}") or 2.0,  # type: ignore[func-returns-value]
        rounds=4,
    )
    assert seen == ["A0", "B0", "B1", "A1", "A2", "B2", "B3", "A3"]
    assert pair == Pair((1.0,) * 4, (2.0,) * 4)


def test_a_drift_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(compare(*drifting(), rounds=6).ratio("lower")) == "undecided"
    monkeypatch.setattr("bench.rounds.order", lambda rounds: ["AB"] * rounds)
    assert verdict(compare(*drifting(), rounds=6).ratio("lower")) == "win"  # the mutant is seen


def test_ratios_are_formed_round_by_round() -> None:
    pair = Pair(ours=(1.0, 2.0, 4.0), peer=(3.0, 4.0, 4.0))
    assert pair.ratio("lower") == Spread.of([3.0, 2.0, 1.0])
    assert pair.ratio("higher") == Spread.of([1 / 3, 0.5, 1.0])
    assert order(3) == ["AB", "BA", "AB"]


def test_spreads() -> None:
    """Of nine figures the quartiles are the third from below and the third from above."""
    assert Spread.of([5, 1, 9, 3, 7, 2, 8, 4, 6]) == Spread(5, 1, 9, lower=3, upper=7)
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(3, 1, 5, lower=2, upper=4)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("low", "median", "high", "word", "target"),
    [
        (1.01, 1.6, 2.0, "win", "met"),
        (1.0, 1.2, 2.0, "undecided", "missed"),
        (0.5, 0.9, 1.0, "undecided", "missed"),
        (0.5, 0.9, 0.99, "loss", "missed"),
    ],
)
def test_verdicts(low: float, median: float, high: float, word: str, target: str) -> None:
    ratio = Spread.of([low, median, high])
    assert (verdict(ratio), against_targets(ratio, 1.5)) == (word, f"target {target}")


@pytest.mark.parametrize(
    ("rounds", "reached"),
    [
        ([0.7, 0.8, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3, 1.3], "median met, quartile met"),
        ([0.7, 0.8, 0.9, 1.1, 1.1, 1.2, 1.2, 1.3, 1.3], "median met, quartile missed"),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.2, 1.2, 1.3, 1.3], "median missed, quartile met"),
    ],
)
def test_a_quartile_has_a_target_of_its_own(rounds: list[float], reached: str) -> None:
    pair = Pair(tuple(1 / ratio for ratio in rounds), (1.0,) * 9)
    cells = Row.of("thin: one", "s", "lower", "peer", pair, 1.1, 1.0).cells()
    assert cells[-2] == ">= 1.1x, quartile >= 1x"
    assert cells[-1].endswith(f", {reached}") and cells[-1].startswith("undecided") == (
        min(rounds) <= 1
    )


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(n) for n in range(1, 21)]
    assert percentile(values[::-1], 0.95) == 19.0
    assert percentile(values[:3], 0.95) == 3.0
    assert percentile([7.0], 0.95) == 7.0


def test_something_is_always_measured() -> None:
    made: list[int] = []
    assert seconds_each(lambda: made.append(1), least_s=0.0) > 0
    assert made == [1]


def jobs(count: int) -> list[Arrival]:
    return [Arrival(float(n), ImageParams("a lake", seed=n)) for n in range(count)]


def test_policies() -> None:
    assert at_once(jobs(3), 0.0, running=5) == 3
    assert [one_at_a_time(jobs(n), 9.0, r) for n, r in ((3, 0), (3, 1), (0, 0))] == [1, 0, 0]
    static = batches(most=2, timer_s=5.0)
    assert static(jobs(3), 0.0, 0) == 2
    assert static(jobs(3), 9.0, 1) == 0
    assert static(jobs(1), 4.9, 0) == 0
    assert static(jobs(1), 5.0, 0) == 1


def test_traces_repeat_and_mix_evenly() -> None:
    kinds = [ImageParams("a lake", num_inference_steps=n, seed=n) for n in (10, 20)]
    one, same, other = (policies.trace(400, 2.0, seed, kinds) for seed in (1, 1, 2))
    assert one == same != other
    assert sum(a.params == kinds[0] for a in one) == 200
    assert 150 < one[-1].at < 250  # 400 jobs at two a second


class Watched(Engine):
    """The engine, with how many jobs it held at each tick."""

    def __init__(self, nets: Any) -> None:
        super().__init__(nets)
        self.held: list[int] = [0]

    def submit(self, *args: Any, **kwargs: Any) -> None:
        self.held[-1] += 1
        super().submit(*args, **kwargs)

    def tick(self) -> list[Outcome]:
        outcomes = super().tick()
        self.held.append(self.held[-1] - len(outcomes))
        return outcomes


@pytest.mark.parametrize(("policy", "most"), [(at_once, 3), (one_at_a_time, 1)])
def test_a_trace_is_played_by_its_rule(nets: Any, policy: policies.Policy, most: int) -> None:
    given = ImageParams("a lake", scheduler="Euler", num_inference_steps=2, seed=1)
    small = replace(given, img_width=64, img_height=64)
    engine = Watched(nets)
    ran = policies.run(engine, [Arrival(0.0, small)] * 3, policy)
    assert max(engine.held) == most and engine.idle
    assert len(ran.waits) == 3 and ran.rate > 0
    if policy is one_at_a_time:
        assert ran.waits[0] < ran.waits[1] < ran.waits[2]


def sample() -> Figures:
    row = Row.of("thin: one", "s", "lower", "peer", Pair((1.0, 2.0), (4.0, 4.0)), target=2.0)
    bound = Row("a step", "ms", ours=Spread.of([20, 19, 21]), limit=24.0)
    missing = Row("thin: many", peer_name="server-async", note="no clone")
    points: list[dict[str, Any]] = [
        {"model": "thin", "load": load, "who": who, "rate": 1.0, "p95": 2.0, "short_p95": 1.0}
        for load in (0.3, 0.7)
        for who in ("imaged", "one at a time")
    ]
    machine, limits = {"device": "a device", "threads": "2"}, {"copy, GB/s": 12.0}
    agreed = {"ours and the peer's": 0.01}
    return Figures(
        "single",
        "python -m bench single",
        False,
        5,
        Tree().code("single"),
        "2026-01-01 00:00 UTC",
        machine,
        limits,
        agreed,
        [row, bound, missing],
        points,
    )


def documents() -> str:
    return "".join(path.read_text() for path in report.DOCUMENTS)


DOCUMENT = """# T
<!-- figures: single -->
old
<!-- end -->
kept
<!-- figures: gpu-1 -->
<!-- end -->
"""


def test_report_fills_the_places_and_nothing_else(build: Path, tmp_path: Path) -> None:
    sample().write()
    read = Figures.read("single")
    assert read is not None and json.loads((build / "single.json").read_text())
    text = report.fill(DOCUMENT, {"single": read}, tmp_path, Tree())
    assert text == report.fill(text, {"single": read}, tmp_path, Tree())  # and so again
    assert text == report.fill(text, {}, tmp_path, Tree())  # without new figures it keeps its own
    assert "old" not in text and "\nkept\n" in text
    first = "| thin: one | s | 1.50 (1.00 to 2.00) | peer | 4.00 | 3.00 (2.00 to 4.00)x "
    assert f"{first}| 2.50 to 3.50 | >= 2x | win, target met |" in text
    assert "| a step | ms | 20.0 (19.0 to 21.0) |  |  |  |  | <= 24 | target met |" in text
    assert "| thin: many |  | not measured | server-async |  |  |  |  | no clone |" in text
    assert text.count(report.NOT_MEASURED) == 1  # the GPU's
    assert (tmp_path / "pictures" / "load.png").stat().st_size > 5000


@pytest.mark.parametrize(("quick", "rounds"), [(True, 5), (False, 4), (False, 8)])
def test_figures_of_few_rounds_never_enter_the_document(
    tmp_path: Path, quick: bool, rounds: int
) -> None:
    row = replace(sample().rows[0], quartile=1.0 if rounds > 4 else None)
    figures = replace(sample(), quick=quick, rounds=rounds, rows=[row])
    text = report.fill(DOCUMENT, {"single": figures}, tmp_path, Tree())
    assert "\nold\n" in text and not list(tmp_path.rglob("*.png"))
    assert report.counts(replace(figures, quick=False, rounds=9))


def test_old_figures_never_replace_current_ones(tmp_path: Path) -> None:
    """As of a build folder that lay about while somebody else measured anew."""
    old = replace(sample(), code=Code("0" * 12, "1" * 12), measured_at="long ago")
    before = report.fill(DOCUMENT, {"single": sample()}, tmp_path, Tree())
    assert report.fill(before, {"single": old}, tmp_path, Tree()) == before
    first = report.fill(DOCUMENT, {"single": old}, tmp_path, Tree())
    assert "long ago" in first  # better than none, and it is said


def test_the_document_has_a_place_for_every_benchmark() -> None:
    named = {place.name for place in report.places(documents())}
    parts = {f"gpu-{n}" for n in (0, 1, 3, 4, 5, 6, 7)}
    cpu = {"single", "crowd", "waiting", "start", "exact", "savings", "polls", "full", "recovery"}
    cpu |= {"bf16"}
    assert named == cpu | parts


def test_commands_of_the_document_exist() -> None:
    page = (ROOT / "docs" / "prompts-and-schedulers.md").read_text()  # has a picture of it
    named = set(re.findall(r"python -m bench (\w+)", documents() + page))
    assert named == set(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_teaches(command: str) -> None:
    words = [command, "--help"] if command else ["--help"]
    shown = CliRunner().invoke(main, words)
    assert shown.exit_code == 0
    assert "Usage: " in shown.output and len(shown.output) > 200


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, build: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    shown = CliRunner().invoke(main, ["gpu"])
    assert shown.exit_code == 0 and "no GPU here: not measured" in shown.output
    assert not build.exists()


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small(build: Path) -> None:
    words = ["gpu", "--small", "--threads", str(torch.get_num_threads())]
    shown = CliRunner().invoke(main, [*words, "--only", "0", "--only", "2", "--only", "7"])
    assert shown.exit_code == 0, shown.output
    steps = Figures.read("gpu-1")
    assert steps is not None and steps.quick
    assert steps.agreement["ours and the peer's"] < 1.0 < steps.agreement["ours and another seed's"]
    assert [row.peer_name for row in steps.rows[1:3]] == ["diffusers", "diffusers, halves apart"]
    assert Figures.read("gpu-0") is not None and Figures.read("gpu-7") is not None


def test_full_is_sdxl() -> None:
    """Its UNet has SDXL's number of parameters, and the FLOP counted by hand for 1024 px."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES["full"].unet())
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    step = flops(SimpleNamespace(unet=unet, vae_scale_factor=8), 1024)
    assert step == pytest.approx(13.52e12, rel=1e-3)


def test_pictures_that_differ_are_not_compared() -> None:
    import io

    from click import ClickException
    from PIL import Image

    from bench.sides.agree import agreement

    def flat(level: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (level,) * 3).save(buffer, "PNG")
        return buffer.getvalue()

    assert agreement(flat(100), flat(101), flat(200))["ours and another seed's"] == 100.0
    with pytest.raises(ClickException, match="do not agree"):
        agreement(flat(100), flat(102), flat(200))
    with pytest.raises(ClickException, match="do not agree"):
        agreement(flat(100), flat(100), flat(102))  # another seed could not be told from it


def test_cells_say_what_is_missing() -> None:
    assert figures.plain_table([figures.COLUMNS, sample().rows[2].cells()])[1].startswith(
        "thin: many  not measured  server-async"
    )
