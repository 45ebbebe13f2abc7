"""What the kernel bodies call, in Metal and in CUDA: chunks of 16 bytes, and products of tiles.

On Metal, and for float32 on CUDA, the sums of a tile are taken one by one. For float16 and bfloat16
on CUDA they are ``mma.sync``, whose assembly stands alone (`CUDA_MMA`) so that a test can put a
function in its place and run all the rest.
"""

from __future__ import annotations

from draftloom.kernels.backend import CUDA_BUILTINS

__all__ = ["CUDA_FRAGMENTS", "CUDA_MMA", "CUDA_PRELUDE", "METAL_PRELUDE"]

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
#define UNROLL_8
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
"""
    + _PLAIN
    + """
template <typename T, int D, int KIND, typename P>
inline QueryRows<P> queries_at(P row0, P row1, int lane) {
  QueryRows<P> rows;
  rows.row0 = row0;
  rows.row1 = row1;
  return rows;
}
// sums = queries [16, D] times keys [8, D], for NT tiles one below the other
template <typename T, int D, int NT, int LD, int KIND, typename P, typename S>
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
template <typename T, int OT, int BN, int LD, int PLD, int KIND, typename W, typename S>
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

CUDA_MMA = """
#define UNROLL _Pragma("unroll")
// c [16, 8] += a [16, 16] b [16, 8]; the layouts are PTX's for m16n8k16
template <int KIND>
__device__ __forceinline__ void mma_16x8x16(
    float* c, const unsigned int* a, unsigned int b0, unsigned int b1) {
  if (KIND == 2) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
"""
"""The one instruction that a CPU has to be told: tests put a function of the same name here."""

CUDA_FRAGMENTS = (
    """
#ifdef __CUDACC_RTC__
#define UNROLL_8 _Pragma("unroll 8")
#else
#define UNROLL_8
#endif
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
// Two neighbours in one register, as mma takes them.
template <typename T>
__device__ __forceinline__ unsigned int pair_of(const T& low, const T& high) {
  return *reinterpret_cast<const unsigned short*>(&low)
      | static_cast<unsigned int>(*reinterpret_cast<const unsigned short*>(&high)) << 16;
}
template <typename T>
__device__ __forceinline__ unsigned int pair_at(const T* from) {
  return *reinterpret_cast<const unsigned int*>(from);
}
"""
    + _PLAIN
    + """
// What the lane multiplies: its share of 16 rows of queries, in registers.
template <int D>
struct QueryFragments {
  unsigned int a[D / 16][4];
};
template <typename T, int D, int KIND>
struct QueriesOf {
  using Type = QueryFragments<D>;
  static __device__ __forceinline__ Type at(const T* row0, const T* row1, int lane) {
    Type rows;
    UNROLL
    for (int k = 0; k < D / 16; ++k) {
      const int d = 16 * k + 2 * (lane % 4);
      rows.a[k][0] = pair_of(row0[d], row0[d + 1]);
      rows.a[k][1] = pair_of(row1[d], row1[d + 1]);
      rows.a[k][2] = pair_of(row0[d + 8], row0[d + 9]);
      rows.a[k][3] = pair_of(row1[d + 8], row1[d + 9]);
    }
    return rows;
  }
};
template <typename T, int D>
struct QueriesOf<T, D, 0> {
  using Type = QueryRows<const T*>;
  static __device__ __forceinline__ Type at(const T* row0, const T* row1, int lane) {
    Type rows;
    rows.row0 = row0;
    rows.row1 = row1;
    return rows;
  }
};
template <typename T, int D, int KIND>
__device__ __forceinline__ typename QueriesOf<T, D, KIND>::Type queries_at(
    const T* row0, const T* row1, int lane) {
  return QueriesOf<T, D, KIND>::at(row0, row1, lane);
}
// sums = queries [16, D] times keys [8, D], for NT tiles one below the other. Every second product
// has sums of its own: a tensor core's result is long in coming, and no product waits for the last.
template <typename T, int D, int NT, int LD, int KIND>
__device__ __forceinline__ void score_tiles(
    float (*sums)[4], const QueryFragments<D>& rows, const T* keys, int lane) {
  const T* key = keys + (lane / 4) * LD + 2 * (lane % 4);
  float odd[NT][4];
  UNROLL
  for (int t = 0; t < NT; ++t) {
    UNROLL
    for (int e = 0; e < 4; ++e) {
      sums[t][e] = odd[t][e] = 0.0f;
    }
  }
  UNROLL
  for (int k = 0; k < D / 16; k += 2) {
    UNROLL
    for (int t = 0; t < NT; ++t) {
      const T* at = key + 8 * t * LD + 16 * k;
      mma_16x8x16<KIND>(sums[t], rows.a[k], pair_at(at), pair_at(at + 8));
      mma_16x8x16<KIND>(odd[t], rows.a[k + 1], pair_at(at + 16), pair_at(at + 24));
    }
  }
  UNROLL
  for (int t = 0; t < NT; ++t) {
    UNROLL
    for (int e = 0; e < 4; ++e) {
      sums[t][e] += odd[t][e];
    }
  }
}
template <typename T, int D, int NT, int LD, int KIND>
__device__ __forceinline__ void score_tiles(
    float (*sums)[4], const QueryRows<const T*>& rows, const T* keys, int lane) {
  UNROLL
  for (int t = 0; t < NT; ++t) {
    const T* key0 = keys + (8 * t + 2 * (lane % 4)) * LD;
    const T* key1 = key0 + LD;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int d = 0; d < D; ++d) {
      sum[0] += rows.row0[d] * key0[d];
      sum[1] += rows.row0[d] * key1[d];
      sum[2] += rows.row1[d] * key0[d];
      sum[3] += rows.row1[d] * key1[d];
    }
    UNROLL
    for (int e = 0; e < 4; ++e) {
      sums[t][e] = sum[e];
    }
  }
}
// sums += weights [16, BN] times values [BN, 8], for OT tiles side by side
template <typename T, int OT, int BN, int LD, int PLD, int KIND>
struct ValueTiles {
  static __device__ __forceinline__ void add(
      float (*sums)[4], const T* weights, const T* values, int lane) {
    const T* weight = weights + (lane / 4) * PLD + 2 * (lane % 4);
    const T* value = values + 2 * (lane % 4) * LD + lane / 4;
    UNROLL
    for (int k = 0; k < BN; k += 16) {
      unsigned int a[4];
      a[0] = pair_at(weight + k);
      a[1] = pair_at(weight + 8 * PLD + k);
      a[2] = pair_at(weight + k + 8);
      a[3] = pair_at(weight + 8 * PLD + k + 8);
      UNROLL
      for (int t = 0; t < OT; ++t) {
        const T* from = value + k * LD + 8 * t;
        mma_16x8x16<KIND>(
            sums[t], a, pair_of(from[0], from[LD]), pair_of(from[8 * LD], from[9 * LD]));
      }
    }
  }
};
template <typename T, int OT, int BN, int LD, int PLD>
struct ValueTiles<T, OT, BN, LD, PLD, 0> {
  static __device__ __forceinline__ void add(
      float (*sums)[4], const T* weights, const T* values, int lane) {
    const T* weight0 = weights + (lane / 4) * PLD;
    const T* weight1 = weight0 + 8 * PLD;
    for (int key = 0; key < BN; ++key) {
      UNROLL
      for (int t = 0; t < OT; ++t) {
        const T* value = values + key * LD + 8 * t + 2 * (lane % 4);
        sums[t][0] += weight0[key] * value[0];
        sums[t][1] += weight0[key] * value[1];
        sums[t][2] += weight1[key] * value[0];
        sums[t][3] += weight1[key] * value[1];
      }
    }
  }
};
template <typename T, int OT, int BN, int LD, int PLD, int KIND>
__device__ __forceinline__ void value_tiles(
    float (*sums)[4], const T* weights, const T* values, int lane) {
  ValueTiles<T, OT, BN, LD, PLD, KIND>::add(sums, weights, values, lane);
}
"""
)

CUDA_PRELUDE = CUDA_BUILTINS + CUDA_MMA + CUDA_FRAGMENTS
