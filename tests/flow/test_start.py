"""What keeps a command from beginning is one line, said before anything is made or shown."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imaged.cli.app import refuse_unwritable
from imaged.cli.serve import _locked
from imaged.errors import CommandError
from imaged.settings import Settings
from tests.conftest import Server, free_port, imaged

PR_CAPBSET_DROP, OVERRIDE, READ_SEARCH = 24, 1, 2


def plainly() -> None:
    """Take from a process what lets root pass by a folder's mode. Others have none of it."""
    if os.geteuid() == 0:
        for capability in (OVERRIDE, READ_SEARCH):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def refused(*words: str, **kwargs: Any) -> str:
    """The one line of a command that could not begin."""
    done = imaged(*words, preexec_fn=plainly, **kwargs)
    assert done.returncode == 1 and done.stdout == "", done
    [line] = done.stderr.splitlines()
    return line


# -- imaged serve -----------------------------------------------------------------------------


def test_a_port_in_use(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            said = refused("serve", "--data", str(data), "--port", str(port), "--host", host)
            assert said.startswith(f"Error: port {port} of {host} is in use")
    assert not data.exists()


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("192.0.2.1", "192.0.2.1 is no address of this machine"),
        ("a" * 70 + ".example", "has no address"),
    ],
)
def test_a_host_that_is_none(host: str, said: str, tmp_path: Path) -> None:
    assert said in refused("serve", "--data", str(tmp_path / "data"), "--host", host)


def a_file(path: Path) -> Path:
    path.write_text("mine")
    return path


def closed(path: Path) -> Path:
    path.mkdir(mode=0o555)
    return path


@pytest.mark.parametrize(
    ("made", "below", "said"),
    [
        (a_file, "", "is a file"),
        (a_file, "data", "cannot be written: Not a directory"),
        (closed, "", "cannot be written: Permission denied"),
        (closed, "data", "cannot be written: Permission denied"),
        (lambda _: Path("/proc"), "data", "/proc/data cannot be written"),
    ],
    ids=["a file", "below a file", "closed", "below a closed one", "no file system for files"],
)
def test_a_folder_that_cannot_be_written(
    made: Callable[[Path], Path], below: str, said: str, tmp_path: Path
) -> None:
    data = str(made(tmp_path / "place") / below)
    line = refused("serve", "--data", data)
    assert line.startswith(f"Error: the data folder {data}") and said in line
    assert "choose another with --data" in line
    assert [path.name for path in tmp_path.iterdir()] in ([], ["place"])
    if not below:
        assert refused("serve", env={**os.environ, "IMAGED_DATA": data}) == line


def test_a_second_server_on_the_same_folder(server: Server) -> None:
    assert server.process is not None
    said = refused("serve", "--data", str(server.data), "--port", str(free_port()))
    assert said.startswith(f"Error: another server (process {server.process.pid}) serves the data")
    listed = imaged("keys", "list", "--data", str(server.data))  # other commands share it
    assert listed.returncode == 0 and "first" in listed.stdout


def test_a_folder_of_pictures_that_is_anothers(tmp_path: Path) -> None:
    """As after one start by another user, to whom the folders in it belong."""
    (tmp_path / "data/files").mkdir(parents=True)
    inner = closed(tmp_path / "data/files/0a")
    line = refused("serve", "--data", str(tmp_path / "data"), "--port", str(free_port()))
    assert line.startswith(f"Error: pictures cannot be kept in {inner}: Permission denied")


def test_numbers_and_names_that_cannot_be(tmp_path: Path) -> None:
    for name, value in (("WORKERS", "-1"), ("HOST", ""), ("PORT", "0")):
        said = refused("serve", env={**os.environ, f"IMAGED_{name}": value}, cwd=tmp_path)
        assert said.startswith(f"Error: IMAGED_{name} should")
    assert not list(tmp_path.iterdir())


def test_the_lock_is_of_servers_with_a_store_of_their_own(tmp_path: Path) -> None:
    """A server that was killed leaves none: see test_faults.py, where one starts after it."""
    own = Settings(data=tmp_path)
    with _locked(own):
        with pytest.raises(CommandError, match=f"process {os.getpid()}"), _locked(own):
            pass
        shared = Settings(data=tmp_path, database_url="postgresql://somewhere/imaged")
        with _locked(shared), _locked(shared):
            pass
    with _locked(own):
        pass


# -- what writes files ------------------------------------------------------------------------


def test_a_picture_that_could_not_be_written_is_not_made(tmp_path: Path) -> None:
    shut = closed(tmp_path / "shut")
    (tmp_path / "folder.jpg").mkdir()
    a_file(tmp_path / "p-1.png").chmod(0o444)
    a_file(tmp_path / "d-draft.jpg").chmod(0o444)
    denied = "cannot be written: Permission denied"
    (tmp_path / "link.jpg").symlink_to("missing/x.jpg")
    (tmp_path / "blind").mkdir(mode=0)  # nobody may look into it
    for options, said in (
        (("-o", "missing/x.jpg"), "there is no folder missing"),
        (("-o", "folder.jpg"), "folder.jpg cannot be written: Is a directory"),
        (("-o", "link.jpg"), "link.jpg cannot be written: No such file or directory"),
        (("-o", "blind/in/x.jpg"), f"blind/in/x.jpg {denied}"),
        (("-o", "n" * 300 + ".jpg"), f"{'n' * 300}.jpg cannot be written: File name too long"),
        (("-o", "shut/x.jpg"), f"shut/x.jpg {denied}"),
        (("-o", "p.png", "--samples", "2"), f"p-1.png {denied}"),
        (("-o", "d.png", "--draft", "5", "--finish", "none"), f"d-draft.jpg {denied}"),
    ):
        line = refused("generate", "x", *options, cwd=tmp_path)
        assert line == f"Error: --output: {said}"  # and not a word of a checkpoint before
    assert denied in refused("generate", "x", "--seed", "7", cwd=shut)
    left = {path.name for path in tmp_path.iterdir()}
    # trying leaves nothing
    assert left == {"shut", "blind", "folder.jpg", "link.jpg", "p-1.png", "d-draft.jpg"}
    for drafts in ((), ("--draft", "5")):
        for name in ("", "/"):
            line = refused("generate", "x", "-o", name, *drafts, cwd=tmp_path)
            assert line == "Error: --output should end in .jpg, .jpeg or .png"


def test_trying_keeps_links_and_pipes(tmp_path: Path) -> None:
    link, pipe = tmp_path / "latest.jpg", tmp_path / "pipe.jpg"
    link.symlink_to("there.jpg")
    os.mkfifo(pipe)
    for path in (link, pipe):
        refuse_unwritable(path, "--output")  # a pipe without a reader would have waited
    assert link.is_symlink() and not (tmp_path / "there.jpg").exists()


def test_a_checkpoint_is_not_loaded_for_nothing(tmp_path: Path) -> None:
    data = closed(tmp_path / "data")
    copy = tmp_path / "copy"
    copy.mkdir()
    line = refused("models", "add", "x", "--checkpoint", str(copy), "--data", str(data))
    assert "cannot be written: Permission denied" in line
