"""The text of a CUDA kernel for a compiler that is given nothing to include.

Headers are what costs time where MLX compiles a kernel; bodies need little of them: the types of
half precision (`HALVES`), and what NVRTC knows by itself (vector types, shuffles, ``expf``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

__all__ = ["BFLOAT16_BITS", "HALVES", "TYPES", "program", "shaped_inputs"]

TYPES = {
    mx.float32: "float",
    mx.float16: "Float16",
    mx.bfloat16: "BFloat16",
    mx.int32: "int",
    mx.uint32: "unsigned int",
    mx.bool_: "bool",
}
"""Types of inputs, outputs and template values."""

BFLOAT16_BITS = """
// Round to nearest even; NaN is the one that the hardware gives.
__device__ __forceinline__ unsigned short bfloat16_bits(unsigned int x) {
  return (x & 0x7fffffffu) > 0x7f800000u
      ? 0x7fffu
      : static_cast<unsigned short>((x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
}
__device__ __forceinline__ unsigned int bfloat16_as_float_bits(unsigned short bits) {
  return static_cast<unsigned int>(bits) << 16;
}
"""
"""For devices that have no instructions for it: before sm_80, and before sm_90."""

HALVES = (
    BFLOAT16_BITS
    + """
// Numbers of 16 bits that are only stored: whoever computes converts them, in so many words.
struct Float16 {
  unsigned short bits;
  Float16() = default;
  __device__ __forceinline__ explicit Float16(float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  }
  __device__ __forceinline__ explicit operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};
struct BFloat16 {
  unsigned short bits;
  BFloat16() = default;
  __device__ __forceinline__ explicit BFloat16(float x) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
    bits = bfloat16_bits(__float_as_uint(x));
#endif
  }
  __device__ __forceinline__ explicit operator float() const {
#if __CUDA_ARCH__ >= 900
    float x;
    asm("cvt.f32.bf16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#else
    return __uint_as_float(bfloat16_as_float_bits(bits));
#endif
  }
};
"""
)
"""CUDA's own types, as far as kernel bodies use them: no arithmetic, which would not compile."""


def shaped_inputs(names: Sequence[str], source: str) -> tuple[int, ...]:
    """Which inputs a body asks the shape of, as ``NAME_shape``: their places."""
    return tuple(i for i, n in enumerate(names) if re.search(rf"\b{n}_shape\b", source))


def program(
    name: str,
    header: str,
    source: str,
    inputs: Sequence[tuple[str, mx.Dtype, int]],
    outputs: Sequence[tuple[str, mx.Dtype]],
    template: Sequence[tuple[str, Any]],
) -> str:
    """The translation unit of a kernel. Its parameters are pointers to the inputs and the outputs,
    then, for each input whose shape the body asks, an int an axis: ``NAME_shape[1]`` is read as
    ``NAME_shape_1``. (So, and with ``__grid_constant__``, the instructions are those of MLX's
    kernels; of an array, or of plain ints, the compiler made others.)

    Args:
        name: of the function.
        header: what goes before it.
        source: the body. It finds what it would find in a kernel of `mx.fast.cuda_kernel`, but for
            strides: inputs and outputs by name, ``NAME_shape[AXIS]``, template values.
        inputs: name, dtype and number of axes.
        outputs: name and dtype.
        template: names and whole numbers, truth values or dtypes.

    Raises:
        ValueError: a dtype that is none of `TYPES`.
    """
    parameters = [f"const {_type(dtype)}* {n}" for n, dtype, _ in inputs]
    parameters += [f"{_type(dtype)}* {n}" for n, dtype in outputs]
    for place in shaped_inputs([n for n, _, _ in inputs], source):
        n, _, axes = inputs[place]
        lengths = [f"{n}_shape_{axis}" for axis in range(axes)]
        parameters += [f"const __grid_constant__ int {length}" for length in lengths]
        source = re.sub(rf"\b{n}_shape\[(\d+)\]", rf"{n}_shape_\1", source)
    lines = [_constant(n, value) for n, value in template]
    listed, begun = ",\n    ".join(parameters), "\n  ".join(lines)
    return (
        f"{HALVES}{header}\n"
        f'extern "C" __global__ void {name}(\n    {listed}) {{\n  {begun}\n{source}\n}}\n'
    )


def _type(dtype: mx.Dtype) -> str:
    if dtype not in TYPES:
        raise ValueError(f"no CUDA type is known for {dtype}; there are {[*map(str, TYPES)]}")
    return TYPES[dtype]


def _constant(name: str, value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {_type(value)};"
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};"
    return f"constexpr int {name} = {value};"
