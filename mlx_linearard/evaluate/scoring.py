"""Log-likelihoods of continuations, several sequences per forward pass.

The common beginning of an item's sequences is computed once, for several items in one pass; their endings are then
read after it, many in one pass. Logits are computed only at the positions that are scored. While the device computes
a batch, the numbers of the batch before it are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import is_out_of_memory
from ..models.layers import hidden_at
from ..ops.logits import TokenScores, token_scores
from .branches import Contexts
from .passes import LOGITS_BYTES, Passes, padded

LEAST_CHUNK = 64  # tokens of a pass; memory that is too small for these is too small for the model
LEAST_SHARED = 8  # tokens: a shorter common beginning is computed again for each sequence

Score = tuple[float, bool]  # log-likelihood in nats; whether all tokens are the model's first choice
Scores = dict[tuple[int, int], Score]  # by item and number of the sequence


class Continuations(Protocol):
    """Sequences, and how many tokens at the end of each are scored; each has at least one token before them."""

    @property
    def sequences(self) -> Sequence[Sequence[int]]: ...

    @property
    def lengths(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class _Row:
    """A sequence behind the common beginning: inputs (T,), and targets of its last positions (at most T)."""

    item: int
    number: int
    inputs: Sequence[int]
    targets: Sequence[int]


@dataclass(frozen=True)
class _Batch:
    """Sequences whose scores (1, N) are being computed, for the targets of one after those of another."""

    rows: Sequence[_Row]
    scores: TokenScores

    def read(self, passes: Passes) -> Scores:
        """The scores, when they are computed; UserError if they are not finite."""
        passes.check_finite(bool(self.scores.finite.all().item()))
        nll, first = np.array(self.scores.nll)[0], np.array(self.scores.first)[0]
        scores, start = {}, 0
        for row in self.rows:
            own = slice(start, start := start + len(row.targets))
            scores[row.item, row.number] = (-float(nll[own].sum(dtype=np.float64)), bool(first[own].all()))
        return scores


def score(passes: Passes, items: Sequence[Continuations], wanted: Sequence[bool]) -> Iterator[list[Score]]:
    """The scores of the sequences of each wanted item, in the order of the items.

    An item is always in the same batch, whichever items are wanted, so its numbers do not depend on `wanted`. If the
    device's memory does not hold a pass, the passes become smaller.

    Raises UserError if the model computes logits that are not finite, and RuntimeError if no pass fits the memory.
    """
    for numbers in _groups(items, passes.group):
        group, asked = [items[number] for number in numbers], [wanted[number] for number in numbers]
        found: Scores | None = None
        while found is None:
            try:
                found = _scores(passes, group, asked)
            except RuntimeError as error:
                if not is_out_of_memory(error) or passes.chunk < 2 * LEAST_CHUNK:
                    raise
            mx.clear_cache()
            if found is None:
                passes = replace(passes, chunk=passes.chunk // 2)
        for i, item in enumerate(group):
            if asked[i]:
                yield [found[i, sequence] for sequence in range(len(item.sequences))]


def _scores(passes: Passes, group: Sequence[Continuations], wanted: Sequence[bool]) -> Scores:
    found: Scores = {}
    for batch in _one_ahead(_batches(passes, group, wanted)):
        found |= batch.read(passes)
    return found


def _one_ahead(batches: Iterable[_Batch]) -> Iterator[_Batch]:
    """The batches, each when the next one is begun."""
    last = None
    for batch in batches:
        if last:
            yield last
        last = batch
    if last:
        yield last


def _groups(items: Sequence[Continuations], tokens: int) -> Iterator[list[int]]:
    """The numbers of consecutive items, of about `tokens` tokens in all."""
    group: list[int] = []
    have = 0
    for number, item in enumerate(items):
        group.append(number)
        have += sum(map(len, item.sequences))
        if have >= tokens:
            yield group
            group, have = [], 0
    if group:
        yield group


def _batches(passes: Passes, group: Sequence[Continuations], wanted: Sequence[bool]) -> Iterator[_Batch]:
    """The batches with wanted items; each is being computed when it is yielded."""
    shared = [_shared(item, passes.chunk) if passes.shares else 0 for item in group]

    def inputs(row: _Row) -> int:
        return len(row.inputs)

    alone = [row for i, item in enumerate(group) if not shared[i] for row in _rows(i, item, 0)]
    for rows in passes.packed(alone, inputs):
        if any(wanted[row.item] for row in rows):
            yield _alone(passes, rows)
    behind = [i for i in range(len(group)) if shared[i]]
    for batch in passes.packed(behind, shared.__getitem__):
        endings = [row for i in batch for row in _rows(i, group[i], shared[i])]
        contexts: Contexts | None = None
        for rows in passes.packed(endings, inputs):
            if any(wanted[row.item] for row in rows):
                contexts = contexts or passes.read([group[i].sequences[0][: shared[i]] for i in batch])
                height = passes.rounded(len(rows))
                cache = contexts.branches([batch.index(row.item) for row in rows], height)
                yield _computing(passes, rows, cache)


def _shared(item: Continuations, chunk: int) -> int:
    """The length of the common beginning, if it is worth a pass of its own and the endings fit into a pass."""
    most = min(len(s) - n for s, n in zip(item.sequences, item.lengths, strict=True)) - 1
    shared = min(_common_prefix(item.sequences), most) if len(item.sequences) > 1 else 0
    longest = max(map(len, item.sequences))
    return shared if shared >= LEAST_SHARED and longest - shared <= chunk else 0


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    shortest = min(len(s) for s in sequences)
    for i in range(shortest):
        if any(s[i] != sequences[0][i] for s in sequences):
            return i
    return shortest


def _rows(number: int, item: Continuations, shared: int) -> list[_Row]:
    return [
        _Row(number, i, sequence[shared:-1], sequence[len(sequence) - length :])
        for i, (sequence, length) in enumerate(zip(item.sequences, item.lengths, strict=True))
    ]


def _alone(passes: Passes, rows: Sequence[_Row]) -> _Batch:
    """Complete sequences; one that exceeds a pass is read in chunks."""
    row = rows[0]
    if len(rows) > 1 or len(row.inputs) <= passes.chunk:
        return _computing(passes, rows, None)
    cache = passes.new_cache()
    before = len(row.inputs) - len(row.targets)
    passes.prefill(cache, row.inputs[:before])
    return _computing(passes, [_Row(row.item, row.number, row.inputs[before:], row.targets)], cache)


def _computing(passes: Passes, rows: Sequence[_Row], cache: list[Any] | None) -> _Batch:
    width = passes.width(max(len(row.inputs) for row in rows))
    ids = padded([row.inputs for row in rows], passes.rounded(len(rows)), width)
    ends = [i * ids.shape[1] + len(row.inputs) for i, row in enumerate(rows)]
    positions = np.concatenate([np.arange(e - len(r.targets), e) for e, r in zip(ends, rows, strict=True)])
    targets = mx.array(np.concatenate([np.asarray(row.targets, np.int32) for row in rows]))[None]
    hidden, head = hidden_at(passes.model, ids, mx.array(positions.astype(np.int32)), cache)
    scores = token_scores(hidden, head, targets, workspace_bytes=4 * LOGITS_BYTES)
    mx.async_eval(*scores)
    return _Batch(rows, scores)
