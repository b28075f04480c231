"""What the documents say is true: code runs, links lead somewhere, commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from tests import room_map
from tests.conftest import Server, cli, imaged

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS.append(ROOT / "imaged" / "checkpoints" / "micro" / "README.md")
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def session(text: str, server: Server, folder: Path) -> subprocess.CompletedProcess[str]:
    """The bash and python blocks of a text, in order, in one fresh shell in the folder where
    `make serve` runs. Only the port is another, and `python` and `imaged` are on the PATH no
    sooner than the text puts them there.
    """
    (folder / ".venv" / "bin").mkdir(parents=True)
    own = Path(sys.executable).parent
    (folder / ".venv" / "bin" / "activate").write_text(f'PATH="{own}:$PATH"\n')
    (folder / "data").symlink_to(server.data)
    lines = ["set -eu"]
    for language, code in re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL):
        lines.append(code if language == "bash" else f"python - <<'PASTED'\n{code}PASTED\n")
    paths = os.environ["PATH"].split(os.pathsep)
    environ = {
        **os.environ,
        "PATH": os.pathsep.join(p for p in paths if not Path(p, "imaged").exists()),
        "PYTHONPATH": str(ROOT),  # this tree's code, wherever another is installed from
        "IMAGED_URL": server.url,
    }
    return subprocess.run(
        ["bash"],
        input="\n".join(lines).replace("http://127.0.0.1:8000", server.url),
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_readme_code_runs_as_pasted(server: Server, tmp_path: Path) -> None:
    text, code = README.split("## Your own checkpoint")  # from there on with files of one's own
    assert not re.findall(r"```(?:bash|python)", code)
    done = session(text, server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{server.url}/files/") == len(blocks("python"))
    for name in ("house.jpg", "imaged-7.jpg"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (512, 512)


@pytest.mark.parametrize(
    ("line", "first_use", "said"),
    [
        ("export IMAGED_API_KEY=", "curl", "IMAGED_API_KEY: unbound variable"),
        ("source .venv/bin/activate", "imaged generate", "imaged: command not found"),
    ],
)
def test_a_line_that_the_readme_lacks_is_missed(
    line: str, first_use: str, said: str, server: Server, tmp_path: Path
) -> None:
    [before] = [block for block in blocks("bash") if line in block]
    without = "".join(kept for kept in before.splitlines(True) if line not in kept)
    [use] = [block for block in blocks("bash") if block.startswith(first_use)]
    done = session(f"```bash\n{without}```\n```bash\n{use}```\n", server, tmp_path)
    assert done.returncode != 0 and said in done.stderr


CONNECTS = {"aiohttp", "asyncio.open_connection", "ftplib", "http.client", "httpx", "requests"}
CONNECTS |= {"smtplib", "socket", "urllib.request", "urllib3", "websockets"}


def test_nothing_is_sent_home() -> None:
    """Who can connect at all: webhooks, the checker, the client; and who listens."""
    package, found = ROOT / "imaged", set()
    for path in package.rglob("*.py"):
        source = path.read_text()
        if any(re.search(rf"\b(import|from) {name}\b|\b{name}\(", source) for name in CONNECTS):
            found.add(str(path.relative_to(package)))
    assert {name for name in found if not name.startswith("client/")} == {
        "gateway/webhooks/delivery.py",  # webhooks
        "gateway/webhooks/url_guard.py",  # where they may lead
        "worker/image_checker.py",  # the checker
        "gateway/serve.py",  # binds the port
        "worker/heartbeat.py",  # this machine's own name
    }


def test_what_explain_is_shown_to_say() -> None:
    page = (ROOT / "docs" / "prompts-and-schedulers.md").read_text()
    [(command, shown)] = re.findall(r"```console\n\$ (imaged .*?)\n(.*?)```", page, re.DOTALL)
    done = cli(*shlex.split(command)[1:])
    assert done.exit_code == 0, done.stderr
    assert done.stdout == shown


def test_a_quote_works_as_pasted(server: Server, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "prompts-and-schedulers.md").read_text()
    [lines] = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    (tmp_path / "data").symlink_to(server.data)
    pasted = lines.replace("http://127.0.0.1:8000", server.url)
    subprocess.run(["bash", "-ec", pasted], cwd=tmp_path, check=True, timeout=120)
    with Image.open(tmp_path / "quoted.jpg") as image:
        assert image.size == (512, 512)


@pytest.mark.slow
def test_what_stop_and_go_shows(server: Server, tmp_path: Path) -> None:
    """Its commands, then its code, in one folder."""
    page = (ROOT / "docs" / "stop-and-go.md").read_text()
    (tmp_path / "data").symlink_to(server.data)
    for command, text in re.findall(r"```console\n\$ (imaged .*?)\n(.*?)```", page, re.DOTALL):
        done = imaged(*shlex.split(command)[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        shown = re.escape(text).replace(re.escape("..."), ".*")
        assert re.fullmatch(shown, done.stdout), done.stdout
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(len(looks))"],
        env={**os.environ, "IMAGED_URL": server.url, "IMAGED_API_KEY": server.key},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "4\n", done.stderr
    same, *others = (pixels(tmp_path / f"{n}.jpg") for n in ("house-2", "finished", "night"))
    assert [other == same for other in others] == [True, False]


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_greeting_curl_works_as_pasted(server: Server, tmp_path: Path) -> None:
    said = (server.data.parent / f"{server.data.name}.log").read_text()
    [lines] = re.findall(r"^  curl .*?\n\n", said, re.DOTALL | re.MULTILINE)
    subprocess.run(["bash", "-ec", lines], cwd=tmp_path, check=True, timeout=120)
    with Image.open(tmp_path / "house.jpg") as image:
        assert image.size == (512, 512)


def test_two_commands_and_ci_agree() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in ("make demo", "make test", "make test-slow", "make serve"):
        assert command in README
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)
    steps = (ROOT / ".ci" / "run").read_text().splitlines()
    assert steps[-2:] == ["make test", "make test-slow"] and "set -euo pipefail" in steps


def test_commands_in_the_readme_exist() -> None:
    for command in set(re.findall(r"^imaged (\w+(?: \w+)?)", README, re.MULTILINE)):
        words = command.split()
        words = words if words[0] in ("keys", "models", "jobs") else words[:1]
        assert cli(*words, "--help").exit_code == 0, command


def test_every_command_teaches() -> None:
    assert imaged("--help").stdout.startswith("Usage: ")
    for words in (
        (),
        ("serve",),
        ("generate",),
        ("explain",),
        ("worker",),
        ("keys",),
        ("keys", "create"),
        ("models", "add"),
        ("jobs", "list"),
        ("jobs", "cancel"),
    ):
        text = cli(*words, "--help").stdout
        assert "Usage: " in text and len(text) > 150, words


def test_every_dependency_is_pinned() -> None:
    pinned = {
        re.split(r"[=\[]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {re.split(r"[<>\[]", name)[0].lower() for name in names} <= pinned


def test_the_map_is_drawn_from_the_imports() -> None:
    text = room_map.DOCUMENT.read_text()
    assert room_map.document(text) == text
    assert text.count("```mermaid") == 5 and "gateway --> store" in text


def test_the_map_has_no_arrow_that_follows_from_others() -> None:
    arrows = {"a": {"b", "c"}, "b": {"c"}, "c": set[str]()}
    assert room_map.reduced(arrows) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    titles = {
        path.name: path.read_text().splitlines()[0].removeprefix("# ")
        for path in sorted(folder.glob("[0-9]*.md"))
    }
    index = (folder / "README.md").read_text()
    for name, title in titles.items():
        number, _, subject = title.partition(". ")
        assert f"| {number} | [{subject}]({name}) |" in index
