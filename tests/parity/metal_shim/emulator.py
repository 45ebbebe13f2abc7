"""Runs a Metal kernel body on the CPU: compiles the very source as C++ and executes it lane by
lane.

``Emulator`` has the calling convention of ``mx.fast.metal_kernel``, so it can be handed to the same
launcher; what it compiles is the header and the source it was given, inside the signature that MLX
would generate.
"""

import ctypes
import hashlib
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import numpy as np

__all__ = ["EmulationError", "Emulator"]

METAL_THREADGROUP_BYTES = 32 * 1024
_GUARD = 64  # bytes around every buffer: NaN before and after inputs, a pattern around outputs
_PATTERN = 0xA5
_TYPES = {
    mx.float32: "float",
    mx.float16: "half",
    mx.bfloat16: "bfloat16_t",
    mx.int32: "int",
    mx.bool_: "bool",
}
_POSITIONS = (
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
)

_DRIVER = """
static void** g_buffers;
static uint g_threads[3];
static uint3 g_group;

static void enter() {
  shim::Lane& me = *shim::machine.now;
  const uint3 at = {me.index % g_threads[0], me.index / g_threads[0] % g_threads[1],
                    me.index / (g_threads[0] * g_threads[1])};
  const uint3 grid = {g_group.x * g_threads[0] + at.x, g_group.y * g_threads[1] + at.y,
                      g_group.z * g_threads[2] + at.z};
  const Positions p = {grid, at, g_group, me.index, me.index % 32, me.index / 32};
  call_kernel(g_buffers, p);
  me.done = true;
  ++shim::machine.progress;
}

extern "C" long threadgroup_bytes() {
  return __stop_threadgroup_memory - __start_threadgroup_memory;
}

extern "C" const char* run(void** buffers, const uint* groups, const uint* threads) {
  g_buffers = buffers;
  memcpy(g_threads, threads, sizeof(g_threads));
  auto& machine = shim::machine;
  machine.error = nullptr;
  const uint total = threads[0] * threads[1] * threads[2];
  if (total % 32) return "a threadgroup that is not a multiple of 32 threads";
  machine.lanes = std::vector<shim::Lane>(total);
  for (auto& lane : machine.lanes) lane.stack.reset(new char[shim::kStack]);
  for (g_group.z = 0; g_group.z < groups[2]; ++g_group.z)
  for (g_group.y = 0; g_group.y < groups[1]; ++g_group.y)
  for (g_group.x = 0; g_group.x < groups[0]; ++g_group.x) {
    if (threadgroup_bytes() > 0) memset(__start_threadgroup_memory, 0xff, threadgroup_bytes());
    for (uint i = 0; i < total; ++i) {
      auto& lane = machine.lanes[i];
      lane.index = i;
      lane.simd_ops = lane.barriers = 0;
      lane.done = false;
      getcontext(&lane.context);
      lane.context.uc_stack.ss_sp = lane.stack.get();
      lane.context.uc_stack.ss_size = shim::kStack;
      lane.context.uc_link = &machine.main;
      makecontext(&lane.context, enter, 0);
    }
    for (bool running = true; running;) {
      running = false;
      const uint64_t before = machine.progress;
      for (auto& lane : machine.lanes) {
        if (lane.done) continue;
        running = true;
        machine.now = &lane;
        swapcontext(&machine.main, &lane.context);
        if (machine.error) return machine.error;
      }
      if (running && machine.progress == before) {
        return "lanes wait for an operation that others never reach";
      }
    }
    for (auto& lane : machine.lanes) {
      if (lane.barriers != machine.lanes[0].barriers) {
        return "a barrier was reached by some lanes only";
      }
    }
  }
  return nullptr;
}
"""


class EmulationError(RuntimeError):
    """The kernel did something that Metal would not survive."""


@attrs.frozen
class Emulator:
    """Stands in for ``mx.fast.metal_kernel``.

    Attributes:
        folder: where sources and libraries go.
        memory: threadgroup memory allowed, bytes; Metal's limit unless another GPU's is emulated.
        gap: elements of NaN between the rows of every input for kernels
            that ask for inputs as they lie.
    """

    folder: Path
    memory: int = METAL_THREADGROUP_BYTES
    gap: int = 0

    def __call__(
        self,
        *,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
    ) -> Callable[..., list[mx.array]]:
        """A kernel with MLX's calling convention; compiled at its first launch per dtype and
        template values.
        """

        def launch(
            *,
            inputs: Sequence[mx.array],
            output_shapes: Sequence[tuple[int, ...]],
            output_dtypes: Sequence[mx.Dtype],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            template: Sequence[tuple[str, Any]] = (),
            init_value: float | None = None,
        ) -> list[mx.array]:
            dtypes = [*(x.dtype for x in inputs), *output_dtypes]
            names = list(zip([*input_names, *output_names], dtypes, strict=True))
            text = _program(header, source, names, len(input_names), template)
            library = self._compile(name, text)
            gap = 0 if ensure_row_contiguous else self.gap
            laid = [_laid_out(x, gap) for x in inputs]
            held = [_guarded(raw) for raw, _ in laid]
            shapes = []
            for x, (_, strides), n in zip(inputs, laid, input_names, strict=True):
                if f"{n}_shape" in source:
                    shapes.append(_guarded(np.array(x.shape, dtype=np.int32).tobytes()))
                if f"{n}_strides" in source:
                    shapes.append(_guarded(np.array(strides, dtype=np.int64).tobytes()))
            outputs = [
                _guarded(_initial(shape, dtype, init_value), _PATTERN)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            _check_memory(library, self.memory)
            _execute(library, [*held, *outputs, *shapes], grid, threadgroup)
            return [
                _array(_unguarded(raw, n), shape, dtype)
                for raw, n, shape, dtype in zip(
                    outputs, output_names, output_shapes, output_dtypes, strict=True
                )
            ]

        return launch

    def _compile(self, name: str, text: str) -> ctypes.CDLL:
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        library = self.folder / f"{name}_{digest}.so"
        if not library.exists():
            code = library.with_suffix(".cpp")
            code.write_text(text)
            command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w"]
            include = str(Path(__file__).parent)
            subprocess.run([*command, "-I", include, str(code), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def _program(
    header: str,
    source: str,
    names: Sequence[tuple[str, mx.Dtype]],
    input_count: int,
    template: Sequence[tuple[str, Any]],
) -> str:
    """The translation unit: shim, header, the kernel in the signature MLX generates, driver."""
    parameters, arguments = [], []
    for i, (name, dtype) in enumerate(names):
        qualifier = "const device " if i < input_count else "device "
        parameters.append(f"{qualifier}{_TYPES[dtype]}* {name}")
        arguments.append(f"static_cast<{_TYPES[dtype]}*>(b[{i}])")
    index = len(names)
    for name, _ in names[:input_count]:
        if f"{name}_shape" in source:
            parameters.append(f"const constant int* {name}_shape")
            arguments.append(f"static_cast<int*>(b[{index}])")
            index += 1
        if f"{name}_strides" in source:
            parameters.append(f"const constant int64_t* {name}_strides")
            arguments.append(f"static_cast<int64_t*>(b[{index}])")
            index += 1
    fields = []
    for position in _POSITIONS:
        kind = "uint3" if "position_in" in position else "uint"
        fields.append(f"{kind} {position};")
        if position in source:
            parameters.append(f"{kind} {position}")
            arguments.append(f"p.{position}")
    values = "\n".join(_template_line(name, value) for name, value in template)
    return "\n".join(
        [
            '#include "metal_shim.h"',
            "struct Positions {" + " ".join(fields) + "};",
            header,
            f"static void kernel_body({', '.join(parameters)}) {{\n{values}\n{source}\n}}",
            "static void call_kernel(void** b, const Positions& p) {",
            f"  kernel_body({', '.join(arguments)});\n}}",
            _DRIVER,
        ]
    )


def _template_line(name: str, value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {_TYPES[value]};"
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};"
    return f"constexpr int {name} = {value};"


def _check_memory(library: ctypes.CDLL, memory: int) -> None:
    library.threadgroup_bytes.restype = ctypes.c_long
    used = library.threadgroup_bytes()
    if used > memory:
        raise EmulationError(f"{used} bytes of threadgroup memory; there are {memory}")


def _execute(
    library: ctypes.CDLL,
    buffers: Sequence[ctypes.Array],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
) -> None:
    for axis in range(3):
        if grid[axis] % threadgroup[axis]:
            raise EmulationError(f"grid {grid} does not divide into threadgroups {threadgroup}")
    pointers = (ctypes.c_void_p * len(buffers))(
        *(ctypes.addressof(raw) + _GUARD for raw in buffers)
    )
    groups = (ctypes.c_uint * 3)(*(n // t for n, t in zip(grid, threadgroup, strict=True)))
    library.run.restype = ctypes.c_char_p
    error = library.run(pointers, groups, (ctypes.c_uint * 3)(*threadgroup))
    if error:
        raise EmulationError(error.decode())


def _bytes(x: mx.array) -> bytes:
    if x.dtype == mx.bfloat16:
        return np.array(x.view(mx.uint16)).tobytes()
    return np.array(x).tobytes()


def _laid_out(x: mx.array, gap: int) -> tuple[bytes, list[int]]:
    """Bytes and strides (in elements) of an input; with a gap its rows lie that many elements
    apart, and every other element is none of its own."""
    if gap and x.ndim:
        fill = mx.array(True) if x.dtype == mx.bool_ else mx.array(float("nan"), x.dtype)
        sides = [(0, 0)] * (x.ndim - 1) + [(0, gap)]
        padded = mx.pad(x, sides, constant_values=fill)
        spread = mx.stack([padded, mx.broadcast_to(fill, padded.shape)], axis=-1)
        return _bytes(spread), [2 * stride for stride in _strides(padded.shape)]
    return _bytes(x), _strides(x.shape)


def _strides(shape: Sequence[int]) -> list[int]:
    return [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]


def _array(raw: bytes, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    if dtype == mx.bfloat16:
        return mx.array(np.frombuffer(raw, np.uint16).reshape(shape)).view(mx.bfloat16)
    kind = {mx.float32: np.float32, mx.float16: np.float16}[dtype]
    return mx.array(np.frombuffer(raw, kind).reshape(shape))


def _initial(shape: tuple[int, ...], dtype: mx.Dtype, value: float | None) -> bytes:
    return _bytes(mx.full(shape, float("nan") if value is None else value, dtype=dtype))


def _guarded(raw: bytes, fill: int = 0xFF) -> ctypes.Array:
    edge = bytes([fill]) * _GUARD
    return (ctypes.c_char * (len(raw) + 2 * _GUARD)).from_buffer_copy(edge + raw + edge)


def _unguarded(held: ctypes.Array, name: str) -> bytes:
    raw = bytes(held)
    edge = bytes([_PATTERN]) * _GUARD
    if raw[:_GUARD] != edge or raw[-_GUARD:] != edge:
        raise EmulationError(f"the kernel wrote outside output {name!r}")
    return raw[_GUARD:-_GUARD]
