"""Measurements kept for later evaluations and runs in the user's cache, found by everything that they depend on.

Each is a small JSON file that holds what it depends on and the measurement. A file that is damaged or cannot be read
counts as missing, and one that cannot be written is left out: a cache must not stop a measurement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json, write_json

FORM = 1  # of the measurements; another version whose numbers differ gets another
VARIABLE = "MLX_LINEARARD_CACHE"  # another folder for these files; empty: none are kept
LIMIT = 64 << 20  # bytes of all files; the ones that were used longest ago are removed first
_NAME = re.compile(r"[0-9a-f]{40}\.json")


class Kept:
    """The measurements in one folder, which several processes may use at the same time."""

    def __init__(self, folder: Path, limit: int = LIMIT):
        self.folder, self.limit = folder, limit

    @classmethod
    def of_user(cls) -> Kept | None:
        """The user's own, in the folder that MLX_LINEARARD_CACHE names; None if that is empty, or without a home."""
        if (folder := os.environ.get(VARIABLE)) is not None:
            return cls(Path(folder)) if folder else None
        try:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:
            return None
        return cls(Path(base) / "mlx_linearard" / "evaluations")

    def read(self, depends_on: Any) -> Any:
        """The measurement, a JSON value; None if there is none."""
        path = self._path(depends_on)
        try:
            if not path.exists():
                return None
            value = read_json(path)
            with contextlib.suppress(OSError):
                os.utime(path)  # it was used now
        except (UserError, OSError):
            return None
        if not isinstance(value, dict) or value.get("depends_on") != json.loads(json.dumps([FORM, depends_on])):
            return None
        return value.get("measured")

    def write(self, depends_on: Any, measured: Any) -> None:
        """Keep a measurement, in place of an earlier one that depends on the same."""
        with contextlib.suppress(UserError, OSError, ValueError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._path(depends_on), {"depends_on": [FORM, depends_on], "measured": measured})
            self._bound()

    def _path(self, depends_on: Any) -> Path:
        name = hashlib.sha256(json.dumps([FORM, depends_on], sort_keys=True).encode()).hexdigest()[:40]
        return self.folder / f"{name}.json"

    def _bound(self) -> None:
        """Remove the files used longest ago until the others are within the limit; other files stay."""
        files = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        states = sorted(((path.stat().st_mtime_ns, path.stat().st_size, path) for path in files), reverse=True)
        total = 0
        for _, size, path in states:
            total += size
            if total > self.limit:
                path.unlink(missing_ok=True)
