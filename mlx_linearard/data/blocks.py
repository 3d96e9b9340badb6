"""A token stream cut into blocks for training and into windows for measuring."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from ..errors import UserError


def hash_of(*tokens: np.ndarray) -> str:
    """A short hash of token arrays in order."""
    digest = hashlib.sha256()
    for array in tokens:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def begins_itself(tokens: np.ndarray, start: int, seq_len: int, first: int | None) -> bool:
    """Whether the block at `start` needs no first token before it: the model needs none, or it is there already."""
    return first is None or (tokens[start] == first and start + seq_len < len(tokens))


def block_at(tokens: np.ndarray, start: int, seq_len: int, first: int | None) -> np.ndarray:
    """The block of seq_len + 1 tokens at `start`, int32; it begins with the token `first`, if the model needs one."""
    if begins_itself(tokens, start, seq_len, first):
        return tokens[start : start + seq_len + 1]
    return np.concatenate([[first], tokens[start : start + seq_len]]).astype(np.int32)


@dataclass(frozen=True)
class Blocks:
    """Training blocks cut from one token stream, in an order that depends on the seed alone.

    Batch number n does not depend on earlier batches, so the number of batches taken is the cursor: a resumed run
    continues with the blocks that the stopped run would have read.

    tokens: (N,) int32. first: the token that each block begins with, if the model needs one. answers: (N,) bool, the
    tokens that count in cross-entropy, None if all count; blocks without any such token are left out.
    """

    tokens: np.ndarray
    seq_len: int
    seed: int
    first: int | None = None
    answers: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self._possible < 1:
            raise UserError(
                f"the training text has {len(self.tokens)} tokens, too few for one block of {self.seq_len + 1}: "
                "give more text with --data or a shorter --seq-len"
            )
        if self.count < 1:
            raise UserError("the training text holds no answer that counts: give longer --data, or leave --mask-prompt")

    @property
    def _possible(self) -> int:
        return (len(self.tokens) - (self.first is None)) // self.seq_len

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """The positions of the blocks of one pass over the text."""
        starts = np.arange(self._possible, dtype=np.int64) * self.seq_len
        if self.answers is None:
            return starts
        return np.array([start for start in starts if self._counted(int(start)).any()], np.int64)

    @property
    def count(self) -> int:
        """Blocks in one pass over the text."""
        return len(self._starts)

    def batch(self, number: int, size: int) -> np.ndarray:
        """Batch `number` of `size` blocks, (size, seq_len + 1) int32. The last token of a block is only a target."""
        return np.stack([self._block(start) for start in self._places(number, size)])

    def counted(self, number: int, size: int) -> np.ndarray:
        """Which targets of batch `number` count in cross-entropy, (size, seq_len) bool."""
        return np.stack([self._counted(start) for start in self._places(number, size)])

    def _places(self, number: int, size: int) -> list[int]:
        """Where the blocks of batch `number` begin."""
        epochs = [divmod(number * size + i, self.count) for i in range(size)]
        return [int(self._starts[self._order(epoch)[place]]) for epoch, place in epochs]

    def _block(self, start: int) -> np.ndarray:
        return block_at(self.tokens, start, self.seq_len, self.first)

    def _counted(self, start: int) -> np.ndarray:
        if self.answers is None:
            return np.ones(self.seq_len, bool)
        begin = start + 1 if begins_itself(self.tokens, start, self.seq_len, self.first) else start
        return self.answers[begin : begin + self.seq_len]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)


def windows(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
    """At most `count` windows of length + 1 tokens, spaced evenly over the stream; (n, length + 1) int32."""
    possible = max(0, len(tokens) - 1) // length
    taken = min(count, possible)
    starts = [(i * possible // taken) * length for i in range(taken)]
    return np.stack([tokens[s : s + length + 1] for s in starts]) if taken else np.zeros((0, length + 1), np.int32)


def split(tokens: np.ndarray, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out): the last `held_out` tokens are held out, but never more than a fifth of all tokens."""
    cut = len(tokens) - min(held_out, len(tokens) // 5)
    return tokens[:cut], tokens[cut:]
