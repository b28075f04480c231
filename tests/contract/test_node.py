"""The npm client and the MCP server, as node sends them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.contract.gate import Gate

NODE = Path(__file__).parent / "node"
ENVIRON = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}


class NodeIsMissing(UserWarning):
    """The clients in JavaScript were not tested."""


def absent(why: str) -> None:
    """Without node or its packages: a failure in CI, a loud skip elsewhere."""
    assert os.environ.get("CI") != "true", f"{why}; they are needed in CI"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"{why}: its clients are not tested", NodeIsMissing, 2)
    pytest.skip(f"{why}: the npm client and the MCP server are NOT tested")


def installed() -> Path:
    """A folder with the script and what it needs, kept between runs by the lock file's hash."""
    if not (shutil.which("node") and shutil.which("npm")):
        absent("node or npm is missing")
    lock = (NODE / "package-lock.json").read_bytes()
    folder = Path(tempfile.gettempdir()) / f"imaged-node-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not (folder / "node_modules" / ".package-lock.json").exists():
        folder.mkdir(exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(NODE / name, folder)
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False)
        if done.returncode:
            absent("npm cannot get axios")
    for script in NODE.glob("*.mjs"):
        shutil.copy(script, folder)
    return folder


@pytest.fixture(scope="module")
def seen(gate: Gate) -> Any:
    done = subprocess.run(
        ["node", "clients.mjs", gate.url, gate.key, gate.make_key(rpm=30)],
        cwd=installed(),
        env=ENVIRON,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_npm_gets_base64_pictures(seen: Any) -> None:
    for name in ("npm_base64", "npm_strings", "npm_from_a_page"):
        assert seen[name] == {"status": 200, "image": "/9j/4AAQ", "images": 1}, name  # a JPEG
    assert seen["npm_several"]["images"] == 2


def test_npm_hears_of_errors(seen: Any) -> None:
    assert (seen["npm_unknown"]["status"], seen["npm_unknown"]["code"]) == (404, "unknown_model")
    assert seen["npm_wrong"]["status"] == 400
    assert "scheduler should be one of" in seen["npm_wrong"]["error"]
    assert (seen["npm_failed"]["status"], seen["npm_failed"]["error"]) == (422, "no luck")


def test_npm_in_a_browser_is_let_in_from_the_named_page_only(seen: Any) -> None:
    page = seen["preflight_page"]
    assert (page["status"], page["origin"]) == (200, "https://app.example")
    allowed = {name.strip().lower() for name in page["headers"].split(",")}
    assert {"access-control-allow-origin", "content-type", "x-api-key"} <= allowed
    assert seen["preflight_other"]["origin"] is None


def test_mcp_gets_pictures(seen: Any) -> None:
    for name in ("mcp_sdxl", "mcp_draft", "mcp_small", "mcp_lightning"):
        answer = seen[name]
        assert (answer["status"], answer["kind"], answer["extension"]) == (200, "image", "jpeg")
        assert answer["start"] == "/9j/" and answer["credits"] > 900


def test_mcp_asks_for_several_one_by_one(seen: Any) -> None:
    first, second = seen["mcp_several"]
    assert first["start"] == second["start"] == "/9j/"
    assert second["credits"] <= first["credits"]


def test_mcp_comes_back_when_it_is_told(seen: Any) -> None:
    answer = seen["mcp_again"]
    assert (answer["refused"]["status"], answer["refused"]["code"]) == (429, "too_fast")
    assert 1 <= int(answer["refused"]["retryAfter"]) <= 3
    assert (answer["status"], answer["start"], answer["tries"]) == (200, "/9j/", 2)


def test_mcp_hears_of_unknown_models(seen: Any) -> None:
    assert (seen["mcp_unknown"]["status"], seen["mcp_unknown"]["code"]) == (404, "unknown_model")


def test_mcp_reads_credits_and_health(seen: Any) -> None:
    credits = seen["mcp_credits"]["data"]["data"]["credits"]
    assert credits["remaining"] > 900 and credits["used"] > 0
    assert seen["mcp_health"] == {"status": 200, "kind": "json", "data": {"status": "ok"}}


def test_without_node_ci_fails_and_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(AssertionError, match="needed in CI"):
        installed()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="NOT tested"), pytest.warns(NodeIsMissing):
        installed()


def test_the_lock_names_no_host() -> None:
    assert '"resolved"' not in (NODE / "package-lock.json").read_text()
