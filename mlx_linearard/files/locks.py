"""The operating system's locks of files and folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .names import LOCK
from .reading import shown
from .writing import disk_errors


@contextlib.contextmanager
def locked(path: str | Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the operating system's lock of `path` while the block runs.

    Only one process holds the lock at a time. The system releases the lock when its process ends, however it ends.
    The lock of a directory is a file LOCK inside the directory, the lock of a file is `.NAME.lock` beside it;
    the block's end removes it. A file system without locks is used without one.

    Args:
        path: an existing directory, or a file that may not exist yet.
        wait: seconds to wait for another holder.
    Raises:
        UserError: another process holds the lock, or the lock file cannot be made.
    """
    path = Path(path)
    lock = path / LOCK if path.is_dir() else path.with_name(f".{path.name}.lock")
    end = time.monotonic() + wait
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        while (handle := _lock(lock)) is None:
            if time.monotonic() >= end:
                raise UserError(f"{shown(path)} is in use by another process: wait until it ends, or write elsewhere")
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # removed while the lock is held, because only its holder may remove it
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
