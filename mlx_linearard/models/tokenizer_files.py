"""The files of a model directory's tokenizer: checked before anything loads them, and copied to a new directory.

No tokenizer runs a model's own code, asks for permission to run it, or reads a file outside the directory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import UserError
from ..files import CONFIG, GENERATION_CONFIG, TOKENIZER_FILES, read_object, reading
from .weights import plain_name

TOKENIZER_CONFIG = "tokenizer_config.json"
MORE_TEMPLATES = "additional_chat_templates"  # transformers' folder of chat templates beside the default one

# Names of a tokenizer's files in a model directory, beside those of TOKENIZER_FILES.
_PATTERNS = ("tokenizer*", "vocab*", "merges*", "chat_template*", "*.tiktoken", "tekken.json", "*.model")


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a directory's tokenizer, with its chat templates and without any Python file."""
    with reading(directory):
        files = [path for path in sorted(directory.iterdir()) if path.is_file() and _is_tokenizer_file(path.name)]
        folder = directory / MORE_TEMPLATES
        more = sorted(path for path in folder.glob("*.jinja") if path.is_file()) if folder.is_dir() else []
    return files + more


def _is_tokenizer_file(name: str) -> bool:
    if name in TOKENIZER_FILES:
        return True
    return any(fnmatchcase(name, pattern) for pattern in _PATTERNS) and not name.endswith(".py")


# -- check --


def check_settings(directory: Path) -> dict[str, str]:
    """Check tokenizer_config.json and the JSON files beside it; the files that it names, by key, with their paths.

    Raises UserError if a file is damaged, if the tokenizer needs code of the model's own, and if
    tokenizer_config.json names a file that is not in the directory.
    """
    for name in TOKENIZER_FILES:
        if name.endswith(".json") and (directory / name).is_file():
            read_object(directory / name)
    path = directory / TOKENIZER_CONFIG
    settings = read_object(path) if path.is_file() else {}
    if settings.get("auto_map"):
        raise UserError(
            f"{path} asks to run the model's own code (auto_map): tokenizers run no code here. Remove auto_map if "
            "tokenizer.json is all that the tokenizer needs"
        )
    class_name = settings.get("tokenizer_class")
    if class_name is not None and not _in_transformers(class_name):
        raise UserError(
            f"{path}: tokenizer_class {str(class_name)[:80]!r} is not a tokenizer of transformers, so it needs code of "
            "the model's own, which is not run here. Write PreTrainedTokenizerFast if tokenizer.json is all it needs"
        )
    named = {}
    for key, value in _named_files(settings):
        if not plain_name(value) or not (directory / value).is_file():
            raise UserError(f"{path}: {key} names {value[:200]!r}, which is not a file of its directory: remove {key}")
        named[key] = str(directory / value)
    return named


def _in_transformers(name: Any) -> bool:
    """Whether `name` is a tokenizer class that transformers itself has."""
    if not isinstance(name, str) or not name.isidentifier():
        return False
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    stem = name.removesuffix("Fast")
    for candidate in (name, stem, f"{stem}Fast"):
        known = tokenizer_class_from_name(candidate)
        if isinstance(known, type) and issubclass(known, PreTrainedTokenizerBase):
            return True
    return False


def _named_files(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of tokenizer_config.json that name files, with each name."""
    for key, value in settings.items():
        if key.endswith(("_file", "_files")) or key in ("vocab", "merges"):
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str):
                    yield key, name


# -- copy --


def copy_tokenizer(source: Path, target: Path, *, window: int | None = None) -> None:
    """Copy the tokenizer's files and generation_config.json from one model directory to another.

    With `window`, the new model's window, the limits that follow the window of `source` follow the new one:
    `model_max_length`, tokenizer.json's truncation, and generation_config.json's `max_length`.
    """
    for path in tokenizer_files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    if (source / GENERATION_CONFIG).is_file():
        shutil.copyfile(source / GENERATION_CONFIG, target / GENERATION_CONFIG)
    if window is None:
        return
    old = read_object(source / CONFIG).get("max_position_embeddings")
    if _number(old):
        for name, keys in (
            (TOKENIZER_CONFIG, ("model_max_length",)),
            ("tokenizer.json", ("truncation", "max_length")),
            (GENERATION_CONFIG, ("max_length",)),
        ):
            _follow_window(target / name, keys, old, window)


def _follow_window(path: Path, keys: tuple[str, ...], old: float, new: int) -> None:
    """Raise the limit at `keys` of a JSON file to the new window, if it is at least the old one and below the new."""
    if not path.is_file():
        return
    value = read_object(path)
    holder: Any = value
    for key in keys[:-1]:
        holder = holder.get(key)
        if not isinstance(holder, dict):
            return
    limit = holder.get(keys[-1])
    if _number(limit) and old <= limit < new:
        holder[keys[-1]] = new
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
