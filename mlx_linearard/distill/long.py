"""The long part of a step: what one block of text that is longer than the native window teaches the student.

Short text restores what scaling cost within the native window; it does not teach the student to use the new one.
One block of long text in the same optimizer step does. The teacher never reads this block as a whole, because its
predictions beyond its native window are no reference. The terms of the loss:

    ce      next-token cross-entropy
    longce  the same, with the weight min(exp(short - full), 5) for each token: `full` is the student's negative
            log-likelihood given everything, `short` the teacher's given at most its native window. The frozen teacher
            gives `short`, and not the student, so it is a constant of the text: it costs forward passes alone, needs
            no adapters, and does not follow the student away from the native model.
    recall  some passages of the block stand again at its end. The teacher reads a passage twice in a row, and the
            student the whole block: KL(teacher || student) at the second occurrence teaches the native model's own
            way of copying over far distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import DistillConfig
from ..models.adapters import Leaves
from ..models.layers import forward_hidden, head
from ..models.pair import Pair
from ..ops.fused import Choice
from ..ops.logits import cross_entropy, gain_cross_entropy, logits_kl, token_nll
from ..ops.mlp import width_of
from ..ops.tiling import in_order
from .kept import NOTHING, Kept
from .long_text import LongBlocks, LongSizes, pairs_of, passages_of, short_windows
from .objective import Objective, student_hidden

LongBatch = dict[str, mx.array]


@dataclass(frozen=True)
class LongLoss:
    """The loss of a long block: a function of the parameters and of arrays whose shapes never change."""

    terms: tuple[str, ...]  # of ce, longce and recall
    run: Objective  # how the student runs: through all layers, without the teacher
    recall_weight: float = 1.0  # beside ce or longce

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of what a call returns beside the loss: none if the loss has one term."""
        return tuple(f"long_{term}" for term in self.terms) if len(self.terms) > 1 else ()

    def __call__(
        self, pair: Pair, parameters: list[Leaves], batch: LongBatch, dropout_seed: int | None = None
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """The unweighted loss of a block and its terms, a differentiable float32 scalar of `parameters`.

        Args:
            batch: a result of `LongPart.batch`.
            dropout_seed: the seed of the student's dropout; None without dropout.
        Returns:
            (loss, terms): in nats per position. `terms` has the keys `parts`.
        """
        hidden = student_hidden(pair, self.run, parameters, batch["inputs"], dropout_seed)
        losses = list[mx.array]()
        for term in self.terms:
            (ready,) = in_order([hidden], losses)  # else the chunks of two terms would be in memory at the same time
            losses.append(self._term(term, pair, ready, batch))
        weights = [self.recall_weight if term == "recall" and self.parts else 1.0 for term in self.terms]
        total: Any = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        return total, dict(zip(self.parts, losses, strict=False))

    def _term(self, term: str, pair: Pair, hidden: mx.array, batch: LongBatch) -> mx.array:
        student, limit = head(pair.student), self.run.workspace_bytes
        if term == "recall":
            hidden = hidden[:, batch["rows"]]
            return logits_kl(hidden, batch["teacher"], student, head(pair.teacher), workspace_bytes=limit)
        targets = batch["targets"]
        hidden = hidden[:, : targets.shape[1]]
        if term == "ce":
            return cross_entropy(hidden, student, targets, workspace_bytes=limit)
        return gain_cross_entropy(hidden, student, targets, batch["short"], workspace_bytes=limit)


@dataclass(frozen=True)
class LongPart:
    """The long part of every step: `weight` times the loss of one block.

    blocks: the long text of each block, without the passages that stand again; `sizes.text` tokens each.
    """

    weight: float
    sizes: LongSizes
    blocks: LongBlocks
    loss: LongLoss

    @classmethod
    def of(
        cls,
        config: DistillConfig,
        sizes: LongSizes,
        blocks: LongBlocks,
        attention: Choice | None = None,
        kept: Kept = NOTHING,
    ) -> LongPart:
        """The long part that the options ask for, over blocks of `sizes.text` tokens; `kept` is the objective's."""
        workspace = config.workspace << 20
        run = Objective(layers=(), ce_weight=1.0, workspace_bytes=workspace, attention=attention, kept=kept)
        loss = LongLoss(tuple(config.long_objective.split("+")), run, config.recall_weight)
        return cls(config.weight_of_long, sizes, blocks, loss)

    def batch(self, pair: Pair, number: int) -> LongBatch:
        """Everything that the loss of block `number` reads beside the parameters, evaluated.

        inputs (1, T) int32. For ce and longce: targets (1, text) int32. For longce: short (1, text) float32, the
        teacher's negative log-likelihoods. For recall: rows (recalled,) int32, the positions that count, and teacher
        (1, recalled, width), its hidden states there. The teacher runs here, without a gradient.
        """
        text, terms = self.blocks.block(number)[0], self.loss.terms
        tokens, batch = text, LongBatch()
        if "recall" in terms:
            passages = passages_of(self.blocks, number, self.sizes)
            tokens = np.concatenate([text, passages.reshape(-1)])
            hidden = self._teacher(pair, pairs_of(passages, self.blocks.first))
            batch["rows"] = mx.array(self.sizes.rows())
            batch["teacher"] = hidden[:, mx.array(self.sizes.teacher_rows(self.blocks.first))]
        batch["inputs"] = mx.array(tokens[None, :-1])
        if terms != ("recall",):
            batch["targets"] = mx.array(text[None, 1:])
        if "longce" in terms:
            windows, rows = short_windows(text[:-1], self.sizes.window, self.blocks.first)
            hidden = self._teacher(pair, windows)[:, mx.array(rows)]
            limit = self.loss.run.workspace_bytes
            batch["short"] = token_nll(hidden, head(pair.teacher), batch["targets"], workspace_bytes=limit)
        mx.eval(batch)
        return batch

    def _teacher(self, pair: Pair, tokens: np.ndarray) -> mx.array:
        """The teacher's hidden state at every position of `tokens` (B, T), as (1, B * T, width)."""
        wide, limit = width_of(pair.native_config), self.loss.run.workspace_bytes
        hidden = forward_hidden(pair.teacher, mx.array(tokens), feed_forward=wide, workspace_bytes=limit)
        return hidden.reshape(1, -1, hidden.shape[-1])
