"""A model named by its user -> a directory on this disk."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import UserError, one_line

# What is fetched of a repository: never code, never pickles.
PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(name: str) -> Path:
    """The local directory of a path or hub repository; UserError where it is neither or cannot be fetched."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"--model {name} is a file: give the model's directory (a GGUF goes through `convert from-gguf`)")
    if not _REPOSITORY.fullmatch(name):
        raise UserError(f"--model {name} does not exist: give a model directory or a hub repository (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as error:  # the client raises many kinds; all mean that the repository is not to be had
        raise UserError(
            f"--model {name} is no local directory and cannot be fetched from the hub: {one_line(error)[:200]}"
        ) from None
