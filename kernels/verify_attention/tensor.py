"""The first pass on CUDA's tensor cores, for float16 and bfloat16: what :mod:`.source`'s gives.

A warp takes 16 rows and one half of every tile of keys, and keeps a running softmax of its own: it
exchanges nothing until its keys are through, then two warps add up what they have. The warps of a
half fetch for themselves (``cp.async``), keys and values in turns, into a ring of `STAGES` slots:
one is worked on while the others are on their way. Chunks of 16 bytes change places within their
row, so that no read meets two in a bank.

Lane l holds, of a product's 16 x 8 sums, rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
"""

from __future__ import annotations

import math

import attrs

from .share import SHARE
from .source import Partial

__all__ = ["CUDA_INSTRUCTIONS", "CUDA_MMA", "CUDA_TENSOR", "STAGES", "TensorPartial"]

STAGES = 3
"""Slots of a ring, each for the keys or the values of half a tile."""

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
"""The product of tiles, as PTX has it; few-rows products call it too."""

CUDA_INSTRUCTIONS = """
#define ONE_BY_ONE _Pragma("unroll 1")
// Four 8 x 8 matrices, transposed: lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_transposed(unsigned int* x, const void* row) {
  const unsigned int from = static_cast<unsigned int>(__cvta_generic_to_shared(row));
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
      : "r"(from)
      : "memory");
}
// Sets out to copy 16 bytes to shared memory; zeros where there is nothing to copy.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool some) {
  const unsigned int at = static_cast<unsigned int>(__cvta_generic_to_shared(to));
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;"
      :: "r"(at), "l"(__cvta_generic_to_global(from)), "r"(some ? 16 : 0)
      : "memory");
}
__device__ __forceinline__ void end_of_fetch() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until all but the last LEFT fetches are there (as far as this thread copies them).
template <int LEFT>
__device__ __forceinline__ void wait_for_fetches() {
  asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
}
// A barrier of those THREADS threads that name it.
template <int THREADS>
__device__ __forceinline__ void barrier_of(int which) {
  asm volatile("bar.sync %0, %1;" :: "r"(which + 1), "n"(THREADS) : "memory");
}
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
"""
"""The other instructions that a CPU has to be told: tests put functions of the same names here."""

CUDA_TENSOR = """
// Two neighbours in one register, as mma takes them.
template <typename T>
__device__ __forceinline__ unsigned int pair_of(const T& low, const T& high) {
  return *reinterpret_cast<const unsigned short*>(&low)
      | static_cast<unsigned int>(*reinterpret_cast<const unsigned short*>(&high)) << 16;
}
// Where a chunk of a row lies in a tile: eight rows of a column, and two rows of four chunks, are
// in banks of their own. Chunks stay among their eight, and eight rows on all is the same again.
template <int D>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * D + (chunk ^ ((row & 1) << 2 | (row >> 1 & 3))) * 8;
}
// Sets out to copy `left` rows (KEYS at most) to a slot; the others become zeros. `from` is the
// chunk of the thread in the first of its rows. What is not aligned is copied number by number.
template <typename T, int D, int KEYS, int THREADS>
__device__ __forceinline__ void fetch_rows(
    T* slot, const T* from, int left, int thread_id, bool wide) {
  constexpr int ROWS = THREADS / (D / 8);   // fetched at once
  constexpr int SAME = ROWS < 8 ? 8 / ROWS : 1;
  const int row = thread_id / (D / 8);
  const int chunk = thread_id % (D / 8);
  if (wide) {
    UNROLL
    for (int i = 0; i < SAME; ++i) {
      T* to = slot + chunk_at<D>(row + i * ROWS, chunk);
      UNROLL
      for (int s = i; s < KEYS / ROWS; s += SAME) {
        copy_16(to + (s - i) * ROWS * D, from + s * ROWS * D, row + s * ROWS < left);
      }
    }
  } else {
    ONE_BY_ONE
    for (int at = row; at < KEYS; at += ROWS) {
      T* to = slot + chunk_at<D>(at, chunk);
      ONE_BY_ONE
      for (int e = 0; e < 8; ++e) {
        to[e] = at < left ? from[(at - row) * D + e] : static_cast<T>(0.0f);
      }
    }
  }
}
// What the lane multiplies: its share of 16 rows of queries, in registers. The sum over D may go in
// any order that queries and keys share: a lane has eight neighbours of every 32.
template <typename T, int D>
struct Queries {
  unsigned int a[D / 16][4];
  __device__ __forceinline__ Queries(const T* row0, const T* row1, int lane, bool wide) {
    UNROLL
    for (int k = 0; k < D / 32; ++k) {
      const uint4 x = load_chunk<T>(row0 + 32 * k + 8 * (lane % 4), wide).bits;
      const uint4 y = load_chunk<T>(row1 + 32 * k + 8 * (lane % 4), wide).bits;
      a[2 * k][0] = x.x;
      a[2 * k][1] = y.x;
      a[2 * k][2] = x.y;
      a[2 * k][3] = y.y;
      a[2 * k + 1][0] = x.z;
      a[2 * k + 1][1] = y.z;
      a[2 * k + 1][2] = x.w;
      a[2 * k + 1][3] = y.w;
    }
  }
};
// sums = queries [16, D] times keys [8, D], for NT times eight keys. Every second product has sums
// of its own: a tensor core's result is long in coming, and no product waits for the last.
template <typename T, int D, int NT, int KIND>
__device__ __forceinline__ void score_keys(
    float (*sums)[4], const Queries<T, D>& rows, const T* slot, int lane) {
  const T* from[2] = {
      slot + chunk_at<D>(lane / 4, lane % 4), slot + chunk_at<D>(lane / 4, 4 + lane % 4)};
  float odd[NT][4];
  UNROLL
  for (int t = 0; t < NT; ++t) {
    UNROLL
    for (int e = 0; e < 4; ++e) {
      sums[t][e] = odd[t][e] = 0.0f;
    }
  }
  UNROLL
  for (int k = 0; k < D / 32; ++k) {
    UNROLL
    for (int t = 0; t < NT; ++t) {
      const uint4 b = *reinterpret_cast<const uint4*>(from[k % 2] + 8 * t * D + k / 2 * 64);
      mma_16x8x16<KIND>(sums[t], rows.a[2 * k], b.x, b.y);
      mma_16x8x16<KIND>(odd[t], rows.a[2 * k + 1], b.z, b.w);
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
// sums [16, D] += weights [16, 8 NT] times values
template <typename T, int D, int NT, int KIND>
__device__ __forceinline__ void add_values(
    float (*sums)[4], const unsigned int (*weights)[2], const T* slot, int lane) {
  const T* from[4];
  UNROLL
  for (int i = 0; i < 4; ++i) {
    from[i] = slot + chunk_at<D>(lane % 16, 2 * i + lane / 16);
  }
  UNROLL
  for (int t = 0; t < NT; t += 2) {
    const unsigned int a[4] = {
        weights[t][0], weights[t][1], weights[t + 1][0], weights[t + 1][1]};
    UNROLL
    for (int u = 0; u < D / 16; ++u) {
      unsigned int b[4];
      load_transposed(b, from[u % 4] + 8 * t * D + u / 4 * 64);
      mma_16x8x16<KIND>(sums[2 * u], a, b[0], b[1]);
      mma_16x8x16<KIND>(sums[2 * u + 1], a, b[2], b[3]);
    }
  }
}
"""

_BODY = """
  constexpr int STAGES = @STAGES@;
  constexpr int THREADS = 32 * SIMDS;
  constexpr int OWN = BN / 2;                   // keys of a tile that a warp takes
  constexpr int NT = OWN / 8;
  constexpr int OT = D / 8;
  constexpr int SLOT = OWN * D;                 // numbers of a slot
  constexpr float LOWEST = -1e30f;              // no score is lower,
  constexpr float UNSEEN = -3e38f;              // and this is far below
  const int lane = static_cast<int>(thread_index_in_simdgroup);
  const int simd = static_cast<int>(simdgroup_index_in_threadgroup);
  const int thread_id = simd * 32 + lane;
  const int half_of_keys = simd / (SIMDS / 2);
  const int local = simd % (SIMDS / 2) * 16 + lane / 4;
@SHARE@  const int skip = half_of_keys * OWN;
  const int thread_of_half = thread_id % (THREADS / 2);
  const size_t start = (static_cast<size_t>(pair) * allocated + skip
      + thread_of_half / (D / 8)) * D + thread_of_half % (D / 8) * 8;
  const CT* keys = k + start;
  const CT* values = v + start;
  const bool wide = is_wide(k) && is_wide(v);

  const Queries<CT, D> mine(q + (base + from0) * D, q + (base + from1) * D, lane, is_wide(q));

  // A half fetches what it takes of a tile of keys, of its values, of the next tile, and so on.
  threadgroup CT rings[2 * STAGES * SLOT];
  CT* ring = rings + half_of_keys * STAGES * SLOT;
  int now = 0;                 // the slot that is worked on
  int free = STAGES - 1;       // the one that was
  auto fetch = [&](int slot, int turn, int j0) {
    const int j = j0 + turn / 2 * BN;
    if (j < end) {
      fetch_rows<CT, D, OWN, THREADS / 2>(
          ring + slot * SLOT, (turn % 2 == 0 ? keys : values) + static_cast<size_t>(j) * D,
          end - j - skip, thread_of_half, wide);
    }
    end_of_fetch();
  };
  UNROLL
  for (int s = 0; s < STAGES - 1; ++s) {
    fetch(s, s, begin);
  }
  // Waits for what a turn needs, and sets out to fetch into the slot that became free.
  auto turn_to = [&](int turn, int j0) {
    wait_for_fetches<STAGES - 2>();
    barrier_of<THREADS / 2>(half_of_keys);
    fetch(free, turn + STAGES - 1, j0);
    const CT* slot = ring + now * SLOT;
    free = now;
    now = now + 1 == STAGES ? 0 : now + 1;
    return slot;
  };
  float out[OT][4];
  UNROLL
  for (int t = 0; t < OT; ++t) {
    out[t][0] = out[t][1] = out[t][2] = out[t][3] = 0.0f;
  }
  float top0 = LOWEST;  // of scores times log2(e)
  float top1 = LOWEST;
  float sum0 = 0.0f;
  float sum1 = 0.0f;
  for (int j0 = begin; j0 < end; j0 += BN) {
    float score[NT][4];
    score_keys<CT, D, NT, KIND>(score, mine, turn_to(0, j0), lane);
    float next0 = top0;
    float next1 = top1;
    UNROLL
    for (int t = 0; t < NT; ++t) {
      UNROLL
      for (int e = 0; e < 4; ++e) {
        score[t][e] *= @SCALE@;
      }
    }
    if (WINDOW > 0 || j0 + BN > length - queries) {  // not all of them are seen by all
      UNROLL
      for (int t = 0; t < NT; ++t) {
        UNROLL
        for (int e = 0; e < 4; ++e) {
          const int j = j0 + skip + t * 8 + 2 * (lane % 4) + e % 2;
          const int at = length - queries + (e < 2 ? from0 : from1) % queries;
          const bool seen = j <= at && (WINDOW == 0 || j > at - WINDOW);
          score[t][e] = seen ? score[t][e] : UNSEEN;
        }
      }
    }
    UNROLL
    for (int t = 0; t < NT; ++t) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
        next0 = fmaxf(next0, score[t][e]);
        next1 = fmaxf(next1, score[t][2 + e]);
      }
    }
    UNROLL
    for (int bit = 1; bit < 4; bit <<= 1) {
      next0 = fmaxf(next0, simd_shuffle_xor(next0, bit));
      next1 = fmaxf(next1, simd_shuffle_xor(next1, bit));
    }
    if (next0 != top0 || next1 != top1) {  // seldom, after the first keys
      const float shrink0 = power_of_two(top0 - next0);
      const float shrink1 = power_of_two(top1 - next1);
      top0 = next0;
      top1 = next1;
      sum0 *= shrink0;
      sum1 *= shrink1;
      UNROLL
      for (int t = 0; t < OT; ++t) {
        out[t][0] *= shrink0;
        out[t][1] *= shrink0;
        out[t][2] *= shrink1;
        out[t][3] *= shrink1;
      }
    }
    unsigned int weights[NT][2];
    UNROLL
    for (int t = 0; t < NT; ++t) {
      float weight[4];
      UNROLL
      for (int e = 0; e < 4; ++e) {
        weight[e] = power_of_two(score[t][e] - (e < 2 ? top0 : top1));
      }
      sum0 += weight[0] + weight[1];
      sum1 += weight[2] + weight[3];
      weights[t][0] = pair_of(static_cast<CT>(weight[0]), static_cast<CT>(weight[1]));
      weights[t][1] = pair_of(static_cast<CT>(weight[2]), static_cast<CT>(weight[3]));
    }
    add_values<CT, D, NT, KIND>(out, weights, turn_to(1, j0), lane);
  }

  const size_t row_base = (static_cast<size_t>(pair) * splits + split) * rows;
  if (begin >= end) {
    if (half_of_keys == 0 && lane % 4 == 0) {
      if (row0 < rows) {
        sums[row_base + row0] = 0.0f;
        maxima[row_base + row0] = LOWEST;
      }
      if (row1 < rows) {
        sums[row_base + row1] = 0.0f;
        maxima[row_base + row1] = LOWEST;
      }
    }
    return;
  }
  // The two warps of 16 rows: each keeps one half of the columns and is given it by the other.
  UNROLL
  for (int bit = 1; bit < 4; bit <<= 1) {
    sum0 += simd_shuffle_xor(sum0, bit);
    sum1 += simd_shuffle_xor(sum1, bit);
  }
  float4* given = reinterpret_cast<float4*>(rings);
  const int partner = thread_id ^ THREADS / 2;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  given[thread_id] = make_float4(top0, top1, sum0, sum1);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float4 other = given[partner];
  const float best0 = fmaxf(top0, other.x);
  const float best1 = fmaxf(top1, other.y);
  const float shrink0 = power_of_two(top0 - best0);
  const float shrink1 = power_of_two(top1 - best1);
  if (half_of_keys == 0 && lane % 4 == 0) {
    constexpr float LOG_2 = 0.69314718f;
    if (row0 < rows) {
      maxima[row_base + row0] = best0 * LOG_2;
      sums[row_base + row0] = sum0 * shrink0 + other.z * power_of_two(other.x - best0);
    }
    if (row1 < rows) {
      maxima[row_base + row1] = best1 * LOG_2;
      sums[row_base + row1] = sum1 * shrink1 + other.w * power_of_two(other.y - best1);
    }
  }
  constexpr int TURN = OT / 2 < 8 ? OT / 2 : 8;
  UNROLL
  for (int t0 = 0; t0 < OT / 2; t0 += TURN) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int t = t0; t < t0 + TURN; ++t) {
      float* low = out[t];
      float* high = out[OT / 2 + t];
      UNROLL
      for (int e = 0; e < 4; ++e) {
        const float a = low[e] * (e < 2 ? shrink0 : shrink1);
        const float b = high[e] * (e < 2 ? shrink0 : shrink1);
        low[e] = half_of_keys == 0 ? a : b;
        high[e] = half_of_keys == 0 ? b : a;
      }
      given[(t - t0) * THREADS + thread_id] = make_float4(high[0], high[1], high[2], high[3]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int t = t0; t < t0 + TURN; ++t) {
      const float4 more = given[(t - t0) * THREADS + partner];
      const int d = (half_of_keys * (OT / 2) + t) * 8 + 2 * (lane % 4);
      if (row0 < rows) {
        put_pair(partial + (row_base + row0) * D + d, out[t][0] + more.x, out[t][1] + more.y);
      }
      if (row1 < rows) {
        put_pair(partial + (row_base + row1) * D + d, out[t][2] + more.z, out[t][3] + more.w);
      }
    }
  }
"""


@attrs.frozen
class TensorPartial(Partial):
    """The first pass, for float16 and bfloat16 on CUDA."""

    name = "draftloom_verify_attention_tensor"

    @property
    def source(self) -> str:
        """The body, as handed to MLX."""
        scale = f"{self.scale / math.log(2):.9e}f"
        body = _BODY.replace("@SHARE@", SHARE)
        return body.replace("@SCALE@", scale).replace("@STAGES@", str(STAGES))
