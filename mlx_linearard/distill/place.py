"""Whether a run or a comparison can be written to its --output. Nothing here leaves a file behind."""

from __future__ import annotations

import os
from pathlib import Path

from ..config import DistillConfig
from ..errors import UserError
from ..files import LOCK, RunDir, check_overwrite, disk_errors, existing_parent, locked


def check_output(config: DistillConfig, run: RunDir) -> None:
    """UserError if the run cannot be written to `run`."""
    with disk_errors(run.root):  # a name that is too long, or a folder without permission
        if run.comparison.exists():
            raise UserError(
                f"--output {run.root} holds a comparison: give --compare as well, or choose another directory"
            )
        holds = run.config.exists() or run.checkpoints.exists()
        check_place(config, run.root, "run", holds=holds, missing="checkpoint to resume from")
        check_model_stays(config, run.root)
        check_directories(config, run)


def check_directories(config: DistillConfig, run: RunDir) -> None:
    """UserError if a directory that a run replaces holds a file that this tool did not write."""
    for folder in (run.model, run.adapters, run.base):
        if not (config.overwrite and folder.is_symlink()):  # --overwrite removes the link, not its target
            check_overwrite(folder)


def check_place(config: DistillConfig, root: Path, kind: str, *, holds: bool, missing: str) -> None:
    """UserError if a `kind` cannot be written to `root`.

    Args:
        kind: "run" or "comparison".
        holds: whether `root` holds one.
        missing: what --resume needs, for the message.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"--output {root} is a file: choose a directory")
    if config.resume and not holds:
        raise UserError(f"--resume: {root} holds no {missing}: leave out --resume, or name another --output")
    if holds and not (config.resume or config.overwrite):
        raise UserError(
            f"--output {root} already holds a {kind}: pass --resume to continue it, --overwrite to replace it"
        )
    if config.overwrite and root.is_symlink():
        raise UserError(f"--output {root} is a link, which --overwrite does not replace: name the directory itself")
    if root.is_dir() and not holds and any(path.name != LOCK for path in root.iterdir()):
        raise UserError(f"--output {root} exists and is not a {kind}: choose another directory")
    if not config.dry_run:
        _check_writable(root)


def check_model_stays(config: DistillConfig, root: Path) -> None:
    """UserError if --overwrite would remove the model that the run reads."""
    if not config.overwrite or not config.model or not Path(config.model).exists():
        return
    if Path(config.model).resolve().is_relative_to(root.resolve()):
        raise UserError(f"--overwrite would remove --model {config.model}: choose another --output")


def check_not_in_use(config: DistillConfig, root: Path) -> None:
    """UserError if another process writes to `root`; the run's opening checks again."""
    if root.is_dir() and not config.dry_run:
        with locked(root):
            pass


def _check_writable(target: Path) -> None:
    """UserError if `target` cannot be made or written; nothing stays behind."""
    parent = existing_parent(target)
    if not parent.is_dir():
        raise UserError(f"--output {target}: {parent} is not a directory; choose another place")
    for part in target.absolute().relative_to(parent).parts:
        (parent / part).exists()  # raises OSError if the file system cannot hold the name
    probe = parent / f".linearard-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(f"--output {target} cannot be written ({error.strerror}): choose another place") from None
