"""One CUDA kernel for KL(p_t || p_s) of rows and E = p_s - p_t, beside the operations in `divergence`.

The operations read and write a tile of scores, or a chunk of logits, many times. The kernel reads a row once from
memory and once from the cache, and writes E. It exists for CUDA only; Metal and the CPU use the operations, and so
does a CUDA device on which the kernel does not give their results: `usable` compares both once per process.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..machine import on_gpu
from .tiling import MASKED

VECTOR_BYTES = 16  # bytes per load
THREADS = 256  # threads per row
TOLERANCE, HALF_TOLERANCE = 1e-5, 1e-2  # largest errors in the self-check, relative to the largest number

# A block of threads works on one row: a running maximum and sum per thread (online softmax, arXiv 1805.02867), one
# reduction over the block, then the terms and E. Row i of n rows and m columns sees j <= m - n + i if CAUSAL.
_HEADER = """
__device__ inline void merge(float& top, float& total, float other_top, float other_total) {
  float new_top = fmaxf(top, other_top);
  total = total * expf(top - new_top) + other_total * expf(other_top - new_top);
  top = new_top;
}
"""
_SOURCE = """
  struct alignas(VECTOR * sizeof(T)) Pack { T v[VECTOR]; };
  const int columns = s_shape[s_ndim - 1], rows = s_shape[s_ndim - 2];
  const long row = blockIdx.x;
  const int seen = CAUSAL ? columns - rows + int(row % rows) + 1 : columns;
  const Pack* s_row = reinterpret_cast<const Pack*>(s + row * columns);
  const Pack* r_row = reinterpret_cast<const Pack*>(r + row * columns);
  const float scale_s = scales[0], scale_r = scales[1], w = weight[row % weight_shape[0]];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __shared__ float shared[4][32];

  float top_s = LOWEST, top_r = LOWEST, total_s = 0.0f, total_r = 0.0f;
  for (int k = threadIdx.x; k * VECTOR < seen; k += THREADS) {
    Pack a = s_row[k], b = r_row[k];
    float x[VECTOR], y[VECTOR], new_s = top_s, new_r = top_r;
    for (int c = 0; c < VECTOR; ++c) {
      bool counts = k * VECTOR + c < seen;
      x[c] = counts ? scale_s * static_cast<float>(a.v[c]) : LOWEST;
      y[c] = counts ? scale_r * static_cast<float>(b.v[c]) : LOWEST;
      new_s = fmaxf(new_s, x[c]);
      new_r = fmaxf(new_r, y[c]);
    }
    total_s *= expf(top_s - new_s);
    total_r *= expf(top_r - new_r);
    for (int c = 0; c < VECTOR; ++c) {
      total_s += expf(x[c] - new_s);
      total_r += expf(y[c] - new_r);
    }
    top_s = new_s;
    top_r = new_r;
  }
  for (int offset = 16; offset; offset /= 2) {
    merge(top_s, total_s, __shfl_xor_sync(~0u, top_s, offset), __shfl_xor_sync(~0u, total_s, offset));
    merge(top_r, total_r, __shfl_xor_sync(~0u, top_r, offset), __shfl_xor_sync(~0u, total_r, offset));
  }
  if (lane == 0) {
    shared[0][warp] = top_s; shared[1][warp] = total_s; shared[2][warp] = top_r; shared[3][warp] = total_r;
  }
  __syncthreads();
  top_s = LOWEST; top_r = LOWEST; total_s = 0.0f; total_r = 0.0f;
  for (int k = 0; k < THREADS / 32; ++k) {
    merge(top_s, total_s, shared[0][k], shared[1][k]);
    merge(top_r, total_r, shared[2][k], shared[3][k]);
  }
  __syncthreads();

  const float shift = (top_s - top_r) + logf(total_s / total_r);  // lse_s - lse_t, without their rounding
  const float over_s = 1.0f / total_s, over_r = 1.0f / total_r;
  float sum = 0.0f;
  for (int k = threadIdx.x; k * VECTOR < (ERROR ? columns : seen); k += THREADS) {
    Pack a = s_row[k], b = r_row[k], e;
    for (int c = 0; c < VECTOR; ++c) {
      float difference = 0.0f;
      if (k * VECTOR + c < seen) {
        float x = scale_s * static_cast<float>(a.v[c]), y = scale_r * static_cast<float>(b.v[c]);
        float p_s = expf(x - top_s) * over_s, p_t = expf(y - top_r) * over_r;
        difference = p_s - p_t;
        sum += difference - p_t * ((x - y) - shift);
      }
      e.v[c] = static_cast<T>(difference * w);
    }
    if (ERROR) reinterpret_cast<Pack*>(error + row * columns)[k] = e;
  }
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane == 0) shared[0][warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float all = 0.0f;
    for (int k = 0; k < THREADS / 32; ++k) all += shared[0][k];
    kl[row] = all * w;
  }
"""


def rows_kl(
    s: mx.array, r: mx.array, weight: mx.array, scales: mx.array, *, causal: bool = False, error: bool = True
) -> tuple[mx.array, mx.array]:
    """(KL, E) of the rows scale_s S and scale_r R, both (..., rows, columns) of one dtype.

    Args:
        weight: (n,) float32, the factor of each row of KL and E; n is 1 or the number of rows.
        scales: (2,) float32, scale_s and scale_r.
        causal: row i of n sees the columns up to columns - n + i; E is 0 in the others.
        error: False leaves E out; it is then an array of one number.

    Returns:
        KL (...,) of the rows, float32, and E in the dtype and shape of S.
    """
    columns = s.shape[-1]
    count = s.size // columns
    kl, e = _kernel()(
        inputs=[s, r, weight, scales],
        template=[
            ("T", s.dtype),
            ("VECTOR", _vector(columns, s.dtype)),
            ("THREADS", THREADS),
            ("CAUSAL", causal),
            ("ERROR", error),
        ],
        grid=(count * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[s.shape[:-1], s.shape if error else (1,)],
        output_dtypes=[mx.float32, s.dtype],
    )
    return kl, e


def on_cuda() -> bool:
    """Whether the default device is a CUDA GPU."""
    return on_gpu() and mx.cuda.is_available()


def usable(columns: int, dtype: mx.Dtype, *, causal: bool = False, error: bool = True) -> bool:
    """Whether the default device is a CUDA GPU on which the kernel gives the results of the operations."""
    return on_cuda() and _agrees(_vector(columns, dtype), dtype, causal, error)


@functools.cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="linearard_rows_kl",
        input_names=["s", "r", "weight", "scales"],
        output_names=["kl", "error"],
        header=f"#define LOWEST {MASKED:.0e}f\n{_HEADER}",
        source=_SOURCE,
    )


def _vector(columns: int, dtype: mx.Dtype) -> int:
    """Numbers per load. Rows that do not begin at a multiple of `VECTOR_BYTES` are read one number at a time."""
    return VECTOR_BYTES // dtype.size if columns * dtype.size % VECTOR_BYTES == 0 else 1


@functools.cache
def _agrees(vector: int, dtype: mx.Dtype, causal: bool, error: bool) -> bool:
    """Compare one variant of the kernel with the definition, once per process; each variant is compiled anyway."""
    columns = 2048 + 5 * vector
    s, r = (mx.random.normal((2, 7, columns), key=mx.random.key(i)).astype(dtype) for i in range(2))
    scales, weight = mx.array([0.7, 1.3]), mx.array([2.0])
    try:
        got = rows_kl(s, r, weight, scales, causal=causal, error=error)
        close = [
            mx.abs(a - b).max() <= (TOLERANCE if a.dtype == mx.float32 else HALF_TOLERANCE) * mx.abs(b).max()
            for a, b in zip(got, definition(s, r, weight, scales, causal)[: 1 + error], strict=False)
        ]
        return all(c.item() for c in close)
    except (RuntimeError, ValueError):  # the kernel does not compile or run here
        return False


def definition(s: mx.array, r: mx.array, weight: mx.array, scales: mx.array, causal: bool) -> list[mx.array]:
    """[KL, E] of `rows_kl` by mlx's operations, float32; the oracle of the self-check."""
    rows, columns = s.shape[-2:]
    allowed = mx.arange(columns) <= mx.arange(columns - rows, columns)[:, None] if causal else mx.array(True)
    log_s, log_t = (
        z - mx.logsumexp(z, axis=-1, keepdims=True)
        for z in (mx.where(allowed, v.astype(mx.float32) * c, MASKED) for v, c in ((s, scales[0]), (r, scales[1])))
    )
    p_s, p_t = mx.exp(log_s), mx.exp(log_t)
    weight = weight.reshape(s.shape[:-1]) if weight.size > 1 else weight
    return [(p_s - p_t - p_t * (log_s - log_t)).sum(axis=-1) * weight, (p_s - p_t) * weight[..., None]]
