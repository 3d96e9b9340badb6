"""The long part of a step: next-token cross-entropy on text that is longer than the native window.

Short text restores what scaling cost within the native window; it does not teach the student to use the new one.
One block of long text in the same optimizer step does. The teacher does not read this block, because its
predictions beyond its native window are no reference.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from ..ops.fused import Choice
from .objective import Objective


@dataclass(frozen=True)
class LongBlocks:
    """Blocks of long text in a seeded order. Block `n` depends on `n` alone, so a resumed run reads the same blocks.

    tokens: the stream, (N,) int32. starts: the first token of each block, (count,) int64. first: the token that
    each block begins with, if the model needs one.
    """

    tokens: np.ndarray
    seq_len: int
    seed: int
    starts: np.ndarray
    first: int | None = None

    @classmethod
    def of(cls, tokens: np.ndarray, seq_len: int, seed: int, end: int | None, first: int | None = None) -> LongBlocks:
        """Blocks of `seq_len` tokens inside documents that are long enough, or across documents if none is.

        Args:
            tokens: a stream of documents, (N,) int32.
            end: the token that ends a document; None if the tokenizer has none.
            first: the token that each block begins with; None if the model needs none.
        Raises:
            UserError: the text is too short for one block.
        """
        borders = [0, *(np.flatnonzero(tokens == end) + 1 if end is not None else []), len(tokens)]
        inside = [_starts(a, b, seq_len) for a, b in itertools.pairwise(borders)]
        starts = np.concatenate(inside)
        if not len(starts):
            starts = _starts(0, len(tokens), seq_len)
        if not len(starts):
            raise UserError(
                f"the long text has {len(tokens)} tokens, too few for one block of {seq_len + 1}: give more text with "
                "--long-data or --data, or a shorter --long-seq-len"
            )
        return cls(tokens, seq_len, seed, starts, first)

    def block(self, number: int) -> np.ndarray:
        """Block `number`, (1, seq_len + 1) int32; its last token is only a target."""
        epoch, place = divmod(number, len(self.starts))
        order = np.random.default_rng([self.seed, epoch, self.seq_len]).permutation(len(self.starts))
        start = int(self.starts[order[place]])
        if self.first is None:
            return self.tokens[None, start : start + self.seq_len + 1]
        return np.concatenate([[self.first], self.tokens[start : start + self.seq_len]]).astype(np.int32)[None]


def _starts(first: int, end: int, seq_len: int) -> np.ndarray:
    """The starts of the blocks of seq_len + 1 tokens between two positions; neighbours share one token."""
    return np.arange(first, end - seq_len, seq_len, dtype=np.int64)


@dataclass(frozen=True)
class LongPart:
    """The long part of every step: `weight` times the loss of one block."""

    weight: float
    blocks: LongBlocks
    objective: Objective  # cross-entropy alone


def long_objective(workspace_bytes: int, attention: Choice | None = None) -> Objective:
    """Next-token cross-entropy of the student alone."""
    return Objective(layers=(), ce_weight=1.0, workspace_bytes=workspace_bytes, attention=attention)
