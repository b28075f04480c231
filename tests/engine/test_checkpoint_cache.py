"""Several checkpoints on one worker: the real loop and store, copies of the real checkpoint."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imaged.catalogue.model import DEFAULT_SLUG, MICRO, Model, Weights
from imaged.engine.engine import Engine
from imaged.engine.loading.load import load, size, with_dtypes
from imaged.engine.outcome import Outcome
from imaged.jobs import State
from imaged.store.jobs import load_failures, model_demand, queue
from imaged.worker import checkpoint_cache, crash_loops, loop
from imaged.worker.jobs import claiming
from imaged.worker.loop import tick
from tests.engine.test_worker import SMALL as OF_TWENTY_STEPS
from tests.engine.test_worker import Bench, working

CPU = torch.device("cpu")
MICRO_GB = size(Weights(MICRO), CPU) / 1e9
SMALL = replace(OF_TWENTY_STEPS, num_inference_steps=6)
LONG = replace(SMALL, num_inference_steps=12)
IN_BF16 = "cpu bfloat16 and float32"  # of a receipt


def copies(folder: Path, *slugs: str) -> list[Model]:
    """Models of their own, which happen to have the shipped weights."""
    return [
        Model(slug, slug, Weights(Path(shutil.copytree(MICRO, folder / "models" / slug))))
        for slug in slugs
    ]


def states(bench: Bench) -> dict[str, str]:
    offered = bench.worker.claims.offered
    return {slug: bench.worker.checkpoints.state(model.weights) for slug, model in offered.items()}


def told(bench: Bench) -> Mapping[str, str]:
    """What the store has heard of it."""
    with bench.db.read() as c:
        return model_demand.states(c, time.time() - 5)


def done(bench: Bench, job_id: str) -> bool:
    return bench.job(job_id).state is State.COMPLETED


def pixels(bench: Bench, job_id: str) -> bytes:
    """Of its picture; the receipt in its file names the checkpoint."""
    result = bench.job(job_id).result
    assert result is not None
    with Image.open(bench.files / job_id[:2] / result["images"][0]["name"]) as image:
        return image.convert("RGB").tobytes()


def test_the_size_is_known_before_loading() -> None:
    measured, held = size(Weights(MICRO), CPU), load(MICRO, CPU).nbytes
    assert held <= measured < 1.3 * held
    assert size(Weights(MICRO, dtype="bf16"), CPU) * 2 == measured


def test_two_checkpoints_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither's pictures change by the other's company, and both are under way at once."""
    [other] = copies(tmp_path, "other")
    seen: list[dict[str, str]] = []
    with working(tmp_path, other, memory_gb=3 * MICRO_GB) as bench:

        def noted(engines: Iterable[Engine]) -> list[Outcome]:
            seen.append(states(bench))
            return tick(engines)

        monkeypatch.setattr(loop, "tick", noted)
        alone, there = bench.put(SMALL), bench.put(SMALL, model="other")
        bench.wait(lambda: done(bench, alone) and done(bench, there))
        first, second = bench.put(LONG), bench.put(LONG, model="other")
        third = bench.put(SMALL, model="other")
        bench.wait(lambda: all(done(bench, j) for j in (first, second, third)))
        assert any(found[DEFAULT_SLUG] == found["other"] == "BUSY" for found in seen)
        assert pixels(bench, first) == pixels(bench, second)
        assert pixels(bench, third) == pixels(bench, alone)
        result = bench.job(second).result
        assert result is not None and result["checkpoint"] == "other"
        bench.wait(lambda: "BUSY" not in states(bench).values())
        assert states(bench)["other"] == "READY"
        bench.wait(lambda: told(bench).get("other") == "READY")


def test_without_room_for_both_they_take_turns(tmp_path: Path) -> None:
    [other] = copies(tmp_path, "other")
    with working(tmp_path, other, memory_gb=1.5 * MICRO_GB, patience_s=0.1) as bench:
        jobs = [bench.put(SMALL, model=("other", DEFAULT_SLUG)[n % 2]) for n in range(6)]
        most = 0

        def all_done() -> bool:
            nonlocal most
            most = max(most, len(list(bench.worker.checkpoints)))
            return all(done(bench, job) for job in jobs)

        bench.wait(all_done)
        assert most == 1
        assert len({pixels(bench, job) for job in jobs}) == 1


@pytest.mark.slow
def test_who_waits_for_another_checkpoint_is_not_forgotten(tmp_path: Path) -> None:
    """A stream of jobs for the one at hand ends for a while when patience does."""
    [other] = copies(tmp_path, "other")
    given = {"memory_gb": 1.5 * MICRO_GB, "patience_s": 0.5}
    with working(tmp_path, other, **given) as bench:
        stream = [bench.put(LONG) for _ in range(4)]
        bench.wait(lambda: bench.job(stream[0]).state is State.PROCESSING)
        waits = bench.put(SMALL, model="other")

        def served() -> bool:
            if sum(bench.job(job).state is State.QUEUED for job in stream) < 2:
                stream.append(bench.put(LONG))
            return done(bench, waits)

        bench.wait(served)
        bench.wait(lambda: all(done(bench, job) for job in stream))


@pytest.mark.slow
def test_two_long_queues_do_not_change_the_checkpoint_for_every_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the jobs are past patience soon; each checkpoint that comes stays for a while."""
    loaded = 0
    loading = load

    def counted(weights: Weights) -> Any:
        nonlocal loaded
        loaded += 1
        return loading(weights)

    monkeypatch.setattr(crash_loops, "load", counted)
    [other] = copies(tmp_path, "other")
    with working(tmp_path, other, memory_gb=1.5 * MICRO_GB, patience_s=1.5) as bench:
        jobs = [bench.put(SMALL, model=("other", DEFAULT_SLUG)[n % 2]) for n in range(16)]
        bench.wait(lambda: all(done(bench, job) for job in jobs))
    assert loaded <= 8


@pytest.mark.parametrize("patience_s", [0.1, 60.0])
def test_the_types_of_a_receipt_take_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    """They are loaded only once there is room; patience ends the stream for the others."""
    held: list[int] = []
    with working(tmp_path, memory_gb=1.1 * MICRO_GB, patience_s=patience_s) as bench:

        def noted(engines: Iterable[Engine]) -> list[Outcome]:
            held.append(sum(one.size for one in bench.worker.checkpoints._residents.values()))
            return tick(engines)

        monkeypatch.setattr(loop, "tick", noted)
        stream = [bench.put(LONG)]
        bench.wait(lambda: bench.job(stream[0]).state is State.PROCESSING)
        again = bench.put(SMALL, made_in=IN_BF16)

        def served() -> bool:
            queued = sum(bench.job(job).state is State.QUEUED for job in stream)
            if not queued and (patience_s < 1 or len(stream) < 3):
                stream.append(bench.put(LONG))
            return done(bench, again)

        bench.wait(served)
        bench.wait(lambda: all(done(bench, job) for job in stream))
    assert max(held) <= 1.1 * MICRO_GB * 1e9
    result = bench.job(again).result
    assert result is not None and result["dtype"] == "bfloat16 and float32"


def test_types_that_end_workers_are_left_alone(tmp_path: Path) -> None:
    with working(tmp_path) as bench:
        crashing = with_dtypes(bench.model.weights, IN_BF16, CPU)
        with bench.db.write() as c:
            for n in range(load_failures.DEATHS):
                load_failures.begin(c, f"dead{n}", crashing, time.time())
        again = bench.put(SMALL, made_in=IN_BF16)
        bench.wait(lambda: bench.job(again).state is State.FAILED)
        assert bench.job(again).reason == "model_unavailable"
        assert bench.kinds(again) == ["reserve", "release"]
        own = bench.put(SMALL)
        bench.wait(lambda: done(bench, own))


def test_the_longest_unused_leaves_first(tmp_path: Path) -> None:
    others = copies(tmp_path, "b", "c")
    with working(tmp_path, *others, memory_gb=2.5 * MICRO_GB) as bench:
        for model in ("b", DEFAULT_SLUG, "c"):
            job = bench.put(SMALL, model=model)
            bench.wait(lambda job=job: done(bench, job))  # type: ignore[misc]
        found = states(bench)
        assert (found[DEFAULT_SLUG], found["b"], found["c"]) == ("READY", "UNLOADED", "READY")


def test_an_idle_checkpoint_leaves_and_comes_back(tmp_path: Path) -> None:
    with working(tmp_path, idle_s=0.3) as bench:
        first = bench.put(SMALL)
        bench.wait(lambda: done(bench, first))
        bench.wait(lambda: states(bench)[DEFAULT_SLUG] == "UNLOADED")
        assert not list(bench.worker.checkpoints)
        second = bench.put(SMALL)
        bench.wait(lambda: done(bench, second))
        assert pixels(bench, first) == pixels(bench, second)


def exchanged(folder: Path) -> Model:
    """A model whose file is another than was added."""
    [bad] = copies(folder, "bad")
    sha256 = load(bad.checkpoint, CPU).sha256
    config = bad.checkpoint / "unet" / "config.json"
    config.write_text(config.read_text() + " ")
    return replace(bad, weights=replace(bad.weights, sha256=sha256))


def elsewhere(bench: Bench, slug: str, state: str) -> None:
    """What another worker, which never takes a job, says of a model."""
    with bench.db.write() as c:
        now = time.time()
        if queue.beat(c, "elsewhere", now, now, None, {}, {slug: state}) is None:
            queue.register(c, "elsewhere", 1, "there", now)
            queue.beat(c, "elsewhere", now, now, None, {}, {slug: state})


def test_a_checkpoint_that_cannot_be_loaded_harms_nobody(tmp_path: Path) -> None:
    with working(tmp_path, exchanged(tmp_path)) as bench:
        good = bench.put(LONG)
        lost = [bench.put(SMALL, model="bad") for _ in range(2)]
        bench.wait(lambda: all(bench.job(job).state is State.FAILED for job in lost))
        assert [bench.job(job).reason for job in lost] == ["model_unavailable"] * 2
        assert [bench.kinds(job) for job in lost] == [["reserve", "release"]] * 2
        assert states(bench)["bad"] == "UNAVAILABLE"
        bench.wait(lambda: done(bench, good))


def test_a_job_whose_checkpoint_is_refused_here_is_left_to_others(tmp_path: Path) -> None:
    """Until no other may have it."""
    with working(tmp_path, exchanged(tmp_path)) as bench:
        elsewhere(bench, "bad", "UNLOADED")
        job = bench.put(SMALL, model="bad")
        bench.wait(lambda: states(bench).get("bad") == "UNAVAILABLE")
        bench.wait(lambda: bench.job(job).state is State.QUEUED)
        assert bench.job(job).attempts == 0
        good = bench.put(SMALL)
        bench.wait(lambda: done(bench, good))
        assert bench.job(job).state is State.QUEUED  # it was not taken again
        elsewhere(bench, "bad", "UNAVAILABLE")
        bench.wait(lambda: bench.job(job).state is State.FAILED)
        assert bench.job(job).reason == "model_unavailable"
        assert bench.kinds(job) == ["reserve", "release"]


def test_a_checkpoint_that_was_mended_is_tried_again_though_another_may_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_cache, "RETRY_LOAD_S", 0.5)
    bad = exchanged(tmp_path)
    with working(tmp_path, bad, patience_s=0.5) as bench:
        elsewhere(bench, "bad", "UNLOADED")
        job = bench.put(SMALL, model="bad")
        bench.wait(lambda: states(bench).get("bad") == "UNAVAILABLE")
        config = bad.checkpoint / "unet" / "config.json"
        config.write_text(config.read_text()[:-1])  # as it was added
        bench.wait(lambda: done(bench, job))


def test_a_job_whose_checkpoint_is_coming_can_be_cancelled(tmp_path: Path) -> None:
    [other] = copies(tmp_path, "other")
    with working(tmp_path, other) as bench:
        job = bench.put(SMALL, model="other")
        bench.wait(lambda: bench.job(job).state is State.PROCESSING)
        with bench.db.write() as c:
            queue.cancel(c, job, time.time(), 60.0)
        bench.wait(lambda: not bench.worker.held)
        after = bench.put(SMALL, model="other")
        bench.wait(lambda: done(bench, after))


def test_a_job_is_left_for_a_while_to_who_holds_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "DEFER_S", 1.0)
    [other] = copies(tmp_path, "other")
    with working(tmp_path, other) as bench:
        elsewhere(bench, "other", "READY")
        job = bench.put(SMALL, model="other")
        bench.wait(lambda: done(bench, job))
        started = bench.job(job).started_at
        assert started is not None and started - bench.job(job).created_at > 0.9
