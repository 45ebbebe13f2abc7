"""The kernel body, in Metal's dialect: a threadgroup serves one row.

Its lanes take every ``32 * SIMDS``-th number and keep theirs in registers. What MLX rounds is
rounded: the sum, what is scaled, and that times the weight.
"""

from typing import ClassVar

import attrs

from draftloom.kernels.gated_delta_inputs.source import CUDA_PRELUDE, METAL_PRELUDE
from draftloom.kernels.rms_norm import NormVariant

__all__ = ["CUDA_PRELUDE", "METAL_PRELUDE", "Variant"]

_BODY = """
  constexpr int LANES = 32 * SIMDS;
  constexpr int EACH = (D + LANES - 1) / LANES;
  const int simd = static_cast<int>(simdgroup_index_in_threadgroup);
  const int lane = static_cast<int>(thread_index_in_simdgroup);
  const int first = simd * 32 + lane;
  const size_t at = static_cast<size_t>(threadgroup_position_in_grid.x) * D;
  threadgroup float parts[SIMDS];
  float values[EACH];
  float squares = 0.0f;
  for (int i = 0; i < EACH; ++i) {
    const int c = i * LANES + first;
    values[i] = 0.0f;
    if (c < D) {
      const QT sum = static_cast<QT>(static_cast<float>(x[at + c]) + static_cast<float>(y[at + c]));
      total[at + c] = sum;
      values[i] = static_cast<float>(sum);
      squares += values[i] * values[i];
    }
  }
  for (int bit = 1; bit < 32; bit <<= 1) {
    squares += simd_shuffle_xor(squares, bit);
  }
  if (lane == 0) {
    parts[simd] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float all = 0.0f;
  for (int i = 0; i < SIMDS; ++i) {
    all += parts[i];
  }
  const float scale = rsqrt_of(all / static_cast<float>(D) + @EPS@);
  for (int i = 0; i < EACH; ++i) {
    const int c = i * LANES + first;
    if (c < D) {
      const QT scaled = static_cast<QT>(values[i] * scale);
      normed[at + c] = static_cast<QT>(static_cast<float>(scaled) * static_cast<float>(weight[c]));
    }
  }
"""


@attrs.frozen(cache_hash=True)
class Variant(NormVariant):
    """The kernel for one epsilon."""

    name = "draftloom_add_rms_norm"
    inputs: ClassVar = ["x", "y", "weight"]
    outputs: ClassVar = ["total", "normed"]
    body = _BODY
