"""Suites `choice` and `lambada`: short text, scored by log-likelihood as lm-evaluation-harness scores it."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from ..errors import UserError, one_line
from ..results.statistics import DECISION, PERPLEXITY, Metric
from ..results.store import Record
from .subject import Directory, Subject, Tick, digest
from .suite import Item


def read_items(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line of a JSONL file; UserError names the line that is no JSON object."""
    path = Path(source)
    try:
        with opened(path) as handle:  # not splitlines: U+2028 may stand in a JSON text
            lines = handle.read().removeprefix("\ufeff").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a .jsonl file with one item a line") from None
    except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} is empty")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path} line {number}", _object(line, f"{path} line {number}")


def opened(path: Path) -> IO[str]:
    """A text file, or one that is packed as .gz or .xz, for reading."""
    openers: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}
    return openers.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold a JSON object, not a {type(value).__name__}")
    return value


def check_choice(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """{query, choices, gold} of a multiple-choice item; UserError names what it lacks."""
    query, choices, gold = item.get("query"), item.get("choices"), item.get("gold")
    if not isinstance(query, str):
        raise UserError(f"{where} has no `query` that is text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{where} has no `choices`: a list of at least two texts is needed")
    if gold is None:
        raise UserError(f"{where} has no `gold`: give the number of the right choice, 0 for the first")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise UserError(f"{where}: `gold` is {gold!r}, not the number of one of its {len(choices)} choices")
    return {"query": query, "choices": choices, "gold": gold}


def check_passage(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """{text} of a last-word item; UserError where there is no text of at least two words."""
    text = item.get("text")
    if not isinstance(text, str) or len(text.split()) < 2:
        raise UserError(f"{where} has no `text` of at least two words")
    return {"text": text.rstrip()}


def split_tokens(directory: Directory, context: str, continuation: str) -> tuple[list[int], int]:
    """(tokens of both, how many are the continuation's), cut as lm-evaluation-harness cuts.

    Spaces at the context's end belong to the continuation; the whole is encoded at once and split behind as
    many tokens as the context alone has. An empty context is one first token.
    """
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    if not context:
        ids = list(directory.tokenizer.encode(continuation, add_special_tokens=False))
        return [directory.prefix_token(), *ids], len(ids)
    whole = directory.encode(context + continuation)
    own = max(1, len(whole) - len(directory.encode(context)))  # where tokens merge over the border: the last
    return (whole if own < len(whole) else [directory.prefix_token(), *whole]), own


@dataclass(frozen=True)
class Request:
    """One item as tokens: the sequences to score and how many tokens at the end of each count."""

    sequences: list[list[int]]
    lengths: list[int]
    content: dict[str, Any]


def _item(
    directory: Directory, window: int, number: int, context: str, continuations: list[str], content: dict[str, Any]
) -> Item:
    pairs = [split_tokens(directory, context, continuation) for continuation in continuations]
    longest = max(len(tokens) for tokens, _ in pairs)
    if longest > window + 1:  # the last token is only a target
        raise UserError(
            f"item {number} has {longest} tokens and does not fit the longest window of the directories given, "
            f"{window} tokens: shorten it or leave it out"
        )
    request = Request([tokens for tokens, _ in pairs], [length for _, length in pairs], content)
    return Item(str(number), request, sum(request.lengths) + longest)


@dataclass(frozen=True)
class Choice:
    """Multiple choice over `questions` ({query, choices, gold}). A continuation is " " + choice.

    Metrics: `acc`, the choice of the highest log-likelihood is right; `acc_norm`, the same with each
    log-likelihood divided by its choice's length in characters. Ties go to the first choice.
    """

    questions: Sequence[Mapping[str, Any]]
    name: str = "choice"
    parts: ClassVar[tuple[str, ...]] = ()

    @property
    def options(self) -> dict[str, Any]:
        return {"items": len(self.questions), "data": digest(list(self.questions))}

    def items(self, directory: Directory, window: int) -> list[Item]:
        return [
            _item(directory, window, i, q["query"], [f" {choice}" for choice in q["choices"]], dict(q))
            for i, q in enumerate(self.questions)
        ]

    def measure(self, subject: Subject, item: Item, tick: Tick) -> Record:
        request: Request = item.content
        scores = [score for score, _ in subject.continuations(request.sequences, request.lengths)]
        gold, lengths = request.content["gold"], [len(choice) for choice in request.content["choices"]]
        by_sum, by_length = int(np.argmax(scores)), int(np.argmax(np.array(scores) / lengths))
        tick(item.cost)
        return {
            "id": item.id,
            "samples": {"acc": float(by_sum == gold), "acc_norm": float(by_length == gold)},
            "scores": scores,
            "decisions": [by_sum, by_length],
            "gold": gold,
        }

    def metric(self, name: str) -> Metric:
        return Metric(DECISION, ideal=1.0)

    def extras(self, records: Sequence[Record]) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class LastWord:
    """Suite `lambada`: the last word of each of `passages` ({text}), given all before it.

    Metrics: `acc`, every token of the word is the model's first; `perplexity`, of a word given its passage.
    """

    passages: Sequence[Mapping[str, Any]]
    name: str = "lambada"
    parts: ClassVar[tuple[str, ...]] = ()

    @property
    def options(self) -> dict[str, Any]:
        return {"items": len(self.passages), "data": digest(list(self.passages))}

    def items(self, directory: Directory, window: int) -> list[Item]:
        found = []
        for i, passage in enumerate(self.passages):
            context, _, word = passage["text"].rpartition(" ")
            found.append(_item(directory, window, i, context, [f" {word}"], dict(passage)))
        return found

    def measure(self, subject: Subject, item: Item, tick: Tick) -> Record:
        ((score, greedy),) = subject.continuations(item.content.sequences, item.content.lengths)
        tick(item.cost)
        return {"id": item.id, "samples": {"acc": float(greedy), "perplexity": -score}}

    def metric(self, name: str) -> Metric:
        return Metric(DECISION, ideal=1.0) if name == "acc" else Metric(PERPLEXITY, higher_is_better=False)

    def extras(self, records: Sequence[Record]) -> dict[str, Any]:
        return {}
