"""Writing: a file or directory is complete or absent, and every failure becomes a UserError that names it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from .names import MARKER
from .reading import read_object, shown, without_surrogates

_ADDED_TEXT = "added"  # the marker's note of what `add_file` wrote: digests by name
_MADE = "made"  # the marker's note of what a directory was made from
_WRITTEN_BY = "mlx-linearard"  # this tool's name in the marker

# The names that tempfile makes below: .NAME.new-xxxxxxxx, for files with their suffix, and .NAME.old-xxxxxxxx.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<kind>new|old)-[a-z0-9_]{8}(\.\w+)?")

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EIO)
_IMPOSSIBLE = (errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.EINVAL, errno.EILSEQ)


@contextlib.contextmanager
def disk_errors(target: str | Path, need: int | None = None) -> Iterator[None]:
    """Turn a full disk, a read-only place, a size limit or a bad name into a UserError that names `target`.

    `need` is the number of bytes that `target` takes. If the disk has fewer, the block does not begin.
    """
    try:
        if need is not None and _free(target) < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(_no_space(target, need)) from None
        if error.errno == errno.EFBIG:
            raise UserError(
                f"cannot write {shown(target)}: {error.strerror}; raise the limit (ulimit -f) or write elsewhere"
            ) from None
        if not _about(error, Path(target)) and error.errno in (*_REFUSED, *_IMPOSSIBLE):  # another file, being read
            raise UserError(f"{shown(error.filename)}: {error.strerror}") from None
        if error.errno in _REFUSED:
            raise UserError(f"cannot write {shown(target)}: {error.strerror}; choose another place") from None
        if error.errno in _IMPOSSIBLE and error.filename is not None:
            raise UserError(f"cannot make {shown(target)} ({error.strerror}): choose another place") from None
        raise
    except UnicodeEncodeError:
        if _encodes(target):
            raise
        raise UserError(f"cannot make {shown(target)}: not a file name that this system can hold") from None
    except ValueError as error:
        if str(error) != "embedded null byte":
            raise
        raise UserError(f"cannot make {shown(target)}: not a file name") from None
    except RuntimeError as error:  # mlx reports a failed write of safetensors this way
        text = str(error).lower()
        if "write" in text and ("fail" in text or "unable" in text):
            if need is not None and _free(target) < need:
                raise UserError(_no_space(target, need)) from None
            raise UserError(f"cannot write {shown(target)}: {one_line(error)}") from None
        raise


def _no_space(target: str | Path, need: int | None) -> str:
    needed = "" if need is None else f", {need / 1e6:.1f} MB needed"
    return (
        f"no space left on the disk that holds {shown(target)} ({_free(target) / 1e6:.1f} MB free{needed}): "
        "free some, or write elsewhere"
    )


def _free(target: str | Path) -> int:
    """Bytes free on the disk that holds, or would hold, `target`."""
    return shutil.disk_usage(existing_parent(Path(target))).free


def _about(error: OSError, target: Path) -> bool:
    """Whether an error is about `target`, a file inside or beside it, or a folder above it, and no other file."""
    if not isinstance(error.filename, str):
        return True
    failed, target = Path(error.filename).absolute(), target.absolute()
    return failed.is_relative_to(target.parent) or failed in target.parents


def _encodes(path: str | Path) -> bool:
    """Whether this system can hold a file of that name."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def existing_parent(path: Path) -> Path:
    """The nearest of `path` and the folders above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """A temporary path beside `target`, synced and renamed to it if the block ends without an error, else removed."""
    target = Path(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.new-", suffix=target.suffix, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _sync(temporary)
            temporary.chmod(0o644)
            temporary.replace(target)
            _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(
    target: str | Path,
    *,
    overwrite: bool = False,
    sources: Iterable[str | Path] = (),
    need: int | None = None,
    marker: bool = True,
) -> Iterator[Path]:
    """A temporary directory beside `target`, renamed to it if the block ends without an error, else removed.

    An existing `target` is refused unless it is an empty directory, or `overwrite` is set and `check_overwrite`
    allows it. It is replaced only after the new directory is complete. The new directory gets a marker file that
    lists the other files in it.

    Args:
        sources: the files and directories that are read; `check_overwrite` refuses a target that overlaps them.
        need: the number of bytes that will be written, if known: UserError if the disk has fewer.
        marker: whether to write and demand the marker; not for parts of a directory that only this tool uses.
    """
    target = Path(target)
    sources = tuple(sources)

    def check() -> None:
        if overwrite and marker:
            check_overwrite(target, sources)
        elif not overwrite:
            refuse_existing(target)

    check()
    with disk_errors(target, need):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        try:
            yield temporary
            if marker:
                _mark(temporary)
            for path in temporary.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    _sync(path)
            temporary.chmod(0o755)
            check()  # again: the block may have run for hours
            _swap(temporary, target)
            _sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(target: str | Path) -> None:
    """UserError if `target` is a file, or a directory that is not empty."""
    target = Path(target)
    with disk_errors(target):
        if _is_empty_directory(target):
            _refuse_place(target)
        elif os.path.lexists(target):
            raise UserError(f"{shown(target)} already exists: remove it, choose another name, or pass --overwrite")


def check_overwrite(target: str | Path, sources: Iterable[str | Path] = ()) -> None:
    """UserError if `target` exists and is not a directory that this tool wrote, with nothing else in it.

    Refused too: a link, the current directory or one above it, the home directory or one above it, a mounted disk,
    and any directory that contains, is, or is inside one of `sources`.
    """
    target = Path(target)
    with disk_errors(target):
        if target.is_symlink():
            raise UserError(f"{shown(target)} is a link, which --overwrite does not replace: name the directory itself")
        if not target.exists():
            return
        if not target.is_dir():
            raise UserError(f"{shown(target)} is a file, which --overwrite does not replace: choose another name")
        _refuse_place(target)
        if _is_empty_directory(target):
            return
        for source in sources:
            if relation := _relation(target, Path(source)):
                raise UserError(f"{shown(target)} {relation} the source {shown(source)}: choose another target")
        if foreign := _not_written_here(target):
            raise UserError(
                f"{shown(target)} {foreign}, so --overwrite leaves it alone: move it or choose another name"
            )


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _refuse_place(target: Path) -> None:
    """UserError for a directory that no output may replace, even if it is empty."""
    places = {"the current directory": Path.cwd, "the home directory": Path.home}
    for name, find in places.items():
        try:
            place = find()
        except (OSError, RuntimeError):  # removed, or no HOME
            continue
        relation = _relation(target, place)
        if relation in ("is", "contains"):
            raise UserError(f"{shown(target)} {relation} {name}: choose another target")
    if target.resolve().is_mount():
        raise UserError(f"{shown(target)} is a mounted disk: choose a directory on it")


def _relation(target: Path, other: Path) -> str | None:
    """Whether the directory `target` "is", "contains" or "is inside" `other`, which may be a file; None if none holds.

    Directories are compared by identity, because names may differ in case on some disks.
    """
    others = [other.absolute(), other.resolve()]
    if any(_same(target, path) for path in others):
        return "is"
    if any(_same(target, parent) for path in others for parent in path.parents):
        return "contains"
    return "is inside" if any(_same(parent, other) for parent in target.resolve().parents) else None


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of the two does not exist
        return False


# Files that an operating system adds to directories.
_ADDED = (".DS_Store", ".localized", "Thumbs.db", "desktop.ini")


def _files_in(directory: Path) -> set[str]:
    """The paths in `directory` of all its files and links, at any depth, without the marker."""
    paths: set[str] = set()
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        paths.update(str((Path(folder) / name).relative_to(directory).as_posix()) for name in (*files, *links))
    return {path for path in paths if path != MARKER and path.rpartition("/")[2] not in _ADDED}


def add_file(directory: Path, name: str, text: str) -> None:
    """Write a text file into a directory that this tool wrote; its marker lists the file and what it holds."""
    ours = _not_written_here(directory) is None
    write_text(directory / name, text)
    if ours:
        marker = directory / MARKER
        noted = read_object(marker)
        added = {**_added(noted), name: _digest(directory / name)}
        _mark(directory, {**noted, _ADDED_TEXT: added})


def is_as_added(directory: Path, name: str) -> bool:
    """Whether a file of a directory is missing, or holds what `add_file` wrote: nobody has changed it since."""
    path = directory / name
    with contextlib.suppress(UserError), disk_errors(directory):
        return not os.path.lexists(path) or _added(read_object(directory / MARKER)).get(name) == _digest(path)
    return False


def _added(marker: Mapping[str, Any]) -> dict[str, Any]:
    """The digests of added files by name."""
    added = marker.get(_ADDED_TEXT)
    return added if isinstance(added, dict) else {}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def remember(directory: Path, made: Mapping[str, Any]) -> None:
    """Note in the marker of a finished directory what it was made from; the note must be JSON."""
    marker = directory / MARKER
    write_json(marker, {**read_object(marker), _MADE: dict(made)})


def remembered(directory: Path) -> Any:
    """What `remember` noted, if the directory is one that this tool wrote, with nothing else in it; else None."""
    with contextlib.suppress(UserError):
        check_overwrite(directory)
        return read_object(directory / MARKER).get(_MADE)
    return None


def _mark(directory: Path, noted: Mapping[str, Any] | None = None) -> None:
    """Write the marker, by which `check_overwrite` recognises the directory; `noted` stands in it already."""
    marks = {**(noted or {}), "written_by": _WRITTEN_BY, "files": sorted(_files_in(directory))}
    listed = json.dumps(marks, indent=2)
    (directory / MARKER).write_text(f"{listed}\n", encoding="utf-8", errors="backslashreplace")


def _not_written_here(directory: Path) -> str | None:
    """Why a directory is not one that this tool wrote; None if it is."""
    marker = directory / MARKER
    unmarked = f"has no valid file {MARKER}, which marks what this tool wrote"
    if marker.is_symlink() or not marker.is_file():
        return unmarked
    try:
        value = read_object(marker)
    except UserError:
        return unmarked
    listed = value.get("files")
    if value.get("written_by") != _WRITTEN_BY or not isinstance(listed, list):
        return unmarked
    others = sorted(_files_in(directory) - {str(name) for name in listed})
    return f"holds {shown(others[0])}, which this tool did not write" if others else None


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, complete or not at all. Half of a surrogate pair becomes U+FFFD."""
    with new_file(path) as temporary:
        temporary.write_text(without_surrogates(text), encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, complete or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _swap(temporary: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        target.replace(old)
        temporary.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.replace(target)


def sweep(folder: Path) -> None:
    """Remove the temporary files and directories of a killed process from `folder`.

    If the process was killed between the two renames of `_swap`, the old directory gets its name back.
    """
    for path in sorted(folder.glob(".*")):
        if not (match := _TEMPORARY.fullmatch(path.name)):
            continue
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif match["kind"] == "old" and any(path.iterdir()) and not (folder / match["name"]).exists():
            path.replace(folder / match["name"])
        else:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
