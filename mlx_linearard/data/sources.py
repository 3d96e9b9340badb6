"""Sources of documents: a file, a folder of files, a data set in mlx-lm's folder form, or a data set of the hub."""

from __future__ import annotations

import importlib
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from ..files import reading
from .forms import FORMS, ROWS, TEXTS, form_of, read_file, suffixes
from .hub import HUB_FORM, HUB_PREFIX, NAMES, hub_has_split, read_hub
from .rows import Document, text_of

# Which split of a data set is read, in order of preference.
TRAINED, VALIDATED, EVALUATED = ("train",), ("valid",), ("test", "valid")


def read_documents(source: str) -> Iterator[str]:
    """The documents of `source` as complete texts; see `read_pieces`."""
    return map(text_of, read_pieces(source))


def read_pieces(source: str, splits: Sequence[str] = TRAINED) -> Iterator[Document]:
    """The documents of `source`: rows, and texts as their pieces, which must be read before the next document.

    Args:
        source: a file of text or rows (see `FORMS`), a folder of .txt and .md, a folder with train.jsonl, valid.jsonl
            and test.jsonl, or hf:NAME[:CONFIG][@SPLIT]. A lone surrogate in JSON becomes U+FFFD.
        splits: of a data set with splits, the first of these that it has is read.
    Raises:
        UserError: the source is missing, empty, binary, damaged, or has none of the splits.
    """
    if source.startswith(HUB_PREFIX):
        return read_hub(source, splits)
    path = Path(source)
    return _folder(path, splits) if _is_folder(path) else read_file(path)


def has_split(source: str, split: str) -> bool:
    """Whether `source` is a data set with splits and has this one: train, valid or test."""
    if source.startswith(HUB_PREFIX):
        return hub_has_split(source, split)
    path = Path(source)
    return _is_folder(path) and split in _split_files(path)


def _is_folder(path: Path) -> bool:
    with reading(path):
        try:
            return stat.S_ISDIR(path.stat().st_mode)
        except FileNotFoundError:
            raise UserError(
                f"{path} does not exist: give {FORMS}; a folder of text or with train.jsonl; or {HUB_FORM}"
            ) from None


def _folder(path: Path, splits: Sequence[str]) -> Iterator[Document]:
    found = _split_files(path)
    if found:
        split = next((split for split in splits if split in found), None)
        if split is None:
            names = " and ".join(file.name for file in found.values())
            raise UserError(
                f"{path} holds {names}, but no {' or '.join(f'{split}.jsonl' for split in splits)}: add it, or name "
                "the file to read"
            )
        yield from read_file(found[split])
        return
    texts = _texts(path)
    if not texts:
        raise UserError(f"{path} holds no .txt or .md, and no train.jsonl: put text there, or give a file ({FORMS})")
    for file in texts:
        yield from read_file(file)


def _texts(path: Path) -> list[Path]:
    with reading(path):
        next(path.iterdir(), None)  # raises without permission, where rglob yields nothing
        return sorted(p for p in path.rglob("*") if form_of(p) in TEXTS and p.is_file())


def _split_files(path: Path) -> dict[str, Path]:
    """The file of each split in a folder in mlx-lm's form; {} if the folder has another form.

    A folder of text may hold a valid.jsonl or a test.jsonl for another purpose; only train.jsonl makes it a data set.
    """
    with reading(path):
        found = {}
        for split, names in NAMES.items():
            files = (path / f"{name}{suffix}" for form in ROWS for name in names for suffix in suffixes(form))
            if file := next((file for file in files if file.is_file()), None):
                found[split] = file
    return found if "train" in found or not (found and _texts(path)) else {}


def python_prose() -> Iterator[str]:
    """The prose in every Python installation: its language reference, as pydoc shows it."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise UserError("this Python has no documentation to train on: give text with --data") from None
    for name in sorted(topics):
        yield topics[name]
