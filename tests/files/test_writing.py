"""Writing that is complete or absent, and every failure of the disk as one UserError that names the target."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest

from mlx_linearard.errors import UserError
from mlx_linearard.files import disk_errors, new_directory, new_file, refuse_existing, write_json, write_text


def refused(said: str, write, *arguments) -> None:
    with pytest.raises(UserError, match=said) as caught:
        write(*arguments)
    assert "\n" not in str(caught.value)


def directory(target: Path) -> None:
    with new_directory(target) as folder:
        (folder / "file").write_text("x")


WRITERS = [lambda path: write_json(path, {"a": 1}), lambda path: write_text(path, "x"), directory]


@pytest.mark.parametrize("write", WRITERS)
def test_places_that_cannot_be_written(write, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x")
    before = sorted(tmp_path.iterdir())
    refused(r"cannot (write|make) .*text/out", write, tmp_path / "text" / "out")
    refused("cannot make .*File name too long", write, tmp_path / ("x" * 300))
    refused("cannot make .*File name too long", write, tmp_path / ("x" * 250))  # its temporary name is too long
    refused("cannot (write|make) /proc/", write, Path("/proc/out"))
    refused("not a file name", write, tmp_path / "a\0b")
    refused("not a file name", write, tmp_path / "\ud800")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO])
def test_failures_of_the_disk(code: int, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    with pytest.raises(UserError, match=r"out\.json") as caught, new_file(target) as temporary:
        temporary.write_text("half")
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """A process under `ulimit -f` gets one line, and leaves nothing."""
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself does
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_json(tmp_path / "big.json", "x" * 5000)
        except UserError as error:
            os._exit(7 if "big.json" in str(error) and "limit" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not list(tmp_path.iterdir())


def test_an_unreadable_source_is_not_blamed_on_the_target(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^/elsewhere/source: Permission denied$"), disk_errors(tmp_path / "target"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/source")


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, [1])
    with pytest.raises(RuntimeError), new_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == [1] and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "folder").mkdir()
    refused("cannot write .*folder", write_json, tmp_path / "folder", [2])


def test_half_of_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    """A path from the command line may hold bytes that are not UTF-8."""
    write_json(tmp_path / "value.json", {"path": "caf\udce9 😀"})
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8")) == {"path": "caf\ufffd 😀"}


def test_what_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse_existing(tmp_path / "empty")
    refuse_existing(tmp_path / "none")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link", "."):
        refused("already exists: remove it", refuse_existing, tmp_path / name)
    refused("File name too long", refuse_existing, tmp_path / ("x" * 300))
