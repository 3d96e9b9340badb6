"""Exact softmax attention in a constant workspace, forward and backward.

    O = softmax(scale Q K^T + mask) V

mlx's own attention holds the (T, T) scores if a gradient is taken. Here they exist one tile at a time. The
forward pass keeps a running maximum and sum per row (online softmax, arXiv 1805.02867). The backward pass
recomputes each tile from the log-sum-exp of its rows:

    P = exp(S - lse),  dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dQ = scale dS K,  dK = scale dS^T Q.

A sink is a number per query head that stands beside the scores of every row, for a key without a value: it takes a
share of the softmax and adds nothing to the output. A soft cap replaces each score s by cap tanh(s / cap).

Scores are computed and kept in float32 for inputs of every dtype. Query heads that share a key head are stacked
as rows, so keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from ..machine import on_gpu
from .attention_parts import Sums, check, d_scores, fused_d_scores, fused_probabilities, probabilities
from .fused import Choice, has_linear_kernel, is_linear, trains_fused
from .tiling import FLOAT32, MASKED, Tiles, best_tiles, check_workspace, first, in_order, row_sizes, untraced, usable


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    window: int | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
) -> mx.array:
    """softmax(scale Q K^T + mask) V, exact, with one tile of scores in memory at a time.

    Args:
        queries: (B, Hq, Tq, D), floating.
        keys: (B, Hkv, Tk, D), Hq a multiple of Hkv.
        values: (B, Hkv, Tk, Dv).
        scale: the factor of the scores.
        mask: None, "causal" (the last query sees every key), or an array that broadcasts to (B, Hq, Tq, Tk):
            bool (True: the query sees the key), or numbers that are added to the scores. It is read tile by tile.
        window: with mask="causal", how many keys a query sees, its own included; None for all.
        sinks: (Hq,), floating; None for none.
        softcap: the cap of the scores before the mask is added; None for none.
        workspace_bytes: the most memory for tiles, beyond inputs, outputs and gradients; None for 256 MiB.

    Returns:
        (B, Hq, Tq, Dv) in the dtype of `queries`; zeros for a query that sees no key.

    Raises:
        ValueError: if shapes, dtypes or options are wrong or do not fit together; the message names the wrong one.
    """
    call = _Attention.of(
        queries, keys, values, float(scale), mask, window, check_workspace(workspace_bytes), sinks, softcap
    )
    arrays = [queries, keys, values] if sinks is None else [queries, keys, values, sinks]

    @mx.custom_function
    def output_and_lse(*arrays: mx.array):
        return call.forward(*arrays)

    @output_and_lse.vjp
    def _(primals, cotangents, outputs):
        return call.backward(primals, cotangents[0], *outputs)

    return first(output_and_lse(*arrays))


def attention_no_grad(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    window: int | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
) -> mx.array:
    """`attention` without a gradient, for the frozen teacher and for evaluation. Arguments and result are the same.

    On a GPU mlx's fused kernel is used if possible: for half precision on CUDA in one call, else in float32 for
    some rows at a time. mlx falls back to unfused operations for some head sizes, and on Metal whenever a gradient
    is traced around this call. In float32 and for some rows at a time these are exact, too, and stay within the
    workspace.
    """
    workspace = check_workspace(workspace_bytes)
    call = _Attention.of(queries, keys, values, float(scale), mask, window, workspace, sinks, softcap)
    queries, keys, values = (mx.stop_gradient(a) for a in (queries, keys, values))
    plain = call.mask is None and window is None and sinks is None and softcap is None
    if not on_gpu() or not plain:
        return call.forward(queries, keys, values, None if sinks is None else mx.stop_gradient(sinks))[0]
    if is_linear(queries, values):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=float(scale), mask=mask)
    return call.fused_rows(queries, keys, values, workspace)


def attention_in_training(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    choice: Choice | None = None,
    workspace_bytes: int | None = None,
) -> mx.array:
    """`attention`, or mlx's fused kernel if it holds no scores in the backward pass either.

    `choice` is what a probe found on this machine (ops/probe.py). Without a choice the kernel is used on CUDA in half
    precision: there its gradient is about as exact as the dtype (an error of 0.5 % in bfloat16, against 0.2 % of
    `attention`), and many times faster.
    """
    plain = not isinstance(mask, mx.array) and sinks is None and softcap is None
    if plain and trains_fused(queries, values, choice):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=float(scale), mask=mask)
    return attention(
        queries, keys, values, scale=scale, mask=mask, sinks=sinks, softcap=softcap, workspace_bytes=workspace_bytes
    )


@dataclass(frozen=True)
class _Attention:
    """One call, checked: its sizes, scale, mask and tiles."""

    batch: int
    heads: int  # key heads
    group: int  # query heads per key head
    rows: int  # Tq
    columns: int  # Tk
    scale: float
    causal: bool
    window: int | None
    mask: mx.array | None
    softcap: float | None
    tiles: Tiles

    @classmethod
    def of(cls, queries, keys, values, scale, mask, window, workspace, sinks=None, softcap=None):
        check(queries, keys, values, mask, window, sinks, softcap)
        batch, heads_q, rows, dim = queries.shape
        heads, columns = keys.shape[1:3]
        group = heads_q // heads
        if isinstance(mask, mx.array):
            mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        return cls(
            batch=batch,
            heads=heads,
            group=group,
            rows=rows,
            columns=columns,
            scale=scale,
            causal=isinstance(mask, str),
            window=window,
            mask=mask if isinstance(mask, mx.array) else None,
            softcap=softcap,
            tiles=choose_tiles(batch, heads, group, rows, columns, dim, values.shape[-1], workspace, on_gpu()),
        )

    def forward(
        self, queries: mx.array, keys: mx.array, values: mx.array, sinks: mx.array | None = None
    ) -> list[mx.array]:
        """[output (B, Hq, Tq, Dv), lse (B, Hq, Tq, 1) float32]."""
        queries, keys, values, *given = untraced([queries, keys, values, *([] if sinks is None else [sinks])])
        sinks = given[0] if given else None
        output = mx.zeros((*queries.shape[:3], values.shape[-1]), dtype=queries.dtype)
        lse = mx.zeros((*queries.shape[:3], 1))
        for b, h in self.tiles.groups(self.batch, self.heads):
            inputs = in_order([queries, keys, values], [output, lse])
            outputs: list[mx.array] = []
            lses: list[mx.array] = []
            for rows in self.tiles.row_tiles(self.rows):
                q, k, v = in_order(inputs, [*outputs[:1], *lses[:1]])
                part, part_lse = self._forward_rows(q, k, v, sinks, b, h, rows)
                outputs.insert(0, part.astype(output.dtype))
                lses.insert(0, part_lse)
            at = (b, self._query_heads(h))
            output[at], lse[at] = mx.concatenate(outputs, axis=2), mx.concatenate(lses, axis=2)
        return [output, lse]

    def _forward_rows(self, queries, keys, values, sinks, b, h, rows) -> tuple[mx.array, mx.array]:
        """Output and log-sum-exp of one tile of rows, by online softmax over its column blocks."""
        q = self._stack(queries, b, h, rows) * self.scale
        top, total, out = mx.array(MASKED), mx.array(0.0), mx.array(0.0)
        if sinks is not None:  # a score that every row has, and whose value is zero
            top, total = self._sink_scores(sinks, h, rows), mx.array(1.0)
        softmax = fused_probabilities if on_gpu() else probabilities
        for columns in self._blocks(rows):
            keys, values = in_order([keys, values], [q, out])
            scores = self._masked(self._scores(q, keys, b, h, columns), b, h, rows, columns)
            new_top = mx.maximum(top, scores.max(axis=-1, keepdims=True))
            shrink = mx.exp(top - new_top)
            u = softmax(scores, new_top)
            total = total * shrink + u.sum(axis=-1, keepdims=True)
            out = out * shrink + u @ _block(values, b, h, columns)
            top = new_top
        sees_any = top > MASKED / 2
        out = mx.where(sees_any, out / total, 0.0)
        lse = mx.where(sees_any, top + mx.log(total), mx.inf)  # exp(S - inf) = 0: no gradient either
        return self._unstack(out, rows), self._unstack(lse, rows)

    def backward(self, primals, d_output, output, lse) -> list[mx.array]:
        """[dQ, dK, dV, and those of the sinks], each in its primal's dtype, accumulated in float32."""
        queries, keys, values, *sinks = primals
        d_q, d_k, d_v = (mx.zeros_like(a) for a in (queries, keys, values))
        queries, keys, values, d_output, output, lse = untraced([queries, keys, values, d_output, output, lse])
        for b, h in self.tiles.groups(self.batch, self.heads):
            inputs = in_order([queries, keys, values, d_output, output, lse], [d_q, d_k, d_v])
            parts: list[mx.array] = []
            sums = [Sums() for _ in self.tiles.column_blocks(self.columns)]
            for rows in self.tiles.row_tiles(self.rows):
                inputs = in_order(inputs, [*parts[:1], *(a for total in sums for a in total.running)])
                parts.insert(0, self._backward_rows(inputs, sums, b, h, rows).astype(d_q.dtype))
            d_q[b, self._query_heads(h)] = mx.concatenate(parts, axis=2)
            for columns, total in zip(self.tiles.column_blocks(self.columns), sums, strict=True):
                if total.running:
                    d_k[b, h, columns], d_v[b, h, columns] = total.joined(d_k.dtype), total.joined(d_v.dtype, 1)
        return [d_q, d_k, d_v, *(_d_sinks(sink, d_output, output, lse) for sink in sinks)]

    def _backward_rows(self, inputs, sums, b, h, rows) -> mx.array:
        """dQ of one tile of rows. The parts of dK and dV from this tile are added to `sums`, block by block."""
        queries, keys, values, d_output, output, lse = inputs
        q = self._stack(queries, b, h, rows) * self.scale
        d_out, out, lse = (self._stack(a, b, h, rows) for a in (d_output, output, lse))
        delta = (d_out * out).sum(axis=-1, keepdims=True)
        d_q = mx.zeros(q.shape)
        softmax, derivative = probabilities, d_scores
        if on_gpu():
            softmax, derivative = fused_probabilities, fused_d_scores
        after = [q, d_out, delta]
        for columns in self._blocks(rows):
            keys, values = in_order([keys, values], after)
            scores = self._scores(q, keys, b, h, columns)
            p = softmax(self._masked(scores, b, h, rows, columns), lse)
            d_p = d_out @ _block(values, b, h, columns).swapaxes(-1, -2)
            gradient = derivative(p, d_p, delta)
            if self.softcap is not None:
                gradient = gradient * (1 - (scores / self.softcap) ** 2)
            d_q = mx.addmm(d_q, gradient, _block(keys, b, h, columns))
            total = sums[columns.start // self.tiles.columns]
            total.add(gradient.swapaxes(-1, -2), q, p.swapaxes(-1, -2), d_out)
            after = [d_q, *total.running]
        return self._unstack(d_q * self.scale, rows)

    def fused_rows(self, queries: mx.array, keys: mx.array, values: mx.array, workspace: int) -> mx.array:
        """The output of mlx's own attention in float32, for as many rows at a time as the workspace has room for."""
        heads = self.batch * self.heads * self.group
        tile = max(1, min(self.rows, int(workspace / (4 * FLOAT32 * heads * self.columns))))
        outputs: list[mx.array] = []
        for start in range(0, self.rows, tile):
            rows = slice(start, min(start + tile, self.rows))
            end = rows.stop + self.columns - self.rows if self.causal else self.columns
            q, k, v = in_order([queries, keys, values], outputs[-1:])
            q, k, v = (a.astype(mx.float32) for a in (q[:, :, rows], k[:, :, :end], v[:, :, :end]))
            mask = "causal" if self.causal else None
            part = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)
            outputs.append(part.astype(queries.dtype))
        return mx.concatenate(outputs, axis=2)

    def _blocks(self, rows: slice) -> Iterator[slice]:
        """The column blocks that a tile of rows can see."""
        offset = self.columns - self.rows
        first = 0 if self.window is None else max(0, rows.start + offset - self.window + 1)
        end = min(self.columns, rows.stop + offset) if self.causal else self.columns
        return (block for block in self.tiles.column_blocks(max(end, 0)) if block.stop > first)

    def _scores(self, q, keys, b, h, columns) -> mx.array:
        """The scores of a tile before the mask, (b, h, group * rows, columns) float32; q is already scaled."""
        scores = q @ _block(keys, b, h, columns).swapaxes(-1, -2)
        return scores if self.softcap is None else self.softcap * mx.tanh(scores / self.softcap)

    def _masked(self, scores, b, h, rows, columns) -> mx.array:
        """The scores of a tile with the mask added."""
        bias = self._bias(b, h, rows, columns)
        if bias is None:
            return scores
        by_head = scores.reshape(*scores.shape[:2], self.group, -1, scores.shape[-1])
        return (by_head + bias).reshape(scores.shape)

    def _bias(self, b, h, rows, columns) -> mx.array | None:
        """The numbers that the mask adds to a tile, broadcastable to (b, h, group, rows, columns), or None."""
        if self.mask is not None:
            part = self._mask_tile(b, h, rows, columns)
            return mx.where(part, 0.0, MASKED) if part.dtype == mx.bool_ else part.astype(mx.float32)
        if not self.causal:
            return None
        offset = self.columns - self.rows
        newest, oldest = rows.start + offset, rows.stop - 1 + offset
        outside_window = self.window is not None and columns.start <= oldest - self.window
        if columns.stop <= newest + 1 and not outside_window:
            return None
        i = mx.arange(newest, rows.stop + offset)[:, None]
        j = mx.arange(columns.start, columns.stop)[None, :]
        allowed = j <= i
        if self.window is not None:
            allowed = allowed & (j > i - self.window)
        return mx.where(allowed, 0.0, MASKED)

    def _mask_tile(self, b, h, rows, columns) -> mx.array:
        """The part of the mask that covers a tile, (b|1, h|1, group|1, rows|1, columns|1)."""
        assert self.mask is not None
        wanted = (b, self._query_heads(h), rows, columns)
        at = tuple(slice(None) if n == 1 else s for n, s in zip(self.mask.shape, wanted, strict=True))
        part = self.mask[at]
        heads = (1, 1) if part.shape[1] == 1 else (-1, self.group)
        return part.reshape(part.shape[0], *heads, *part.shape[2:])

    def _sink_scores(self, sinks, h, rows) -> mx.array:
        """The sinks of a tile's rows, (1, h, group * rows, 1) float32."""
        by_head = mx.maximum(sinks.astype(mx.float32)[self._query_heads(h)], MASKED).reshape(1, -1, self.group, 1)
        shape = (1, by_head.shape[1], self.group, rows.stop - rows.start)
        return mx.broadcast_to(by_head, shape).reshape(1, by_head.shape[1], -1, 1)

    def _query_heads(self, h: slice) -> slice:
        return slice(h.start * self.group, h.stop * self.group)

    def _stack(self, a: mx.array, b: slice, h: slice, rows: slice) -> mx.array:
        """The rows of all query heads of a key head, stacked: (b, h, group * rows, D) float32."""
        part = a[b, self._query_heads(h), rows].astype(mx.float32)
        return part.reshape(part.shape[0], h.stop - h.start, -1, part.shape[-1])

    def _unstack(self, a: mx.array, rows: slice) -> mx.array:
        """The inverse of `_stack`: (b, query heads, rows, D)."""
        return a.reshape(a.shape[0], -1, rows.stop - rows.start, a.shape[-1])


def _d_sinks(sinks: mx.array, d_output: mx.array, output: mx.array, lse: mx.array) -> mx.array:
    """The gradient of the sinks, (Hq,): minus the sum over the rows of exp(sink - lse) rowsum(dO O)."""
    delta = (d_output.astype(mx.float32) * output.astype(mx.float32)).sum(axis=-1, keepdims=True)
    share = mx.exp(sinks.astype(mx.float32)[None, :, None, None] - lse)
    return -(share * delta).sum(axis=-1).sum(axis=-1).sum(axis=0).astype(sinks.dtype)


def _block(a: mx.array, b: slice, h: slice, columns: slice) -> mx.array:
    return a[b, h, columns].astype(mx.float32)


def choose_tiles(
    batch: int, heads: int, group: int, rows: int, columns: int, dim: int, dim_v: int, workspace: int, gpu: bool
) -> Tiles:
    """The tiles of one call, chosen so that they hold at most `workspace` bytes at a time.

    For each key head of a group the workspace holds the finished dQ of its query heads, the running dK and dV, and
    the tiles in flight: scores, P, dP and dS, blocks of K and V, and the stacked rows.
    """
    budget, dims = usable(workspace, gpu) / FLOAT32, dim + dim_v

    def held(tile: int, block: int) -> float:
        """float32 numbers for one key head."""
        step = 4 * group * tile * min(block, columns) + 4 * min(block, columns) * dims + 3 * group * tile * dims
        return (3 if gpu else 1.5) * step + 2 * columns * dims + group * rows * dim

    widths = [w for w in (512, 2048, 8192, 32768) if w == 512 or (w < 2 * columns and (gpu or w == 2048))]
    sizes = [(tile, width) for width in widths for tile in row_sizes(rows, gpu)]
    return best_tiles(batch, heads, rows, columns, sizes, held, budget, gpu)


def peak_bytes(
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    dim: int,
    *,
    workspace: int,
    size: int,
    gpu: bool,
    fused: bool | None = None,
) -> int:
    """The most memory that the backward pass of `attention_in_training` holds, in bytes; `size` per input number.

    That is 0 if mlx's kernel does the work (`fused`: a probe's choice, None without a probe). Else each head of a
    tile holds scores, P, dP and dS, the stacked rows of q, dO and O, the running dK and dV, and dQ (in parts, and
    joined). The finished gradients of the other heads are as large as q, k and v together.
    """
    if fused is None:
        fused = gpu and has_linear_kernel(dim, dim, half=size < FLOAT32)
    if fused:
        return 0
    group, dims = heads // kv_heads, 2 * dim
    tiles = choose_tiles(batch, kv_heads, group, length, length, dim, dim, workspace, gpu)
    rows, columns = min(tiles.rows, length), min(tiles.columns, length)
    held = 4 * group * rows * columns * (2 if gpu else 1) + 3 * group * rows * dims
    held += 2 * length * dims + 2 * group * length * dim
    finished = batch * length * (heads + 2 * kv_heads) * dim * size
    return FLOAT32 * tiles.batch * tiles.heads * held + finished
