"""The text of a run: what is trained on, what is held out, and of which kind both are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ..config import DistillConfig
from ..data import (
    VALIDATED,
    Document,
    Stream,
    Tokenizer,
    check_ids,
    first_token,
    has_split,
    has_template,
    python_prose,
    read_pieces,
    read_stream,
    split,
    windows,
)
from ..errors import UserError
from ..results.info import TextInfo
from .listener import Listener
from .plan import Plan
from .timing import held_out_windows


@dataclass(frozen=True)
class Text:
    """The tokens of a run.

    training: (N,) int32. held_out: by length, windows (n, length + 1) int32. long: the stream of --long-data, None
    without one. long_starts: (D,) int64, where each document of the text of long blocks begins. first: the token that
    each block begins with, if the model needs one. answers: (N,) bool, the training tokens that count in
    cross-entropy, None if all do.
    """

    training: np.ndarray
    held_out: dict[int, np.ndarray]
    long: np.ndarray | None = None
    long_starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    first: int | None = None
    answers: np.ndarray | None = None
    kinds: TextInfo = field(default_factory=TextInfo)


def read_text(plan: Plan, tokenizer: Tokenizer, listener: Listener) -> Text:
    """Training tokens and held-out windows.

    Raises:
        UserError: the text is missing, damaged or too short for one held-out window, or the model has no embedding
            for one of its tokens.
    """
    config, sizing = plan.config, plan.sizing
    listener.say(f"reading {config.data or 'the prose of this Python'}")
    training, held_out = _streams(config, tokenizer, sizing.held_out)
    by_length = {n: windows(held_out.tokens, n, held_out_windows(sizing.eval_tokens, n)) for n in sizing.eval_lengths}
    if not len(by_length[sizing.eval_lengths[0]]):
        raise UserError(
            f"the held-out text has {len(held_out.tokens)} tokens, too few for one block of {sizing.eval_lengths[0]}: "
            "give more text with --data or --valid-data, or a shorter --seq-len"
        )
    long = _stream(read_pieces(config.long_data), tokenizer, config) if config.long_data else None
    first = first_token(tokenizer, plan.native)
    for stream in (training, held_out, *([long] if long else [])):
        check_ids(stream.tokens, plan.native, plan.path)
    check_ids([] if first is None else [first], plan.native, plan.path)
    kinds = TextInfo(tuple(training.kinds), tuple(held_out.kinds), has_template(tokenizer))
    if kinds.warning:
        listener.say(f"note: {kinds.warning}")
    by_length = {n: cut for n, cut in by_length.items() if len(cut)}
    long_tokens = long.tokens if long else None
    starts = (long or training).starts
    return Text(training.tokens, by_length, long_tokens, starts, first, training.answers, kinds)


def documents_of(config: DistillConfig) -> Iterable[Document]:
    """The documents of the training text."""
    return read_pieces(config.data) if config.data else python_prose()


def held_out_source(config: DistillConfig) -> str | None:
    """--valid-data, or --data if it has a split that is held out; None if the end of --data is held out."""
    if config.valid_data:
        return config.valid_data
    return config.data if config.data and has_split(config.data, "valid") else None


def _streams(config: DistillConfig, tokenizer: Tokenizer, held_out: int) -> tuple[Stream, Stream]:
    """(training, held-out): --valid-data, the valid.jsonl of --data, or the last `held_out` tokens of --data."""
    training = _stream(documents_of(config), tokenizer, config, mask_prompt=config.mask_prompt)
    if source := held_out_source(config):
        return training, _stream(read_pieces(source, VALIDATED), tokenizer, config)
    tokens, rest = split(training.tokens, held_out)
    answers = None if training.answers is None else training.answers[: len(tokens)]
    starts = training.starts[training.starts < len(tokens)]
    training = dataclasses.replace(training, tokens=tokens, starts=starts, answers=answers)
    return training, dataclasses.replace(training, tokens=rest)


def _stream(
    documents: Iterable[Document], tokenizer: Tokenizer, config: DistillConfig, *, mask_prompt: bool = False
) -> Stream:
    return read_stream(documents, tokenizer, limit=config.data_tokens, mask_prompt=mask_prompt)
