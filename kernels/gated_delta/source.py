"""The one kernel body of the gated delta rule, in Metal's dialect, and the prelude that makes it
CUDA.

A threadgroup serves ``SIMDS * (32 / LANES) * ROWS`` value rows of one head. A row of the state [Dk]
is spread over LANES neighbouring lanes (in turns of 4 values, so that neighbours read neighbouring
words), and a lane holds ROWS rows in registers for the whole run: the state is read once and
written once. Tokens come in tiles of TILE, as float32 in threadgroup memory; the next tile is
fetched into registers while the current one is worked on.

The output of a token is summed across lanes together with the memory read of the *next* token: the
two chains of shuffles do not depend on each other, so only one latency is paid a token.

Both halves change the state through ``advance``, the same expression, which is why a state replayed
from the tape equals, bit for bit, the one the verify half had after as many tokens.

Only builtins that mlx-lm's own Metal kernels use appear here: simd_shuffle_xor, threadgroup arrays,
threadgroup_barrier, and the position attributes.
"""

import attrs

from draftloom.kernels.backend import CUDA_BUILTINS

__all__ = ["CUDA_PRELUDE", "METAL_PRELUDE", "Variant"]

METAL_PRELUDE = """
#define UNROLL_TOKENS
template <typename P>
inline void load4(P from, thread float* to) {
  for (int j = 0; j < 4; ++j) {
    to[j] = static_cast<float>(from[j]);
  }
}
template <typename P>
inline void store4(P to, thread const float* from) {
  for (int j = 0; j < 4; ++j) {
    to[j] = from[j];
  }
}
// This thread's share of `count` rows of COLS values, `stride` apart, into registers.
template <int COLS, int TILE, int THREADS, typename P>
inline void fetch(thread float* held, P from, int stride, int count, int thread_id) {
  for (int s = 0; s * THREADS * 4 < TILE * COLS; ++s) {
    const int i = (s * THREADS + thread_id) * 4;
    if (i < count * COLS) {
      load4(from + (i / COLS) * stride + i % COLS, held + 4 * s);
    }
  }
}
// What fetch brought, into a dense tile.
template <int COLS, int TILE, int THREADS, typename S>
inline void put(S to, thread const float* held, int count, int thread_id) {
  for (int s = 0; s * THREADS * 4 < TILE * COLS; ++s) {
    const int i = (s * THREADS + thread_id) * 4;
    if (i < count * COLS) {
      store4(to + i, held + 4 * s);
    }
  }
}
inline float advance(float state, float decay, float key, float delta) {
  return state * decay + key * delta;
}
"""

CUDA_PRELUDE = (
    CUDA_BUILTINS
    + """
#define UNROLL_TOKENS _Pragma("unroll UNROLL")

template <typename T>
__device__ __forceinline__ bool wide4(const T* from) {
  return (reinterpret_cast<size_t>(from) & (4 * sizeof(T) - 1)) == 0;
}
__device__ __forceinline__ void wide_load4(const float* from, float* to) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  to[0] = x.x;
  to[1] = x.y;
  to[2] = x.z;
  to[3] = x.w;
}
template <typename T>
__device__ __forceinline__ void wide_load4(const T* from, float* to) {
  const uint2 bits = *reinterpret_cast<const uint2*>(from);
  T x[4];
  *reinterpret_cast<uint2*>(x) = bits;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    to[j] = static_cast<float>(x[j]);
  }
}
// For float tiles and states: 16-byte aligned by construction, except a state cut out of a buffer.
__device__ __forceinline__ void load4(const float* from, float* to) {
  if (wide4(from)) {
    wide_load4(from, to);
  } else {
    for (int j = 0; j < 4; ++j) {
      to[j] = from[j];
    }
  }
}
__device__ __forceinline__ void store4(float* to, const float* from) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
template <int COLS, int TILE, int THREADS, bool WIDE, typename T>
__device__ __forceinline__ void fetch_as(
    float* held, const T* from, int stride, int count, int thread_id) {
#pragma unroll
  for (int s = 0; s * THREADS * 4 < TILE * COLS; ++s) {
    const int i = (s * THREADS + thread_id) * 4;
    if (i < count * COLS) {
      const T* at = from + (i / COLS) * stride + i % COLS;
      if (WIDE) {
        wide_load4(at, held + 4 * s);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          held[4 * s + j] = static_cast<float>(at[j]);
        }
      }
    }
  }
}
// This thread's share of `count` rows of COLS values, `stride` apart, into registers.
template <int COLS, int TILE, int THREADS, typename T>
__device__ __forceinline__ void fetch(
    float* held, const T* from, int stride, int count, int thread_id) {
  if (wide4(from) && stride % 4 == 0) {
    fetch_as<COLS, TILE, THREADS, true>(held, from, stride, count, thread_id);
  } else {
    fetch_as<COLS, TILE, THREADS, false>(held, from, stride, count, thread_id);
  }
}
// What fetch brought, into a dense tile.
template <int COLS, int TILE, int THREADS>
__device__ __forceinline__ void put(float* to, const float* held, int count, int thread_id) {
#pragma unroll
  for (int s = 0; s * THREADS * 4 < TILE * COLS; ++s) {
    const int i = (s * THREADS + thread_id) * 4;
    if (i < count * COLS) {
      store4(to + i, held + 4 * s);
    }
  }
}
__device__ __forceinline__ float advance(float state, float decay, float key, float delta) {
  return __fmaf_rn(key, delta, __fmul_rn(state, decay));
}
"""
)

_SETUP = """
  constexpr int PER_LANE = Dk / LANES;
  constexpr int TG_ROWS = SIMDS * (32 / LANES) * ROWS;
  constexpr int THREADS = 32 * SIMDS;
  constexpr int KEY_HELD = (TILE * Dk + THREADS * 4 - 1) / (THREADS * 4) * 4;
  constexpr int ROW_HELD = (TILE * TG_ROWS + THREADS * 4 - 1) / (THREADS * 4) * 4;
  const int lane = static_cast<int>(thread_index_in_simdgroup);
  const int simd = static_cast<int>(simdgroup_index_in_threadgroup);
  const int thread_id = simd * 32 + lane;
  const int part = lane % LANES;
  const int local_row = (simd * (32 / LANES) + lane / LANES) * ROWS;
  const int first_row = static_cast<int>(threadgroup_position_in_grid.y) * TG_ROWS;
  const int batch = static_cast<int>(threadgroup_position_in_grid.z) / Hv;
  const int head = static_cast<int>(threadgroup_position_in_grid.z) % Hv;
  const int key_head = head / (Hv / Hk);

  threadgroup float k_tile[TILE * Dk];
  threadgroup float row_tile[TILE * TG_ROWS];
  threadgroup float g_tile[TILE];

  const size_t state_at =
      ((static_cast<size_t>(batch) * Hv + head) * Dv + first_row + local_row) * Dk + part * 4;
  float state[ROWS][PER_LANE];
  float key[PER_LANE];
  for (int r = 0; r < ROWS; ++r) {
    for (int i = 0; i < PER_LANE; i += 4) {
      load4(state_in + state_at + r * Dk + i * LANES, &state[r][i]);
    }
  }
"""

# Fetched before anything is waited for, so that the latencies of both halves overlap.
_REPLAY_FETCH = """
  const int length = tape_delta_shape[1];
  float tape_keys[KEY_HELD];
  float tape_rows[ROW_HELD];
  float tape_decay = 0.0f;
  {
    const int count = length < TILE ? length : TILE;
    const size_t at = static_cast<size_t>(batch) * length;
    @FETCH_TAPE@
  }
"""

_FETCH_TAPE = """
    fetch<Dk, TILE, THREADS>(
        tape_keys, tape_k + (at * Hk + key_head) * Dk, Hk * Dk, count, thread_id);
    fetch<TG_ROWS, TILE, THREADS>(
        tape_rows, tape_delta + (at * Hv + head) * Dv + first_row, Hv * Dv, count, thread_id);
    if (thread_id < count) {
      tape_decay = static_cast<float>(tape_g[(at + thread_id) * Hv + head]);
    }
"""

_BLOCK_FETCH = """
  const int tokens = beta_shape[1];
  float held_k[KEY_HELD];
  float held_q[KEY_HELD];
  float held_v[ROW_HELD];
  float held_g = 0.0f;
  float held_beta = 0.0f;
  float held_kept = 1.0f;
  {
    const int count = tokens < TILE ? tokens : TILE;
    const size_t at = static_cast<size_t>(batch) * tokens;
    @FETCH_BLOCK@
  }
"""

_FETCH_BLOCK = """
    fetch<Dk, TILE, THREADS>(held_k, k + (at * Hk + key_head) * Dk, Hk * Dk, count, thread_id);
    fetch<Dk, TILE, THREADS>(held_q, q + (at * Hk + key_head) * Dk, Hk * Dk, count, thread_id);
    fetch<TG_ROWS, TILE, THREADS>(
        held_v, v + (at * Hv + head) * Dv + first_row, Hv * Dv, count, thread_id);
    if (thread_id < count) {
      held_g = static_cast<float>(g[(at + thread_id) * Hv + head]);
      held_beta = static_cast<float>(beta[(at + thread_id) * Hv + head]);
      held_kept = @KEPT@ ? 1.0f : 0.0f;
    }
"""

_REPLAY = """
  {
    const int wanted = counts[batch];
    const int steps = wanted < 0 ? 0 : (wanted > length ? length : wanted);
    for (int t0 = 0; t0 < steps; t0 += TILE) {
      const int here = steps - t0 < TILE ? steps - t0 : TILE;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      put<Dk, TILE, THREADS>(k_tile, tape_keys, here, thread_id);
      put<TG_ROWS, TILE, THREADS>(row_tile, tape_rows, here, thread_id);
      if (thread_id < here) {
        g_tile[thread_id] = tape_decay;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (t0 + TILE < steps) {
        const int count = steps - t0 - TILE < TILE ? steps - t0 - TILE : TILE;
        const size_t at = static_cast<size_t>(batch) * length + t0 + TILE;
        @FETCH_TAPE@
      }
      UNROLL_TOKENS
      for (int t = 0; t < here; ++t) {
        for (int i = 0; i < PER_LANE; i += 4) {
          load4(k_tile + t * Dk + i * LANES + part * 4, &key[i]);
        }
        const float decay = g_tile[t];
        for (int r = 0; r < ROWS; ++r) {
          const float delta = row_tile[t * TG_ROWS + local_row + r];
          for (int i = 0; i < PER_LANE; ++i) {
            state[r][i] = advance(state[r][i], decay, key[i], delta);
          }
        }
      }
    }
  }
"""

_BLOCK = """
  threadgroup float q_tile[TILE * Dk];
  threadgroup float beta_tile[TILE];
  threadgroup float kept_tile[TILE];
  float waiting[ROWS];  // this lane's share of the last token's output, not yet summed
  for (int r = 0; r < ROWS; ++r) {
    waiting[r] = 0.0f;
  }
  const size_t row_at =
      (static_cast<size_t>(batch) * tokens * Hv + head) * Dv + first_row + local_row;
  for (int t0 = 0; t0 < tokens; t0 += TILE) {
    const int here = tokens - t0 < TILE ? tokens - t0 : TILE;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    put<Dk, TILE, THREADS>(k_tile, held_k, here, thread_id);
    put<Dk, TILE, THREADS>(q_tile, held_q, here, thread_id);
    put<TG_ROWS, TILE, THREADS>(row_tile, held_v, here, thread_id);
    if (thread_id < here) {
      g_tile[thread_id] = held_g;
      beta_tile[thread_id] = held_beta;
      kept_tile[thread_id] = held_kept;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (t0 + TILE < tokens) {
      const int count = tokens - t0 - TILE < TILE ? tokens - t0 - TILE : TILE;
      const size_t at = static_cast<size_t>(batch) * tokens + t0 + TILE;
      @FETCH_BLOCK@
    }
    UNROLL_TOKENS
    for (int t = 0; t < here; ++t) {
      const float decay = g_tile[t];
      const float strength = beta_tile[t];
      const bool kept = @KEPT_TILE@;
      float memory[ROWS];
      float value[ROWS];
      float query[PER_LANE];
      for (int i = 0; i < PER_LANE; i += 4) {
        load4(k_tile + t * Dk + i * LANES + part * 4, &key[i]);
      }
      for (int i = 0; i < PER_LANE; i += 4) {
        load4(q_tile + t * Dk + i * LANES + part * 4, &query[i]);
      }
      for (int r = 0; r < ROWS; ++r) {
        value[r] = row_tile[t * TG_ROWS + local_row + r];
      }
      for (int r = 0; r < ROWS; ++r) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int i = 0; i < PER_LANE; i += 4) {
          for (int j = 0; j < 4; ++j) {
            sum[j] += state[r][i + j] * key[i + j];
          }
        }
        memory[r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      }
      for (int bit = 1; bit < LANES; bit <<= 1) {
        for (int r = 0; r < ROWS; ++r) {
          memory[r] += simd_shuffle_xor(memory[r], bit);
          waiting[r] += simd_shuffle_xor(waiting[r], bit);
        }
      }
      if (t0 + t > 0 && part == 0) {
        for (int r = 0; r < ROWS; ++r) {
          y[row_at + static_cast<size_t>(t0 + t - 1) * Hv * Dv + r] = static_cast<QT>(waiting[r]);
        }
      }
      for (int r = 0; r < ROWS; ++r) {
        float delta = (value[r] - decay * memory[r]) * strength;
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (kept) {
          for (int i = 0; i < PER_LANE; i += 4) {
            for (int j = 0; j < 4; ++j) {
              state[r][i + j] = advance(state[r][i + j], decay, key[i + j], delta);
              sum[j] += state[r][i + j] * query[i + j];
            }
          }
        } else {
          delta = 0.0f;
        }
        waiting[r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
@TAPE@
      }
    }
  }
  for (int bit = 1; bit < LANES; bit <<= 1) {
    for (int r = 0; r < ROWS; ++r) {
      waiting[r] += simd_shuffle_xor(waiting[r], bit);
    }
  }
  if (part == 0) {
    for (int r = 0; r < ROWS; ++r) {
      y[row_at + static_cast<size_t>(tokens - 1) * Hv * Dv + r] = static_cast<QT>(waiting[r]);
    }
  }
"""

_TAPE = """        if (part == 0) {
          delta_out[row_at + static_cast<size_t>(t0 + t) * Hv * Dv + r] = delta;
        }"""

_STORE = """
  for (int r = 0; r < ROWS; ++r) {
    for (int i = 0; i < PER_LANE; i += 4) {
      store4(@OUT@ + state_at + r * Dk + i * LANES, &state[r][i]);
    }
  }
"""


@attrs.frozen
class Variant:
    """Which halves of the body a kernel has, and what it writes.

    Attributes:
        replay: start by replaying ``counts[b]`` entries of a tape onto the state.
        block: run a block of tokens, writing y.
        tape: the block writes its innovations.
        masked: the block reads a mask.
        middle: write the state between the halves (only with ``replay``).
        end: write the state after the block (only with ``block``).
    """

    replay: bool = False
    block: bool = False
    tape: bool = False
    masked: bool = False
    middle: bool = False
    end: bool = False

    @property
    def name(self) -> str:
        """A short name, unique to the variant."""
        on = [field.name for field in attrs.fields(Variant) if getattr(self, field.name)]
        return "draftloom_gated_delta_" + "_".join(on)

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        names = ["tape_delta", "tape_k", "tape_g", "counts"] if self.replay else []
        names += ["q", "k", "v", "g", "beta"] if self.block else []
        return [*names, "state_in"] + (["mask"] if self.masked else [])

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in order."""
        flags = {
            "y": self.block,
            "delta_out": self.tape,
            "state_middle": self.middle,
            "state_out": self.end,
        }
        return [name for name, wanted in flags.items() if wanted]

    @property
    def source(self) -> str:
        """The body, as handed to MLX for either backend."""
        text = _SETUP
        if self.replay:
            text += _REPLAY_FETCH
        if self.block:
            text += _BLOCK_FETCH
        if self.replay:
            text += _REPLAY
        if self.middle:
            text += _STORE.replace("@OUT@", "state_middle")
        if self.block:
            text += _BLOCK
        if self.end:
            text += _STORE.replace("@OUT@", "state_out")
        parts = {
            "@FETCH_TAPE@": _FETCH_TAPE,
            "@FETCH_BLOCK@": _FETCH_BLOCK,
            "@TAPE@": _TAPE if self.tape else "",
            "@KEPT@": "mask[at + thread_id]" if self.masked else "true",
            "@KEPT_TILE@": "kept_tile[t] != 0.0f" if self.masked else "true",
        }
        for name, part in parts.items():
            text = text.replace(name, part)
        return text
