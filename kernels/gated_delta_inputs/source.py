"""The kernel body, in Metal's dialect, and the preludes that make it Metal or CUDA.

A simdgroup serves one head of one token: first the Hk heads of q, then those of k, then the Hv of
v. Its lanes take every 32nd channel. A channel of a token needs the W inputs before it, which its
neighbours read as well; they come from the cache of the processor. Everything is float32 between
reading and writing. The simdgroup of a head of v makes the gates of that head.

Inputs are read through their strides, so that slices of a wider product need no copy.

``log(1 + e)`` is written as a series (2 atanh(e / (2 + e)), e in 0..1), which is right to the last
bits of float32 for small e too; mlx-lm's kernels use no logarithm.
"""

import attrs

from draftloom.kernels.backend import CUDA_BUILTINS

__all__ = ["CUDA_PRELUDE", "METAL_PRELUDE", "Variant"]

METAL_PRELUDE = """
inline float exp_of(float x) {
  return metal::exp(x);
}
inline float rsqrt_of(float x) {
  return metal::rsqrt(x);
}
"""

CUDA_PRELUDE = (
    CUDA_BUILTINS
    + """
__device__ __forceinline__ float exp_of(float x) {
  return expf(x);
}
__device__ __forceinline__ float rsqrt_of(float x) {
  return 1.0f / sqrtf(x);
}
"""
)

_SETUP = """
  constexpr int KEPT = KW - 1;
  constexpr int CHANNELS = 2 * Hk * Dk + Hv * Dv;
  const int lane = static_cast<int>(thread_index_in_simdgroup);
  const int head = static_cast<int>(threadgroup_position_in_grid.y) * SIMDS
      + static_cast<int>(simdgroup_index_in_threadgroup);
  const int row = static_cast<int>(threadgroup_position_in_grid.x);
  const int tokens = qkv_shape[1];
  const int batch = row / tokens;
  const int t = row % tokens;
  const size_t window_at = static_cast<size_t>(batch) * (tokens + KEPT) * CHANNELS;
"""

# The convolution and SiLU of this simdgroup's SIZE channels from `first` on, into `mixed`; writes
# the window's row of this token, and at the first token the rows before it.
_MIX = """
    float mixed[@SIZE@ / 32];
    for (int i = 0; i < @SIZE@ / 32; ++i) {
      const int c = first + i * 32 + lane;
      float sum = 0.0f;
      float x = 0.0f;
      for (int j = 0; j < KW; ++j) {
        const int s = t + j - KEPT;
        x = 0.0f;
        if (s < 0) {
          x = static_cast<float>(
              before[batch * before_strides[0] + (s + KEPT) * before_strides[1]
                     + c * before_strides[2]]);
        } else if (@KEPT_TOKEN@) {
          x = static_cast<float>(
              qkv[batch * qkv_strides[0] + s * qkv_strides[1] + c * qkv_strides[2]]);
        }
        if (t == 0 && s < 0) {
          window[window_at + static_cast<size_t>(s + KEPT) * CHANNELS + c] = static_cast<QT>(x);
        }
        sum += x * static_cast<float>(weight[c * weight_strides[0] + j * weight_strides[1]]);
      }
      window[window_at + static_cast<size_t>(t + KEPT) * CHANNELS + c] = static_cast<QT>(x);
      mixed[i] = sum / (1.0f + exp_of(-sum));
    }
"""

_BODY = """
  if (head < 2 * Hk) {
    const int first = head * Dk;
@MIX_KEYS@
    float squares = 0.0f;
    for (int i = 0; i < Dk / 32; ++i) {
      squares += mixed[i] * mixed[i];
    }
    for (int bit = 1; bit < 32; bit <<= 1) {
      squares += simd_shuffle_xor(squares, bit);
    }
    float scale = rsqrt_of(squares + 1e-6f);
    if (head < Hk) {
      scale *= rsqrt_of(static_cast<float>(Dk));
    }
    for (int i = 0; i < Dk / 32; ++i) {
      const QT value = static_cast<QT>(mixed[i] * scale);
      if (head < Hk) {
        q[(static_cast<size_t>(row) * Hk + head) * Dk + i * 32 + lane] = value;
      } else {
        k[(static_cast<size_t>(row) * Hk + head - Hk) * Dk + i * 32 + lane] = value;
      }
    }
  } else {
    const int own = head - 2 * Hk;
    const int first = 2 * Hk * Dk + own * Dv;
@MIX_VALUES@
    for (int i = 0; i < Dv / 32; ++i) {
      v[(static_cast<size_t>(row) * Hv + own) * Dv + i * 32 + lane] = static_cast<QT>(mixed[i]);
    }
    if (lane == 0) {
      const float x = static_cast<float>(
              a_in[batch * a_in_strides[0] + t * a_in_strides[1] + own * a_in_strides[2]])
          + static_cast<float>(dt_bias[own * dt_bias_strides[0]]);
      const float e = exp_of(x < 0.0f ? x : -x);
      const float s = e / (2.0f + e);
      const float s2 = s * s;
      float series = 1.0f / 17.0f;
      for (int n = 15; n > 0; n -= 2) {
        series = series * s2 + 1.0f / static_cast<float>(n);
      }
      const float step = (x > 0.0f ? x : 0.0f) + 2.0f * s * series;
      const float rate = exp_of(static_cast<float>(a_log[own * a_log_strides[0]]));
      const float strength = static_cast<float>(
          b_in[batch * b_in_strides[0] + t * b_in_strides[1] + own * b_in_strides[2]]);
      g[static_cast<size_t>(row) * Hv + own] = exp_of(-rate * step);
      beta[static_cast<size_t>(row) * Hv + own] = 1.0f / (1.0f + exp_of(-strength));
    }
  }
"""


@attrs.frozen(cache_hash=True)
class Variant:
    """The kernel, with or without a mask.

    Attributes:
        masked: whether it reads a mask.
    """

    masked: bool = False

    @property
    def name(self) -> str:
        """A short name, unique to the variant."""
        return "draftloom_gated_delta_inputs" + ("_masked" if self.masked else "")

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        names = ["qkv", "before", "weight", "a_in", "b_in", "a_log", "dt_bias"]
        return [*names, "mask"] if self.masked else names

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in order."""
        return ["q", "k", "v", "g", "beta", "window"]

    @property
    def source(self) -> str:
        """The body, as handed to MLX for either backend."""
        kept = "mask[batch * mask_strides[0] + s * mask_strides[1]]" if self.masked else "true"
        mix = _MIX.replace("@KEPT_TOKEN@", kept)
        body = _BODY.replace("@MIX_KEYS@", mix.replace("@SIZE@", "Dk"))
        return _SETUP + body.replace("@MIX_VALUES@", mix.replace("@SIZE@", "Dv"))
