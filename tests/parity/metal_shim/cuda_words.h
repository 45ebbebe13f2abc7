// CUDA's words that the verify attention fragments use, and its tensor core instruction, for the shim: what
// stands here takes the place of the preludes' builtins and inline assembly, everything else is compiled as is.
#define __device__
#define __forceinline__ inline
#define UNROLL
#define ONE_BY_ONE

struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace shim {

// What every lane brings to the current and to the last mma.
struct Fragments {
  uint a[4];
  uint b[2];
};
inline Fragments fragments[2][1024];

template <int KIND>
float half_of(uint bits, int which) {
  const uint16_t raw = static_cast<uint16_t>(bits >> (16 * which));
  if (KIND == 2) {
    bfloat16_t x;
    memcpy(&x, &raw, 2);
    return static_cast<float>(x);
  }
  half x;
  memcpy(&x, &raw, 2);
  return static_cast<float>(x);
}

}  // namespace shim

// PTX ISA, "matrix fragments for mma.m16n8k16": with g = lane / 4 and t = lane % 4, register r of A holds row
// g + 8 (r % 2), columns 2 t + 8 (r / 2) and the next; register r of B rows 2 t + 8 r and the next, column g;
// C rows g and g + 8, columns 2 t and the next.
template <int KIND>
inline void mma_16x8x16(float* c, const uint* a, uint b0, uint b1) {
  const uint me = shim::machine.now->index;
  auto& mine = shim::fragments[shim::machine.now->simd_ops & 1][me];
  memcpy(mine.a, a, sizeof(mine.a));
  mine.b[0] = b0;
  mine.b[1] = b1;
  const int side = shim::meet(0.0f, -3);
  const auto* all = shim::fragments[side] + me / 32 * 32;
  const uint g = me % 32 / 4, t = me % 4;
  for (uint e = 0; e < 4; ++e) {
    const uint row = g + e / 2 * 8, column = 2 * t + e % 2;
    float sum = 0.0f;
    for (uint k = 0; k < 16; ++k) {
      const uint* from = all[row % 8 * 4 + k % 8 / 2].a;
      const uint* with = all[column * 4 + k % 8 / 2].b;
      sum += shim::half_of<KIND>(from[row / 8 + k / 8 * 2], k % 2)
          * shim::half_of<KIND>(with[k / 8], k % 2);
    }
    c[e] += sum;
  }
}

// PTX ISA, "ldmatrix", .x4.trans: lane l names row l % 8 of matrix l / 8; register r of lane l gets, of matrix r,
// rows 2 (l % 4) and the next, column l / 4.
inline void load_transposed(uint* x, const void* row) {
  const uint me = shim::machine.now->index;
  auto& mine = shim::fragments[shim::machine.now->simd_ops & 1][me];
  memcpy(mine.a, row, sizeof(mine.a));
  const int side = shim::meet(0.0f, -4);
  const auto* all = shim::fragments[side] + me / 32 * 32;
  const uint column = me % 32 / 4;
  for (uint r = 0; r < 4; ++r) {
    x[r] = 0;
    for (uint e = 0; e < 2; ++e) {
      const uint pair = all[8 * r + 2 * (me % 4) + e].a[column / 2];
      x[r] |= (pair >> (16 * (column % 2)) & 0xffffu) << (16 * e);
    }
  }
}

namespace shim {

// A copy that is on its way: where it goes is NaN until it is waited for.
struct Copy {
  char* to;
  char bytes[16];
};
inline std::vector<std::vector<Copy>> copies[1024];

inline std::vector<std::vector<Copy>>& own_copies() {
  auto& own = copies[machine.now->index];
  if (own.empty()) own.emplace_back();
  return own;
}

}  // namespace shim

inline void copy_16(void* to, const void* from, bool some) {
  shim::Copy copy{static_cast<char*>(to), {}};
  if (reinterpret_cast<size_t>(to) % 16 || (some && reinterpret_cast<size_t>(from) % 16)) {
    shim::machine.error = "a copy of 16 bytes that is not aligned";
    return;
  }
  if (some) memcpy(copy.bytes, from, 16);
  memset(to, 0xff, 16);
  shim::own_copies().back().push_back(copy);
}
inline void end_of_fetch() {
  shim::own_copies().emplace_back();
}
template <int LEFT>
inline void wait_for_fetches() {
  auto& own = shim::own_copies();  // the last of them is not ended yet
  while (own.size() > LEFT + 1) {
    for (const auto& copy : own.front()) memcpy(copy.to, copy.bytes, 16);
    own.erase(own.begin());
  }
}
template <int THREADS>
inline void barrier_of(int) { threadgroup_barrier(mem_flags::mem_threadgroup); }
inline float power_of_two(float x) { return std::exp2(x); }
