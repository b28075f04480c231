"""Which code the figures in the documents are of, and all benchmarks by one command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bench import all as whole
from bench import app, check
from bench.code import LEFT_OUT, SHARED, SHOWING, Code, Tree, counts, part, said
from bench.company import Company
from bench.report import NOT_MEASURED, Place, fill, places

ROOT = Path(__file__).parent.parent
ENGINE, GATEWAY, CLIENT = (
    f"imaged/{name}"
    for name in ("engine/nets/cached_unet.py", "gateway/app.py", "client/client.py")
)


def git(root: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(
        ["git", *who, *words], cwd=root, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository of the code and its documents, committed; without the weights."""
    root = tmp_path / "copy"
    unwanted = shutil.ignore_patterns("__pycache__", "*.safetensors", "tokenizer*")
    for name in ("imaged", "bench", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=unwanted)
    git(root, "init", "-q")
    commit(root)
    return root


def commit(root: Path) -> str:
    git(root, "add", "-A")
    git(root, "commit", "-qm", "a change", "--allow-empty")
    return git(root, "rev-parse", "--short=12", "HEAD")


def touch(root: Path, name: str) -> None:
    with (root / name).open("a") as file:
        file.write("\nCHANGED = 1\n" if name.endswith(".py") else "\n# changed\n")


def measure(root: Path, *names: str) -> None:
    """Have the document say that these were measured on the code as it is."""
    document, tree = root / "docs" / "benchmarks.md", Tree(root)
    text = document.read_text()
    for place in places(text):
        if place.name in names:
            new = Place(place.name, "| a table |", tree.code(place.name)).text(tree)
            start = text.index(f"<!-- figures: {place.name} ".replace(" -->", ""))
            end = text.index("<!-- end -->", start) + len("<!-- end -->")
            text = text[:start] + new + text[end:]
    document.write_text(text)


def checked(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "check", *words]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def told(root: Path, name: str) -> str:
    """What `check` says of one benchmark."""
    lines = [
        line for line in checked(root).stderr.splitlines() if f"benchmarks.md, {name}:" in line
    ]
    return lines[0].split(": ", 2)[2] if lines else ""


@pytest.mark.parametrize(
    ("name", "changed", "stale"),
    [
        ("single", ENGINE, True),
        ("single", GATEWAY, True),
        ("single", CLIENT, False),
        ("single", "imaged/cli/serve.py", True),
        ("single", "imaged/cli/verify.py", False),
        ("waiting", "imaged/cli/serve.py", False),
        ("waiting", "constraints.txt", True),
        ("single", "bench/runs/single.py", True),
        ("single", "bench/runs/crowd.py", False),
        ("single", "bench/rounds.py", True),
        ("single", "bench/sides/servers.py", True),
        ("single", "bench/gpu/steps.py", False),
        ("single", "bench/runs/__init__.py", False),
        ("full", "bench/full/side.py", True),
        ("single", "bench/figures.py", False),
        ("single", "imaged/catalogue/models.toml", True),
        ("single", "imaged/checkpoints/micro/README.md", False),
        ("waiting", ENGINE, True),
        ("waiting", GATEWAY, False),
        ("start", "imaged/cli/generate.py", True),
        ("gpu-1", "bench/gpu/steps.py", True),
    ],
)
def test_what_counts(name: str, changed: str, stale: bool) -> None:
    assert (ROOT / changed).exists()
    assert counts(name, changed) is stale


def test_words_for_people_do_not_count() -> None:
    code = '''"""What it is."""

NAME = "a  # no comment"  # a comment


class Thing:
    """What a thing is,

    at length.
    """

    def act(self) -> str:
        """What it does."""
        return f"{NAME}"
'''
    same = code.replace("What", "Which").replace("  # a comment", "").replace("\n\n", "\n\n\n")
    assert said(code.encode(), ".py") == said(same.encode(), ".py") != b""
    for old, new in (("# no", "# one"), ("act", "do"), ('f"{', '"{'), (" str", " int")):
        assert said(code.encode(), ".py") != said(code.replace(old, new).encode(), ".py")
    assert said(b"# one", ".toml") != said(b"# two", ".toml")


def test_every_file_of_the_benchmarks_is_thought_of() -> None:
    paths = [path.relative_to(ROOT).as_posix() for path in (ROOT / "bench").rglob("*.py")]
    for path in paths:
        assert sum(part(path) in kind for kind in (LEFT_OUT, SHARED, SHOWING)) == 1, path
    assert {part(path) for path in paths} == {*LEFT_OUT, *SHARED, *SHOWING}
    assert set(whole.PARTS) | {"full", "bf16", "gpu"} == set(LEFT_OUT)


def test_a_changed_file_makes_figures_stale(copy: Path) -> None:
    measure(copy, "single", "waiting")
    assert told(copy, "single") == told(copy, "waiting") == ""
    touch(copy, GATEWAY)  # which `waiting` does not run
    assert told(copy, "single") == f"measured on code that has changed since: {GATEWAY}"
    assert told(copy, "waiting") == ""
    git(copy, "checkout", GATEWAY)
    assert told(copy, "single") == ""
    (copy / "imaged" / "engine" / "more.py").write_text("")
    assert told(copy, "waiting").startswith("measured on code that has changed since: ")
    assert checked(copy).returncode == 0  # a warning, never more


def test_what_git_ignores_counts_as_little_as_it_is_committed(copy: Path) -> None:
    before = Tree(copy).code("single")
    (copy / ".gitignore").write_text("junk*\n")
    (copy / "imaged" / "junk.py").write_text("x = 1\n")
    assert Tree(copy).code("single") == before and before.commit


def test_another_torch_makes_figures_stale(copy: Path) -> None:
    pins = copy / "constraints.txt"
    pins.write_text("numpy==1.0\ntorch==2.0\n")
    commit(copy)
    measure(copy, "single")
    pins.write_text("numpy==2.0\ntorch==2.0\n")
    assert told(copy, "single") == ""
    pins.write_text("numpy==2.0\ntorch==2.1\n")
    assert told(copy, "single") == "measured on code that has changed since: constraints.txt"


def test_the_check_is_quick() -> None:
    """It ends every `make test`, so it does without what takes seconds to import."""
    code = "import sys, bench.check; print({'torch', 'numpy', 'diffusers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_the_report_says_what_has_changed_since(copy: Path, tmp_path: Path) -> None:
    measure(copy, "single")
    text = (copy / "docs" / "benchmarks.md").read_text()
    assert fill(text, {}, tmp_path, Tree(copy)).count("| a table |") == 1
    for name in (ENGINE, GATEWAY, "bench/rounds.py", "bench/runs/single.py"):
        touch(copy, name)
    marked = fill(text, {}, tmp_path, Tree(copy))
    names = "bench/rounds.py, bench/runs/single.py, imaged/engine/nets/cached_unet.py"
    note = f"{names} and 1 more.*\n\n| a table |"
    assert f"\n*Measured on code that has changed since: {note}" in marked
    assert fill(marked, {}, tmp_path, Tree(copy)) == marked
    git(copy, "checkout", ".")
    assert "\n| a table |" in fill(marked, {}, tmp_path, Tree(copy))
    assert note not in fill(marked, {}, tmp_path, Tree(copy))


def test_older_code_and_no_figures() -> None:
    unknown, empty = Place("single", "| a table |"), Place("single", NOT_MEASURED)
    assert "*Measured on older code, it is not known which.*\n\n|" in unknown.text(Tree())
    assert empty.text(Tree()) == f"<!-- figures: single -->\n{NOT_MEASURED}\n<!-- end -->"


def test_a_release_wants_everything_of_one_commit(copy: Path) -> None:
    assert checked(copy, "--strict").returncode == 1
    measure(copy, *whole.PARTS)
    good = checked(copy, "--strict")
    assert good.returncode == 0 and "checkpoints.md, full" in good.stderr  # a warning
    touch(copy, CLIENT)  # counts for nobody, but makes another commit
    commit(copy)
    assert checked(copy, "--strict").returncode == 0
    measure(copy, "polls")
    assert "measured on different commits: " in checked(copy, "--strict").stderr
    measure(copy, *whole.PARTS)
    touch(copy, "bench/runs/polls.py")
    assert "\n  polls: measured on code that has changed" in checked(copy, "--strict").stderr
    measure(copy, "polls")
    assert "  polls: measured on code that was not committed" in checked(copy, "--strict").stderr


def test_a_benchmark_that_was_not_measured_is_refused() -> None:
    tree = Tree()
    measured = [
        Place(name, "| a table |", Code(tree.code(name).digest, "a")) for name in whole.PARTS
    ]
    assert check.refusals(measured, tree) == []
    assert check.refusals(measured[1:], tree)[0] == "single: not measured"


def test_code_that_changes_while_it_is_measured_has_no_figures(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.app import Effort
    from bench.figures import publish

    monkeypatch.setattr(app, "BUILD", tmp_path / "build")
    effort = Effort(5, 1.0, 1, False, Tree(copy))
    touch(copy, ENGINE)
    monkeypatch.setattr("bench.figures.Tree", lambda: Tree(copy))
    with pytest.raises(Exception, match="the code changed while it was measured"):
        publish("single", effort, [], {})
    assert not (tmp_path / "build").exists()


def test_what_others_took_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    company = Company()
    burn = "import time\nwhile time.process_time() < 1.0: pass\nprint('burnt', flush=True); input()"
    command = [sys.executable, "-c", burn]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as busy:
        assert busy.stdout is not None and busy.stdout.readline() == "burnt\n"
        assert company.others_s() > 0.5  # another's, as long as it was not waited for
        busy.communicate("\n")
    monkeypatch.setattr(
        "bench.company._machine", iter([(100, 900), (130, 950), (130, 950)]).__next__
    )
    monkeypatch.setattr("bench.company._ours", iter([7, 27, 27]).__next__)
    company = Company()
    assert company.share() == 10 / 50


@pytest.fixture
def replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`all` with parts that only note that they ran; those named fail."""
    monkeypatch.setattr(whole, "missing", lambda parts, diffusers: [])

    def run(*given: str, failing: tuple[str, ...] = ()) -> Result:
        def words(name: str) -> list[str]:
            note = f"open({str(tmp_path / 'ran')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')"
            return [sys.executable, "-c", f"import sys; {note}; sys.exit({name in failing})", name]

        monkeypatch.setattr(whole, "words", words)
        return CliRunner().invoke(app.main, ["all", *given])

    return run


def ran(tmp_path: Path) -> list[str]:
    return (tmp_path / "ran").read_text().splitlines()


def test_all_runs_each_part_and_the_report(replaced: Callable[..., Result], tmp_path: Path) -> None:
    shown = replaced("--threads", "2", "--without", "polls")
    assert shown.exit_code == 0, shown.output
    parts = [part for part in whole.PARTS if part != "polls"]
    assert ran(tmp_path) == [*(f"{part} --threads 2" for part in parts), "report"]
    assert "== 7 of 7: recovery done after 0 min " in shown.output
    assert "== all of it took 0 min " in shown.output
    assert "left out: full, bf16, gpu, polls" in shown.output


def test_a_part_that_fails_leaves_the_others_alone(
    replaced: Callable[..., Result], tmp_path: Path
) -> None:
    shown = replaced("--quick", failing=("crowd", "exact"))
    assert shown.exit_code == 1
    assert ran(tmp_path) == [f"{part} --quick" for part in whole.PARTS]  # and no report of these
    assert "== 2 of 8: crowd FAILED (1) after" in shown.output
    assert "Error: failed: crowd, exact" in shown.output


def test_a_clone_of_diffusers_is_for_the_crowd() -> None:
    """The document will have the command, without a path of this machine."""
    clone = ROOT / "build" / "diffusers"
    assert whole.command("single", clone, 0, False)[-1] == "single"
    assert whole.command("crowd", clone, 0, False)[-2:] == ["--diffusers", "build/diffusers"]


def test_what_is_missing_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.all.find_spec", lambda name: None if name == "fastapi" else name)
    monkeypatch.setattr("bench.all.shutil.which", lambda name: None)
    monkeypatch.setattr("bench.all.cores", lambda: 1)
    monkeypatch.setattr("bench.all.subprocess.run", lambda *_, **__: pytest.fail("it began"))
    shown = CliRunner().invoke(app.main, ["all", "--diffusers", str(tmp_path)])
    assert shown.exit_code == 1
    for missing in (
        "crowd, polls: the package fastapi",
        "wrk",
        "a second core",
        "serverasync.py in",
    ):
        assert missing in shown.output
    assert whole.missing(["waiting"], None) == []
