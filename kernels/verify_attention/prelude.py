"""What the bodies of :mod:`.source` call, in Metal and in CUDA: chunks of 16 bytes, sums of tiles.

What :mod:`.tensor` calls besides is there. Its instructions stand alone (`CUDA_MMA`,
`CUDA_INSTRUCTIONS`), so that a test can put functions in their place and run all the rest.
"""

from __future__ import annotations

from draftloom.kernels.backend import CUDA_BUILTINS

from .tensor import CUDA_INSTRUCTIONS, CUDA_MMA, CUDA_TENSOR

__all__ = ["CUDA_FUNCTIONS", "CUDA_MMA", "CUDA_PRELUDE", "METAL_PRELUDE"]

_PLAIN = """
// What the lane multiplies: two rows of queries, where they lie.
template <typename P>
struct QueryRows {
  P row0;
  P row1;
};
"""

METAL_PRELUDE = (
    """
#define UNROLL
inline float natural_exp(float x) {
  return metal::exp(x);
}
template <typename T>
struct Chunk {
  T x[16 / sizeof(T)];
};
template <typename P>
inline bool is_wide(P from) {
  return true;
}
template <typename T>
inline Chunk<T> zero_chunk() {
  Chunk<T> chunk;
  for (uint j = 0; j < 16 / sizeof(T); ++j) {
    chunk.x[j] = static_cast<T>(0.0f);
  }
  return chunk;
}
template <typename T, typename P>
inline Chunk<T> load_chunk(P from, bool wide) {
  Chunk<T> chunk;
  for (uint j = 0; j < 16 / sizeof(T); ++j) {
    chunk.x[j] = from[j];
  }
  return chunk;
}
template <typename T, typename S>
inline void put_chunk(S to, thread const Chunk<T>& chunk) {
  for (uint j = 0; j < 16 / sizeof(T); ++j) {
    to[j] = chunk.x[j];
  }
}
template <typename P>
inline void put_pair(P to, float a, float b) {
  to[0] = a;
  to[1] = b;
}
struct Four {
  float x[4];
};
template <typename P>
inline Four load_four(P from) {
  Four four;
  for (int e = 0; e < 4; ++e) {
    four.x[e] = from[e];
  }
  return four;
}
"""
    + _PLAIN
    + """
template <typename P>
inline QueryRows<P> rows_at(P row0, P row1) {
  QueryRows<P> rows;
  rows.row0 = row0;
  rows.row1 = row1;
  return rows;
}
// sums = queries [16, D] times keys [8, D], for NT tiles one below the other
template <int D, int NT, int LD, typename P, typename S>
inline void score_tiles(
    thread float (*sums)[4], thread const QueryRows<P>& rows, S keys, int lane) {
  for (int t = 0; t < NT; ++t) {
    S key0 = keys + (8 * t + 2 * (lane % 4)) * LD;
    S key1 = key0 + LD;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int d = 0; d < D; ++d) {
      const float q0 = static_cast<float>(rows.row0[d]);
      const float q1 = static_cast<float>(rows.row1[d]);
      const float k0 = static_cast<float>(key0[d]);
      const float k1 = static_cast<float>(key1[d]);
      sum[0] += q0 * k0;
      sum[1] += q0 * k1;
      sum[2] += q1 * k0;
      sum[3] += q1 * k1;
    }
    for (int e = 0; e < 4; ++e) {
      sums[t][e] = sum[e];
    }
  }
}
// sums += weights [16, BN] times values [BN, 8], for OT tiles side by side
template <int OT, int BN, int LD, int PLD, typename W, typename S>
inline void value_tiles(thread float (*sums)[4], W weights, S values, int lane) {
  W weight0 = weights + (lane / 4) * PLD;
  W weight1 = weight0 + 8 * PLD;
  for (int key = 0; key < BN; ++key) {
    const float w0 = static_cast<float>(weight0[key]);
    const float w1 = static_cast<float>(weight1[key]);
    for (int t = 0; t < OT; ++t) {
      S value = values + key * LD + 8 * t + 2 * (lane % 4);
      const float v0 = static_cast<float>(value[0]);
      const float v1 = static_cast<float>(value[1]);
      sums[t][0] += w0 * v0;
      sums[t][1] += w0 * v1;
      sums[t][2] += w1 * v0;
      sums[t][3] += w1 * v1;
    }
  }
}
"""
)

CUDA_FUNCTIONS = (
    """
__device__ __forceinline__ float natural_exp(float x) {
  return expf(x);
}
template <typename T>
struct Chunk {
  uint4 bits;
};
template <typename T>
__device__ __forceinline__ bool is_wide(const T* from) {
  return (reinterpret_cast<size_t>(from) & 15) == 0;
}
template <typename T>
__device__ __forceinline__ Chunk<T> zero_chunk() {
  Chunk<T> chunk;
  chunk.bits.x = chunk.bits.y = chunk.bits.z = chunk.bits.w = 0;
  return chunk;
}
template <typename T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* from, bool wide) {
  Chunk<T> chunk;
  if (wide) {
    chunk.bits = *reinterpret_cast<const uint4*>(from);
  } else {
    alignas(16) T x[16 / sizeof(T)];
    UNROLL
    for (int j = 0; j < static_cast<int>(16 / sizeof(T)); ++j) {
      x[j] = from[j];
    }
    chunk.bits = *reinterpret_cast<const uint4*>(x);
  }
  return chunk;
}
template <typename T>
__device__ __forceinline__ void put_chunk(T* to, const Chunk<T>& chunk) {
  *reinterpret_cast<uint4*>(to) = chunk.bits;
}
__device__ __forceinline__ void put_pair(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}
struct Four {
  float x[4];
};
__device__ __forceinline__ Four load_four(const float* from) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  return {x.x, x.y, x.z, x.w};
}
"""
    + _PLAIN
    + """
template <typename T>
__device__ __forceinline__ QueryRows<const T*> rows_at(const T* row0, const T* row1) {
  return {row0, row1};
}
// sums = queries [16, D] times keys [8, D], for NT tiles one below the other
template <int D, int NT, int LD, typename T>
__device__ __forceinline__ void score_tiles(
    float (*sums)[4], const QueryRows<const T*>& rows, const T* keys, int lane) {
  UNROLL
  for (int t = 0; t < NT; ++t) {
    const T* key0 = keys + (8 * t + 2 * (lane % 4)) * LD;
    const T* key1 = key0 + LD;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int d = 0; d < D; ++d) {
      const float q0 = static_cast<float>(rows.row0[d]);
      const float q1 = static_cast<float>(rows.row1[d]);
      const float k0 = static_cast<float>(key0[d]);
      const float k1 = static_cast<float>(key1[d]);
      sum[0] += q0 * k0;
      sum[1] += q0 * k1;
      sum[2] += q1 * k0;
      sum[3] += q1 * k1;
    }
    UNROLL
    for (int e = 0; e < 4; ++e) {
      sums[t][e] = sum[e];
    }
  }
}
// sums += weights [16, BN] times values [BN, 8], for OT tiles side by side
template <int OT, int BN, int LD, int PLD, typename T>
__device__ __forceinline__ void value_tiles(
    float (*sums)[4], const T* weights, const T* values, int lane) {
  const T* weight0 = weights + (lane / 4) * PLD;
  const T* weight1 = weight0 + 8 * PLD;
  for (int key = 0; key < BN; ++key) {
    const float w0 = static_cast<float>(weight0[key]);
    const float w1 = static_cast<float>(weight1[key]);
    UNROLL
    for (int t = 0; t < OT; ++t) {
      const T* value = values + key * LD + 8 * t + 2 * (lane % 4);
      const float v0 = static_cast<float>(value[0]);
      const float v1 = static_cast<float>(value[1]);
      sums[t][0] += w0 * v0;
      sums[t][1] += w0 * v1;
      sums[t][2] += w1 * v0;
      sums[t][3] += w1 * v1;
    }
  }
}
"""
)

CUDA_PRELUDE = CUDA_BUILTINS + CUDA_MMA + CUDA_INSTRUCTIONS + CUDA_FUNCTIONS + CUDA_TENSOR
