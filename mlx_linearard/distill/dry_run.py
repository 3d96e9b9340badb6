"""A dry run: the plan is checked against the text, and nothing is written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

from ..data import Conversation, Document, TextRow, Tokenizer, tokenize
from ..distributed.ranks import ALONE, Ranks
from ..models.tokenizer import tokenizer_of
from .amounts import Amount
from .listener import Listener
from .plan import Plan
from .prepare import amount_of, blocks_of, long_part_of, with_long_text
from .text import documents_of, held_out_source, read_text

COUNTING_SECONDS = 10.0  # the tokens of a long text are counted for this long
NOTHING_WRITTEN = "nothing was written"


def check_text(plan: Plan, *, listener: Listener | None = None, ranks: Ranks = ALONE) -> None:
    """UserError if the text is missing, damaged or too short; says how much there is. Reads no weights."""
    listener = listener or Listener()
    config = dataclasses.replace(plan.config, data_tokens=min(plan.config.data_tokens, _enough(plan)))
    few = dataclasses.replace(plan, config=config)
    with ranks.meeting():
        tokenizer = tokenizer_of(plan.path, plan.native)
        text = read_text(few, tokenizer, listener)
        blocks_of(plan.config, plan.sizing, text)
        long_part_of(with_long_text(plan, text, listener), text, tokenizer)
        amount = amount_of(text, plan.sizing)
        if amount.training > config.data_tokens // 2 and ranks.leads:  # perhaps only the start of the text
            amount = _count_text(plan, tokenizer)
        for line in amount.lines(plan.sizing):
            listener.say(line)


def _count_text(plan: Plan, tokenizer: Tokenizer) -> Amount:
    """How much text --data holds, as far as it can be counted in COUNTING_SECONDS."""
    config, sizing = plan.config, plan.sizing
    tokens, more = count_tokens(documents_of(config), tokenizer, config.data_tokens)
    if held_out_source(config):
        return Amount(tokens, more=more)
    held_out = min(sizing.held_out, tokens // 5)
    return Amount(tokens - held_out, max(1, (held_out - 1) // sizing.eval_lengths[0]), more)


def _enough(plan: Plan) -> int:
    """Tokens of text that make a batch and a held-out window; a fifth of them is held out."""
    sizing = plan.sizing
    return 10 * (sizing.seq_len * sizing.batch_size + max(sizing.eval_lengths) + sizing.long_seq_len + 1)


def count_tokens(documents: Iterable[Document], tokenizer: Tokenizer, limit: int) -> tuple[int, bool]:
    """The tokens of `documents`, at most `limit`, and whether there are more than could be counted in time."""
    end, late = time.monotonic() + COUNTING_SECONDS, False

    def in_time(items: Iterable[Any]) -> Iterator[Any]:
        nonlocal late
        for item in items:
            late = late or time.monotonic() > end
            if late:
                return
            yield item

    whole = str | TextRow | Conversation
    parts = (document if isinstance(document, whole) else in_time(document) for document in documents)
    count = len(tokenize(in_time(parts), tokenizer, limit=limit))
    return count, late and count < limit
