"""Log-likelihoods of continuations, several sequences per forward pass.

The common beginning of an item's sequences is computed once, for several items in one pass; their endings are then
read after it, many in one pass. Logits are computed only at the positions that are scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..models.layers import hidden_at
from ..ops.logits import token_nll
from ..ops.tiling import FLOAT32
from .passes import LOGITS_BYTES, Passes, itself, packed, padded, take

GROUP = 4  # passes: items of about as many tokens are sorted by length and scored together
LEAST_SHARED = 8  # tokens: a shorter common beginning is computed again for each sequence

Score = tuple[float, bool]  # log-likelihood in nats; whether all tokens are the model's first choice


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


def score(passes: Passes, items: Sequence[Continuations], wanted: Sequence[bool]) -> Iterator[list[Score]]:
    """The scores of the sequences of each wanted item, in the order of the items.

    An item is always in the same batch, whichever items are wanted, so its numbers do not depend on `wanted`.

    Raises UserError if the model computes logits that are not finite.
    """
    for numbers in _groups(items, GROUP * passes.chunk):
        if not any(wanted[number] for number in numbers):
            continue
        group = [items[number] for number in numbers]
        shared = [_shared(item, passes.chunk) if passes.batches else 0 for item in group]
        found: dict[tuple[int, int], Score] = {}
        alone = [row for i, item in enumerate(group) if not shared[i] for row in _rows(i, item, 0)]
        for rows in packed(alone, lambda row: len(row.inputs), passes.chunk, passes.rows):
            found |= _score_alone(passes, rows)
        behind = [i for i in range(len(group)) if shared[i]]
        for batch in packed(behind, shared.__getitem__, passes.chunk, passes.rows):
            cache = passes.prefill_rows([group[i].sequences[0][: shared[i]] for i in batch])
            endings = [row for i in batch for row in _rows(i, group[i], shared[i])]
            for rows in packed(endings, lambda row: len(row.inputs), passes.chunk, passes.rows):
                found |= _score(passes, rows, take(cache, [batch.index(row.item) for row in rows]))
        mx.clear_cache()
        for i, item in enumerate(group):
            if wanted[numbers[i]]:
                yield [found[i, sequence] for sequence in range(len(item.sequences))]


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


def _score_alone(passes: Passes, rows: Sequence[_Row]) -> dict[tuple[int, int], Score]:
    """Scores of complete sequences; one that exceeds a pass is read in chunks."""
    row = rows[0]
    if len(rows) > 1 or len(row.inputs) <= passes.chunk:
        return _score(passes, rows, None)
    cache = passes.new_cache()
    before = len(row.inputs) - len(row.targets)
    passes.prefill(cache, row.inputs[:before])
    return _score(passes, [_Row(row.item, row.number, row.inputs[before:], row.targets)], cache)


def _score(passes: Passes, rows: Sequence[_Row], cache: list[Any] | None) -> dict[tuple[int, int], Score]:
    ids = padded([row.inputs for row in rows])
    ends = [i * ids.shape[1] + len(row.inputs) for i, row in enumerate(rows)]
    positions = np.concatenate([np.arange(e - len(r.targets), e) for e, r in zip(ends, rows, strict=True)])
    targets = mx.array(np.concatenate([np.asarray(row.targets, np.int32) for row in rows]))[None]
    hidden, head = hidden_at(passes.model, ids, mx.array(positions), cache)
    mx.eval(hidden)
    nll, first = _nll_and_first(passes, hidden, head, targets)
    scores, start = {}, 0
    for row in rows:
        own = slice(start, start := start + len(row.targets))
        scores[row.item, row.number] = (-float(nll[own].sum(dtype=np.float64)), bool(first[own].all()))
    return scores


def _nll_and_first(passes: Passes, hidden: mx.array, head: Any, targets: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Of each position (N,): the negative log-likelihood of its target, and whether the target is the first choice."""
    vocabulary = head(hidden[:, :1]).shape[-1]  # read from the graph, nothing is computed
    size = max(1, LOGITS_BYTES // (FLOAT32 * vocabulary))
    nll, first = [], []
    for start in range(0, hidden.shape[1], size):
        logits, own = head(hidden[:, start : start + size]), targets[:, start : start + size]
        passes.check_finite(logits)
        nll.append(np.array(token_nll(logits, itself, own, workspace_bytes=4 * LOGITS_BYTES))[0])
        first.append(np.array(mx.argmax(logits, axis=-1) == own)[0])
    return np.concatenate(nll), np.concatenate(first)
