"""Models in the store: what was said of them, who wants them, which weights end their workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from imaged.catalogue.model import STANDARD_PRICE, Weights
from imaged.params.knobs import KNOBS
from imaged.store import catalogue
from imaged.store.jobs import load_failures, model_demand, queue
from imaged.store.sql.database import Database
from tests.in_store import KEEP_S, make_key, put


def test_added_model_takes_the_slug(db: Database) -> None:
    with db.write() as c:
        built_in = catalogue.catalogue(c)["sdxl1.0-yamers-realistic"]
        catalogue.add(c, built_in.slug, {"checkpoint": "/x/real.safetensors"}, 0.0)
        assert catalogue.catalogue(c)[built_in.slug].checkpoint_name == "real"
        catalogue.remove(c, built_in.slug)
        assert catalogue.catalogue(c)[built_in.slug].checkpoint_name == "micro"


@pytest.mark.parametrize("zero_snr", [None, False, True])
def test_all_that_was_said_of_weights_is_kept(db: Database, zero_snr: bool | None) -> None:
    said = {
        "vae": "/y",
        "dtype": "bf16",
        "cpu_dtype": "fp32",
        "prediction": "v_prediction",
        "sha256": "0" * 64,
        "title": "Own",
        "description": "It is.",
        "licence": "None.",
        "price": 0.25,
        "sample": {"prompt": "a house"},
    } | ({} if zero_snr is None else {"zero_snr": zero_snr})
    with db.write() as c:
        catalogue.add(c, "own", {"checkpoint": "/x", **said}, 0.0)
        catalogue.add(c, "plain", {"checkpoint": "/x"}, 0.0)
        found = catalogue.catalogue(c)
    own, plain = found["own"], found["plain"]
    weights = Weights(Path("/x"), Path("/y"), "bf16", "v_prediction", zero_snr, "0" * 64, "fp32")
    assert (own.weights, plain.weights) == (weights, Weights(Path("/x")))
    assert (own.title, own.description, own.licence) == ("Own", "It is.", "None.")
    assert (own.price_micros, own.sample) == (250_000, {"prompt": "a house"})
    assert (plain.title, plain.price_micros, plain.knobs) == ("plain", STANDARD_PRICE, KNOBS)


def test_a_model_of_before_there_was_more_to_say(db: Database) -> None:
    with db.write() as c:
        c.exec_driver_sql(
            "INSERT INTO models (slug, title, checkpoint, price_micros, added_at) "
            "VALUES ('old', 'Old', '/x', 20000, 0)"
        )
        old = catalogue.catalogue(c)["old"]
    assert (old.title, old.weights, old.price_micros) == ("Old", Weights(Path("/x")), 20_000)


def test_demand_and_where_checkpoints_lie(db: Database) -> None:
    key_id = make_key(db)
    for n, model in enumerate(("a", "b", "a")):
        put(db, key_id, model=model, now=float(n))
    with db.write() as c:
        queue.register(c, "w", 1, "h", 5.0)
        queue.register(c, "x", 1, "h", 5.0)
        queue.register(c, "old", 1, "h", 1.0)
        queue.beat(c, "w", 6.0, 6.0, None, {}, {"a": "STARTING", "b": "UNAVAILABLE"})
        queue.beat(c, "x", 6.0, 6.0, None, {}, {"a": "READY", "b": "UNLOADED", "c": "BUSY"})
        queue.beat(c, "old", 2.0, 2.0, None, {}, {"d": "BUSY"})
    with db.read() as c:
        waiting = model_demand.fairest(c, ["b", "a", "none"], 7.0)
        assert [(w.model, w.since) for w in waiting] == [("a", 0.0), ("b", 1.0)]
        assert model_demand.states(c, 3.0) == {"a": "READY", "b": "UNAVAILABLE", "c": "BUSY"}
        assert model_demand.states(c, 3.0, "x") == {"a": "STARTING", "b": "UNAVAILABLE"}


def test_weights_that_end_their_workers(db: Database) -> None:
    """Those alive, those long ago and those of other weights do not count."""
    bad, good = Weights(Path("/bad")), Weights(Path("/good"))

    def crashing(now: float) -> set[str]:
        with db.read() as c:
            return load_failures.crashing(c, now)

    with db.write() as c:
        for n, weights in enumerate((bad, good, bad, bad)):
            queue.register(c, f"w{n}", 1, "h", 1.0)
            load_failures.begin(c, f"w{n}", weights, 1.0)
    assert crashing(2.0) == set()
    for n in range(4):
        assert crashing(2.0) == set()
        with db.write() as c:
            queue.end_lease(c, f"w{n}", 2.0, KEEP_S, blame=True)
    assert crashing(2.0) == {str(bad)}
    assert crashing(2.0 + load_failures.FORGET_S) == set()
    with db.write() as c:
        load_failures.end(c, "w2")
    assert crashing(2.0) == set()
    with db.write() as c:
        load_failures.begin(c, "w4", bad, 3.0)
    assert crashing(4.0) == {str(bad)}
    with db.write() as c:
        queue.end_lease(c, "w4", 4.0, KEEP_S, blame=False)  # an orderly stop in its midst
    assert crashing(4.0) == set()
    with db.write() as c:
        load_failures.begin(c, "w5", bad, 3.0)
        load_failures.clear(c)
    assert crashing(4.0) == set()
