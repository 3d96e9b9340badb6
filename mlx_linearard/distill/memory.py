"""How much memory a training step takes at its fullest, from sizes alone, before anything is loaded.

mlx's peak is a sum over what lives at one moment. For a step that moment is one of these:

    relations    a layer's relation losses run tile by tile, over both models' q, k and v
    feed-forward a layer's student half has been recomputed, and its gradient is in the feed-forward part
    attention    that gradient runs through attention, tile by tile
    projections  that gradient runs through the q, k, v projections and their adapters
    logits       the logits of a chunk of positions are compared
    update       AdamW's old and new state exist together

Each adds to what a step keeps all the while: the frozen weights, the adapters and the optimizer's state, the
student's hidden state before every layer, and each supervised layer's gradients in q, k and v. The counts of
arrays were confirmed on mlx's counter with one size varied at a time (mlx 0.32.4, CPU, float32); they include
what mlx's queue of some ten operations has not yet released.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from ..models.shape import Shape
from ..ops.attention import has_linear_kernel
from ..ops.attention import plan as attention_tiles
from ..ops.logits import CE_ARRAYS, KL_ARRAYS
from ..ops.logits import chunk_size as logits_chunk
from ..ops.mlp import held as held_by_feed_forward
from ..ops.relation import held_by_head
from ..ops.relation import plan as relation_tiles
from ..ops.tiling import FLOAT32

# CUDA only, in arrays as large as a hidden state: mlx runs ahead of the device by ten batches of operations, which
# tiles.py keeps as small as one operation where activations are large; what they make is not released yet.
CUDA_AHEAD = 10


@dataclass(frozen=True)
class Step:
    """A training step, as far as its memory is concerned."""

    shape: Shape
    weights: int  # bytes of the frozen weights in memory
    trained: int  # bytes of what is trained, all layers together; float32
    rank: int  # of a layer's adapters together; 0 without any
    size: int  # bytes of an activation
    layers: int  # that run
    supervised: int  # layers whose relations are matched
    relations: str
    logits: str | None  # "kl", "ce" or None: then nothing behind the last layer's q, k, v is computed
    batch: int
    seq_len: int
    grad_accum: int
    workspace: int  # bytes
    gpu: bool

    @property
    def tokens(self) -> int:
        """Positions of a forward pass."""
        return self.batch * self.seq_len

    @property
    def qkv(self) -> int:
        """Widths of q, k and v together."""
        return (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim

    @property
    def related(self) -> int:
        """Widths of the vectors whose relations are matched, together."""
        return sum(self.shape.heads_of(self.relations)) * self.shape.head_dim if self.supervised else 0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, at the fullest moment of a step."""

    weights: int  # frozen, one copy
    adapters: int  # now, before the last update, and their gradients
    optimizer: int  # two moments, now and before the last update
    activations: int  # what layers keep for the backward pass, and what the fullest layer holds
    workspace: int  # tiles of scores, or chunks of logits
    moment: str  # when that is

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.optimizer + self.activations + self.workspace

    def line(self) -> str:
        """The plan in one line, in MB."""
        names = ("weights", "adapters", "optimizer", "activations", "workspace")
        parts = ", ".join(f"{name} {getattr(self, name) / 1e6:.0f}" for name in names)
        return f"memory: {self.total / 1e9:.2f} GB (MB: {parts})"


def plan_memory(step: Step) -> MemoryPlan:
    """The fullest moment of `step`. Right to some 10 % of mlx's own peak, run-time libraries not counted."""
    return max([*_backward(step), _update(step)], key=lambda plan: plan.total)


def longest(step: Step, limit: int, most: int) -> int:
    """The longest sequence, at most `most` tokens, whose plan stays within `limit` bytes; 0 where none does."""
    fits, above = 0, most + 1
    while above - fits > 1:
        length = (fits + above) // 2
        if plan_memory(dataclasses.replace(step, seq_len=length)).total <= limit:
            fits = length
        else:
            above = length
    return fits


def _backward(step: Step) -> Iterator[MemoryPlan]:
    """The moments before the update.

    While gradients come, from the last layer to the first, hidden states go: the larger of the two counts.
    The adapters exist twice (now, and before the last update, to which the guard may return), the moments too.
    With gradient accumulation the sum so far is another copy.
    """
    kept = step.layers * step.tokens * step.shape.width + step.supervised * step.tokens * step.related
    coming = max(0, step.trained - kept * step.size)
    adapters = (2 + (step.grad_accum > 1)) * step.trained + coming
    cuda = step.gpu and not mx.metal.is_available()
    ahead = CUDA_AHEAD * step.tokens * step.shape.width * step.size if cuda else 0
    for moment, activations, workspace in _moments(step):
        yield MemoryPlan(
            step.weights, adapters, 4 * step.trained, kept * step.size + activations, workspace + ahead, moment
        )


def _update(step: Step) -> MemoryPlan:
    """The update: gradients and clipped gradients, old and new weights and moments, and what the guard keeps."""
    return MemoryPlan(step.weights, (2 + 1 + 2) * step.trained, 6 * step.trained, 0, 0, "update")


def _moments(step: Step) -> Iterator[tuple[str, int, int]]:
    """(moment, bytes of activations, bytes of workspace) of the fullest layer."""
    shape, tokens = step.shape, step.tokens
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    arriving = step.related  # gradients in q, k, v, multiplied by what arrives from behind
    adapted = tokens * step.rank * FLOAT32  # x A: float32, as the adapters are
    if step.supervised:
        # Both models' q, k and v, the gradients, the hidden states.
        live = tokens * (3 * step.related + 2 * shape.width) * step.size
        yield "relations", live, _relation_workspace(step)
    if step.logits or step.layers > 1:
        # The residual stream and its norms; q, k, v before and after RoPE and what attention made of them.
        held = 7 * shape.width + 7 * q + 4 * k + arriving
        wide = held_by_feed_forward(tokens, shape.ffn, step.size, step.workspace)
        yield "feed-forward", tokens * held * step.size + 3 * adapted, wide
        held = 4 * shape.width + 3 * (q + 2 * k) + arriving
        yield "attention", tokens * held * step.size, _attention_workspace(step)
    # The input's gradient from three projections and three adapters, being added up.
    held = 9 * shape.width + 6 * (q + 2 * k) + arriving
    yield "projections", tokens * held * step.size + 7 * adapted, 0
    if step.logits:
        yield "logits", 3 * tokens * shape.width * step.size, _logits_workspace(step)


def _relation_workspace(step: Step) -> int:
    """The tiles of the largest relation; one relation is done before the next begins."""
    shape, length, dim = step.shape, step.seq_len, step.shape.head_dim
    cast, most = step.size != FLOAT32, 0
    for heads in set(shape.heads_of(step.relations)):
        tiles, once = relation_tiles(step.batch, heads, length, dim, dim, step.workspace, cast, step.gpu, True)
        held = held_by_head(min(tiles.rows, length), tiles.columns, length, dim, dim, cast, once, step.gpu)
        most = max(most, int(FLOAT32 * tiles.batch * tiles.heads * held))
    return most


def _attention_workspace(step: Step) -> int:
    """The tiles of attention's backward pass, nothing where mlx's kernel does the work (half precision on CUDA).

    A head of a tile holds scores, P, dP and dS, the stacked rows of q, dO and O, the running dK and dV, and
    dQ in parts and put together. Finished gradients of other heads are q, k and v once more.
    """
    shape, length, dims = step.shape, step.seq_len, 2 * step.shape.head_dim
    if step.gpu and has_linear_kernel(shape.head_dim, shape.head_dim, half=step.size < FLOAT32):
        return 0
    group = shape.heads // shape.kv_heads
    tiles = attention_tiles(
        step.batch, shape.kv_heads, group, length, length, shape.head_dim, shape.head_dim, step.workspace, step.gpu
    )
    rows, columns = min(tiles.rows, length), min(tiles.columns, length)
    held = 4 * group * rows * columns * (2 if step.gpu else 1) + 3 * group * rows * dims
    held += 2 * length * dims + 2 * group * length * shape.head_dim
    return FLOAT32 * tiles.batch * tiles.heads * held + step.tokens * step.qkv * step.size


def _logits_workspace(step: Step) -> int:
    """Chunks of logits: of several, two or three are alive at a time (20 arrays for the KL, 7 for cross-entropy)."""
    several, single, reckoned = {"kl": (20, 11, KL_ARRAYS), "ce": (7, 4, CE_ARRAYS)}[step.logits or "kl"]
    chunk = logits_chunk(step.workspace, reckoned, step.shape.vocabulary)
    arrays = several if chunk < step.tokens else single
    return min(chunk, step.tokens) * arrays * step.shape.vocabulary * FLOAT32
