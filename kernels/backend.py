"""What compiles a kernel: one body, two compilers, and the words that make the one the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import attrs
import mlx.core as mx

from .compiled_cuda import CompiledKernel, architecture, kernels_compiled

__all__ = [
    "CUDA_BUILTINS",
    "ON_CPU",
    "Backend",
    "KernelLauncher",
    "KernelSource",
    "kernels_built",
    "per_row",
    "row_entries",
]

ON_CPU = "the default device is the CPU"
_NAMES = {"metal": "Metal", "cuda": "CUDA"}
_BUILT: set[tuple[str, str]] = set()
_LEAST = 4  # MLX-CUDA keeps arrays of 8 bytes or less in host memory, slow to read from a kernel

CUDA_BUILTINS = """
#define thread_index_in_simdgroup (threadIdx.x & 31)
#define simdgroup_index_in_threadgroup ((threadIdx.y * blockDim.x + threadIdx.x) >> 5)
#define threadgroup_position_in_grid blockIdx
#define threadgroup __shared__ __align__(16)
#define threadgroup_barrier(flags) __syncthreads()
#define simd_shuffle_xor(value, bit) __shfl_xor_sync(0xffffffffu, value, bit)
"""
"""Metal's words in CUDA, for threadgroups of 32 x SIMDS threads."""


class KernelSource(Protocol):
    """A body and what it is handed."""

    @property
    def name(self) -> str:
        """A name for the kernel, unique to the variant."""

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in order."""

    @property
    def source(self) -> str:
        """The body, as handed to MLX for either backend."""


@attrs.frozen(cache_hash=True)
class Backend:
    """A compiler of kernels.

    Attributes:
        name: "metal" or "cuda".
        build: ``mx.fast.metal_kernel`` or `draftloom.kernels.compiled_cuda.cuda_kernel`.
        prelude: the header handed over with every body.
        memory: threadgroup memory a kernel may use, bytes.
        least: architecture of a CUDA device that has all instructions of the kernels, as 80 for
            ``sm_80``; 0 is any.
    """

    name: str
    build: Callable[..., Any]
    prelude: str
    memory: int = 32 * 1024
    least: int = 0

    def kernel(
        self,
        variant: KernelSource,
        dtypes: tuple[mx.Dtype, ...],
        template: Sequence[tuple[str, Any]],
        strided: bool = False,
    ) -> Callable[..., list[mx.array]]:
        """The kernel of a variant for inputs of these dtypes; it is compiled at its first launch.

        MLX's CUDA backend tells compiled kernels apart, in memory and on disk, by their name and
        template values alone. So the name holds a digest of all that the code depends on.

        Args:
            variant: the body.
            dtypes: of the inputs.
            template: the values that it will be launched with; counted, see `kernels_built`.
            strided: whether the body reads every input through its strides, so that slices need
                not be copied first.
        """
        text = "\n".join([self.prelude, variant.source, *map(str, dtypes)])
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        name = f"{variant.name}_{digest}"
        kernel: Callable[..., list[mx.array]] = self.build(
            name=name,
            input_names=variant.inputs,
            output_names=variant.outputs,
            source=variant.source,
            header=self.prelude,
            ensure_row_contiguous=not strided,
        )
        if not isinstance(kernel, CompiledKernel):
            _BUILT.add((name, str(template)))
        return kernel

    def why_missing(self) -> str | None:
        """None if MLX has this backend here, and its device what kernels need; else why not."""
        if not getattr(mx, self.name).is_available():
            name = _NAMES[self.name]
            return f"MLX was built without {name} or finds no {name} device"
        here = architecture() if self.least else ""
        if self.least and int("".join(filter(str.isdigit, here)) or 0) < self.least:
            return f"the GPU is {here}, the kernel needs sm_{self.least} or newer"
        return None

    def why_not_here(self) -> str | None:
        """None if kernels can run on the default device, else the reason why not."""
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        return self.why_missing() or (ON_CPU if on_cpu else None)


@attrs.frozen
class KernelLauncher:
    """What runs an operation on one backend.

    Attributes:
        backend: who compiles.
        poison: fill outputs with this value first (tests find unwritten elements so); None leaves
            them as allocated.
    """

    backend: Backend
    poison: float | None = attrs.field(default=None, kw_only=True)

    @property
    def fill(self) -> dict[str, float]:
        """What a launch is told of `poison`."""
        return {} if self.poison is None else {"init_value": self.poison}


def kernels_built() -> int:
    """How many kernels of draftloom's this process has asked a compiler for: each name with each
    set of template values is one. On CUDA those that were found on disk cost nothing and are not
    counted; those that MLX compiles cost seconds each (:mod:`.compiled_cuda`)."""
    return len(_BUILT) + kernels_compiled()


def per_row(numbers: mx.array, rows: int) -> mx.array:
    """Numbers a row, as kernels want them: [max(B, 4)] int32; entries past B mean nothing.

    Args:
        numbers: at least ``rows`` of them.
        rows: B.
    """
    size = row_entries(rows)
    if numbers.shape[0] >= size and numbers.dtype == mx.int32:
        return numbers
    return mx.pad(numbers.astype(mx.int32), (0, max(size - numbers.shape[0], 0)))


def row_entries(rows: int) -> int:
    """How many entries an array of numbers a row needs."""
    return max(rows, _LEAST)
