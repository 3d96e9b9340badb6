"""Continuations of a context, scored by log-likelihood as lm-evaluation-harness scores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from ..model import Directory
from .suite import Item


@dataclass(frozen=True)
class Request:
    """One item as tokens: the sequences to score, and how many tokens at the end of each count."""

    sequences: list[list[int]]
    lengths: list[int]
    content: dict[str, Any]


def split_tokens(directory: Directory, context: str, continuation: str) -> tuple[list[int], int]:
    """(tokens of context and continuation, how many are the continuation's), as lm-evaluation-harness splits them.

    Spaces at the end of the context belong to the continuation. The tokens are those of the context alone (n tokens),
    followed by those of the joined text after its first n. So a token of the joined text that spans context and
    continuation does not count. An empty context is one first token.
    """
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    before = directory.encode(context) if context else []
    if not before:
        ids = directory.encode_plain(continuation)
        ids = ids[1:] if ids[:1] == [directory.prefix_token()] else ids
        return [directory.prefix_token(), *ids], len(ids)
    whole = directory.encode(context + continuation)
    if len(whole) > len(before):
        return [*before, *whole[len(before) :]], len(whole) - len(before)
    return (whole if len(whole) > 1 else [directory.prefix_token(), *whole]), 1  # merged into the last token


def request_item(
    directory: Directory,
    window: int,
    number: int,
    context: str,
    continuations: Sequence[str],
    content: Mapping[str, Any],
) -> Item:
    """The item `number` of a suite; UserError if it does not fit `window` tokens."""
    pairs = [split_tokens(directory, context, continuation) for continuation in continuations]
    longest = max(len(tokens) for tokens, _ in pairs)
    if longest > window + 1:  # the last token is only a target
        raise UserError(
            f"item {number} has {longest} tokens and does not fit the longest window of the directories given, "
            f"{window} tokens: shorten the item or leave it out"
        )
    request = Request([tokens for tokens, _ in pairs], [length for _, length in pairs], dict(content))
    return Item(str(number), request, sum(request.lengths) + longest)
