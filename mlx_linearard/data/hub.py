"""Data sets of the hub, as a stream of rows, through the extra `datasets`."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import UserError, one_line
from ..files import without_surrogates
from .rows import Conversation, TextRow, documents_from

HUB_PREFIX = "hf:"
HUB_FORM = f"{HUB_PREFIX}NAME[:CONFIG][@SPLIT]"
_NAME = re.compile(r"([^:@\s]+)(?::([^:@\s]+))?(?:@(\S+))?")
NAMES = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}  # what the hub calls a split


class HubSource(NamedTuple):
    """A data set of the hub: its name, its configuration and its split, the last two if they are given."""

    name: str
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, source: str) -> HubSource:
        """The parts of hf:NAME[:CONFIG][@SPLIT]; UserError if it is not of this form."""
        match = _NAME.fullmatch(source.removeprefix(HUB_PREFIX))
        if match is None:
            raise UserError(f"{source} does not name a data set of the hub: give {HUB_FORM}")
        name, config, split = match.groups()
        if split and "[" in split:
            raise UserError(f"{source} names a part of a split, which a stream does not have: give {HUB_FORM}")
        return cls(name, config, split)


def read_hub(source: str, splits: Sequence[str]) -> Iterator[TextRow | Conversation]:
    """The documents of hf:NAME[:CONFIG][@SPLIT]; without a split, the first of `splits` that the data set has."""
    asked = HubSource.parse(source)
    split = asked.split or _first_split(source, asked, splits)
    yield from documents_from(_rows(source, asked, split), source)


def hub_has_split(source: str, split: str) -> bool:
    """Whether hf:NAME names no split, and its data set has `split` (train, valid or test)."""
    asked = HubSource.parse(source)
    return asked.split is None and any(name in NAMES[split] for name in _split_names(source, asked))


def _first_split(source: str, asked: HubSource, splits: Sequence[str]) -> str:
    if tuple(splits) == ("train",):
        return "train"  # nearly every set has it: no question to the hub
    have = _split_names(source, asked)
    for name in (name for split in splits for name in NAMES[split]):
        if name in have:
            return name
    raise UserError(f"{source} has no split {' or '.join(splits)}, but {', '.join(have)}: give {HUB_FORM}")


def _split_names(source: str, asked: HubSource) -> list[str]:
    datasets = _library(source)
    with _hub_errors(source):
        return [str(name) for name in datasets.get_dataset_split_names(asked.name, asked.config)]


def _rows(source: str, asked: HubSource, split: str) -> Iterator[tuple[str, Any]]:
    datasets = _library(source)
    with _hub_errors(source):
        rows = iter(datasets.load_dataset(asked.name, asked.config, split=split, streaming=True))
    number = 0
    while True:
        with _hub_errors(source):
            row = next(rows, None)
        if row is None:
            return
        number += 1
        yield f"{source} row {number}", without_surrogates(dict(row))


def _library(source: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise UserError(f"{source} needs the extra `datasets`: pip install 'mlx-linearard[datasets]'") from None


@contextlib.contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """The hub's client raises errors of many types for a wrong name or without a network: each is a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source} cannot be loaded: {one_line(error)}") from None
