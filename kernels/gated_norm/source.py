"""The kernel body, in Metal's dialect: a simdgroup serves one head of one token.

Inputs are read through their strides, so that a gate that is a slice of a wider product needs no
copy. Everything is float32 between reading and writing.
"""

from typing import ClassVar

import attrs

from draftloom.kernels.gated_delta_inputs.source import CUDA_PRELUDE, METAL_PRELUDE
from draftloom.kernels.head_norm import HeadNormVariant

__all__ = ["CUDA_PRELUDE", "METAL_PRELUDE", "Variant"]

_BODY = """
  const int lane = static_cast<int>(thread_index_in_simdgroup);
  const int head = static_cast<int>(threadgroup_position_in_grid.y) * SIMDS
      + static_cast<int>(simdgroup_index_in_threadgroup);
  const int row = static_cast<int>(threadgroup_position_in_grid.x);
  const int tokens = y_shape[1];
  const int batch = row / tokens;
  const int t = row % tokens;
  float values[Dv / 32];
  float squares = 0.0f;
  for (int i = 0; i < Dv / 32; ++i) {
    const int c = i * 32 + lane;
    values[i] = static_cast<float>(
        y[batch * y_strides[0] + t * y_strides[1] + head * y_strides[2] + c * y_strides[3]]);
    squares += values[i] * values[i];
  }
  for (int bit = 1; bit < 32; bit <<= 1) {
    squares += simd_shuffle_xor(squares, bit);
  }
  const float scale = rsqrt_of(squares / static_cast<float>(Dv) + @EPS@);
  for (int i = 0; i < Dv / 32; ++i) {
    const int c = i * 32 + lane;
    const float gate = static_cast<float>(
        z[batch * z_strides[0] + t * z_strides[1] + head * z_strides[2] + c * z_strides[3]]);
    const float normed = values[i] * scale * static_cast<float>(weight[c * weight_strides[0]]);
    out[(static_cast<size_t>(row) * Hv + head) * Dv + c] =
        static_cast<QT>(normed * gate / (1.0f + exp_of(-gate)));
  }
"""


@attrs.frozen(cache_hash=True)
class Variant(HeadNormVariant):
    """The kernel for one epsilon."""

    name = "draftloom_gated_norm"
    inputs: ClassVar = ["y", "z", "weight"]
    outputs: ClassVar = ["out"]
    body = _BODY
