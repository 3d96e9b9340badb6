"""The memory of a training step at its fullest moment, from sizes alone, before anything is loaded.

mlx's peak is a sum over all arrays that exist at one moment. For a step the fullest moment is one of these:

    relations    a layer's relation losses run tile by tile, over q, k and v of both models
    feed-forward the student's half of a layer is recomputed, and its gradient is in the feed-forward part
    attention    this gradient runs through attention, tile by tile
    linear attention  the same in a layer of gated delta attention, chunk by chunk
    projections  this gradient runs through the q, k, v projections and their adapters
    logits       the logits of a chunk of positions are compared
    update       AdamW's old and new state both exist

Each adds to the memory that a step holds all the time: the frozen weights, the adapters and the optimizer's state,
the student's hidden state before every layer, and the gradients of each supervised layer in q, k and v. Every
operation states its own peak (`peak_bytes`). The counts of arrays were confirmed with mlx's counter, one size
varied at a time (mlx 0.32.4, CPU, float32). They include the arrays that mlx's queue of some ten operations has
not yet released.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..config import DistillConfig
from ..models.shape import Shape
from ..ops import attention, gated_delta, logits, mlp, relation
from ..ops.tiling import FLOAT32
from .kept import NOTHING, Kept, kept_always

# CUDA only, in arrays as large as a hidden state: mlx runs ahead of the device by ten batches of operations, and the
# results of these are not yet released. ops/tiling.py makes a batch as small as three operations.
CUDA_AHEAD = 20

LINEAR = "linear attention"  # a moment
KEPT_SHARE = 0.5  # the part of the machine's memory that a step may take before activations are computed again
SHORTEST = 64  # tokens: no shorter sequence is suggested
QUANTIZED = 4.5 / 8  # bytes per weight in 4 bits, with one scale and one bias per 64 weights


@dataclass(frozen=True)
class Step:
    """The sizes of a training step that decide its memory."""

    shape: Shape
    weights: int  # bytes of the frozen weights in memory
    trained: int  # bytes of the trained parameters, float32, of all layers
    rank: int  # sum of the ranks of a layer's adapters; 0 without adapters
    size: int  # bytes per number of an activation
    layers: int  # number of layers that run
    supervised: int  # number of layers whose relations are matched
    relations: str
    logits: str | None  # "kl", "ce", or None: then nothing after the last layer's q, k, v is computed
    batch: int
    seq_len: int
    grad_accum: int
    workspace: int  # bytes
    gpu: bool
    recalled: int = 0  # positions of a long block whose logits are compared with the teacher's, beside `logits`
    fused: bool | None = None  # whether mlx's attention runs under a gradient; None: the default, without a probe
    kept: Kept = NOTHING  # which layers keep activations for the backward pass
    copied: int = 0  # bytes of the float32 copies of a layer's experts (models.experts.copied_bytes)

    @property
    def tokens(self) -> int:
        """Positions of a forward pass."""
        return self.batch * self.seq_len

    @property
    def wide(self) -> int:
        """Bytes per number of an activation in the feed-forward part."""
        return FLOAT32 if self.copied else self.size

    @property
    def qkv(self) -> int:
        """The widths of q, k and v, added."""
        return (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim

    @property
    def retained(self) -> int:
        """Bytes that a layer keeps beyond its input, instead of recomputing them.

        That is what attention keeps, and the feed-forward part (`ops.mlp.kept_width`), with copies of experts.
        """
        return self.retained_attention + self.tokens * self.shape.ffn_kept * self.wide + self.copied

    @property
    def retained_attention(self) -> int:
        """Bytes that a layer keeps beyond its input if it computes its feed-forward part again.

        That is its input's norm and its middle, q, k, v, the output of attention, and x A of the adapters with, in
        half precision, the float32 copies of x. With layers of linear attention it is the mean of both kinds.
        """
        q = self.shape.heads * self.shape.head_dim
        attention = (self.qkv + q) * self.size
        if linear := self.shape.linear:  # measured on the CPU
            kept = (10 * linear.keys + 8 * linear.values) * FLOAT32
            attention = round(attention + linear.share * (kept - attention))
        numbers = 2 * self.shape.width * self.size + attention
        adapted = self.rank + (self.shape.width if self.rank and self.size != FLOAT32 else 0)
        return self.tokens * (numbers + adapted * FLOAT32)

    @property
    def related(self) -> int:
        """The widths of the vectors whose relations are matched, added."""
        return sum(self.shape.heads_of(self.relations)) * self.shape.head_dim if self.supervised else 0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, at the fullest moment of a step."""

    weights: int  # frozen, one copy
    adapters: int  # now and before the last update, and their gradients
    optimizer: int  # two moments, now and before the last update
    activations: int  # kept for the backward pass, and held by the fullest layer
    workspace: int  # tiles of scores, or chunks of logits
    moment: str  # the name of the fullest moment

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.optimizer + self.activations + self.workspace

    def line(self) -> str:
        """The plan in one line, in MB."""
        names = ("weights", "adapters", "optimizer", "activations", "workspace")
        parts = ", ".join(f"{name} {getattr(self, name) / 1e6:.0f}" for name in names)
        return f"memory: {self.total / 1e9:.2f} GB (MB: {parts})"


def plan_memory(step: Step) -> MemoryPlan:
    """The fullest moment of `step`, within about 10 % of mlx's own peak. Run-time libraries are not counted."""
    return max([*_backward(step), _update(step)], key=lambda plan: plan.total)


def keeping(step: Step, config: DistillConfig, usable: int) -> Step:
    """`step` with as many layers keeping activations as --recompute says, on a machine of `usable` bytes.

    By default the layers keep what attention needs first, and then everything, the last layers first.
    """
    layers = step.layers
    if (always := kept_always(config.recompute, layers)) is not None:
        return dataclasses.replace(step, kept=always)
    limit = int(KEPT_SHARE * usable) if config.memory_limit is None else min(config.memory_limit << 20, usable)
    for kept in [Kept(0, n) for n in range(1, layers + 1)] + [Kept(n, layers - n) for n in range(1, layers + 1)]:
        fuller = dataclasses.replace(step, kept=kept)
        if plan_memory(fuller).total > limit:
            break
        step = fuller
    return step


def kept_line(step: Step, name: str) -> str:
    """Which layers keep their activations, in one line; `name` is put after "activations"."""
    whole, attention = step.kept.whole, step.kept.attention
    held = (whole * step.retained + attention * step.retained_attention) / 1e9
    if whole == step.layers:
        return f"activations{name}: all {whole} layers keep theirs ({held:.2f} GB)"
    more = f" and {attention} those of attention" if attention else ""
    return f"activations{name}: of {step.layers} layers, {whole} keep theirs{more} ({held:.2f} GB)"


def relation_workspace(workspace: int, shape: Shape, relations: str, tokens: int, size: int, *, gpu: bool) -> int:
    """The workspace of a layer's relations, in bytes.

    The gradient of a layer takes more than the relations' own arrays. On a GPU their tiles take the difference: fewer
    and larger tiles are faster, and the step takes no more memory at its fullest moment.

    Args:
        tokens: positions of a forward pass. size: bytes per number of an activation.
    """
    if not gpu:
        return workspace
    related = sum(shape.heads_of(relations)) * shape.head_dim
    wide = mlp.peak_bytes(tokens, shape.ffn_held, size, workspace=workspace)
    return max(workspace, tokens * (_held(shape, related) - _live(shape, related)) * size + wide)


def _held(shape: Shape, arriving: int) -> int:
    """Numbers per position while the gradient is in the feed-forward part, without its wide arrays.

    The residual stream and its norms; q, k, v before and after RoPE, and the output of attention.
    """
    return 7 * shape.width + 7 * shape.heads * shape.head_dim + 4 * shape.kv_heads * shape.head_dim + arriving


def _live(shape: Shape, related: int) -> int:
    """Numbers per position beside the tiles of relations: both models' q, k, v, the gradients, the hidden states."""
    return 3 * related + 2 * shape.width


def longest(step: Step, limit: int, most: int) -> int:
    """The longest sequence, at most `most` tokens, whose plan stays within `limit` bytes; 0 if there is none."""
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

    Gradients appear from the last layer to the first, while hidden states are released: the larger of the two
    is counted. The adapters exist twice (now, and before the last update, to which the guard may return), and so do the
    optimizer's moments. With gradient accumulation the running sum is another copy.
    """
    kept = step.layers * step.tokens * step.shape.width + step.supervised * step.tokens * step.related
    coming = max(0, step.trained - kept * step.size)
    adapters = (2 + (step.grad_accum > 1)) * step.trained + coming
    cuda = step.gpu and not mx.metal.is_available()
    ahead = CUDA_AHEAD * step.tokens * step.shape.width * step.size if cuda else 0
    for moment, activations, workspace in (*_moments(step), *_moments_keeping(step)):
        yield MemoryPlan(
            step.weights, adapters, 4 * step.trained, kept * step.size + activations, workspace + ahead, moment
        )


def _update(step: Step) -> MemoryPlan:
    """The update: gradients and clipped gradients, old and new weights and moments, the guard's copy."""
    return MemoryPlan(step.weights, (2 + 1 + 2) * step.trained, 6 * step.trained, 0, 0, "update")


def _moments_keeping(step: Step) -> Iterator[tuple[str, int, int]]:
    """The moments at which the layers that keep their activations hold them: the gradient enters the last of them.

    What this layer keeps is a part of what its gradient holds. A feed-forward part that is kept is not in chunks.
    Without logits the last layer ends at its q, k, v and keeps little.
    """
    if not step.kept:
        return
    full, half = step.retained, step.retained_attention
    whole, attention = step.kept.whole, step.kept.attention
    held = whole * full + attention * half
    if not step.logits and not step.recalled:  # without the last layer
        held -= full if whole else half
        whole, attention = (whole - 1, attention) if whole else (whole, attention - 1)
    own = full if whole else half if attention else 0  # of the first layer that the gradient enters
    wide = mlp.ALONE * step.tokens * step.shape.ffn_held * step.wide + step.copied
    for moment, activations, workspace in _moments(step):
        if moment in ("relations", "logits"):
            yield moment, held + activations, workspace
        elif moment == LINEAR:  # almost all of what its gradient holds is kept
            yield moment, held, workspace
        else:
            space = wide if moment == "feed-forward" and whole else workspace
            yield moment, held + max(0, activations + space - own), 0


def _moments(step: Step) -> Iterator[tuple[str, int, int]]:
    """(moment, bytes of activations, bytes of workspace) of the fullest layer."""
    shape, tokens, dim = step.shape, step.tokens, step.shape.head_dim
    q, k = shape.heads * dim, shape.kv_heads * dim
    arriving = step.related  # gradients in q, k, v, multiplied by the cotangent
    adapted = tokens * step.rank * FLOAT32  # x A: float32, as the adapters are
    if step.supervised:
        live = tokens * _live(shape, step.related) * step.size
        space = relation_workspace(step.workspace, shape, step.relations, tokens, step.size, gpu=step.gpu)
        sizes = dim, dim, space, step.size != FLOAT32, step.gpu
        heads = set(shape.heads_of(step.relations))  # one relation is finished before the next begins
        tiles = max(relation.peak_bytes(step.batch, n, step.seq_len, *sizes) for n in heads)
        yield "relations", live, tiles
    if step.logits or step.recalled or step.layers > 1:
        held = _held(shape, arriving)
        wide = mlp.peak_bytes(tokens, shape.ffn_held, step.wide, workspace=step.workspace)
        yield "feed-forward", tokens * held * step.size + 3 * adapted, wide + step.copied
        held = 4 * shape.width + 3 * (q + 2 * k) + arriving
        scores = attention.peak_bytes(
            step.batch,
            shape.heads,
            shape.kv_heads,
            step.seq_len,
            dim,
            workspace=step.workspace,
            size=step.size,
            gpu=step.gpu,
            fused=step.fused,
        )
        yield "attention", tokens * held * step.size, scores
    if linear := shape.linear:  # measured on the CPU: mostly float32, whatever the dtype
        held = 7 * shape.width * step.size + (40 * linear.keys + 14 * linear.values) * FLOAT32
        state = linear.value_heads, linear.key_dim, linear.value_dim
        yield LINEAR, tokens * held, gated_delta.peak_bytes(step.batch, step.seq_len, *state)
    # The gradient of the input, added up from three projections and three adapters.
    held = 9 * shape.width + 6 * (q + 2 * k) + arriving
    yield "projections", tokens * held * step.size + 7 * adapted, 0
    for kind, positions in (step.logits, tokens), ("kl", step.recalled):
        if kind and positions:
            arrays = {"kl": logits.kl_arrays, "ce": logits.cross_entropy_arrays}[kind]
            in_chunk = arrays(half=step.size != FLOAT32, gpu=step.gpu)
            chunks = logits.peak_bytes(in_chunk, positions, shape.vocabulary, workspace=step.workspace)
            yield "logits", 3 * tokens * shape.width * step.size, chunks


def advice(step: Step, limit: int, config: DistillConfig) -> Iterator[str]:
    """Each option that alone makes the step fit; a 4-bit model together with a shorter sequence if none does."""

    def fits(**changes: Any) -> bool:
        return plan_memory(dataclasses.replace(step, **changes)).total <= limit

    options = ["--recompute auto"] if step.kept and fits(kept=NOTHING) else []
    if (length := longest(step, limit, step.seq_len)) >= SHORTEST:
        options.append(f"--seq-len {length // SHORTEST * SHORTEST}")
    if batch := bisect.bisect_left(range(1, step.batch), True, key=lambda n: not fits(batch=n)):
        options.append(f"--batch-size {batch * (config.batch_size // step.batch)}")
    if config.layers != "last" and "relation" in config.objective and fits(supervised=1):
        options.append("--layers last")
    if config.workspace > 64 and fits(workspace=64 << 20):
        options.append("--workspace 64")
    yield from options
    small = dataclasses.replace(step, weights=min(step.weights, int(_weight_count(step.shape) * QUANTIZED)))
    if config.fine_tune_type != "full" and small.weights < 0.9 * step.weights:
        if plan_memory(small).total <= limit:
            yield "a 4-bit model"
        elif not options and (length := longest(small, limit, step.seq_len)) >= SHORTEST:
            yield f"a 4-bit model with --seq-len {length // SHORTEST * SHORTEST}"


def _weight_count(shape: Shape) -> int:
    return shape.block_weights + shape.vocabulary * shape.width * (1 if shape.tied else 2)
