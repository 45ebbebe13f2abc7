// Enough of the Metal shading language to compile a kernel body as C++ and run it lane by lane.
//
// Each lane of a threadgroup is a fiber. A simdgroup operation or a barrier suspends a lane until all the lanes
// it concerns have reached the same operation; if they cannot, the run stops with an error, since on a GPU it
// would hang or read garbage. Threadgroup arrays live in a linker section of their own, so that they can be
// filled with NaN before every threadgroup and measured against the 32 KiB that Metal allows.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
      bits = 0x7fc0;
    } else {
      bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
  }
  explicit operator float() const {
    uint32_t u = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};
using half = _Float16;
using float16_t = _Float16;
using uint = unsigned int;
using ushort = unsigned short;

struct uint3 {
  uint x, y, z;
};
enum class mem_flags { mem_none, mem_device, mem_threadgroup };

namespace shim {

constexpr int kStack = 64 * 1024;

struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint index = 0;           // index in the threadgroup
  uint64_t simd_ops = 0;    // simdgroup operations reached
  uint64_t barriers = 0;    // threadgroup barriers reached
  float slot[2] = {0, 0};   // what this lane brings to the current and the last simdgroup operation
  int kind[2] = {0, 0};     // which operation, and with which argument
  bool done = false;
};

struct Machine {
  ucontext_t main;
  std::vector<Lane> lanes;
  Lane* now = nullptr;
  uint64_t progress = 0;
  const char* error = nullptr;
};

inline Machine machine;

inline void yield() {
  Lane* me = machine.now;
  swapcontext(&me->context, &machine.main);
  machine.now = me;
}

// Reaches one simdgroup operation with a value; returns the buffer to read the other lanes' values from.
inline int meet(float value, int kind) {
  Lane& me = *machine.now;
  const int side = static_cast<int>(me.simd_ops & 1);
  me.slot[side] = value;
  me.kind[side] = kind;
  const uint64_t mine = ++me.simd_ops;
  ++machine.progress;
  const uint first = me.index / 32 * 32;
  for (uint other = first; other < first + 32;) {
    if (machine.lanes[other].simd_ops >= mine) {
      ++other;
    } else {
      yield();
    }
  }
  for (uint other = first; other < first + 32; ++other) {
    if (machine.lanes[other].kind[side] != kind) {
      machine.error = "lanes of a simdgroup reached different operations";
    }
  }
  return side;
}

}  // namespace shim

inline float simd_shuffle_xor(float value, int bit) {
  const int side = shim::meet(value, bit);
  return shim::machine.lanes[shim::machine.now->index ^ static_cast<uint>(bit)].slot[side];
}

inline float simd_sum(float value) {
  const int side = shim::meet(value, -1);
  const uint first = shim::machine.now->index / 32 * 32;
  float sum[32];
  for (uint i = 0; i < 32; ++i) {
    sum[i] = shim::machine.lanes[first + i].slot[side];
  }
  for (uint bit = 1; bit < 32; bit <<= 1) {
    for (uint i = 0; i < 32; i += 2 * bit) {
      sum[i] += sum[i + bit];
    }
  }
  return sum[0];
}

inline float simd_max(float value) {
  const int side = shim::meet(value, -2);
  const uint first = shim::machine.now->index / 32 * 32;
  float best = shim::machine.lanes[first].slot[side];
  for (uint i = 1; i < 32; ++i) {
    const float x = shim::machine.lanes[first + i].slot[side];
    best = x > best ? x : best;
  }
  return best;
}

inline void threadgroup_barrier(mem_flags) {
  const uint64_t mine = ++shim::machine.now->barriers;
  ++shim::machine.progress;
  for (size_t other = 0; other < shim::machine.lanes.size();) {
    if (shim::machine.lanes[other].barriers >= mine) {
      ++other;
    } else {
      shim::yield();
    }
  }
}

extern "C" {
extern char __start_threadgroup_memory[] __attribute__((weak));
extern char __stop_threadgroup_memory[] __attribute__((weak));
}

namespace metal {
inline float exp(float x) { return std::exp(x); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
}  // namespace metal

#define device
#define constant
#define thread
#define threadgroup __attribute__((section("threadgroup_memory"))) static
