"""The long text of a run in numpy: which block is read in which step, and which of its passages stand twice.

Everything random is drawn here, from the seed and the number of the block, and every array has the same shape in all
steps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from ..data import block_at
from ..errors import UserError

SHORTEST = 16  # tokens of the shortest block of which a part can be far from another
PASSAGE = 256  # tokens of a passage by default
REPEATED = 8  # one in so many tokens of a block with recall belongs to a second occurrence
CUE = 16  # tokens that begin a second occurrence, from which the student must find the first one


@dataclass(frozen=True)
class LongSizes:
    """The sizes of a long block.

    With recall a block is `text` tokens of long text, then some of its passages again:

        text ... passage 3 ... passage 1 ... passage 2 ... | passage 1 | passage 2 | passage 3
    """

    seq_len: int  # tokens of the block
    window: int = 0  # the most tokens that the short-context log-probability of longce is given; 0 without longce
    passages: int = 0  # passages that stand a second time; 0 without recall
    passage: int = 0  # tokens of each

    @classmethod
    def of(cls, objective: str, seq_len: int, native_window: int, passage: int | None = None) -> LongSizes:
        """The sizes of blocks of `seq_len` tokens for a long objective.

        Args:
            passage: the tokens of a passage; None chooses.
        Raises:
            UserError: the block is too short for the objective, or the passage is too long.
        """
        if objective == "ce":
            return cls(seq_len)
        if seq_len < SHORTEST:
            raise UserError(f"--long-seq-len {seq_len} is too short for {objective}: give at least {SHORTEST} tokens")
        if "recall" not in objective:
            return cls(seq_len, min(native_window, seq_len // 2))
        most = min(native_window // 2, seq_len // 4)
        if passage is not None and not 2 <= passage <= most:
            raise UserError(
                f"--recall-passage {passage} does not fit: the native model reads a passage twice, and a block has "
                f"room for more than passages; give 2 to {most} tokens"
            )
        length = _passage(passage, native_window, seq_len)
        count = max(1, seq_len // REPEATED // length)
        text = seq_len - count * length
        return cls(seq_len, min(native_window, text // 2) if "longce" in objective else 0, count, length)

    @property
    def text(self) -> int:
        """Tokens of long text that the student reads in a block, each of which predicts the next one."""
        return self.seq_len - self.passages * self.passage

    @property
    def cue(self) -> int:
        """Tokens at the start of a second occurrence that are given: from them the rest is predicted."""
        return max(1, min(CUE, self.passage // 4))

    @property
    def recalled(self) -> int:
        """Positions of a block at which student and teacher are compared."""
        return self.passages * (self.passage - self.cue) if self.passages else 0

    def described(self) -> str:
        """The block in words."""
        again = f", {self.passages} passages of {self.passage} among them for the second time" if self.passages else ""
        return f"one block of {self.seq_len} tokens of long text{again}"

    def rows(self) -> np.ndarray:
        """The positions in the block at which the passages are continued, (recalled,) int32."""
        return self._continued(self.text + 1, self.passage)

    def teacher_rows(self, first: int | None) -> np.ndarray:
        """The same positions in the flattened `pairs`, (recalled,) int32."""
        width = 2 * self.passage - 1 + (first is not None)
        return self._continued(width - self.passage + 1, width)

    def _continued(self, start: int, step: int) -> np.ndarray:
        """The positions that predict the tokens after the cue of occurrences at start, start + step, ..."""
        places = np.arange(self.cue - 1, self.passage - 1)
        return (start + step * np.arange(self.passages)[:, None] + places).reshape(-1).astype(np.int32)


def length_around(objective: str, text: int, native_window: int, passage: int | None = None) -> int:
    """The length of a block with `text` tokens of long text, so many that every distance in it is in the text.

    The arguments are those of `LongSizes.of`. The passages that stand again come after the text.
    """
    if "recall" not in objective:
        return text
    length = _passage(passage, native_window, text)
    return text + text // (REPEATED - 1) // length * length


def _passage(passage: int | None, native_window: int, seq_len: int) -> int:
    """The tokens of a passage; None chooses."""
    return passage or max(2, min(PASSAGE, native_window // 4, seq_len // REPEATED))


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
    def of(
        cls, tokens: np.ndarray, seq_len: int, seed: int, documents: np.ndarray, first: int | None = None
    ) -> LongBlocks:
        """Blocks of `seq_len` tokens inside documents that are long enough, or across documents if none is.

        Args:
            tokens: a stream of documents, (N,) int32.
            documents: where each document begins, ascending from 0, (D,) int64.
            first: the token that each block begins with; None if the model needs none.
        Raises:
            UserError: the text is too short for one block.
        """
        inside = [_starts(a, b, seq_len) for a, b in itertools.pairwise([*documents.tolist(), len(tokens)])]
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
        return block_at(self.tokens, int(self.starts[order[place]]), self.seq_len, self.first)[None]


def _starts(first: int, end: int, seq_len: int) -> np.ndarray:
    """The starts of the blocks of seq_len + 1 tokens between two positions; neighbours share one token."""
    return np.arange(first, end - seq_len, seq_len, dtype=np.int64)


def passages_of(blocks: LongBlocks, number: int, sizes: LongSizes) -> np.ndarray:
    """The passages of block `number` in the order in which they stand again, (passages, passage) int32.

    Each comes from a random place in its own stretch of the block, so near and far places are equally frequent.
    """
    text = blocks.block(number)[0]
    lead = blocks.first is not None
    stretch = (len(text) - lead) // sizes.passages
    random = np.random.default_rng([blocks.seed, number, sizes.seq_len, sizes.passage])
    starts = lead + stretch * np.arange(sizes.passages)
    starts += random.integers(0, stretch - sizes.passage + 1, sizes.passages)
    random.shuffle(starts)
    return np.stack([text[start : start + sizes.passage] for start in starts])


def pairs_of(passages: np.ndarray, first: int | None) -> np.ndarray:
    """What the teacher reads: each passage twice, without the last token, (passages, 2 * passage - 1) int32.

    With `first`, each begins with that token.
    """
    twice = np.concatenate([passages, passages[:, :-1]], axis=1)
    return twice if first is None else np.insert(twice, 0, first, axis=1)


def short_windows(text: np.ndarray, window: int, first: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping windows over a text in which every token but the earliest has at least window / 2 tokens before it.

    Args:
        text: (N,) int32 with N >= window.
        first: the token that each window begins with, if the model needs one; the text begins with it already.
    Returns:
        (windows, rows): (n, window) int32, and the place of each position of the text in the flattened windows,
        (N,) int32.
    """
    starts = [*range(0, len(text) - window, max(1, window // 2)), len(text) - window]
    cut = np.stack([text[start : start + window] for start in starts])
    if first is not None:
        cut[:, 0] = first
    rows, begin = list[np.ndarray](), 0
    for number, start in enumerate(starts):
        rows.append(np.arange(begin, start + window) - start + number * window)
        begin = start + window
    return cut, np.concatenate(rows).astype(np.int32)
