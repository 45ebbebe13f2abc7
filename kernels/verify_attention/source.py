"""The kernel bodies of verify attention, in Metal's dialect; :mod:`.prelude` has what they call.

Two passes. In the first, a threadgroup takes RT rows (all query heads of a key head and all query
tokens, packed) over one part of the keys: scores, a running softmax, and an output that is not yet
divided by its sum. The second adds the parts up, with the sinks.

A simdgroup works on 16 rows at a time, on tiles of 16 x 8. Lane l holds, of a tile, rows l / 4 and
l / 4 + 8, columns 2 (l % 4) and the next, and takes their sums one by one. Keys and values go
through one tile in threadgroup memory: values are on their way while scores are computed, the next
keys while values are added. Metal and float32 on CUDA share this first pass; :mod:`.tensor` has the
one for float16 and bfloat16 on CUDA. The second is the same for all.

Only builtins that mlx-lm's own Metal kernels use appear here: simd_shuffle_xor, threadgroup arrays,
threadgroup_barrier, metal::exp, and the position attributes.
"""

from __future__ import annotations

import attrs

from .share import SHARE

__all__ = ["COMBINE_SIMDS", "Combine", "Partial"]

COMBINE_SIMDS = 8
"""Simdgroups of a threadgroup of the second pass."""

_FETCH = """
    {
      const int left = end - (@AT@);
      const int valid = (left < BN ? left : BN) * D;
      auto from = @FROM@ + (static_cast<size_t>(pair) * allocated + (@AT@)) * D;
      UNROLL
      for (int s = 0; s < STEPS; ++s) {
        const int i = (s * THREADS + thread_id) * VEC;
        if (i < valid) {
          held[s] = load_chunk<CT>(from + i, wide);
        } else {
          held[s] = zero_chunk<CT>();
        }
      }
    }
"""

_PUT = """
    UNROLL
    for (int s = 0; s < STEPS; ++s) {
      const int i = (s * THREADS + thread_id) * VEC;
      if (i < BN * D) {
        put_chunk(tile + (i / D) * LD + i % D, held[s]);
      }
    }
"""


def _fetch(name: str, at: str) -> str:
    return _FETCH.replace("@FROM@", name).replace("@AT@", at)


_PARTIAL = (
    """
  constexpr int PARTS = SIMDS * 16 / RT;        // simdgroups that share 16 rows
  constexpr int NT = BN / 8 / PARTS;            // score tiles of a simdgroup
  constexpr int OT = D / 8 / PARTS;             // output tiles of a simdgroup
  constexpr int THREADS = 32 * SIMDS;
  constexpr int VEC = 16 / sizeof(CT);
  constexpr int STEPS = (BN * D + THREADS * VEC - 1) / (THREADS * VEC);
  constexpr int LD = D + VEC;                   // padded by 16 bytes: no two rows in one bank
  constexpr int PLD = BN + VEC;
  constexpr float LOWEST = -1e30f;
  const int lane = static_cast<int>(thread_index_in_simdgroup);
  const int simd = static_cast<int>(simdgroup_index_in_threadgroup);
  const int thread_id = simd * 32 + lane;
  const int part = simd % PARTS;
  const int local = simd / PARTS * 16 + lane / 4;
@SHARE@  const int at0 = length - queries + from0 % queries;  // positions of the two rows
  const int at1 = length - queries + from1 % queries;
  auto mine = rows_at(q + (base + from0) * D, q + (base + from1) * D);

  threadgroup CT tile[BN * LD];
  threadgroup CT weights[RT * PLD];
  threadgroup float tops[PARTS * RT];
  float out[OT][4];
  UNROLL
  for (int t = 0; t < OT; ++t) {
    out[t][0] = out[t][1] = out[t][2] = out[t][3] = 0.0f;
  }
  float top0 = LOWEST;
  float top1 = LOWEST;
  float sum0 = 0.0f;
  float sum1 = 0.0f;
  Chunk<CT> held[STEPS];
  const bool wide = is_wide(k) && is_wide(v);
"""
    + _fetch("k", "begin")
    + """
  for (int j0 = begin; j0 < end; j0 += BN) {
"""
    + _PUT
    + """
    threadgroup_barrier(mem_flags::mem_threadgroup);
"""
    + _fetch("v", "j0")
    + """
    float score[NT][4];
    float best0 = LOWEST;
    float best1 = LOWEST;
    score_tiles<D, NT, LD>(score, mine, tile + part * NT * 8 * LD, lane);
    UNROLL
    for (int t = 0; t < NT; ++t) {
      UNROLL
      for (int e = 0; e < 4; ++e) {
        const int j = j0 + (part * NT + t) * 8 + 2 * (lane % 4) + e % 2;
        const int at = e < 2 ? at0 : at1;
        const bool seen = j <= at && (WINDOW == 0 || j > at - WINDOW);
        score[t][e] = seen ? score[t][e] * @SCALE@ : LOWEST;
      }
      UNROLL
      for (int e = 0; e < 2; ++e) {
        best0 = score[t][e] > best0 ? score[t][e] : best0;
        best1 = score[t][2 + e] > best1 ? score[t][2 + e] : best1;
      }
    }
    UNROLL
    for (int bit = 1; bit < 4; bit <<= 1) {
      const float other0 = simd_shuffle_xor(best0, bit);
      const float other1 = simd_shuffle_xor(best1, bit);
      best0 = other0 > best0 ? other0 : best0;
      best1 = other1 > best1 ? other1 : best1;
    }
    if (lane % 4 == 0) {
      tops[part * RT + local] = best0;
      tops[part * RT + local + 8] = best1;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
"""
    + _PUT
    + """
    float next0 = top0;
    float next1 = top1;
    UNROLL
    for (int p = 0; p < PARTS; ++p) {
      const float other0 = tops[p * RT + local];
      const float other1 = tops[p * RT + local + 8];
      next0 = other0 > next0 ? other0 : next0;
      next1 = other1 > next1 ? other1 : next1;
    }
    const float shrink0 = natural_exp(top0 - next0);
    const float shrink1 = natural_exp(top1 - next1);
    top0 = next0;
    top1 = next1;
    sum0 *= shrink0;
    sum1 *= shrink1;
    UNROLL
    for (int t = 0; t < NT; ++t) {
      UNROLL
      for (int e = 0; e < 4; ++e) {
        const float x = score[t][e];
        const float weight = x == LOWEST ? 0.0f : natural_exp(x - (e < 2 ? top0 : top1));
        if (e < 2) {
          sum0 += weight;
        } else {
          sum1 += weight;
        }
        weights[(local + e / 2 * 8) * PLD + (part * NT + t) * 8 + 2 * (lane % 4) + e % 2] =
            static_cast<CT>(weight);
      }
    }
    UNROLL
    for (int t = 0; t < OT; ++t) {
      out[t][0] *= shrink0;
      out[t][1] *= shrink0;
      out[t][2] *= shrink1;
      out[t][3] *= shrink1;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
"""
    + _fetch("k", "j0 + BN")
    + """
    value_tiles<OT, BN, LD, PLD>(
        out, weights + simd / PARTS * 16 * PLD, tile + part * OT * 8, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  UNROLL
  for (int bit = 1; bit < 4; bit <<= 1) {
    sum0 += simd_shuffle_xor(sum0, bit);
    sum1 += simd_shuffle_xor(sum1, bit);
  }
  if (lane % 4 == 0) {
    tops[part * RT + local] = sum0;
    tops[part * RT + local + 8] = sum1;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const size_t row_base = (static_cast<size_t>(pair) * splits + split) * rows;
  if (part == 0 && lane % 4 == 0) {
    float total0 = 0.0f;
    float total1 = 0.0f;
    UNROLL
    for (int p = 0; p < PARTS; ++p) {
      total0 += tops[p * RT + local];
      total1 += tops[p * RT + local + 8];
    }
    if (row0 < rows) {
      maxima[row_base + row0] = top0;
      sums[row_base + row0] = total0;
    }
    if (row1 < rows) {
      maxima[row_base + row1] = top1;
      sums[row_base + row1] = total1;
    }
  }
  if (begin < end) {
    UNROLL
    for (int t = 0; t < OT; ++t) {
      const int d = (part * OT + t) * 8 + 2 * (lane % 4);
      if (row0 < rows) {
        put_pair(partial + (row_base + row0) * D + d, out[t][0], out[t][1]);
      }
      if (row1 < rows) {
        put_pair(partial + (row_base + row1) * D + d, out[t][2], out[t][3]);
      }
    }
  }
"""
)

_COMBINE = """
  constexpr float LOWEST = -1e30f;
  constexpr int THREADS = 32 * @SIMDS@;
  constexpr int SHARES = THREADS / (D / 4);     // threads that share four columns
  constexpr int MOST = (SPLITS + SHARES - 1) / SHARES;  // parts that one of them reads
  threadgroup float weights[64];
  threadgroup float shares[SHARES * D];
  const int lane = static_cast<int>(thread_index_in_simdgroup);
  const int thread_id = static_cast<int>(simdgroup_index_in_threadgroup) * 32 + lane;
  const int share = thread_id / (D / 4);
  const int d = thread_id % (D / 4) * 4;
  const int row = static_cast<int>(threadgroup_position_in_grid.y);
  const int pair = static_cast<int>(threadgroup_position_in_grid.z);
  const int splits = partial_shape[1];
  const int rows = partial_shape[2];
  const int queries = rows / (Hq / Hkv);
  const int head = pair % Hkv * (Hq / Hkv) + row / queries;
  const size_t first = static_cast<size_t>(pair) * splits * rows + row;
  // Every simdgroup reads what all parts say of themselves (at most two a lane), and every thread
  // its share of the outputs, before it knows what they weigh: none of the reads waits for another.
  const int one = lane < splits ? lane : splits - 1;
  const int two = lane + 32 < splits ? lane + 32 : splits - 1;
  const float sum1 = sums[first + static_cast<size_t>(one) * rows];
  const float sum2 = sums[first + static_cast<size_t>(two) * rows];
  const float max1 = maxima[first + static_cast<size_t>(one) * rows];
  const float max2 = maxima[first + static_cast<size_t>(two) * rows];
  Four held[MOST];
  UNROLL
  for (int i = 0; i < MOST; ++i) {
    const int s = i * SHARES + share;
    if (s < splits) {
      held[i] = load_four(partial + (first + static_cast<size_t>(s) * rows) * D + d);
    }
  }
  float top = @SINK@;
  top = max1 > top ? max1 : top;
  top = max2 > top ? max2 : top;
  UNROLL
  for (int bit = 1; bit < 32; bit <<= 1) {
    const float other = simd_shuffle_xor(top, bit);
    top = other > top ? other : top;
  }
  const float weight1 = lane < splits && sum1 != 0.0f ? natural_exp(max1 - top) : 0.0f;
  const float weight2 = lane + 32 < splits && sum2 != 0.0f ? natural_exp(max2 - top) : 0.0f;
  float total = weight1 * sum1 + weight2 * sum2;
  UNROLL
  for (int bit = 1; bit < 32; bit <<= 1) {
    total += simd_shuffle_xor(total, bit);
  }
  total += @SINK_WEIGHT@;
  if (thread_id < 32) {
    weights[lane] = weight1;
    weights[lane + 32] = weight2;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  UNROLL
  for (int i = 0; i < MOST; ++i) {
    const float weight = weights[i * SHARES + share];
    if (weight != 0.0f) {  // what weighs nothing may never have been written
      UNROLL
      for (int e = 0; e < 4; ++e) {
        out[e] += weight * held[i].x[e];
      }
    }
  }
  UNROLL
  for (int e = 0; e < 4; ++e) {
    shares[share * D + d + e] = out[e];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_id < D) {
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < SHARES; ++i) {
      sum += shares[i * D + thread_id];
    }
    const size_t to = (static_cast<size_t>(pair / Hkv) * queries + row % queries) * Hq + head;
    y[to * D + thread_id] = static_cast<QT>(total != 0.0f ? sum / total : 0.0f);
  }
"""


@attrs.frozen
class Partial:
    """The first pass.

    Attributes:
        scale: what scores are multiplied by.
    """

    scale: float

    name = "draftloom_verify_attention_partial"

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        return ["q", "k", "v", "lengths"]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in order."""
        return ["partial", "maxima", "sums"]

    @property
    def source(self) -> str:
        """The body, as handed to MLX for either backend."""
        return _PARTIAL.replace("@SHARE@", SHARE).replace("@SCALE@", f"{self.scale:.9e}f")


@attrs.frozen
class Combine:
    """The second pass.

    Attributes:
        sinks: whether every head has one logit more, which takes weight and gives nothing.
    """

    sinks: bool = False

    @property
    def name(self) -> str:
        """A short name, unique to the variant."""
        return "draftloom_verify_attention_combine" + ("_sinks" if self.sinks else "")

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        return ["partial", "maxima", "sums"] + (["sinks"] if self.sinks else [])

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in order."""
        return ["y"]

    @property
    def source(self) -> str:
        """The body, as handed to MLX for either backend."""
        sink = "static_cast<float>(sinks[head])" if self.sinks else "LOWEST"
        weight = "natural_exp(static_cast<float>(sinks[head]) - top)" if self.sinks else "0.0f"
        body = _COMBINE.replace("@SIMDS@", str(COMBINE_SIMDS))
        return body.replace("@SINK@", sink).replace("@SINK_WEIGHT@", weight)
