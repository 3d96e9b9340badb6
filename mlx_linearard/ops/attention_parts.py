"""Parts of tiled attention: the checks of a call, running gradients of a block, and the functions of one tile."""

from __future__ import annotations

import math

import mlx.core as mx


class Sums:
    """Running dK and dV of a column block. A later tile (of earlier rows) sees at most a prefix of the block."""

    def __init__(self) -> None:
        self.running: list[mx.array] = []
        self.finished: list[list[mx.array]] = []

    def add(self, d_scores_t: mx.array, q: mx.array, p_t: mx.array, d_out: mx.array) -> None:
        """Adds dS^T Q and P^T dO of a tile."""
        if not self.running:
            self.running = [d_scores_t @ q, p_t @ d_out]
            return
        seen = p_t.shape[2]
        if seen < self.running[0].shape[2]:
            self.finished.insert(0, [a[:, :, seen:] for a in self.running])
            self.running = [a[:, :, :seen] for a in self.running]
        d_k, d_v = self.running
        self.running = [mx.addmm(d_k, d_scores_t, q), mx.addmm(d_v, p_t, d_out)]

    def joined(self, dtype: mx.Dtype, which: int = 0) -> mx.array:
        """dK (0) or dV (1) of the block."""
        parts = [self.running[which], *(pair[which] for pair in self.finished)]
        return mx.concatenate([a.astype(dtype) for a in parts], axis=2)


def probabilities(scores: mx.array, lse: mx.array) -> mx.array:
    return mx.exp(scores - lse)


def d_scores(p: mx.array, d_p: mx.array, delta: mx.array) -> mx.array:
    return p * (d_p - delta)


# For a GPU: each stage reads and writes a tile once, in place.
fused_probabilities, fused_d_scores = (mx.compile(f, shapeless=True) for f in (probabilities, d_scores))


def check(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array | str | None,
    window: int | None,
    sinks: mx.array | None,
    softcap: float | None,
) -> None:
    """ValueError that names what is wrong with the arguments of `attention`."""
    for name, array in (("queries", queries), ("keys", keys), ("values", values)):
        if array.ndim != 4:
            raise ValueError(f"{name} must be (B, H, T, D), got shape {tuple(array.shape)}")
        if not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"{name} must be floating, got {array.dtype}")
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"keys and values must agree in B, H, T: {tuple(keys.shape)}, {tuple(values.shape)}")
    if queries.shape[0] != keys.shape[0] or queries.shape[3] != keys.shape[3]:
        raise ValueError(f"queries and keys must agree in B and D: {tuple(queries.shape)}, {tuple(keys.shape)}")
    if keys.shape[1] == 0 or queries.shape[1] % keys.shape[1]:
        raise ValueError(f"query heads ({queries.shape[1]}) must be a multiple of key heads ({keys.shape[1]})")
    if isinstance(mask, mx.array):
        _check_mask(mask, (*queries.shape[:3], keys.shape[2]))
    elif mask not in (None, "causal"):
        raise ValueError(f'mask must be None, "causal" or an array, got {mask!r}')
    if isinstance(mask, str) and queries.shape[2] > keys.shape[2]:
        raise ValueError(f"causal: more queries ({queries.shape[2]}) than keys ({keys.shape[2]})")
    if window is not None and not isinstance(mask, str):
        raise ValueError('window needs mask="causal"')
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if sinks is not None and (tuple(sinks.shape) != queries.shape[1:2] or not mx.issubdtype(sinks.dtype, mx.floating)):
        raise ValueError(f"sinks must be ({queries.shape[1]},) numbers, got {tuple(sinks.shape)} {sinks.dtype}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive, got {softcap}")


def _check_mask(mask: mx.array, shape: tuple[int, ...]) -> None:
    if mask.ndim > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"mask must broadcast to {shape}, got shape {tuple(mask.shape)}")
    if mask.dtype != mx.bool_ and not mx.issubdtype(mask.dtype, mx.floating):
        raise ValueError(f"mask must be bool or floating, got {mask.dtype}")
