"""The command line with wrong input: one line that says what is wrong, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from imaged.cli import main
from tests.conftest import store

WRONG: list[tuple[list[str], str]] = [
    (["keys", "create", "--credits", "nan"], "NaN is not an amount"),
    (["keys", "create", "--credits", "inf"], "not in the range"),
    (["keys", "top-up", "1", "nan"], "NaN is not an amount"),
    (["keys", "top-up", "7", "5"], "there is no key 7"),
    (["models", "remove", "sdxl1.0-yamers-realistic"], "it comes with imaged"),
    (["generate", "x", "--draft", "25"], "--draft should be a whole number between 1 and 24"),
    (["explain", "x", "--width", "513"], "Error: --width should be a multiple of 8"),
    (["generate", "x", "--finish", "0"], "--finish goes with --draft"),
    (["generate", "x <lora:ink:0.8>", "-o", "x.jpg"], "there is no LoRA ink in"),
    (["keys", "revoke", "9" * 23], "not in the range"),
    (["jobs", "list", "--limit", "9" * 20], "not in the range"),
    (["jobs", "show", "\udcff"], "surrogates not allowed"),
    (["serve", "--port", "99999"], 'should be a whole number between 1 and 65,535, not "99999"'),
    (["serve", "--workers", "-1"], "should be a whole number between 0 and 64"),
    (["serve", "--host", ""], "should be text, and not empty"),
    (["generate", "x", "-o", "/missing/x.jpg"], "there is no folder /missing"),
    (["generate", "x", "--steps", "5"], "Error: --steps should be an integer between"),
    (["models", "show", "none"], "there is no model none"),
    (["explain", "x", "--scheduler", "eulr"], 'the nearest is "Euler"'),
    (["explain", "x", "--model", "none"], "there is no model none"),
    (
        ["explain", "".join(f"[a:b:{n}]" for n in range(1, 50)), "--steps", "50"],
        "prompt should say",
    ),
]


@pytest.mark.parametrize(("command", "said"), WRONG, ids=lambda v: ascii(v)[:40])
def test_wrong_input(command: list[str], said: str, tmp_path: Path) -> None:
    store(tmp_path / "imaged.db").close()
    result = CliRunner().invoke(main, [*command, "--data", str(tmp_path)])
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit)
    assert said in result.output


def test_asking_makes_no_store(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for command in (["keys", "list"], ["jobs", "list"], ["keys", "top-up", "1", "5"]):
        result = CliRunner().invoke(main, [*command, "--data", str(data)])
        assert result.exit_code == 1 and f"nothing is kept in {data}" in result.output
    result = CliRunner().invoke(main, ["models", "list", "--data", str(data)])
    assert result.exit_code == 0 and "sdxl1.0-yamers-realistic" in result.output
    assert not data.exists()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"IMAGED_LOG": "loud"}, "IMAGED_LOG should be DEBUG"),
        ({"IMAGED_DATABASE_URL": "foo"}, "the database cannot be used"),
        ({"IMAGED_DATA": "/proc/nope"}, "/proc/nope"),
        ({"IMAGED_PORT": "99999"}, "IMAGED_PORT should be"),
        ({"IMAGED_PORT": "many"}, "IMAGED_PORT should be"),
    ],
)
def test_wrong_environment(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    environ = {"IMAGED_DATA": str(tmp_path), **variables}
    result = CliRunner(env=environ).invoke(main, ["keys", "create"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert said in result.output


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "imaged.db").write_bytes(b"no database at all " * 100)
    result = CliRunner().invoke(main, ["keys", "list", "--data", str(tmp_path)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "the database cannot be used" in result.output


def test_explain_as_json(tmp_path: Path) -> None:
    words = ["explain", "a (red:1.3) house", "--json", "--steps", "30", "--data", str(tmp_path)]
    found = json.loads(CliRunner().invoke(main, words).output)
    assert len(found["scheduler"]["sigmas"]) == 31 and found["warnings"] == []
    window = found["prompts"]["prompt"]["texts"][0]["encoders"][0]["windows"][0]
    assert window == {"tokens": ["a</w>", "red</w>", "house</w>"], "weights": [1.0, 1.3, 1.0]}
