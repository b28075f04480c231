"""Settings: what is taken from the environment, what is refused, and what people are told of it."""

from __future__ import annotations

import json
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from imaged.cli import main
from imaged.errors import CommandError
from imaged.settings import Settings, _ignored, known, shown

ROOT = Path(__file__).parents[2]
#: The names that were there before a setting could be refused: all of them keep working.
NAMES = (
    *("data", "database_url", "blobs_url", "public_url", "host", "port", "workers", "slots"),
    *("threads", "memory_gb", "idle_s", "patience_s", "graphs", "determinism", "receipts"),
    *("retention_s", "queue_s", "run_s", "lease_s", "drain_s", "park_s", "hang_s", "wait_s"),
    *("max_body", "rules", "checker", "webhook_networks", "models", "loras", "embeddings"),
    *("aliases", "cors", "history_s", "connections", "connections_per_address"),
)


def test_every_setting_has_a_text_and_a_default_within_its_bounds() -> None:
    assert [*known()] == [field.name for field in fields(Settings)]
    assert set(NAMES) <= set(known())
    for name, setting in known().items():
        assert setting.text.endswith(".") and setting.allowed
        # As workers are handed it.
        assert setting.read(str(setting.default), name) == setting.default


def test_what_a_worker_is_handed_is_what_the_supervisor_has() -> None:
    """The supervisor passes every setting on as text (worker/supervisor.py)."""
    own = replace(
        Settings(), data=Path("/x y"), port=80, memory_gb=1.5, graphs="on", idle_s=0.1, rules="a=b"
    )
    handed = {f"IMAGED_{name.upper()}": str(value) for name, value in vars(own).items()}
    assert Settings.from_env(handed) == own


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("PORT", "80", 80),
        ("PORT", " 80 ", 80),
        ("WORKERS", "0", 0),
        ("WORKERS", "64", 64),
        ("LEASE_S", "0.5", 0.5),
        ("LEASE_S", "1e3", 1000.0),
        ("DATA", "/tmp/a b", Path("/tmp/a b")),
        ("GRAPHS", "on", "on"),
        ("RULES", "", ""),
        ("CORS", "*", "*"),
    ],
)
def test_what_is_taken(name: str, text: str, value: Any) -> None:
    found = getattr(Settings.from_env({f"IMAGED_{name}": text}), name.lower())
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("PORT", "0", "a whole number between 1 and 65,535"),
        ("PORT", "65536", "a whole number between 1 and 65,535"),
        ("PORT", "", "a whole number between 1 and 65,535"),
        ("PORT", "8000.5", "a whole number between 1 and 65,535"),
        ("PORT", "many", "a whole number between 1 and 65,535"),
        ("WORKERS", "65", "a whole number between 0 and 64"),
        ("WORKERS", "-1", "a whole number between 0 and 64"),
        ("SLOTS", "0", "a whole number between 1 and 1,000,000"),
        ("LEASE_S", "0", "a number above 0 and up to 100,000,000,000"),
        ("LEASE_S", "nan", "a number above 0 and up to 100,000,000,000"),
        ("DRAIN_S", "-1", "a number between 0 and 100,000,000,000"),
        ("DRAIN_S", "inf", "a number between 0 and 100,000,000,000"),
        ("DRAIN_S", "20 s", "a number between 0 and 100,000,000,000"),
        ("GRAPHS", "yes", '"on" or "off"'),
        ("RECEIPTS", "", '"embedded" or "results"'),
        ("HOST", "", "text, and not empty"),
    ],
)
def test_what_is_refused(name: str, text: str, allowed: str) -> None:
    with pytest.raises(CommandError) as refusal:
        Settings.from_env({f"IMAGED_{name}": text})
    assert refusal.value.detail == f"IMAGED_{name} should be {allowed}, not {json.dumps(text)}"


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("IMAGED_PROT", "is IMAGED_PORT meant? "),
        ("IMAGED_WORKER", "is IMAGED_WORKERS meant? "),
        ("IMAGED_RETENTION", "is IMAGED_RETENTION_S meant? "),
        ("IMAGED_port", "is IMAGED_PORT meant? "),
        ("IMAGED_XYZZYQ", ""),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(variable: str, meant: str) -> None:
    with pytest.raises(CommandError) as refusal:
        Settings.from_env({variable: "1"})
    assert refusal.value.detail == (f"{variable} is no setting: {meant}`imaged config` lists them")


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("IMAGED_PORT", "tcp://10.0.0.7:8000"),
        ("IMAGED_PORT_8000_TCP", "tcp://10.0.0.7:8000"),
        ("IMAGED_PORT_8000_TCP_ADDR", "10.0.0.7"),
        ("IMAGED_PORT_8000_TCP_PORT", "8000"),
        ("IMAGED_PORT_8000_TCP_PROTO", "tcp"),
        ("IMAGED_SERVICE_HOST", "10.0.0.7"),
        ("IMAGED_SERVICE_PORT", "8000"),
        ("IMAGED_SERVICE_PORT_HTTP", "8000"),
        ("IMAGED_GATEWAY_SERVICE_HOST", "10.0.0.7"),
        ("IMAGED_GATEWAY_PORT", "tcp://10.0.0.7:8000"),
    ],
)
def test_what_a_cluster_adds_stops_nothing(
    variable: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    _ignored.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert Settings.from_env({variable: text}) == Settings()
    [record] = caplog.records  # said once
    assert variable in record.getMessage()


def test_what_is_not_a_setting_is_left_alone() -> None:
    others = {
        "IMAGED_URL": "x",
        "IMAGED_API_KEY": "x",
        "IMAGED_LOG": "DEBUG",
        "MY_IMAGED_PROT": "1",
    }
    assert Settings.from_env(others) == Settings()


def test_an_option_goes_before_its_variable() -> None:
    assert Settings.from_env({"IMAGED_PORT": "81"}, port=82, host=None).port == 82


def config(*args: str, **environ: str) -> str:
    done = CliRunner(env=environ).invoke(main, ["config", *args])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_config_tells_value_and_origin() -> None:
    told = json.loads(config("--json", "--data", "/x", IMAGED_PORT="81"))
    assert told["port"] == {"value": "81", "from": "environment"}
    assert told["data"] == {"value": "/x", "from": "--data"}
    assert told["workers"] == {"value": "1", "from": "default"}
    assert [*told] == [*known()]
    ignored = json.loads(config("--json", "port", IMAGED_PORT="tcp://10.0.0.7:8000"))
    assert ignored == {"port": {"value": "8000", "from": "default"}}
    lines = config("port", "IMAGED_LEASE_S").splitlines()
    assert lines[0].split() == ["IMAGED_PORT", "8000", "default"]
    assert lines[1] == "  Port to listen on. A whole number between 1 and 65,535."
    assert lines[2].split() == ["IMAGED_LEASE_S", "10", "default"]


def test_config_shows_no_password() -> None:
    url = "postgresql+psycopg://imaged:s3cret@db/imaged"
    for args in ((), ("--json",)):
        told = config(*args, IMAGED_DATABASE_URL=url)
        assert "s3cret" not in told and "postgresql+psycopg://imaged:***@db/imaged" in told
    assert shown("http://user:p@ss@host") != "http://user:p@ss@host"


def test_config_refuses_what_there_is_not() -> None:
    done = CliRunner(env={"IMAGED_PROT": "1"}).invoke(main, ["config"])
    assert done.exit_code == 1 and "IMAGED_PORT" in done.output
    done = CliRunner().invoke(main, ["config", "prot"])
    assert done.exit_code == 1 and "there is no setting prot" in done.output


def test_the_document_is_of_these_settings() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == config("--markdown")
