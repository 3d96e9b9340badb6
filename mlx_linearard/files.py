"""Names of the files that rooms share, and writing that leaves either the whole thing or nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

# A model directory, as transformers and mlx-lm name its files.
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# mlx-lm's adapter directory.
ADAPTERS = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


# What tempfile makes of the names below: .NAME.xxxxxxxx, .NAME.old.xxxxxxxx, .NAME.xxxxxxxx.suffix.
_TEMPORARY = re.compile(r"\.(?P<name>.+?)(?P<old>\.old)?\.[a-z0-9_]{8}(\.\w+)?")


class RunDir:
    """The paths of a run directory (the contract that users and checks rely on)."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.adapters = self.root / "adapters"
        self.base = self.root / "base"
        self.model = self.root / "model"
        self.checkpoints = self.root / "checkpoints"
        self.results = self.root / "results.json"
        self.report = self.root / "report.html"
        self.report_markdown = self.root / "report.md"
        self.before = self.root / "before.json"  # native and scaled, kept for a resumed run
        self.evaluations = self.root / "evaluations.jsonl"  # of --eval-every
        self.held_out = self.root / "held_out.json"  # each model's numbers by piece of held-out text, for paired tests
        self.items = self.root / "results.items"  # what `evaluate` has measured, item by item
        self.comparison = self.root / "comparison.json"  # what the runs of a --compare have in common


def read_json(path: str | Path) -> Any:
    """The JSON value in `path`; UserError where it is missing, unreadable or not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """A model directory's config.json as a dict; UserError where it is missing or not an object."""
    config = read_json(Path(model_dir) / CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{Path(model_dir) / CONFIG} must hold a JSON object, not {type(config).__name__}")
    return config


@contextlib.contextmanager
def disk_errors(target: str | Path, need: int | None = None) -> Iterator[None]:
    """Turn a full disk, a read-only place or a missing permission into a UserError that names `target`.

    `need` is how many bytes `target` takes; where they are not there the block does not begin.
    """
    try:
        if need is not None and _free(target) < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(_no_space(target, need)) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
            raise UserError(f"cannot write {target}: {error.strerror}; choose another place") from None
        if error.errno in (errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG) and _beside(error, Path(target)):
            raise UserError(f"cannot make {target} ({error.strerror}): choose another place") from None
        raise
    except RuntimeError as error:  # mlx reports a failed write of safetensors this way
        if "write" in str(error).lower() and "fail" in str(error).lower():
            if need is not None and _free(target) < need:
                raise UserError(_no_space(target, need)) from None
            raise UserError(f"cannot write {target}: {error}") from None
        raise


def _no_space(target: str | Path, need: int | None) -> str:
    needed = "" if need is None else f", {need / 1e6:.1f} MB needed"
    return (
        f"no space left on the disk that holds {target} ({_free(target) / 1e6:.1f} MB free{needed}): "
        "free some, or write elsewhere"
    )


def _free(target: str | Path) -> int:
    """Bytes free on the disk that holds, or would hold, `target`."""
    return shutil.disk_usage(existing_parent(Path(target))).free


def _beside(error: OSError, target: Path) -> bool:
    """Whether an error is about `target`, a temporary file beside it, or a folder above it."""
    if not isinstance(error.filename, str):
        return False
    failed = Path(error.filename).absolute()
    return failed.parent == target.absolute().parent or failed in target.absolute().parents


def existing_parent(path: Path) -> Path:
    """The nearest of `path` and the folders above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """A temporary path beside `target`; synced and renamed to it when the block ends well, else removed."""
    target = Path(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
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
def new_directory(target: str | Path, *, overwrite: bool = False, need: int | None = None) -> Iterator[Path]:
    """A temporary directory beside `target`, renamed to it when the block ends well, else removed.

    `need` is how many bytes will be written, if that is known: UserError where the disk has fewer.

    An existing `target` is refused unless it is an empty directory or `overwrite` is set; it is
    replaced only after the new one is whole.
    """
    target = Path(target)
    if not overwrite:
        refuse_existing(target)
    with disk_errors(target, need):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    _sync(path)
            temporary.chmod(0o755)
            _swap(temporary, target)
            _sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(target: str | Path) -> None:
    """UserError where `target` is a file or a directory that holds something."""
    target = Path(target)
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} already exists: remove it, choose another name, or pass --overwrite")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _swap(temporary: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        target.replace(old)
        temporary.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.replace(target)


def sweep(folder: Path) -> None:
    """Remove what a killed process left of new files and directories in `folder`.

    Where it was killed while a whole directory took another's place, and neither is there, the old one comes back.
    """
    for path in sorted(folder.glob(".*")):
        if not (found := _TEMPORARY.fullmatch(path.name)):
            continue
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif found["old"] and any(path.iterdir()) and not (folder / found["name"]).exists():
            path.replace(folder / found["name"])
        else:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: str | Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the operating system's lock of `path` while the block runs.

    Only one process holds the lock at a time. The system releases the lock when its process ends, however it ends.
    The lock of a directory is a file `.lock` inside the directory, the lock of a file is `.NAME.lock` beside it;
    the block's end removes it. A file system without locks is used without one.

    Args:
        path: an existing directory, or a file that may not exist yet.
        wait: seconds to wait for another holder.
    Raises:
        UserError: another process holds the lock, or the lock file cannot be made.
    """
    path = Path(path)
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    end = time.monotonic() + wait
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        while (handle := _lock(lock)) is None:
            if time.monotonic() >= end:
                raise UserError(f"{path} is in use by another process: wait until it ends, or write elsewhere")
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while the lock is held: nobody else removes a lock that is not theirs
        os.close(handle)


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def _lock(path: Path) -> int | None:
    """An open handle that holds the lock of the file `path`; None if another handle holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    except (BlockingIOError, FileNotFoundError):  # held, or removed by the holder since it was opened
        pass
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return handle
        os.close(handle)
        raise
    os.close(handle)
    return None
