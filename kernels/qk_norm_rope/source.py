"""The kernel body, in Metal's dialect: a simdgroup serves one head of one token.

First the heads of q, then those of k. Its lanes take every 32nd channel; the channel that one is
rotated with comes from the cache of the processor. What MLX's norm rounds is rounded; everything
else is float32 between reading and writing.
"""

from typing import ClassVar

import attrs

from draftloom.kernels.gated_delta_inputs.source import CUDA_PRELUDE, METAL_PRELUDE
from draftloom.kernels.head_norm import HeadNormVariant

__all__ = ["CUDA_PRELUDE", "METAL_PRELUDE", "Variant"]

_BODY = """
  constexpr int HALF = R / 2;
  const int lane = static_cast<int>(thread_index_in_simdgroup);
  const int head = static_cast<int>(threadgroup_position_in_grid.y) * SIMDS
      + static_cast<int>(simdgroup_index_in_threadgroup);
  const int row = static_cast<int>(threadgroup_position_in_grid.x);
  const int tokens = rows_shape[1];
  const int batch = row / tokens;
  const int t = row % tokens;
  const bool query = head < Hq;
  const size_t from = static_cast<size_t>(row) * rows_shape[2]
      + (query ? head * STEP : Hq * STEP + (head - Hq) * D);
  float values[D / 32];
  float squares = 0.0f;
  for (int i = 0; i < D / 32; ++i) {
    values[i] = static_cast<float>(rows[from + i * 32 + lane]);
    squares += values[i] * values[i];
  }
  for (int bit = 1; bit < 32; bit <<= 1) {
    squares += simd_shuffle_xor(squares, bit);
  }
  const float scale = rsqrt_of(squares / static_cast<float>(D) + @EPS@);
  const size_t to = query ? (static_cast<size_t>(batch) * Hq + head) * tokens + t
                          : (static_cast<size_t>(batch) * Hk + head - Hq) * tokens + t;
  for (int i = 0; i < D / 32; ++i) {
    const int c = i * 32 + lane;
    const float weight = static_cast<float>(query ? q_weight[c] : k_weight[c]);
    float found = static_cast<float>(static_cast<QT>(values[i] * scale * weight));
    if (c < R) {
      const bool first = TRADITIONAL ? c % 2 == 0 : c < HALF;
      const int other = TRADITIONAL ? (first ? c + 1 : c - 1) : (first ? c + HALF : c - HALF);
      const int angle = TRADITIONAL ? c / 2 : (first ? c : other);
      const float beside = static_cast<float>(query ? q_weight[other] : k_weight[other]);
      const float partner = static_cast<float>(
          static_cast<QT>(static_cast<float>(rows[from + other]) * scale * beside));
      const float turned = partner * table[t * R + HALF + angle];
      found = found * table[t * R + angle] + (first ? -turned : turned);
    }
    if (query) {
      q[to * D + c] = static_cast<QT>(found);
    } else {
      k[to * D + c] = static_cast<QT>(found);
    }
  }
"""


@attrs.frozen(cache_hash=True)
class Variant(HeadNormVariant):
    """The kernel for one epsilon."""

    name = "draftloom_qk_norm_rope"
    inputs: ClassVar = ["rows", "q_weight", "k_weight", "table"]
    outputs: ClassVar = ["q", "k"]
    body = _BODY
